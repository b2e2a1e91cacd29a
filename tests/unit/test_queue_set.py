"""Many queues of one thread, without a kernel's disk."""

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest

from pyublk import DeviceClosed, Queue, Target
from pyublk._native import NULL_HANDLER, Handlers, Layout, MappedQueue, QueueSet
from pyublk.uapi import Op

RING = pytest.mark.parametrize("extra_entries", [0, 8], ids=["without ring", "with ring"])


def make(extra_entries: int) -> Queue:
    queue = Queue.loopback(depth=4, buffer_size=4096, extra_entries=extra_entries)
    queue.fetch()
    return queue


@pytest.fixture
def queues() -> Iterator[QueueSet]:
    with QueueSet(room=64) as made:
        yield made


def ask(queue: Queue, tag: int = 0) -> None:
    queue.inject(tag, int(Op.READ), 0, 512)


@RING
def test_those_that_have_something_are_brought(queues: QueueSet, extra_entries: int) -> None:
    members = [make(extra_entries) for _ in range(5)]
    for queue in members:
        queues.add(queue)
    assert set(queues.wait(10)) == set(members)  # each at first
    assert queues.wait(0.01) == []
    ask(members[3])
    assert queues.wait(10) == [members[3]]
    (io,) = members[3].wait(0) or []
    io.complete()
    for queue in queues.wait(1):
        queue.wait(0)
    assert members[3].answered(0) == 512


@RING
def test_what_is_left_is_brought_again(queues: QueueSet, extra_entries: int) -> None:
    queue = make(extra_entries)
    queues.add(queue)
    ask(queue)
    for _ in range(3):
        assert queues.wait(10) == [queue]
    assert len(queue.wait(0) or []) == 1


@RING
def test_others_wake_it(queues: QueueSet, extra_entries: int) -> None:
    queue = make(extra_entries)
    queues.add(queue)
    queues.wait(0)
    for call, brought in ((queues.wake, []), (queue.wake, [queue])):
        thread = threading.Timer(0.05, call)
        thread.start()
        began = time.monotonic()
        assert queues.wait(60) == brought
        assert time.monotonic() - began < 30
        thread.join()


@RING
def test_answers_from_elsewhere_go_out(queues: QueueSet, extra_entries: int) -> None:
    queue = make(extra_entries)
    queues.add(queue)
    ask(queue)
    queues.wait(10)
    (io,) = queue.wait(0) or []
    thread = threading.Timer(0.05, io.complete)
    thread.start()
    while queue.answered(0) is None:
        for one in queues.wait(10):
            one.wait(0)
    thread.join()


def test_a_place_is_given_again(queues: QueueSet) -> None:
    for _ in range(200):
        queue = make(8)
        queues.add(queue)
        assert queues.wait(10) == [queue]
        queues.remove(queue)
        assert queues.wait(0) == []
        queue.close()
    assert len(queues) == 0


def test_a_set_is_full() -> None:
    with QueueSet(room=2) as queues:
        queues.add(make(0))
        queues.add(make(0))
        with pytest.raises(OSError, match="no room for more than 2 queues") as full:
            queues.add(make(0))
        assert full.value.errno == errno.ENOSPC


def test_mistakes(queues: QueueSet) -> None:
    queue = make(0)
    queues.add(queue)
    with pytest.raises(ValueError, match="is in this set already"):
        queues.add(queue)
    with pytest.raises(ValueError, match="is not in this set"):
        queues.remove(make(0))
    with pytest.raises(ValueError, match="room must be 1 to 16384"):
        QueueSet(room=0)
    queues.close()
    queues.close()
    with pytest.raises(DeviceClosed, match="the set of queues is closed"):
        queues.wait(0)


def test_it_is_its_threads_own(queues: QueueSet) -> None:
    said: list[str] = []

    def use() -> None:
        for call in (lambda: queues.wait(0), lambda: queues.add(make(0))):
            with pytest.raises(RuntimeError, match="by the thread that made it") as refused:
                call()
            said.append(str(refused.value))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(said) == 2


def test_a_forked_child_leaves_it_alone(queues: QueueSet) -> None:
    queue = make(8)
    queues.add(queue)
    if (child := os.fork()) == 0:
        try:
            queues.wake()
            queues.wait(0)
        except DeviceClosed:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert queues.wait(10) == [queue]


# ---- turns ----


class Counts(Target):
    concurrency = "parallel"

    def __init__(self) -> None:
        super().__init__(size=1 << 20)
        self.reads = 0

    def read(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1

    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "full")


@RING
def test_a_turn_serves_what_there_is(queues: QueueSet, extra_entries: int) -> None:
    target = Counts()
    handlers = Handlers(target, lambda outcome, _io: getattr(outcome, "errno", errno.EIO))
    members = [make(extra_entries) for _ in range(3)]
    for queue in members:
        queues.add(queue)
    for queue in members[:2]:
        ask(queue, 0)
        queue.inject(1, int(Op.WRITE), 0, 512)
    while any(queue.answered(0) is None for queue in members[:2]):
        for queue in queues.wait(10):
            assert queue.turn(handlers, threading.Lock())
    assert target.reads == 2
    assert [queue.answered(1) for queue in members[:2]] == [-errno.ENOSPC] * 2


@RING
def test_a_native_turn(extra_entries: int) -> None:
    queue = make(extra_entries)
    ask(queue)
    assert queue.turn_native(NULL_HANDLER)
    assert queue.answered(0) == 512


def test_a_mapped_turn(queues: QueueSet) -> None:
    file = os.memfd_create("bytes", os.MFD_CLOEXEC)
    os.pwrite(file, b"x" * 4096, 0)
    try:
        layout = Layout.table([(file, False, False)], [(0, 0, 4096)])
        with MappedQueue.loopback(layout=layout, depth=2) as queue:
            queue.fetch()
            queues.add(queue)
            ask(queue)
            while queue.answered(0) is None:
                for one in queues.wait(10):
                    assert one is queue
                    assert queue.step(timeout=0)
            assert queue.answered(0) == 512
            assert bytes(queue.memory(0, 512)) == b"x" * 512
            queues.remove(queue)
    finally:
        os.close(file)
