# SPDX-License-Identifier: MIT
"""Results as tables with ratios, and what is wanted of them."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .contenders import CONTENDERS, KUBLK_MODES, REFERENCES
from .jobs import JOBS
from .plan import Measurement, Results


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one job: medians over the repeats.

    Attributes:
        spread: difference between the fastest and the slowest repeat, as a part of `iops`.
        ratios: its `iops` in relation to the references of its kind (limit, kublk, ours); None
            where the reference was not measured.
    """

    contender: str
    iops: float
    bandwidth: float
    latency_median: float
    latency_p99: float
    server_cpu: float | None
    spread: float
    ratios: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """In counting mode, in a job: `contender` at least `ratio` of `reference`, in requests a second
    or, with `cpu`, in requests for each second of its server's processor time."""

    contender: str
    reference: str
    ratio: float
    job: str = "randread"
    cpu: bool = False


_MODES = tuple(f"-{mode}" for mode in KUBLK_MODES if mode != "copy")

#: kublk's server for files in each of its modes, beside our target, which is to beat them all.
_ON_FILES = tuple(
    (f"pyublk-{target}", f"kublk-{kind}{mode}", job)
    for target, kind in (("file", "loop"), ("stripe", "stripe"))
    for mode in ("", *_MODES)
    for job in ("randread", "read")
)

#: Of equal numbers, repeats give one or the other.
_NO_LESS = 0.995

WANTED = (
    # `null`, as it comes, against every mode of kublk's; then each path against the same mode.
    Wanted("pyublk-null", "kublk", 1.05),
    *(Wanted("pyublk-null", f"kublk{mode}", 1.02) for mode in _MODES),
    Wanted("pyublk-null-copy", "kublk", 1.02),
    *(Wanted(f"pyublk-null{mode}", f"kublk{mode}", 1.02) for mode in _MODES),
    Wanted("pyublk-null-copy", "kublk", _NO_LESS, cpu=True),
    *(Wanted(f"pyublk-null{mode}", f"kublk{mode}", _NO_LESS, cpu=True) for mode in _MODES),
    # With the same choices on both sides nearly all that is left is the kernel's: no less, then.
    Wanted("pyublk-null-copy-kernels-choices", "kublk", 1.00),
    Wanted("pyublk-null-copy", "kublk-copy-our-choices", 1.00),
    Wanted("pyublk-null-batch-kernels-choices", "kublk-batch", _NO_LESS),
    Wanted("pyublk-null-batch", "kublk-batch-our-choices", _NO_LESS),
    # What Python costs, where the disk has the kernel's own scheduler.
    Wanted("pyublk-handle-kernels-choices", "pyublk-null-batch-kernels-choices", 0.94),
    Wanted("pyublk-handle-fields-kernels-choices", "pyublk-null-batch-kernels-choices", 0.85),
    Wanted("pyublk-async", "pyublk-methods", 0.60),
    *(Wanted(ours, kublk, 1.00, job) for ours, kublk, job in _ON_FILES),
    *(Wanted(ours, kublk, _NO_LESS, job, cpu=True) for ours, kublk, job in _ON_FILES),
    Wanted("pyublk-file", "loop", 1.00, "read"),
    Wanted("pyublk-map", "pyublk-linear", 0.80),
    *(
        Wanted(f"pyublk-{layer}{where}", f"pyublk-file{where}", 0.95)
        for layer in ("overlay-base", "overlay-mixed", "overlay-upper", "cache")
        for where in ("", "-ext4")
    ),
    Wanted("pyublk-disk-auto-buffer", "pyublk-disk-copy", 1.00, "read-1m"),
)


def _taken(results: Results, job: str, contender: str) -> list[Measurement]:
    return [one for one in results.measurements if one.job == job and one.contender == contender]


def _median_iops(results: Results, job: str, contender: str) -> float | None:
    rates = [one.iops for one in _taken(results, job, contender)]
    return statistics.median(rates) if rates else None


def _median_per_cpu(results: Results, job: str, contender: str) -> float | None:
    """Requests for each second that its server's threads ran."""
    cpu = [one.server_cpu for one in _taken(results, job, contender) if one.server_cpu]
    return 1 / statistics.median(cpu) if cpu else None


def ratio(
    results: Results, job: str, contender: str, reference: str, *, cpu: bool = False
) -> float | None:
    """Requests a second, or for each second of CPU, of one in relation to another; None when one
    was not measured."""
    median = _median_per_cpu if cpu else _median_iops
    own, other = (median(results, job, name) for name in (contender, reference))
    return own / other if own and other else None


