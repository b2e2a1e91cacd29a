# SPDX-License-Identifier: MIT
"""What more queues, or more threads, bring: 4k random reads on disks of 1, 2, 4 … queues."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

from pyublk import Device, Target
from pyublk.targets.null import Null
from pyublk.vm.errors import VMError
from pyublk.vm.machine import Machine

from . import jobs, programs

_ROOT = Path(__file__).parent.parent
ROUNDS = 2000
SIZE = 1 << 30


class Computes(Target):
    """A Python method that is busy: so many rounds of an empty loop for each read."""

    concurrency = "parallel"

    def read(self, offset: int, buffer: memoryview) -> None:
        for _ in range(ROUNDS):
            pass

    def write(self, offset: int, data: memoryview) -> None:
        return


class Blocks(Target):
    """A Python method that waits a millisecond for each read, as one that asks a server does."""

    concurrency = "parallel"

    def read(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.001)

    def write(self, offset: int, data: memoryview) -> None:
        return


TARGETS: dict[str, Callable[[], Target]] = {
    "null": lambda: Null(size=SIZE),
    "python": lambda: Computes(size=SIZE),
    "blocks": lambda: Blocks(size=SIZE),
}


@dataclass(frozen=True)
class Shape:
    """How a disk is served: the threads are those of each queue."""

    queues: int
    threads: int
    workers: int

    def __str__(self) -> str:
        said = f"{self.queues:2} queues"
        said += f" × {self.threads} threads" if self.threads > 1 else ""
        return said + (f", {self.workers} workers" if self.workers else "")


@dataclass(frozen=True)
class Run:
    """What fio saw, and the seconds of CPU that this process spent on a request."""

    iops: float
    cpu: float


def run(target: Target, shape: Shape, clients: int, runtime: float) -> Run:
    """Serve `target` to so many fio processes (0: to as many as threads), for `runtime` seconds."""
    queues, threads = shape.queues, shape.threads
    with Device(target, queues=queues, threads=threads, workers=shape.workers) as disk:
        line = jobs.command(
            jobs.JOBS["randread"],
            disk.path,
            runtime=runtime,
            ramp=runtime / 4,
            processes=clients or queues * threads,
        )
        requests, cpu = disk.stats().total.requests, time.process_time()
        iops = jobs.run(line, timeout=runtime * 20 + 60, unblock=disk.stop).iops
        cpu, requests = time.process_time() - cpu, disk.stats().total.requests - requests
    return Run(iops, cpu / requests)


def interpreter() -> str:
    """The interpreter, and whether its threads take turns."""
    # Before 3.13 there is only the one kind.
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return f"Python {sys.version.split()[0]}, {'with' if gil else 'without'} the GIL"


def measure(
    targets: list[str], shapes: list[Shape], clients: int, repeats: int, runtime: float
) -> None:
    """Print the medians, and what they are to those of the first shape."""
    print(f"{interpreter()}; {os.cpu_count()} processors; thousands of requests a second")
    for name in targets:
        runs: dict[Shape, list[Run]] = {shape: [] for shape in shapes}
        for _ in range(repeats):
            for shape in shapes:
                runs[shape].append(run(TARGETS[name](), shape, clients, runtime))
        medians = {shape: median(each.iops for each in runs[shape]) for shape in shapes}
        for shape, iops in medians.items():
            rates = [each.iops for each in runs[shape]]
            cpu = median(each.cpu for each in runs[shape])
            print(
                f"{name:8} {shape!s:32} {iops / 1000:8.2f} ± "
                f"{(max(rates) - min(rates)) / iops / 2:4.0%}   "
                f"{iops / medians[shapes[0]]:6.2f} of the first   {cpu * 1e6:8.2f} µs CPU each",
                flush=True,
            )


def main() -> int:
    """Measure here, as root, or in the virtual machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    processors = os.cpu_count() or 1
    parser.add_argument(
        "--queues",
        type=int,
        nargs="+",
        default=[count for count in (1, 2, 4, 8) if count <= processors],
        help="numbers of queues (1, 2, 4, 8, as far as there are processors)",
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="threads for each queue (1)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="worker threads (0)")
    parser.add_argument(
        "--target",
        choices=list(TARGETS),
        nargs="+",
        default=["null", "python"],
        help="what is served (null and python, which is busy; blocks waits)",
    )
    parser.add_argument("--clients", type=int, default=0, help="fio processes (one a thread)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--runtime", type=float, default=5.0, help="seconds of each run (5)")
    parser.add_argument("--vm", action="store_true", help="measure in the virtual machine")
    parser.add_argument(
        "--count-instructions", action="store_true", help="in one whose clock counts instructions"
    )
    options = parser.parse_args()
    shapes = [Shape(*one) for one in product(options.queues, options.threads, options.workers)]
    if min(*options.queues, *options.threads, options.repeats) < 1 or options.runtime <= 0:
        parser.error("--queues, --threads, --repeats and --runtime must be above 0")
    if options.vm or options.count_instructions:
        line = [sys.executable, "-m", "benchmarks.scaling"]
        line += [word for word in sys.argv[1:] if word not in ("--vm", "--count-instructions")]
        counting = options.count_instructions
        machine = Machine(cpus=None if counting else processors, count_instructions=counting)
        try:
            return machine.run(line, cwd=_ROOT, forward_signals=True).returncode
        except VMError as error:
            sys.exit(f"Error: {error}")
    try:
        measure(options.target, shapes, options.clients, options.repeats, options.runtime)
    except (programs.Unavailable, RuntimeError, OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
