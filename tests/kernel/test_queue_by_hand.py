"""A disk without Device: control commands, and queues that a program waits for by itself."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from blocks import Blocks
from needs import needs
from servers import until

import pyublk
from pyublk.params import Basic, Discard, Params
from pyublk.uapi import Feature, IOFlag, Op
from pyublk.uring import SetupFlag

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))

Serve = Callable[[pyublk.Queue], None]


class ByHand:
    """A device and its char node; `live` starts it, served by a function on a thread a queue."""

    def __init__(self, controller: pyublk.Controller, **options: Any) -> None:
        self.controller = controller
        self.info = controller.add(**{"depth": 8, "max_io_size": 65536, **options})
        self.char = -1
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    @property
    def path(self) -> str:
        return self.info.path

    def configure(self, **basic: Any) -> None:
        size = basic.pop("size", MIB)
        discard = basic.pop("discard", None)
        params = Params(basic=Basic(size=size, max_io_size=65536, **basic), discard=discard)
        self.controller.set_params(self.info.id, params)
        self.char = os.open(self.info.char_path, os.O_RDWR | os.O_CLOEXEC)

    def queue(self, number: int = 0, **options: Any) -> pyublk.Queue:
        settings = {"depth": self.info.depth, "buffer_size": self.info.max_io_size, **options}
        return pyublk.Queue(self.char, number, **settings)

    def serve(self, serve: Serve) -> None:
        """Returns when every tag of every queue was fetched."""
        for number in range(self.info.queues):
            primed = threading.Event()

            def run(number: int = number, primed: threading.Event = primed) -> None:
                try:
                    with self.queue(number) as queue:
                        queue.fetch()
                        primed.set()
                        serve(queue)
                except BaseException as error:
                    self.failures.append(error)
                finally:
                    primed.set()

            self.threads.append(threading.Thread(target=run, daemon=True))
            self.threads[-1].start()
            assert primed.wait(60)

    def live(self, serve: Serve) -> None:
        self.serve(serve)
        self.controller.start(self.info.id, os.getpid())

    def ended(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a queue does not end"
        if self.char >= 0:
            os.close(self.char)
            self.char = -1

    def stop(self) -> None:
        self.controller.stop(self.info.id)
        self.ended()
        assert self.failures == []


@contextmanager
def by_hand(controller: pyublk.Controller, **options: Any) -> Iterator[ByHand]:
    disk = ByHand(controller, **options)
    try:
        yield disk
    finally:
        try:
            controller.stop(disk.info.id, deadline=60)
            disk.ended()
        finally:
            controller.delete(disk.info.id, deadline=60)


class Bytes:
    """What a disk holds, and what was asked of it."""

    def __init__(self, size: int = MIB) -> None:
        self.data = bytearray(size)
        self.asked: list[tuple[Any, ...]] = []

    def answer(self, io: pyublk.IO) -> None:
        self.asked.append((io.op, io.offset, io.length, io.fua, io.unmap))
        span = slice(io.offset, io.offset + io.length)
        if io.op is Op.READ:
            io.buffer[:] = self.data[span]
        elif io.op is Op.WRITE:
            assert io.buffer.readonly
            self.data[span] = io.buffer
        else:
            assert len(io.buffer) == 0
            if io.op in (Op.DISCARD, Op.WRITE_ZEROES):
                self.data[span] = bytes(io.length)
        io.complete()

    def serve(self, queue: pyublk.Queue) -> None:
        for io in queue:
            self.answer(io)


def test_descriptors_of_the_size_that_is_asked_for(controller: pyublk.Controller) -> None:
    needs(Feature.IO_DESC_SIZE)
    held = Bytes()
    with by_hand(controller, flags=Feature.IO_DESC_SIZE, queues=min(2, len(CPUS))) as disk:
        assert Feature.IO_DESC_SIZE in disk.info.flags
        disk.configure()
        disk.live(held.serve)
        with Blocks(disk.path) as blocks:
            blocks.write(b"d" * 4096, 8192)
            assert blocks.read(4096, 8192) == b"d" * 4096
    assert held.data[8192:12288] == b"d" * 4096


def test_requests_by_iteration(controller: pyublk.Controller) -> None:
    held = Bytes()
    counters: list[Any] = []

    def serve(queue: pyublk.Queue) -> None:
        assert queue.ring_flags & SetupFlag.SUBMIT_ALL
        assert (queue.id, queue.depth, queue.held) == (0, 8, 0)
        held.serve(queue)
        assert queue.wait() is None  # still at the end
        counters.append(pyublk.QueueStats.from_counters(queue.counters()))

    with by_hand(controller) as disk:
        limits = Discard(granularity=4096, max_discard_size=MIB, max_write_zeroes_size=MIB)
        disk.configure(volatile_cache=True, fua=True, discard=limits)
        disk.live(serve)
        with Blocks(disk.path) as client:
            client.write(b"a" * 4096, 8192)
            client.write(b"b" * 512, 8192, os.RWF_DSYNC)
            client.sync()
            client.discard(65536, 4096)
            client.zero_out(131072, 8192)
            assert client.read(4096, 8192) == b"b" * 512 + b"a" * 3584
        disk.stop()
    for asked in (
        (Op.WRITE, 8192, 4096, False, True),
        (Op.WRITE, 8192, 512, True, True),
        (Op.FLUSH, 0, 0, False, True),
        (Op.DISCARD, 65536, 4096, False, True),
        (Op.WRITE_ZEROES, 131072, 8192, False, False),  # BLKZEROOUT: space is to be kept
        (Op.READ, 8192, 4096, False, True),
    ):
        assert asked in held.asked
    [done] = counters
    assert (done.writes, done.bytes_written) == (2, 4608)
    assert (done.discards, done.write_zeroes) == (1, 1)
    # The kernel may flush after a write that it asked to be durable, too.
    assert done.flushes == [op for op, *_ in held.asked].count(Op.FLUSH)
    assert (done.bytes_discarded, done.bytes_zeroed) == (4096, 8192)
    assert done.requests == len(held.asked)
    assert done.errors == 0


def test_a_request_in_words(controller: pyublk.Controller) -> None:
    said: list[Any] = []

    def serve(queue: pyublk.Queue) -> None:
        for io in queue:
            if io.offset == 8192:
                said.append((repr(io), io.tag, io.queue_id, io.flags & ~IOFlag.META))
            if io.op is Op.WRITE and io.offset == 4096:
                io.fail(errno.ENOSPC)
            else:
                io.complete()

    with by_hand(controller, depth=1) as disk:
        disk.configure()
        disk.live(serve)
        with Blocks(disk.path) as client:
            client.write(bytes(512), 8192)
            with pytest.raises(OSError, match="No space left"):
                client.write(bytes(512), 4096)
        disk.stop()
    [(words, tag, queue, flags)] = said
    assert words == "<IO tag 0 WRITE offset 8192 length 512>"
    assert (tag, queue) == (0, 0)
    assert flags & IOFlag.FUA == 0


def test_several_queues_by_hand(controller: pyublk.Controller) -> None:
    queues = min(2, len(CPUS))
    held = Bytes()
    seen: set[int] = set()

    def serve(queue: pyublk.Queue) -> None:
        for io in queue:
            seen.add(io.queue_id)
            held.answer(io)

    with by_hand(controller, queues=queues) as disk:
        disk.configure()
        disk.live(serve)
        before = os.sched_getaffinity(0)
        try:
            for number in range(queues):
                cpus = controller.queue_affinity(disk.info.id, number)
                os.sched_setaffinity(0, cpus & before)
                with Blocks(disk.path) as client:
                    client.write(bytes([number + 1]) * 4096, number * 4096)
        finally:
            os.sched_setaffinity(0, before)
        disk.stop()
    assert seen == set(range(queues))
    assert all(held.data[n * 4096] == n + 1 for n in range(queues))


def test_requests_finished_by_another_thread(controller: pyublk.Controller) -> None:
    """It posts its answers; the queue's own thread is woken and commits them."""
    held = Bytes()

    def serve(queue: pyublk.Queue) -> None:
        while (batch := queue.wait()) is not None:
            others = [threading.Thread(target=held.answer, args=(io,)) for io in batch]
            for other in others:
                other.start()
            for other in others:
                other.join(60)

    with by_hand(controller) as disk:
        disk.configure()
        disk.live(serve)
        with Blocks(disk.path) as client:
            client.write(b"t" * 65536, 65536)
            assert client.read(65536, 65536) == b"t" * 65536
        disk.stop()


