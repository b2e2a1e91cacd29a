"""M threads over N queues without Device: each thread serves a share of every queue's tags, so that
whatever queue is busy, all threads have work (Linux 6.16).

python examples/threads_by_hand.py
"""

import os
import select
import threading

import pyublk
from pyublk.params import Basic, Params
from pyublk.uapi import Feature, Op

SIZE = 16 << 20
QUEUES, THREADS = 2, 3

data = bytearray(SIZE)


def answer(io: pyublk.IO) -> None:
    """Does what one request asks for."""
    span = slice(io.offset, io.offset + io.length)
    if io.op is Op.READ:
        io.buffer[:] = data[span]
    elif io.op is Op.WRITE:
        data[span] = io.buffer
    io.complete()


def serve(
    char_device: int, info: pyublk.DeviceInfo, thread: int, primed: threading.Semaphore
) -> None:
    """Serves tags `thread`, `thread` + THREADS, ... of every queue, until the device stops."""
    parts = {}
    with select.epoll() as poller:
        for number in range(info.queues):
            part = pyublk.Queue(
                char_device,
                number,
                depth=info.depth,
                buffer_size=info.max_io_size,
                flags=info.flags,
                first_tag=thread,
                tag_step=THREADS,
            )
            part.fetch()
            parts[part.fileno()] = part
            poller.register(part.fileno(), select.EPOLLIN)
        primed.release()
        while parts:
            for ready, _ in poller.poll():
                while batch := parts[ready].wait(timeout=0):  # until the answers are handed over
                    for io in batch:
                        answer(io)
                if batch is None:  # the device was stopped
                    poller.unregister(ready)
                    parts.pop(ready).close()


def main(use) -> None:  # type: ignore[no-untyped-def]
    """Makes the disk, calls `use(path)`, and takes everything away again."""
    with pyublk.Controller() as controller:
        controller.features().require(Feature.PER_IO_DAEMON)
        info = controller.add(queues=QUEUES, clamp_queues=True, depth=64, guarded=True)
        try:
            basic = Basic(size=SIZE, max_io_size=info.max_io_size)
            controller.set_params(info.id, Params(basic=basic))
            char_device = os.open(info.char_path, os.O_RDWR | os.O_CLOEXEC)
            primed = threading.Semaphore(0)
            servers = [
                threading.Thread(target=serve, args=(char_device, info, number, primed))
                for number in range(THREADS)
            ]
            for server in servers:
                server.start()
            for _ in servers:
                primed.acquire()
            controller.start(info.id, os.getpid())
            use(info.path)
            controller.stop(info.id)
            for server in servers:
                server.join()
            os.close(char_device)
        finally:
            controller.delete(info.id)


if __name__ == "__main__":
    main(lambda path: input(f"{path} is there; press Enter to end "))
