"""`url` and `s3` as real disks, their servers on loopback."""

import os
import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from command_line import added, run_here
from filesystems import check_file_system, checksums, make_file_system, mounted, run
from object_stores import KEYS, SmallS3
from restarted import restart_of, served_again
from servers import until
from web_server import WebServer

from pyublk.control import Controller


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "object":
    with SmallS3() as server:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": server.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_file_system_in_s3_survives_its_server(
    place: Path, controller: Controller, s3: SmallS3
) -> None:
    """Killed, the server takes along what was not synced, as a power cut does, and nothing else."""
    options = ("--option", "chunk_size=1M", "--option", "compression=zstd")
    disk = added("s3", "bucket/disk", "--size", "64M", *options)
    make_file_system("ext4", disk["path"])
    kept: dict[str, str] = {}
    # Nobody can unmount a file system of a disk that is gone, other than lazily.
    with mounted(disk["path"], place / "mnt") as tree:
        for number in range(20):
            (tree / f"kept-{number}").write_bytes(random.Random(number).randbytes(100_000))
        run("sync", "-f", tree)
        kept = checksums(tree)
        (tree / "lost").write_bytes(bytes(3 << 20))
        assert restart_of(disk)["on"] is False
        os.kill(disk["server_pid"], signal.SIGKILL)
        run("umount", "--lazy", tree)
        until(lambda: not Path(disk["path"]).exists(), what="the disk is deleted")
        run("mount", "-t", "tmpfs", "none", tree)  # for `mounted` to unmount
    disk = added("s3", "bucket/disk")
    with mounted(disk["path"], place / "again") as tree:
        found = checksums(tree)
        assert {name: found[name] for name in kept} == kept
        (tree / "kept-0").unlink()
    check_file_system("ext4", disk["path"])
    assert run_here("stop", str(disk["id"])).exit_code == 0
    manifests = [path for path in s3.objects if path.endswith("/manifest")]
    assert manifests == ["/bucket/disk/manifest"]
    assert b'"writer": null' in s3.objects[manifests[0]]


def test_the_first_of_two_s3_disks_is_fenced(place: Path, s3: SmallS3) -> None:
    first = added("s3", "bucket/disk", "--size", "16M", "--option", "chunk_size=1M")
    second = added("s3", "bucket/disk")
    wrote = subprocess.run(
        ["dd", "if=/dev/zero", f"of={first['path']}", "bs=64K", "count=1", "oflag=direct",
         "conv=fsync"],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert wrote.returncode == 1
    assert "Input/output error" in wrote.stderr
    run("dd", "if=/dev/urandom", f"of={second['path']}", "bs=64K", "count=1", "conv=fsync")
    for disk in (second, first):
        assert run_here("stop", str(disk["id"])).exit_code == 0
    assert "nothing more is read or written here" in run_here("logs", str(first["id"])).stdout


def read_through(path: str, skip: int = 0) -> bytes:
    """All of a disk, past the page cache."""
    return subprocess.run(
        ["dd", f"if={path}", "bs=256K", f"skip={skip}", "iflag=direct", "status=none"],
        stdout=subprocess.PIPE, timeout=100, check=True,
    ).stdout  # fmt: skip


def test_a_url_outlives_its_web_server_and_its_own(place: Path, controller: Controller) -> None:
    content = random.Random(1).randbytes(4 << 20)
    with WebServer(content) as web:
        disk = added("url", web.url, "--option", "retry_for=90", "--option", 'etag="v1"')
        short = added("url", web.url, "--option", "retry_for=0.5")
        assert read_through(disk["path"]) == content
        web.stop()
        failed = subprocess.run(
            ["dd", f"if={short['path']}", "of=/dev/null", "bs=4K", "count=1", "iflag=direct"],
            capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
        assert failed.returncode == 1
        assert "timed out" in failed.stderr
        back = threading.Timer(2, web.start)
        back.start()
        assert read_through(disk["path"], skip=4) == content[1 << 20 :]
        back.join()
        os.kill(disk["server_pid"], signal.SIGKILL)
        served_again(controller, disk, disk["server_pid"])
        assert read_through(disk["path"]) == content
        for one in (disk, short):
            assert run_here("stop", str(one["id"])).exit_code == 0
