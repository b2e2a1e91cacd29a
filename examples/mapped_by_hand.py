"""A file as a disk without Device: one thread serves several mapped queues, with a poller.

python examples/mapped_by_hand.py FILE
"""

import os
import select
import sys
import threading

import pyublk
from pyublk.params import Basic, Params

QUEUES = 2


def serve(
    char_device: int, info: pyublk.DeviceInfo, layout: pyublk.Layout, primed: threading.Event
) -> None:
    """Serves until the device stops; the thread that makes queues serves them."""
    queues = {}
    with select.epoll() as poller:
        for number in range(info.queues):
            queue = pyublk.MappedQueue(
                char_device,
                number,
                layout=layout,
                depth=info.depth,
                buffer_size=info.max_io_size,
                flags=info.flags,
            )
            queue.fetch()
            queues[queue.fileno()] = queue
            poller.register(queue.fileno(), select.EPOLLIN)
        primed.set()
        while queues:
            for ready, _ in poller.poll():
                if not queues[ready].step(timeout=0):  # the device was stopped
                    poller.unregister(ready)
                    queues.pop(ready).close()


def main(file: str, use) -> None:  # type: ignore[no-untyped-def]
    """Makes a disk of a file, calls `use(path)`, and takes the disk away again."""
    backing = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    size = os.fstat(backing).st_size
    layout = pyublk.Layout.table([(backing, False, False)], [(0, 0, size)])
    with pyublk.Controller() as controller:
        info = controller.add(queues=QUEUES, clamp_queues=True, depth=64, guarded=True)
        try:
            basic = Basic(size=size, max_io_size=info.max_io_size, volatile_cache=True)
            controller.set_params(info.id, Params(basic=basic))
            char_device = os.open(info.char_path, os.O_RDWR | os.O_CLOEXEC)
            primed = threading.Event()
            server = threading.Thread(target=serve, args=(char_device, info, layout, primed))
            server.start()
            primed.wait()
            controller.start(info.id, os.getpid())
            use(info.path)
            controller.stop(info.id)
            server.join()
            os.close(char_device)
        finally:
            controller.delete(info.id)
            os.close(backing)


if __name__ == "__main__":
    main(sys.argv[1], lambda path: input(f"{path} is there; press Enter to end "))
