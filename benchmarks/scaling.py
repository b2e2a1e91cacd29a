# SPDX-License-Identifier: MIT
"""What more queues bring: 4k random reads on disks of 1, 2, 4 … queues, a fio process for each."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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


TARGETS: dict[str, Callable[[], Target]] = {
    "null": lambda: Null(size=SIZE),
    "python": lambda: Computes(size=SIZE),
}


@dataclass(frozen=True)
class Run:
    """What fio saw, and the seconds of CPU that this process spent on a request."""

    iops: float
    cpu: float


def run(target: Target, queues: int, threads: int, clients: int, runtime: float) -> Run:
    """Serve `target` by so many queues, each by so many threads, to so many fio processes (0: to
    as many as threads), for `runtime` seconds."""
    with Device(target, queues=queues, threads=threads) as disk:
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


def measure(queues: list[int], threads: int, clients: int, repeats: int, runtime: float) -> None:
    """Print the medians, and what they are to those of the first number of queues."""
    print(f"{interpreter()}; {os.cpu_count()} processors; thousands of requests a second")
    for name, make in TARGETS.items():
        runs: dict[int, list[Run]] = {count: [] for count in queues}
        for _ in range(repeats):
            for count in queues:
                runs[count].append(run(make(), count, threads, clients, runtime))
        medians = {count: median(each.iops for each in runs[count]) for count in queues}
        for count, iops in medians.items():
            rates = [each.iops for each in runs[count]]
            cpu = median(each.cpu for each in runs[count])
            print(
                f"{name:8} {count:2} queues {iops / 1000:8.2f} ± "
                f"{(max(rates) - min(rates)) / iops / 2:4.0%}   "
                f"{iops / medians[queues[0]]:5.2f} of {queues[0]}   {cpu * 1e6:8.2f} µs CPU each",
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
    parser.add_argument("--threads", type=int, default=1, help="threads for each queue (1)")
    parser.add_argument("--clients", type=int, default=0, help="fio processes (one a thread)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--runtime", type=float, default=5.0, help="seconds of each run (5)")
    parser.add_argument("--vm", action="store_true", help="measure in the virtual machine")
    options = parser.parse_args()
    if min(*options.queues, options.threads, options.repeats) < 1 or options.runtime <= 0:
        parser.error("--queues, --threads, --repeats and --runtime must be above 0")
    if options.vm:
        line = [sys.executable, "-m", "benchmarks.scaling"]
        line += [word for word in sys.argv[1:] if word != "--vm"]
        try:
            return Machine(cpus=processors).run(line, cwd=_ROOT, forward_signals=True).returncode
        except VMError as error:
            sys.exit(f"Error: {error}")
    try:
        measure(options.queues, options.threads, options.clients, options.repeats, options.runtime)
    except (programs.Unavailable, RuntimeError, OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
