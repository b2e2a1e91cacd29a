# SPDX-License-Identifier: MIT
"""A thousand disks in one process: starts, stops, memory, descriptors, threads, requests a second.

Each kind of target is served as 1, 100 and 1,000 disks by one process: how long the start and the
stop of each takes, and of that the kernel's own commands; what a disk costs in memory before and
after it had requests, in descriptors and threads; how often idle disks wake; and the requests a
second of one fio over all of them.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pyublk.vm import Machine
from pyublk.vm.errors import VMError

from . import jobs, memory, programs
from .many_server import TARGETS

_ROOT = Path(__file__).parent.parent
_HERE = Path(__file__).parent
#: Says to the run in a guest that the caller shows the results, and what its clock counts.
_CLOCK = "PYUBLK_BENCHMARK_CLOCK"
#: Seconds in which idle disks are watched.
IDLE = 2.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """So many disks of a kind: seconds of each start, stop and command; what all have together.

    Memory is the server's PSS in bytes: `idle` before the disks had requests, `used` afterwards.
    """

    kind: str
    disks: int
    starts: list[float]
    stops: list[float]
    commands: dict[str, list[float]]
    idle: int
    used: int
    helper: int
    descriptors: int
    threads: int
    switches: float  # a second, of idle disks
    iops: float


@dataclass(frozen=True)
class Results:
    """Runs in one boot."""

    date: str
    kernel: str
    python: str
    counting: bool
    runs: tuple[Run, ...]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        read = json.loads(path.read_text())
        runs = tuple(Run(**run) for run in read.pop("runs"))
        return cls(runs=runs, **read)


@dataclass(frozen=True)
class Look:
    """A process at one moment."""

    memory: int
    helper: int
    descriptors: int
    threads: int
    switches: int

    @classmethod
    def at(cls, pid: int) -> "Look":
        """The process now."""
        process = Path(f"/proc/{pid}")
        switches = 0
        for status in process.glob("task/*/status"):
            for line in status.read_text().splitlines():
                name, _, number = line.partition(":")
                switches += int(number) if name == "voluntary_ctxt_switches" else 0
        return cls(
            memory=memory.proportional(pid),
            helper=sum(map(memory.proportional, memory.beside(pid))),
            descriptors=len(list((process / "fd").iterdir())),
            threads=len(list((process / "task").iterdir())),
            switches=switches,
        )


def _load(paths: list[str], runtime: float) -> float:
    """The requests a second of one fio over all of these disks, 64 in flight."""
    # fio takes no more than 4,096 bytes of names, so it finds a thousand disks as numbered links.
    with tempfile.TemporaryDirectory() as links:
        for number, path in enumerate(paths):
            Path(links, str(number)).symlink_to(path)
        line = jobs.command(jobs.JOBS["randread"], "", runtime=runtime, ramp=0, processes=1)
        line.remove("--filename=")
        line += [f"--directory={links}", "--filename_format=$filenum", f"--nrfiles={len(paths)}"]
        line.append("--file_service_type=random")
        return jobs.run(line, timeout=None, unblock=lambda: None).iops


def measure(kind: str, disks: int, threads: int, runtime: float) -> Run:
    """Serve so many disks of this kind, by so many shared threads (0: their own), look at them,
    stop them. Raises RuntimeError."""
    line = [sys.executable, "-m", "benchmarks.many_server", kind, str(disks)]
    with (
        tempfile.TemporaryDirectory() as directory,
        subprocess.Popen(
            [*line, directory, f"--threads={threads}"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):

        def hear() -> dict[str, Any]:
            assert server.stdout is not None
            if not (line := server.stdout.readline()):
                raise RuntimeError("the server did not go on: its own words are above")
            told: dict[str, Any] = json.loads(line)
            return told

        def go_on() -> dict[str, Any]:
            assert server.stdin is not None
            server.stdin.write("\n")
            server.stdin.flush()
            return hear()

        hear()
        alone = Look.at(server.pid)
        started = go_on()
        idle = Look.at(server.pid)
        time.sleep(IDLE)
        later = Look.at(server.pid)
        iops = _load(started["paths"], runtime)
        used = Look.at(server.pid)
        stopped = go_on()
        server.stdin.close() if server.stdin else None
    return Run(
        kind=f"{kind} on {threads}" if threads else kind,
        disks=disks,
        starts=started["starts"],
        stops=stopped["stops"],
        commands=stopped["commands"],
        idle=idle.memory - alone.memory,
        used=used.memory - alone.memory,
        helper=idle.helper,
        descriptors=idle.descriptors - alone.descriptors,
        threads=idle.threads - alone.threads,
        switches=(later.switches - idle.switches) / IDLE,
        iops=iops,
    )


def _ms(times: list[float]) -> str:
    return f"{median(times) * 1000:.1f}" if times else ""


def _tail(times: list[float]) -> list[float]:
    """The last tenth."""
    return times[-max(1, len(times) // 10) :]


def table(results: Results) -> Table:
    """A line for each kind and number of disks."""
    drawn = Table(
        title="times in ms; memory in KiB and the rest for each disk", title_justify="left"
    )
    for heading in ("kind", "disks", "start", "last", "stop", "last", "kernel: start", "stop"):
        drawn.add_column(heading, justify="left" if heading == "kind" else "right")
    for heading in ("idle", "used", "helper", "fds", "threads", "switches/s", "IOPS of all"):
        drawn.add_column(heading, justify="right")
    for run in results.runs:
        commands = {name: median(times) for name, times in run.commands.items() if times}
        begins = sum(commands.get(name, 0.0) for name in ("add", "set_params", "start"))
        ends = sum(commands.get(name, 0.0) for name in ("stop", "delete"))
        drawn.add_row(
            run.kind,
            f"{run.disks:,}",
            _ms(run.starts),
            _ms(_tail(run.starts)),
            _ms(run.stops),
            _ms(_tail(run.stops)),
            _ms([begins]),
            _ms([ends]),
            f"{run.idle / run.disks / 1024:,.0f}",
            f"{run.used / run.disks / 1024:,.0f}",
            f"{run.helper / run.disks / 1024:,.1f}",
            f"{run.descriptors / run.disks:.2f}",
            f"{run.threads / run.disks:.2f}",
            f"{run.switches / run.disks:.2f}",
            f"{run.iops:,.0f}",
        )
    return drawn


def draw(results: Results, path: Path) -> None:
    """The time of every start and stop, in the order of the disks; the requests a second of all."""
    from matplotlib.figure import Figure

    largest = max(run.disks for run in results.runs)
    figure = Figure(figsize=(9, 9), layout="constrained")
    figure.suptitle(f"{largest:,} disks in a process, Linux {results.kernel}, {results.date}")
    *each, whole = figure.subplots(3, 1)
    for panel, what in zip(each, ("starts", "stops"), strict=True):
        for run in results.runs:
            if run.disks == largest:
                times = [one * 1000 for one in getattr(run, what)]
                panel.plot(times, label=run.kind, linewidth=0.8)
        panel.set_ylabel(f"{what}, ms")
        panel.set_xlabel("disk", fontsize=8)
    for kind in dict.fromkeys(run.kind for run in results.runs):
        runs = [run for run in results.runs if run.kind == kind]
        rates = [run.iops / 1000 for run in runs]
        whole.plot([run.disks for run in runs], rates, label=kind, marker="o")
    whole.set_xscale("log")
    whole.set_ylabel("thousand requests a second")
    whole.set_xlabel("disks that share 64 requests in flight", fontsize=8)
    for panel in (*each, whole):
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _show(results: Results, output: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    clock = "instructions counted as nanoseconds" if results.counting else "real time"
    console.print(f"{results.date}, Linux {results.kernel}, {results.python}, {clock}")
    console.print(table(results))
    try:
        draw(results, output / "many.png")
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib)")


@click.command()
@click.option("--disks", type=click.IntRange(1), multiple=True, help="How many (1, 100, 1000).")
@click.option("--kind", "kinds", type=click.Choice(list(TARGETS)), multiple=True, help="All.")
@click.option(
    "--threads",
    type=click.IntRange(0),
    multiple=True,
    default=(0,),
    help="Shared (0: of their own); may be given several times.",
)
@click.option("--runtime", type=click.FloatRange(0.1), default=2.0, help="Seconds of fio (2).")
@click.option("--vm", is_flag=True, help="Measure in the virtual machine.")
@click.option("--count-instructions", is_flag=True, help="In one whose clock counts instructions.")
@click.option("--kernel", default="latest", help="The machine's: latest, or a series such as 7.2.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=_HERE / "results",
    help="Where many.json and many.png go (benchmarks/results).",
)
def main(
    disks: tuple[int, ...],
    kinds: tuple[str, ...],
    threads: tuple[int, ...],
    runtime: float,
    vm: bool,
    count_instructions: bool,
    kernel: str,
    output: Path,
) -> None:
    """Measure many disks in one process: table, JSON, plot. Needs root and ublk, or --vm."""
    output.mkdir(parents=True, exist_ok=True)
    answer = output / "many.json"
    if vm or count_instructions:
        words = ["--runtime", str(runtime), "--output", str(output.resolve())]
        words += [word for count in threads for word in ("--threads", str(count))]
        words += [word for count in disks for word in ("--disks", str(count))]
        words += [word for kind in kinds for word in ("--kind", kind)]
        environment = {**os.environ, _CLOCK: "instructions" if count_instructions else "time"}
        machine = Machine(
            kernel,
            count_instructions=count_instructions,
            memory=4 << 30,
            outputs=[str(output.resolve())],
        )
        line = [sys.executable, "-m", "benchmarks.many", *words]
        try:
            done = machine.run(line, cwd=_ROOT, env=environment, forward_signals=True)
        except VMError as error:
            raise click.ClickException(str(error)) from None
        if done.returncode == 0:
            _show(Results.load(answer), output)
        sys.exit(done.returncode)
    runs: list[Run] = []
    try:
        for kind, shared, count in product(
            kinds or tuple(TARGETS), threads, disks or (1, 100, 1000)
        ):
            runs.append(measure(kind, count, shared, runtime))
            results = Results(
                date=datetime.date.today().isoformat(),
                kernel=platform.release(),
                python=f"Python {platform.python_version()}",
                counting=os.environ.get(_CLOCK) == "instructions",
                runs=tuple(runs),
            )
            results.save(answer)
            print(f"{runs[-1].kind}: {count} disks measured", flush=True)
    except (programs.Unavailable, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if _CLOCK not in os.environ:
        _show(results, output)


if __name__ == "__main__":
    main()
