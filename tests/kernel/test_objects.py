"""`url` and `s3` as real disks, their servers on loopback."""

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import added, run_here
from filesystems import check_file_system, checksums, make_file_system, mounted, run
from object_stores import SmallS3, use_endpoint
from restarted import restart_of, served_again, server_of
from servers import until
from web_server import WebServer

from pyublk import Device
from pyublk.control import Controller
from pyublk.targets.s3 import S3
from pyublk.targets.url import Url


@pytest.fixture(scope="module", autouse=True)
def _runtime_of_obstore() -> None:
    """It has descriptors of its own, from its first request until the process ends."""
    with pytest.raises(OSError, match="refused"):
        Url("http://127.0.0.1:1/", retry_for=0).open()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    with SmallS3() as server:
        use_endpoint(monkeypatch, server.endpoint)
        yield server


@pytest.mark.timeout(400)  # for machines that are emulated, and busy
def test_a_file_system_in_s3_survives_its_server(
    place: Path, s3: SmallS3, serve: Callable[..., Device]
) -> None:
    """Killed, the server takes along what was not synced, as a power cut does, and nothing else."""
    options = ("--option", "chunk_size=1M", "--option", "compression=zstd")
    disk = added("s3", "bucket/disk", "--size", "32M", *options)
    make_file_system("ext4", disk["path"])
    with mounted(disk["path"], place / "mnt") as tree:
        for number in range(8):
            (tree / f"kept-{number}").write_bytes(random.Random(number).randbytes(100_000))
        run("sync", "-f", tree)
        kept = checksums(tree)
        (tree / "lost").write_bytes(bytes(3 << 20))
        assert restart_of(disk)["on"] is False
        os.kill(disk["server_pid"], signal.SIGKILL)
        run("umount", "--lazy", tree)
        until(lambda: not Path(disk["path"]).exists(), what="the disk is deleted")
        run("mount", "-t", "tmpfs", "none", tree)  # for `mounted` to unmount
    device = serve(S3("bucket/disk"))
    with mounted(device.path, place / "again") as tree:
        found = checksums(tree)
        assert {name: found[name] for name in kept} == kept
        (tree / "kept-0").unlink()
    check_file_system("ext4", device.path)
    device.stop()
    assert b'"writer": null' in s3.objects["/bucket/disk/manifest"]


def read_through(path: str, skip: int = 0) -> bytes:
    """All of a disk, past the page cache."""
    return subprocess.run(
        ["dd", f"if={path}", "bs=256K", f"skip={skip}", "iflag=direct", "status=none"],
        stdout=subprocess.PIPE, timeout=100, check=True,
    ).stdout  # fmt: skip


@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_a_url_outlives_its_web_server_and_its_own(
    place: Path, controller: Controller, serve: Callable[..., Device]
) -> None:
    content = random.Random(1).randbytes(2 << 20)
    with WebServer(content) as web:
        disk = added("url", web.url, "--option", "retry_for=90", "--option", 'etag="v1"')
        impatient = serve(Url(web.url, retry_for=0.5))
        assert read_through(disk["path"]) == content
        web.stop()
        failed = subprocess.run(
            ["dd", f"if={impatient.path}", "of=/dev/null", "bs=4K", "count=1", "iflag=direct"],
            capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
        assert failed.returncode == 1
        assert "timed out" in failed.stderr
        back = threading.Timer(2, web.start)
        back.start()
        assert read_through(disk["path"], skip=4) == content[1 << 20 :]
        back.join()
        os.kill(disk["server_pid"], signal.SIGKILL)
        # Its server is begun anew twice over, which takes a busy emulated machine a while.
        until(lambda: server_of(disk) != disk["server_pid"], 200, "another server has the disk")
        served_again(controller, disk, disk["server_pid"])
        assert read_through(disk["path"]) == content
        assert run_here("stop", str(disk["id"])).exit_code == 0
