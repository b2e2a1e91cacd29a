"""A ring that is closed before a disk has answered: what the kernel still reads or fills stays."""

import contextlib
import ctypes
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from filesystems import mounted, run
from needs import Program, needs
from servers import state_in, until

import pyublk
from pyublk._native import address

pytestmark = pytest.mark.timeout(120)

KIB = 1 << 10
MIB = 1 << 20
LENGTH = 64 * KIB
PAGE = 4096


class Gated(pyublk.Target):
    """Memory whose reads wait until they may go on."""

    def __init__(self) -> None:
        super().__init__(size=8 * MIB)
        self.data = bytearray(b"\xee" * self.size)
        self.gate = threading.Event()
        self.gate.set()
        self.came = threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        self.came.set()
        assert self.gate.wait(60)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def shut(self) -> None:
        self.came.clear()
        self.gate.clear()


@pytest.fixture
def target() -> Iterator[Gated]:
    made = Gated()
    yield made
    made.gate.set()


def aligned(byte: int = 0) -> memoryview:
    """Pages in the middle of a bytearray, as direct I/O wants them."""
    whole = bytearray([byte]) * (LENGTH + PAGE)
    skip = -address(whole) % PAGE
    return memoryview(whole)[skip : skip + LENGTH]


def by_close(rings: list[pyublk.Ring]) -> None:
    rings.pop().close()


def by_dropping(rings: list[pyublk.Ring]) -> None:
    rings.pop()
    gc.collect()


def by_another_thread(rings: list[pyublk.Ring]) -> None:
    failures: list[BaseException] = []

    def close() -> None:
        try:
            by_close(rings)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join(30)
    assert failures == []


def end(rings: list[pyublk.Ring], how: Callable[[list[pyublk.Ring]], None]) -> list[str]:
    """Ends the ring, within seconds; what it warned of."""
    before = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        how(rings)
    assert time.monotonic() - before < 20  # a second, and what emulation makes of it
    assert all(warning.category is ResourceWarning for warning in caught)
    return [str(warning.message) for warning in caught]


KEPT = (
    "the ring was closed with {} operation(s) that the kernel still carries out: their buffers "
    "are kept until the process ends"
)


@contextlib.contextmanager
def file_read_by_a_worker(path: str, directory: Path) -> Iterator[int]:
    """A file whose reads the kernel leaves to a thread of its own, which nothing interrupts."""
    needs(Program("mkfs.minix"))
    run("mkfs.minix", path)
    with mounted(path, directory, "-t", "minix"):
        (directory / "file").write_bytes(b"\xee" * (3 * LENGTH))
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        fd = os.open(directory / "file", os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def disk_read_directly(path: str, _directory: Path) -> Iterator[int]:
    with Blocks(path) as blocks:
        yield blocks.fd


@pytest.mark.parametrize(
    ("opened", "how", "count"),
    [
        (file_read_by_a_worker, by_close, 1),
        pytest.param(file_read_by_a_worker, by_another_thread, 1, marks=pytest.mark.thorough),
        (disk_read_directly, by_close, 3),
        pytest.param(disk_read_directly, by_dropping, 3, marks=pytest.mark.thorough),
    ],
)
def test_what_is_filled_late_is_nobody_elses(
    serve: Serve,
    target: Gated,
    tmp_path: Path,
    opened: Callable[[str, Path], contextlib.AbstractContextManager[int]],
    how: Callable[[list[pyublk.Ring]], None],
    count: int,
) -> None:
    disk = serve(target)
    with opened(disk.path, tmp_path / "mount") as fd:
        target.shut()
        rings = [pyublk.Ring(8)]
        buffers = [aligned() for _ in range(count)]
        places = [address(buffer) for buffer in buffers]
        for number, buffer in enumerate(buffers):
            rings[0].read(fd, buffer, number * LENGTH, user_data=number)
        del buffer
        rings[0].submit()
        assert target.came.wait(30)
        assert end(rings, how) == [KEPT.format(count)]
        del buffers
        others = [bytearray(LENGTH + PAGE) for _ in range(32)]
        target.gate.set()
        full = b"\xee" * LENGTH
        for place in places:
            until(lambda place=place: ctypes.string_at(place, LENGTH) == full, what="it is filled")
        assert not any(map(any, others))


def a_worker_waits() -> bool:
    """Whether a thread of the kernel, which carries out what a ring cannot, sleeps in it."""
    tasks = [path.read_text() for path in Path("/proc/self/task").glob("*/stat")]
    return any("(iou-wrk-" in task and state_in(task) == "D" for task in tasks)


@pytest.mark.parametrize("how", [by_close, by_another_thread])
def test_what_is_read_late_is_what_was_to_be_written(
    serve: Serve, target: Gated, how: Callable[[list[pyublk.Ring]], None]
) -> None:
    """With a single tag the write waits behind a read: the kernel has copied nothing yet."""
    disk = serve(target, depth=1, io_scheduler="none")
    with Blocks(disk.path) as blocks:
        target.shut()
        rings = [pyublk.Ring(8)]
        buffers = [aligned(), aligned(0x11)]
        rings[0].read(blocks.fd, buffers[0], 0, user_data=0)
        rings[0].submit()
        assert target.came.wait(30)
        rings[0].write(blocks.fd, buffers[1], LENGTH, user_data=1)
        rings[0].submit()
        until(a_worker_waits, what="the write waits for a tag")
        assert end(rings, how) == [KEPT.format(2)]
        del buffers
        others = [bytearray(b"\xff" * (LENGTH + PAGE)) for _ in range(32)]
        target.gate.set()
        until(lambda: target.data[2 * LENGTH - 1] != 0xEE, what="it is written")
        assert target.data[LENGTH : 2 * LENGTH] == b"\x11" * LENGTH
        del others


def test_what_ends_in_time_is_let_go(serve: Serve, target: Gated) -> None:
    disk = serve(target)
    with Blocks(disk.path) as blocks:
        target.shut()
        rings = [pyublk.Ring(8)]
        buffer = aligned()
        rings[0].read(blocks.fd, buffer, 0, user_data=1)
        rings[0].submit()
        assert target.came.wait(30)
        timer = threading.Timer(0.1, target.gate.set)
        timer.start()
        assert end(rings, by_close) == []
        timer.join(30)
        assert buffer == b"\xee" * LENGTH
        whole = buffer.obj
        buffer.release()
        whole.append(0)  # nobody has its address any more
