# SPDX-License-Identifier: MIT
"""One pyublk disk in a process of its own: `python -m benchmarks.server NAME ...`.

Prints the disk's path when it is usable; SIGTERM ends it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pyublk
from pyublk.targets import File, Null, Ram

from . import handlers

TARGETS: dict[str, Callable[[int, str], pyublk.Target]] = {
    "null": lambda size, _file: Null(size=size),
    "handle": lambda size, _file: handlers.Returns(size=size),
    "handle-fields": lambda size, _file: handlers.ReadsRequest(size=size),
    "methods": lambda size, _file: handlers.Methods(size=size),
    "async": lambda size, _file: handlers.Coroutines(size=size),
    "async-sleep": lambda size, _file: handlers.Sleepers(size=size),
    "ram": lambda size, _file: Ram(size=size),
    "file": lambda _size, file: File(Path(file), direct=True),
}


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--max-io-size", type=int, default=512 * 1024)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--file", default="")
    options = parser.parse_args()
    target = TARGETS[options.target](options.size, options.file)
    with pyublk.Device(
        target, queues=options.queues, depth=options.depth, max_io_size=options.max_io_size
    ) as disk:
        print(disk.path, flush=True)
        disk.wait()


if __name__ == "__main__":
    main()