def saved_copy(results: Results) -> tuple[float, float] | None:
    """Zero copy in relation to copying, in 1 MiB reads of a disk: the factor that the time of a
    copy predicts, and the one that was measured. That time is what `null` gains without it.

    None when one of the four was not measured.
    """
    names = ("pyublk-null-batch", "pyublk-null-batch-user-copy")
    names += ("pyublk-disk-copy", "pyublk-disk-auto-buffer")
    rates = [_median_iops(results, "read-1m", name) for name in names]
    if not all(rates):
        return None
    copying, without, disk, zero_copy = (1 / rate for rate in rates if rate)
    return disk / (disk - (copying - without)), disk / zero_copy


def rows(results: Results, job: str) -> list[Row]:
    """A job's rows, in the order of the plan."""
    return [
        _row(results, job, name, taken)
        for name in results.plan.contenders
        if (taken := _taken(results, job, name))
    ]


def _row(results: Results, job: str, name: str, taken: list[Measurement]) -> Row:
    rates = [one.iops for one in taken]
    iops = statistics.median(rates)
    cpu = [one.server_cpu for one in taken if one.server_cpu is not None]
    return Row(
        contender=name,
        iops=iops,
        bandwidth=statistics.median(one.bandwidth for one in taken),
        latency_median=statistics.median(one.latency_median for one in taken),
        latency_p99=statistics.median(one.latency_p99 for one in taken),
        server_cpu=statistics.median(cpu) if cpu else None,
        spread=(max(rates) - min(rates)) / iops,
        ratios=tuple(
            ratio(results, job, name, reference) for reference in REFERENCES[CONTENDERS[name].kind]
        ),
    )


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.2f}"


def _cells(row: Row) -> Iterable[str]:
    yield row.contender
    yield f"{row.iops:,.0f}"
    yield f"{row.bandwidth / (1 << 20):,.0f}"
    for value in row.ratios:
        yield "" if value is None else f"{value:.3f}"
    yield _microseconds(row.latency_median)
    yield _microseconds(row.latency_p99)
    yield _microseconds(row.server_cpu)
    yield f"{row.spread:.1%}"


def table(results: Results, job: str) -> Table:
    """One job's table: null targets first, then those that keep bytes."""
    drawn = Table(title=JOBS[job].title, title_justify="left")
    drawn.add_column("contender")
    headings = ("IOPS", "MiB/s", "/ limit", "/ kublk", "/ ours", "p50 µs", "p99 µs", "CPU µs", "±")
    for heading in headings:
        drawn.add_column(heading, justify="right")
    previous = None
    for row in rows(results, job):
        kind = CONTENDERS[row.contender].kind
        if previous not in (None, kind):
            drawn.add_section()
        previous = kind
        drawn.add_row(*_cells(row))
    return drawn


def verdicts(results: Results) -> list[tuple[Wanted, float]]:
    """What is wanted and was measured, with the ratio found; nothing when time was real."""
    if not results.counting:
        return []
    found = [
        (
            wanted,
            ratio(results, wanted.job, wanted.contender, wanted.reference, cpu=wanted.cpu),
        )
        for wanted in WANTED
    ]
    return [(wanted, value) for wanted, value in found if value is not None]


def show(results: Results, console: Console) -> bool:
    """Print everything; returns whether all that is wanted was reached."""
    clock = "instructions counted as nanoseconds" if results.counting else "real time"
    console.print(
        f"{results.date}, Linux {results.kernel}, {results.processor}, {clock}; "
        f"{results.plan.repeats} × {results.plan.runtime:g} s each, {results.plan.queues} queue(s)"
    )
    for job in results.plan.jobs:
        console.print(table(results, job))
    limits, servers, ours = zip(*REFERENCES.values(), strict=True)
    console.print(
        f"limit: {limits[0]} ({limits[1]} for those with bytes); kublk: {servers[0]} "
        f"({servers[1]}); ours: {ours[0]} ({ours[1]}). CPU: the server's threads, for each of "
        "fio's requests."
    )
    for name, reason in results.missing.items():
        console.print(f"not measured: {name}: {reason}")
    passed = True
    for wanted, value in verdicts(results):
        reached = value >= wanted.ratio
        passed = passed and reached
        console.print(
            f"{'reached' if reached else 'MISSED'}: {wanted.contender} is {value:.3f} of "
            f"{wanted.reference} in {wanted.job}{', per CPU' if wanted.cpu else ''}, "
            f"wanted {wanted.ratio:g}"
        )
    if results.counting and (factors := saved_copy(results)) is not None:
        predicted, measured = factors
        console.print(
            f"1 MiB reads without the copy: {measured:.2f} of those with it, predicted "
            f"{predicted:.2f}"
        )
    return passed
