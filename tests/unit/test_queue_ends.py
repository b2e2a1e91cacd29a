"""How a queue ends: closed by whom, dropped, and in a forked child. Without a kernel's disk."""

import gc
import os
import subprocess
import sys
import threading

import pytest

from pyublk import DeviceClosed, Queue
from pyublk._native import Layout, MappedQueue
from pyublk.uapi import Op


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("extra_entries", [0, 8], ids=["without ring", "with ring"])
def test_a_queue_is_closed_under_its_waiting_thread(extra_entries: int) -> None:
    before = descriptors()
    queues: list[Queue] = []
    waits = threading.Event()
    said: list[str] = []

    def wait() -> None:
        queue = Queue.loopback(depth=2, buffer_size=4096, extra_entries=extra_entries)
        queue.fetch()
        queues.append(queue)
        waits.set()
        try:
            while queue.wait(30) is not None:
                pass
        except DeviceClosed as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(10)
    queues[0].close()
    queues[0].close()
    thread.join(10)
    assert not thread.is_alive()
    assert said == ["the queue is closed"]
    queues.clear()
    gc.collect()
    assert descriptors() == before


def test_a_mapped_queue_is_closed_under_its_serving_thread() -> None:
    before = descriptors()
    reader, writer = os.pipe()
    queues: list[MappedQueue] = []
    serves = threading.Event()
    said: list[str] = []

    def serve() -> None:
        layout = Layout.table([(reader, False, False)], [(0, 0, 4096)])
        queue = MappedQueue.loopback(layout=layout, depth=1)
        queue.fetch()
        queue.inject(0, Op.READ, 0, 4096)
        queues.append(queue)
        serves.set()
        try:
            queue.serve_mapped()
        except DeviceClosed as error:
            said.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    assert serves.wait(10)
    queues[0].close()
    thread.join(10)
    assert not thread.is_alive()
    assert said == ["the queue is closed"]
    os.close(reader)
    os.close(writer)
    queues.clear()
    gc.collect()
    assert descriptors() == before


def test_a_forked_child_leaves_a_queue_to_its_parent() -> None:
    """Closed, dropped, or there at its exit; also where the child has memory of its own now."""
    program = """if True:
        import gc, mmap, os, sys
        from pyublk import Queue

        queue = Queue.loopback(depth=2, buffer_size=65536, extra_entries=8)
        queue.fetch()
        kept = Queue.loopback(depth=2, buffer_size=65536)
        if (child := os.fork()) == 0:
            maps = [mmap.mmap(-1, 1 << 20) for _ in range(32)]
            for each in maps:
                each[:] = b"c" * (1 << 20)
            queue.close()
            del queue
            gc.collect()
            assert all(each[:] == b"c" * (1 << 20) for each in maps)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        queue.inject(0, 0, 0, 4096)
        [io] = queue.wait(10)
        io.buffer[:] = bytes(4096)
        io.complete()
        queue.wait(0)
        print(queue.answered(0))
        """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("0\n4096\n", "")
