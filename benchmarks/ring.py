# SPDX-License-Identifier: MIT
"""Round trips of NOPs through io_uring on this machine's kernel: `python -m benchmarks.ring`.

Three loops take turns on one CPU, in batches of 32: a bare C loop over raw system calls
(`ring_loop.c`), the same in C over pyublk's ring, and `pyublk.Ring` with a Python callable for
each completion. What is judged are the ratios to the bare loop: times differ between machines.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyublk

BATCH = 32

#: Nanoseconds for each NOP where the design was measured; there the C loop was the bare loop.
DESIGN_NATIVE_NS = 109.0
DESIGN_CALLABLE_NS = 253.0
TOLERANCE = 1.2

_HERE = Path(__file__).parent
_CORE = _HERE.parent / "src" / "pyublk" / "_core"


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of each loop: nanoseconds for each NOP."""

    bare: float
    native: float
    python: float


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds; the ratios are to the bare loop of the same round."""

    bare_ns: float
    native_ns: float
    python_ns: float
    native_ratio: float
    python_ratio: float

    @property
    def passed(self) -> bool:
        """Whether both ratios are within `TOLERANCE` of the design's."""
        return (
            self.native_ratio <= TOLERANCE
            and self.python_ratio <= TOLERANCE * DESIGN_CALLABLE_NS / DESIGN_NATIVE_NS
        )


def summary(rounds: list[Round]) -> Result:
    """Medians of the rounds."""
    return Result(
        bare_ns=statistics.median(one.bare for one in rounds),
        native_ns=statistics.median(one.native for one in rounds),
        python_ns=statistics.median(one.python for one in rounds),
        native_ratio=statistics.median(one.native / one.bare for one in rounds),
        python_ratio=statistics.median(one.python / one.bare for one in rounds),
    )


def compile_loop(directory: Path) -> Path:
    """Compile the C loops with the machine's `cc`, as the extension is compiled."""
    program = directory / "ring_loop"
    sources = [str(_HERE / "ring_loop.c"), str(_CORE / "ring.c"), str(_CORE / "forked.c")]
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", f"-I{_CORE}", *sources, "-o", str(program)], check=True
    )
    return program


def _python_round(ring: pyublk.Ring, batches: int) -> float:
    """Nanoseconds for each NOP that is filled, submitted and called back from Python."""

    def note(_user_data: int, _result: int) -> None:
        pass

    nop, submit, for_each = ring.nop, ring.submit, ring.for_each
    numbers = range(BATCH)
    start = time.perf_counter_ns()
    for _ in range(batches):
        for number in numbers:
            nop(number)
        submit(BATCH)
        for_each(note)
    return (time.perf_counter_ns() - start) / (batches * BATCH)


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    """All loops on the same CPU: the last one we may use, which interrupts visit least."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(rounds: int = 30, batches: int = 1000) -> Result:
    """Time the three loops in turns, after one round to warm up.

    Raises:
        OSError: io_uring is not to be had here, or there is no `cc`.
    """
    with tempfile.TemporaryDirectory() as directory, _on_one_cpu(), pyublk.Ring(BATCH) as ring:
        loop = [str(compile_loop(Path(directory))), str(batches), str(BATCH)]
        taken = []
        with subprocess.Popen(
            loop, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for _ in range(rounds + 1):
                process.stdin.write("\n")
                process.stdin.flush()
                bare, native = map(float, process.stdout.readline().split())
                taken.append(Round(bare, native, _python_round(ring, batches)))
            process.stdin.close()
    return summary(taken[1:])


def main() -> int:
    """Print times and ratios; returns 1 when a ratio is above what is wanted."""
    result = measure()
    allowed = TOLERANCE * DESIGN_CALLABLE_NS / DESIGN_NATIVE_NS
    print(f"NOP round trips, batches of {BATCH}, nanoseconds each (median of 30 rounds)")
    print(f"  bare C loop          {result.bare_ns:7.1f}")
    print(
        f"  C over pyublk's ring {result.native_ns:7.1f}   "
        f"{result.native_ratio:.2f} of bare (wanted: at most {TOLERANCE:.2f})"
    )
    print(
        f"  pyublk.Ring, callable{result.python_ns:7.1f}   "
        f"{result.python_ratio:.2f} of bare (wanted: at most {allowed:.2f})"
    )
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
