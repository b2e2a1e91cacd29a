# SPDX-License-Identifier: MIT
"""The command: `python -m benchmarks`."""

import platform
import sys
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from pyublk.vm.errors import VMError
from pyublk.vm.kernels import find_kernel

from . import guest, kublk, measure, report
from .contenders import CONTENDERS
from .jobs import JOBS
from .plan import Plan, Results
from .programs import Unavailable

_HERE = Path(__file__).parent


def _save(results: Results, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    results.save(directory / "results.json")


def _plot(results: Results, directory: Path, console: Console) -> None:
    written = ["results.json"]
    try:
        from .plot import draw
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib)")
    else:
        written += ["plot.png", "plot.svg"]
        for name in written[1:]:
            draw(results, directory / name)
    console.print(f"written to {directory}: {', '.join(written)}")


@click.command()
@click.option(
    "--count-instructions",
    is_flag=True,
    help="Measure in a guest whose clock counts instructions: repeatable, and slow.",
)
@click.option("--kernel", default="latest", help="The guest's: latest, or a series such as 7.2.")
@click.option("--kublk", "with_kublk", is_flag=True, help="Build kublk and measure it too.")
@click.option(
    "--before",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Another checkout, built in place: measure its servers too (pyublk-...-before).",
)
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    help="A contender; may be given several times. All, unless given.",
)
@click.option(
    "--job",
    "jobs",
    multiple=True,
    type=click.Choice(list(JOBS)),
    help="A job; may be given several times. All but 'first', unless given.",
)
@click.option("--repeats", type=click.IntRange(1), default=3, help="Runs of each (3).")
@click.option(
    "--runtime", type=click.FloatRange(0.1), help="Seconds of each run (10; 0.5 when counting)."
)
@click.option("--queues", type=click.IntRange(1), default=1, help="Queues, and fio processes (1).")
@click.option("--busy", is_flag=True, help="Have another program want a processor all the time.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=_HERE / "results",
    help="Where results.json and the plots go (benchmarks/results).",
)
def main(
    count_instructions: bool,
    kernel: str,
    with_kublk: bool,
    before: str | None,
    names: tuple[str, ...],
    jobs: tuple[str, ...],
    repeats: int,
    runtime: float | None,
    queues: int,
    busy: bool,
    output: Path,
) -> None:
    """Measure ublk servers and their peers in one boot: table, JSON, plot.

    On a machine with the ublk driver this needs root, and makes disks of its own only.
    Exit code 1 when a ratio that is wanted of the counting mode is missed, or the run broke off.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    if repeats > 1 and any(JOBS[job].stride for job in jobs):
        raise click.UsageError("a first write is one only once: give --repeats 1 with --job first")
    chosen = names or tuple(
        name
        for name in CONTENDERS
        if (with_kublk or not name.startswith("kublk")) and (before or not name.endswith("-before"))
    )
    plan = Plan(
        contenders=tuple(sorted(chosen, key=list(CONTENDERS).index)),
        jobs=jobs or tuple(name for name, job in JOBS.items() if not job.stride),
        repeats=repeats,
        runtime=runtime or (0.5 if count_instructions else 10.0),
        ramp=0.1 if count_instructions else 1.0,
        queues=queues,
        before=before,
        busy=busy,
    )
    try:
        if count_instructions:
            if with_kublk:
                release = find_kernel(kernel).release
                plan = replace(plan, kublk=str(kublk.build(release)))
            results = guest.carry_out(plan, kernel)
            _save(results, output)
        else:
            if with_kublk:
                plan = replace(plan, kublk=str(kublk.build(platform.release())))
            for results in measure.carry_out(plan, counting=False):
                _save(results, output)
    except (VMError, Unavailable, guest.GuestStopped) as error:
        raise click.ClickException(str(error)) from None
    passed = report.show(results, console)
    _plot(results, output, console)
    sys.exit(0 if passed and guest.THE_REST not in results.missing else 1)


if __name__ == "__main__":
    main()
