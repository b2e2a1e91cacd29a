# SPDX-License-Identifier: MIT
"""Cold sequential reads by `cache`, and by an `overlay` that fetches, beside their source:
`python -m benchmarks.cold`.

The source is far away: each of its answers comes after some ms, as many at a time as it has
`workers`. So the time says how many fetches are under way and how large they are; the processor
time says what passing the bytes through a file costs. The disks are without a kernel, and each
round has new ones. The ways take turns; the best round counts.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pyublk import Target
from pyublk.layers.cache import Cache
from pyublk.layers.overlay import Overlay
from pyublk.testing import Disk

MIB = 1 << 20
DEPTH = 64


class Far(Target):
    """Answers `delay` seconds later, `workers` requests at a time."""

    concurrency = "parallel"

    def __init__(self, size: int, delay: float, workers: int) -> None:
        super().__init__(size=size, read_only=True)
        self.workers = workers
        self.reads = self.most = 0
        self._delay = delay
        self._data = memoryview(bytes(range(256)) * (MIB // 256))
        self._under_way = 0
        self._lock = threading.Lock()

    def read(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self.reads += 1
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        time.sleep(self._delay)
        for at in range(0, len(buffer), MIB):
            buffer[at : at + MIB] = self._data[: len(buffer) - at]
        with self._lock:
            self._under_way -= 1


Way = Callable[[Target, Path], Target]
WAYS: dict[str, Way] = {
    "source": lambda source, _folder: source,
    "cache": lambda source, folder: Cache(source, folder / "cache"),
    "overlay": lambda source, folder: Overlay(source, folder / "overlay"),
}


def read(way: Way, source: Far, request: int, at_once: int, folder: Path) -> tuple[float, float]:
    """Seconds, and of processor time, to read all of it, `at_once` bytes at a time."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        target = way(source, Path(directory))
        workers = source.workers if target is source else None
        options = {} if workers is None else {"workers": workers}
        disk = stack.enter_context(Disk(target, max_io_size=request, depth=DEPTH, **options))
        began, busy = time.monotonic(), time.process_time()
        for at in range(0, source.size, at_once):
            disk.pread(min(at_once, source.size - at), at)
        return time.monotonic() - began, time.process_time() - busy


def main() -> None:
    """Reads each way, in turns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold")
    parser.add_argument("--size", type=int, default=128, help="MiB to read (128)")
    parser.add_argument("--delay", type=float, default=50, help="ms of each answer (50)")
    parser.add_argument("--workers", type=int, default=16, help="of the source (16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="of the files")
    given = parser.parse_args()
    size = given.size * MIB
    for request, at_once in ((512 << 10, 8 * MIB), (128 << 10, 256 << 10)):
        print(f"requests of {request >> 10} KiB, {at_once >> 10} KiB at once")
        best: dict[str, tuple[float, float, Far]] = {}
        for _ in range(given.rounds):
            for name, way in WAYS.items():
                source = Far(size, given.delay / 1000, given.workers)
                now = (*read(way, source, request, at_once, given.folder), source)
                best[name] = min(best.get(name, now), now, key=lambda one: one[0])
        for name, (seconds, busy, source) in best.items():
            ratio = best["source"][0] / seconds
            print(
                f"  {name:8}{size / seconds / 1e6:8.1f} MB/s, {ratio:5.2f} of the source; "
                f"{busy * 1e9 / size:5.2f} ns of processor a byte; {source.reads} reads of the "
                f"source, at most {source.most} at once"
            )


if __name__ == "__main__":
    main()
