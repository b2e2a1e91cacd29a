# SPDX-License-Identifier: MIT
"""One pyublk disk in a process of its own: `python -m benchmarks.server NAME ...`.

Prints the disk's path when it is usable; SIGTERM ends it.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pyublk
from pyublk import overlays
from pyublk.layers.cache import Cache
from pyublk.targets import File, Linear, Null, Ram, Stripe, resolve
from pyublk.targets.overlay import OverlayFile

from . import handlers


def _overlay(base: Path, granularity: int) -> pyublk.Target:
    upper = Path(f"{base}.overlay")
    overlays.create(upper, str(base), granularity=granularity)
    return OverlayFile(upper)


TARGETS: dict[str, Callable[[int, list[Path]], pyublk.Target]] = {
    "null": lambda size, _files: Null(size=size),
    "handle": lambda size, _files: handlers.Returns(size=size),
    "handle-fields": lambda size, _files: handlers.ReadsRequest(size=size),
    "methods": lambda size, _files: handlers.Methods(size=size),
    "async": lambda size, _files: handlers.Coroutines(size=size),
    "async-sleep": lambda size, _files: handlers.Sleepers(size=size),
    "ram": lambda size, _files: Ram(size=size),
    "file": lambda _size, files: File(files[0], direct=True),
    "cached": lambda _size, files: File(files[0]),
    "overlay": lambda _size, files: _overlay(files[0], 4096),
    "overlay-64k": lambda _size, files: _overlay(files[0], 64 << 10),
    "cache": lambda _size, files: Cache(File(files[0]), Path(f"{files[0]}.cache")),
    "stripe": lambda _size, files: Stripe(*files, direct=True),
    "linear": lambda _size, files: Linear(*files, direct=True),
    "map": lambda _size, files: handlers.Concatenates(files, direct=True),
    "nbd": lambda _size, files: resolve("nbd")(f"unix:{files[0]}"),  # type: ignore[call-arg]
}


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--max-io-size", type=int, default=512 * 1024)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--file", action="append", type=Path, default=[])
    parser.add_argument("--path", default="auto")
    parser.add_argument("--batch", action=argparse.BooleanOptionalAction)
    parser.add_argument(
        "--kernels-choice", action="append", choices=["scheduler", "preempt"], default=[]
    )
    parser.add_argument("--trace")
    options = parser.parse_args()
    target = TARGETS[options.target](options.size, options.file)
    with ExitStack() as stack:
        disk = stack.enter_context(
            pyublk.Device(
                target,
                queues=options.queues,
                depth=options.depth,
                max_io_size=options.max_io_size,
                path=options.path,
                batch=options.batch,
                preempt="preempt" in options.kernels_choice,
                io_scheduler=None if "scheduler" in options.kernels_choice else "auto",
            )
        )
        if options.trace:
            stack.enter_context(disk.trace(options.trace))
        print(disk.path, flush=True)
        disk.wait()


if __name__ == "__main__":
    main()
