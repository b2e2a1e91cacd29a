# SPDX-License-Identifier: MIT
"""Clients that share memory with the server: their requests are served where they lie."""

import asyncio
import mmap
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from blocks import Blocks
from conftest import Serve
from needs import needs
from servers import Server, until
from variations import variations

import pyublk
from pyublk._native import address
from pyublk.targets import File, Mirror, Ram, Stripe
from pyublk.uapi import Feature, IOFlag, Op

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def the_kernel_shares_memory() -> None:
    needs(Feature.SHMEM_ZC)


class Looking(pyublk.Target):
    """Keeps its bytes, and for each request: operation, whether it was shared, where its bytes
    are."""

    def __init__(self) -> None:
        super().__init__(size=8 * MIB)
        self.data = memoryview(bytearray(self.size))
        self.seen: list[tuple[Op, bool, int]] = []

    def handle(self, io: pyublk.IO) -> None:
        there = self.data[io.offset : io.offset + io.length]
        self.seen.append((io.op, bool(io.flags & IOFlag.SHMEM_ZC), address(io.buffer)))
        if io.op is Op.READ:
            io.buffer[:] = there
        else:
            there[:] = io.buffer


PATHS = [("copy", False), ("copy", None), ("user-copy", False), ("user-copy", None)]


@pytest.mark.parametrize(("path", "batch"), PATHS)
def test_requests_are_served_in_the_clients_memory(
    serve: Serve, path: str, batch: bool | None
) -> None:
    target = Looking()
    disk = serve(target, shared_memory=True, path=path, batch=batch)
    data = os.urandom(64 * KIB)
    with disk.share(MIB) as shared, Blocks(disk.path) as client:
        assert len(shared.buffer) == shared.size == MIB
        with mmap.mmap(shared.fd, MIB) as own:  # the client's, at another address
            own[128 * KIB : 192 * KIB] = data
            part = memoryview(own)
            target.seen.clear()
            assert os.pwritev(client.fd, [part[128 * KIB : 192 * KIB]], MIB) == 64 * KIB
            assert os.preadv(client.fd, [part[: 64 * KIB]], MIB) == 64 * KIB
            part.release()
            assert own[: 64 * KIB] == data
        start = address(shared.buffer)
        assert target.seen == [
            (Op.WRITE, True, start + 128 * KIB),
            (Op.READ, True, start),
        ]
        assert bytes(target.data[MIB : MIB + 64 * KIB]) == data
        assert np.frombuffer(shared.buffer, np.uint8)[: 64 * KIB].tobytes() == data
        target.seen.clear()
        assert client.read(64 * KIB, MIB) == data, "from memory that is not shared"
        assert [seen[1] for seen in target.seen] == [False]


def there_and_back(disk: pyublk.Device) -> bytes:
    """Writes 256 KiB at 4096 from shared memory, reads them back into it; returns them."""
    data = os.urandom(256 * KIB)
    with disk.share(MIB) as shared, Blocks(disk.path) as client:
        shared.buffer[: 256 * KIB] = data
        os.pwritev(client.fd, [shared.buffer[: 256 * KIB]], 4096)
        os.preadv(client.fd, [shared.buffer[512 * KIB : 768 * KIB]], 4096)
        assert shared.buffer[512 * KIB : 768 * KIB] == data
        assert client.read(256 * KIB, 4096) == data
    return data


@pytest.mark.parametrize("folder", ["disk", "memory"])  # by the ring, and on the spot
@pytest.mark.parametrize("path", ["copy", "user-copy", "zero-copy", "auto-buffer"])
@pytest.mark.parametrize("kind", variations(["file", "stripe", "mirror"], ["stripe"]))
def test_mapped_targets_too(
    serve: Serve, tmp_path: Path, kind: str, path: str, folder: str
) -> None:
    """The kernel copies nothing for such a request: in the buffer there would be other bytes."""
    place = tmp_path if folder == "disk" else Path("/dev/shm")
    files = [place / f"{tmp_path.name}-{n}" for n in range(1 if kind == "file" else 2)]
    for file in files:
        file.write_bytes(bytes(4 * MIB))
    targets = {
        "file": lambda: File(files[0]),
        "stripe": lambda: Stripe(*files, chunk=4096),
        "mirror": lambda: Mirror(*files, state=tmp_path / "record", leg_timeout=0),
    }
    try:
        disk = serve(targets[kind](), shared_memory=True, path=path)
        data = there_and_back(disk)
        if kind == "mirror":
            assert files[1].read_bytes()[4096 : 4096 + 256 * KIB] == data
    finally:
        for file in files:
            file.unlink()


@pytest.mark.parametrize("path", ["copy", "user-copy"])
def test_native_targets_too(serve: Serve, path: str) -> None:
    disk = serve(Ram(size=8 * MIB), shared_memory=True, path=path, queues=2)
    there_and_back(disk)
    assert disk.stats().total.errors == 0


CLIENT = """
import array, mmap, socket
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[2])
_, [(_, _, raw)], _, _ = channel.recvmsg(1, socket.CMSG_SPACE(4))
memory = mmap.mmap(array.array("i", raw)[0], MIB)
disk = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
memory[:8192] = b"from the client " * 512
os.pwritev(disk, [memoryview(memory)[:8192]], 0)
os.preadv(disk, [memoryview(memory)[8192:16384]], 0)
tell(memory[:8192] == memory[8192:16384])
"""


