# SPDX-License-Identifier: MIT
"""Carries a plan out on this machine: `python -m benchmarks.measure PLAN.json RESULTS.json`.

Every disk is there from the first measurement to the last, so that all are measured in the same
state of the machine; they take turns, forwards and backwards.
"""

import datetime
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from . import jobs, programs
from .contenders import CONTENDERS, Disk, Setting
from .jobs import BYTES_SIZE
from .plan import Measurement, Plan, Results
from .programs import Unavailable


def order(plan: Plan) -> Iterator[tuple[int, str, str]]:
    """Repeat, job and contender of every measurement: each repeat turns the order around."""
    for repeat in range(plan.repeats):
        turn = plan.contenders if repeat % 2 == 0 else plan.contenders[::-1]
        for job in plan.jobs:
            for contender in turn:
                yield repeat, job, contender


def processor_time(pid: int) -> float | None:
    """Seconds that a process's threads have run so far; None where the kernel does not count."""
    total = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            # The first number is the time on a processor in nanoseconds; /proc/PID/stat has it in
            # hundredths of a second only.
            total += int((thread / "schedstat").read_text().split()[0])
    except OSError:
        return None
    return total / 1e9


def bytes_moved(path: str) -> int:
    """Bytes that were read from a disk and written to it so far."""
    fields = Path(f"/sys/block/{os.path.basename(path)}/stat").read_text().split()
    return (int(fields[2]) + int(fields[6])) * 512


def _kill(server: int | None) -> None:
    if server is not None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def measure(
    disk: Disk, contender: str, job: str, repeat: int, plan: Plan, patience: float | None
) -> Measurement:
    """Run one job on one disk. Raises RuntimeError when fio fails or takes `patience` seconds."""
    cpu_before = None if disk.server is None else processor_time(disk.server)
    moved_before = bytes_moved(disk.path)
    what = jobs.JOBS[job]
    outcome = jobs.run(
        jobs.command(what, disk.path, runtime=plan.runtime, ramp=plan.ramp, processes=plan.queues),
        timeout=patience,
        unblock=lambda: _kill(disk.server),
    )
    # fio's requests, those of the warm-up too: the kernel may merge them before the server.
    requests = (bytes_moved(disk.path) - moved_before) / what.block
    cpu_after = None if disk.server is None else processor_time(disk.server)
    cpu = None
    if cpu_before is not None and cpu_after is not None and requests:
        cpu = (cpu_after - cpu_before) / requests
    return Measurement(
        contender=contender,
        job=job,
        repeat=repeat,
        iops=outcome.iops,
        bandwidth=outcome.bandwidth,
        latency_mean=outcome.latency_mean,
        latency_median=outcome.latency_median,
        latency_p99=outcome.latency_p99,
        server_cpu=cpu,
    )


def _fill(disk: Disk, every: int) -> None:
    """Write one of every so many MiB: reading what was never written costs something else."""
    block = bytes(1 << 20)
    with open(disk.path, "wb", buffering=0) as file:
        for at in range(0, BYTES_SIZE, every * len(block)):
            os.pwrite(file.fileno(), block, at)
        os.fsync(file.fileno())


def _warm_up(directory: Path) -> None:
    """Have fio in memory before it is measured with."""
    file = directory / "warm-up"
    file.write_bytes(bytes(1 << 20))
    line = jobs.command(jobs.JOBS["randread"], str(file), runtime=0.1, ramp=0.0, processes=1)
    programs.run(*line, "--direct=0")
    file.unlink()


@contextmanager
def _busy() -> Iterator[None]:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as loop:
        try:
            yield
        finally:
            loop.kill()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _start(
    plan: Plan, setting: Setting, stack: ExitStack
) -> tuple[dict[str, Disk], dict[str, str]]:
    """The disks of those who can take part, and why the others cannot."""
    disks: dict[str, Disk] = {}
    missing: dict[str, str] = {}
    for name in plan.contenders:
        _tell(f"starting {name}")
        with ExitStack() as own:
            try:
                disk = CONTENDERS[name].start(setting, own)
                if CONTENDERS[name].kind == "bytes" and CONTENDERS[name].written:
                    _fill(disk, CONTENDERS[name].written)
            except (Unavailable, OSError) as error:
                missing[name] = str(error)
                _tell(f"  not here: {error}")
                continue
            disks[name] = disk
            stack.push(own.pop_all())
    return disks, missing


def carry_out(plan: Plan, *, counting: bool) -> Iterator[Results]:
    """Start the contenders, measure them in turns, take everything away again.

    Gives the results so far after each measurement: those of a run that breaks off count too. A
    contender that cannot take part, or fails on the way, is left out with the reason.

    Raises:
        programs.Unavailable: there is no fio.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        _warm_up(Path(directory))
        disks, missing = _start(
            plan, Setting(plan.queues, Path(directory), plan.kublk, plan.before), stack
        )
        if plan.busy:
            stack.enter_context(_busy())
        results = Results(
            date=datetime.date.today().isoformat(),
            kernel=platform.release(),
            processor=_processor(),
            counting=counting,
            plan=plan,
            measurements=(),
            missing=missing,
        )
        # The guest that counts instructions skips the time in which nothing runs, up to the next
        # timer, also while it waits for the host's files: a minute may pass there in no time.
        patience = None if counting else plan.runtime + plan.ramp + 60
        turns = [turn for turn in order(plan) if turn[2] in disks]
        for number, (repeat, job, name) in enumerate(turns, 1):
            if name not in disks:
                continue
            try:
                one = measure(disks[name], name, job, repeat, plan, patience)
            except (RuntimeError, OSError) as error:
                del disks[name]
                results = replace(results, missing={**results.missing, name: str(error)})
                _tell(f"[{number}/{len(turns)}] {name} {job}: {error}")
                continue
            results = replace(results, measurements=(*results.measurements, one))
            _tell(f"[{number}/{len(turns)}] {job:10} {name:24} {one.iops:10,.0f} a second")
            yield results
        yield results


def main() -> None:
    """What the guest runs: a plan from a file, its results to another."""
    plan, place = map(Path, sys.argv[1:])
    try:
        for results in carry_out(Plan.from_json(plan.read_text()), counting=True):
            results.save(place)
    except Unavailable as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
