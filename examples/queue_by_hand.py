"""A disk without Device: the control commands, one queue and its requests, by hand.

python examples/queue_by_hand.py
"""

import os
import threading

import pyublk
from pyublk.params import Basic, Params
from pyublk.uapi import Op

SIZE = 16 << 20


def serve(char_device: int, info: pyublk.DeviceInfo, primed: threading.Event) -> None:
    """Answers until the device stops; a queue belongs to the thread that makes it."""
    data = bytearray(SIZE)
    with pyublk.Queue(char_device, 0, depth=info.depth, buffer_size=info.max_io_size) as queue:
        queue.fetch()
        primed.set()
        for io in queue:
            span = slice(io.offset, io.offset + io.length)
            if io.op is Op.READ:
                io.buffer[:] = data[span]
            elif io.op is Op.WRITE:
                data[span] = io.buffer
            io.complete()


def main(use) -> None:  # type: ignore[no-untyped-def]
    """Makes the disk, calls `use(path)`, and takes everything away again."""
    with pyublk.Controller() as controller:
        info = controller.add(queues=1, depth=64)
        try:
            basic = Basic(size=SIZE, max_io_size=info.max_io_size)
            controller.set_params(info.id, Params(basic=basic))
            char_device = os.open(info.char_path, os.O_RDWR | os.O_CLOEXEC)
            primed = threading.Event()
            server = threading.Thread(target=serve, args=(char_device, info, primed))
            server.start()
            primed.wait()
            controller.start(info.id, os.getpid())
            use(info.path)
            controller.stop(info.id)
            server.join()
            os.close(char_device)
        finally:
            controller.delete(info.id)


if __name__ == "__main__":
    main(lambda path: input(f"{path} is there; press Enter to end "))