def test_a_client_of_another_process_is_handed_the_file(serve: Serve, tmp_path: Path) -> None:
    target = Looking()
    disk = serve(target, shared_memory=True)
    with disk.share(MIB) as shared, socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door"))
        door.listen()
        door.settimeout(40)
        with Server(CLIENT, disk.path, tmp_path / "door") as client:
            with door.accept()[0] as channel:
                socket.send_fds(channel, [b"x"], [shared.fd])
            assert client.line() == "True"
        start = address(shared.buffer)
    assert (Op.WRITE, True, start) in target.seen
    assert (Op.READ, True, start + 8192) in target.seen


def test_what_a_client_brings_is_shared(serve: Serve) -> None:
    target = Looking()
    disk = serve(target, shared_memory=True)
    fd = os.memfd_create("client")
    try:
        os.ftruncate(fd, 64 * KIB)
        with (
            disk.share(fd=fd, read_only=True) as shared,
            mmap.mmap(fd, 64 * KIB) as own,
            Blocks(disk.path) as client,
        ):
            assert shared.buffer.readonly
            own[:4096] = b"w" * 4096
            part = memoryview(own)
            target.seen.clear()
            os.pwritev(client.fd, [part[:4096]], 0)
            os.preadv(client.fd, [part[4096:8192]], 0)
            part.release()
            assert own[4096:8192] == b"w" * 4096
            # Memory that the server only reads serves writes.
            assert [seen[:2] for seen in target.seen] == [(Op.WRITE, True), (Op.READ, False)]
    finally:
        os.close(fd)


def test_requests_are_copied_again_after_the_end(serve: Serve) -> None:
    target = Looking()
    disk = serve(target, shared_memory=True)
    shared = disk.share(MIB)
    again = disk.share(MIB)
    assert shared.index != again.index
    with mmap.mmap(shared.fd, MIB) as own, Blocks(disk.path) as client:
        shared.close()
        shared.close()
        with pytest.raises(pyublk.DeviceClosed):
            _ = shared.fd
        own[:4096] = b"e" * 4096
        part = memoryview(own)
        target.seen.clear()
        os.pwritev(client.fd, [part[:4096]], 0)
        part.release()
    assert [seen[1] for seen in target.seen] == [False]
    assert bytes(target.data[:4096]) == b"e" * 4096
    disk.stop()
    again.close()  # its registration went with the device


def test_sharing_while_requests_are_under_way(serve: Serve) -> None:
    """Clients keep reading and writing while memory comes and goes; none fails."""
    target = Looking()
    disk = serve(target, shared_memory=True, depth=16)
    fd = os.memfd_create("client")
    os.ftruncate(fd, MIB)
    over = threading.Event()
    failures: list[BaseException] = []

    def client() -> None:
        try:
            with mmap.mmap(fd, MIB) as own, memoryview(own) as part, Blocks(disk.path) as blocks:
                number = 0
                while not over.is_set():
                    number += 1
                    own[:4096] = bytes([number % 256]) * 4096
                    os.pwritev(blocks.fd, [part[:4096]], 0)
                    with part[8192:12288] as answer:
                        os.preadv(blocks.fd, [answer], 0)
                    assert own[8192:12288] == own[:4096]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        for _ in range(5):
            target.seen.clear()
            with disk.share(fd=fd):
                until(
                    lambda: (
                        {(op, shared) for op, shared, _ in list(target.seen)}
                        >= {(Op.READ, True), (Op.WRITE, True)}
                    ),
                    what="requests from the shared memory",
                )
    finally:
        over.set()
        thread.join(20)
        os.close(fd)
    assert not failures
    assert disk.stats().total.errors == 0


def test_a_handler_is_refused(serve: Serve) -> None:
    refusals: list[str] = []

    class Sharing(Looking):
        def handle(self, io: pyublk.IO) -> None:
            if io.offset == MIB:
                try:
                    disk.share(MIB)
                except RuntimeError as error:
                    refusals.append(str(error))
            super().handle(io)

    disk = serve(Sharing(), shared_memory=True)
    with Blocks(disk.path) as client:
        client.read(4096, MIB)
    assert len(refusals) == 1
    assert "cannot be shared or unshared in a handler" in refusals[0]


def test_on_an_event_loop_another_thread_does_it() -> None:
    class Slow(pyublk.Target):
        shared = False

        async def read(self, offset: int, buffer: memoryview) -> None:
            await asyncio.sleep(0)
            buffer[:] = b"a" * len(buffer)

    def client(path: str, shared: pyublk.SharedMemory) -> bytes:
        with Blocks(path, os.O_RDONLY) as blocks, shared.buffer[:4096] as part:
            os.preadv(blocks.fd, [part], 0)
            return bytes(part)

    async def main() -> bytes:
        async with pyublk.Device(Slow(size=MIB, read_only=True), shared_memory=True) as disk:
            with pytest.raises(RuntimeError, match="another thread"):
                disk.share(MIB)
            shared = await asyncio.to_thread(disk.share, MIB)
            try:
                return await asyncio.to_thread(client, disk.path, shared)
            finally:
                await asyncio.to_thread(shared.close)

    assert asyncio.run(main()) == b"a" * 4096