def test_waits_that_bring_nothing(controller: pyublk.Controller) -> None:
    found: list[Any] = []
    fetched: list[pyublk.Queue] = []

    def serve(queue: pyublk.Queue) -> None:
        found.append(queue.wait(0))
        found.append(queue.wait(0.01))
        fetched.append(queue)
        found.append(queue.wait(60))  # until it is woken
        Bytes().serve(queue)

    with by_hand(controller) as disk:
        disk.configure()
        disk.serve(serve)
        until(lambda: fetched, what="it waits")
        fetched[0].wake()
        controller.start(disk.info.id, os.getpid())
        disk.stop()
    assert found == [[], [], []]


def test_a_held_request_is_failed_from_outside(controller: pyublk.Controller) -> None:
    came, kept = threading.Event(), []

    def serve(queue: pyublk.Queue) -> None:
        for io in queue:
            if io.offset == 65536:
                kept.append((queue, io))
                came.set()
            else:
                io.complete()

    with by_hand(controller) as disk:
        disk.configure()
        disk.live(serve)
        errors: list[OSError] = []

        def read() -> None:
            try:
                with Blocks(disk.path, os.O_RDONLY) as client:
                    client.read(4096, 65536)
            except OSError as error:
                errors.append(error)

        client = threading.Thread(target=read)
        client.start()
        assert came.wait(60)
        [(queue, io)] = kept
        assert queue.held == 1
        queue.fail_held(errno.ENOSPC)
        client.join(60)
        assert [error.errno for error in errors] == [errno.ENOSPC]
        with pytest.raises(pyublk.StaleIO, match="was completed already"):
            io.complete()
        disk.stop()


