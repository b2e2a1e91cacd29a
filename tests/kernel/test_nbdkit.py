"""Disks by nbdkit and the nbd driver: `pyublk add --via nbd`, as on a kernel without ublk."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run, run_here

pytestmark = pytest.mark.skipif(
    shutil.which("nbdkit") is None or shutil.which("nbd-client") is None,
    reason="the packages nbdkit, nbdkit-plugin-python and nbd-client are not installed",
)


@pytest.fixture(autouse=True)
def driver() -> Iterator[None]:
    loaded = subprocess.run(["modprobe", "nbd"], capture_output=True, check=False)
    if not any(Path("/sys/block").glob("nbd*")):
        pytest.skip(f"this kernel has no nbd driver: {loaded.stderr.decode().strip()}")
    yield
    run_here("stop", "--force", "all")


def add(*words: str) -> dict[str, object]:
    # By a process of its own, which the disk outlives.
    done = run("add", *words, "--via", "nbd", "--json")
    assert done.returncode == 0, done.stderr
    assert "is served by NBD, not ublk: no recovery" in done.stderr
    made: dict[str, object] = json.loads(done.stdout)
    return made


def test_a_file_is_written_listed_and_stopped(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 << 20))
    made = add("file", str(image))
    path, name = str(made["path"]), str(made["id"])
    assert made["size"] == 4 << 20
    subprocess.run(
        ["dd", "if=/dev/urandom", f"of={path}", "bs=64k", "count=8", "oflag=direct", "conv=fsync"],
        check=True,
        capture_output=True,
    )
    listed = json.loads(run_here("list", "--json").stdout)
    assert [(one["path"], one["state"], one["target"]) for one in listed] == [
        (path, "live", "file")
    ]
    assert "nbdkit, process" in run_here("info", path).stdout
    read = Path(path).read_bytes()[: 512 << 10]
    held = os.open(path, os.O_RDONLY | os.O_EXCL)
    refused = run_here("stop", name)
    os.close(held)
    assert (refused.exit_code, f"{path} is in use" in refused.stderr) == (6, True)
    done = run_here("stop", name)
    assert done.exit_code == 0, done.stderr
    assert image.read_bytes()[: 512 << 10] == read != bytes(512 << 10)
    assert json.loads(run_here("list", "--json").stdout) == []
    gone = run_here("info", name)
    assert (gone.exit_code, "is no disk of pyublk's by NBD" in gone.stderr) == (5, True)


@pytest.mark.thorough
def test_a_file_system_on_a_target_in_python_whose_server_dies(tmp_path: Path) -> None:
    code = tmp_path / "disk.py"
    code.write_text(
        "import pyublk\n"
        "class Memory(pyublk.Target):\n"
        "    concurrency = 'parallel'\n"
        "    def open(self): self.bytes = bytearray(self.size)\n"
        "    def read(self, at, buffer): buffer[:] = self.bytes[at : at + len(buffer)]\n"
        "    def write(self, offset, data): self.bytes[offset : offset + len(data)] = data\n"
        "    def flush(self): pass\n"
    )
    made = add(f"{code}:Memory", "--size", "32M")
    path = str(made["path"])
    subprocess.run(["mkfs.ext4", "-q", path], check=True, capture_output=True)
    place = tmp_path / "mnt"
    place.mkdir()
    subprocess.run(["mount", path, place], check=True)
    try:
        (place / "file").write_bytes(b"x" * 100_000)
        refused = run_here("stop", path)
        assert refused.exit_code == 6
        assert f"{path} is mounted at {place}" in refused.stderr
    finally:
        subprocess.run(["umount", place], check=True)
    subprocess.run(["mount", "-o", "ro", path, place], check=True)
    try:
        assert (place / "file").read_bytes() == b"x" * 100_000
    finally:
        subprocess.run(["umount", place], check=True)
    os.kill(int(str(made["server_pid"])), signal.SIGKILL)
    until = time.monotonic() + 10
    while json.loads(run_here("list", "--json").stdout)[0]["state"] != "dead":
        assert time.monotonic() < until
    assert run_here("stop", "all").exit_code == 0
    assert json.loads(run_here("list", "--json").stdout) == []


@pytest.mark.thorough
def test_what_is_wrong_leaves_nothing() -> None:
    done = run_here("add", "file", "none.img", "--via", "nbd")
    assert (done.exit_code, "Traceback" in done.stderr) == (1, False)
    assert "none.img does not exist: give a size to make it" in done.stderr
    assert not list(Path("/run/pyublk").glob("nbd*"))
