"""Images of virtual machines as real disks."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import added, run_here

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-storage-daemon") is None,
    reason="the packages qemu-utils and qemu-system-common are not installed",
)


def do(*words: object) -> str:
    return subprocess.run(
        [str(word) for word in words], check=True, capture_output=True, text=True, timeout=100
    ).stdout


@pytest.mark.thorough
def test_a_file_system_in_an_image(tmp_path: Path) -> None:
    image, place = tmp_path / "disk.qcow2", tmp_path / "mnt"
    place.mkdir()
    do("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    made = added(f"image:{image}")
    do("mkfs.ext4", "-q", made["path"])
    do("mount", made["path"], place)
    (place / "file").write_bytes(b"x" * 1_000_000)
    do("umount", place)
    told = json.loads(run_here("info", made["path"], "--json").stdout)[0]
    assert told["status"]["served_by"] == "QEMU's storage daemon"
    assert run_here("stop", made["path"]).exit_code == 0
    do("qemu-img", "check", "-q", image)

    # Its files are read where they lie now; a server that dies is followed by another.
    made = added(f"image:{image}", "--read-only", "--restart")
    do("mount", "-o", "ro", made["path"], place)
    try:
        os.kill(made["server_pid"], signal.SIGKILL)
        assert (place / "file").read_bytes() == b"x" * 1_000_000
        told = json.loads(run_here("info", made["path"], "--json").stdout)[0]
        assert told["status"]["served_by"] == "its map"
        assert told["server_pid"] != made["server_pid"]
    finally:
        do("umount", place)
    assert run_here("stop", made["path"]).exit_code == 0


@pytest.mark.thorough
def test_an_image_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    done = run_here("add", f"image:{raw}")
    assert (done.exit_code, "serve it by the target file" in done.stderr) == (2, True)
    assert json.loads(run_here("list", "--json").stdout) == []