# ---- refusals ----


def test_files_that_are_no_queue(controller: pyublk.Controller) -> None:
    with open("/dev/null", "r+b") as null, pytest.raises(OSError, match="queue 3: ") as refused:
        pyublk.Queue(null.fileno(), 3)
    assert refused.value.errno == errno.ENODEV
    assert "the device is gone, or the file is no ublk char device" in str(refused.value)
    with by_hand(controller) as disk:
        disk.configure()
        for options in ({"number": 1}, {"depth": 1000}):
            with pytest.raises(OSError, match=r"queue \d: Invalid argument") as refused:
                disk.queue(**options)
            assert "use the depth and the queues that the device was granted" in str(
                refused.value.__notes__[1]
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be 1 to 4096, not 0"),
        ({"depth": 4097}, "depth must be 1 to 4096, not 4097"),
        ({"buffer_size": 511}, "buffer_size must be at least 512 bytes, not 511"),
    ],
)
def test_sizes_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyublk.Queue(0, **options)


def test_a_queue_is_fetched_once(controller: pyublk.Controller) -> None:
    said: list[str] = []

    def serve(queue: pyublk.Queue) -> None:
        with pytest.raises(ValueError, match="fetched") as refused:
            queue.fetch()
        said.append(str(refused.value))
        Bytes().serve(queue)

    with by_hand(controller) as disk:
        disk.configure()
        disk.live(serve)
        with Blocks(disk.path, os.O_RDONLY) as client:
            assert client.read(4096, 0) == bytes(4096)
        disk.stop()
    assert said == ["queue 0 is fetched already: its commits fetch the next requests"]


def test_a_closed_queue_says_so(controller: pyublk.Controller) -> None:
    with by_hand(controller) as disk:
        disk.configure()
        queue = disk.queue()
        queue.close()
        queue.close()
        for use in (queue.fetch, queue.wait, queue.fileno, lambda: list(queue)):
            with pytest.raises(pyublk.DeviceClosed, match="the queue is closed"):
                use()
        queue.wake()
        queue.fail_held()
        assert queue.counters()[2:] == (0, 0, 0, 0)
