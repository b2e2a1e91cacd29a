"""Disks from an NBD server, by real kernels: verified by fio, and while the server is killed."""

import itertools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from fio import verified
from servers import until
from variations import variations

import pyublk
from pyublk import DataPath
from pyublk.targets.nbd import Nbd

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")
SIZE = 16 << 20


class Nbdkit:
    """nbdkit with a file, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s"
        self.image = folder / "disk"
        with open(self.image, "wb") as file:
            file.truncate(SIZE)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            ["nbdkit", "-f", "-U", self.socket, "file", self.image], stdin=subprocess.DEVNULL
        )
        until(self.socket.exists, what="nbdkit listens")

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nbdkit]:
    server = Nbdkit(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize("path", variations([DataPath.COPY, DataPath.USER_COPY], [DataPath.COPY]))
def test_bytes_are_kept_over_two_queues(serve: Serve, server: Nbdkit, path: DataPath) -> None:
    disk = serve(Nbd(f"unix:{server.socket}", connections=2), queues=2, path=path)
    report = verified(
        disk.path, rw="randwrite", bsrange="4k-256k", iodepth=16, io_size="16m", numjobs=2,
        offset_increment="8m", size="8m", fdatasync=20,
    )  # fmt: skip
    assert report.bytes_written >= SIZE
    with Blocks(disk.path) as blocks:
        blocks.discard(0, 1 << 20)
        blocks.zero_out(1 << 20, 1 << 20)
        assert blocks.read(1 << 20, 1 << 20) == bytes(1 << 20)


def test_no_client_sees_that_the_server_was_killed(serve: Serve, server: Nbdkit) -> None:
    """What was answered is there, each block as it was written last."""
    disk = serve(Nbd(f"unix:{server.socket}"))
    written: list[int] = []
    failed: list[OSError] = []
    over = threading.Event()

    def write() -> None:
        with Blocks(disk.path) as blocks:
            for number in itertools.count():
                if over.is_set():
                    return
                try:
                    blocks.write(number.to_bytes(8, "little") * 512, number % 64 * 4096)
                except OSError as error:
                    failed.append(error)
                    return
                written.append(number)

    writer = threading.Thread(target=write)
    writer.start()

    def some_more() -> None:
        wanted = len(written) + 20
        until(lambda: len(written) > wanted or failed, what="writes are answered")

    for _ in range(3):
        some_more()
        server.kill()
        server.start()
    some_more()
    over.set()
    writer.join(60)
    assert not failed
    last = len(written) - 1
    with Blocks(disk.path) as blocks:
        for number in range(last, max(last - 64, -1), -1):
            found = blocks.read(4096, number % 64 * 4096)
            assert found == number.to_bytes(8, "little") * 512
    status = disk.target.status()
    assert status is not None
    assert status["lost"] == 3


def test_past_the_budget_requests_fail_and_the_disk_can_be_stopped(
    serve: Serve, server: Nbdkit, caplog: pytest.LogCaptureFixture
) -> None:
    disk = serve(Nbd(f"unix:{server.socket}", retry_for=1))
    with Blocks(disk.path) as blocks:
        blocks.write(b"1" * 4096, 0)
        server.kill()
        with pytest.raises(OSError, match="Input/output error"):
            blocks.read(4096, 0)
        assert caplog.text.count("its requests fail with EIO until there is one again") == 1
        server.start()

        def back() -> bool:
            try:
                return blocks.read(4096, 0) == b"1" * 4096
            except OSError:
                return False

        until(back, what="the disk is back")
        server.kill()
    disk.stop()
    assert not os.path.exists(disk.path)


def test_a_server_for_one_connection_has_one_queue(serve: Serve, tmp_path: Path) -> None:
    server = Nbdkit(tmp_path)
    server.socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["nbdkit", "-f", "-U", server.socket, "--filter=multi-conn", "memory", "1M",
         "multi-conn-mode=disable"], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(server.socket.exists, what="nbdkit listens")
        with pytest.raises(ValueError, match=r"does not offer multi-conn.*use one queue"):
            serve(Nbd(f"unix:{server.socket}"), queues=2)
        disk: pyublk.Device = serve(Nbd(f"unix:{server.socket}", connections=2))
        with Blocks(disk.path) as blocks:
            assert blocks.read(4096, 0) == bytes(4096)
    finally:
        process.kill()
        process.wait()
