# SPDX-License-Identifier: MIT
"""What is to be measured, and what was: plain data that travels as JSON between machines."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run.

    Attributes:
        contenders: names of `contenders.CONTENDERS`, in the order of the tables.
        jobs: names of `jobs.JOBS`.
        repeats: times each job runs on each contender.
        runtime: seconds measured, by the clock of the machine that is measured.
        ramp: seconds before that, not counted.
        queues: hardware queues of each disk, and fio processes on it.
        kublk: path of the kublk program, or None when it does not take part.
        before: another checkout, built in place, or None when none takes part.
        busy: whether another program wants a processor all the time.
    """

    contenders: tuple[str, ...]
    jobs: tuple[str, ...]
    repeats: int
    runtime: float
    ramp: float
    queues: int = 1
    kublk: str | None = None
    before: str | None = None
    busy: bool = False

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls._from_values(json.loads(text))

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        return cls(
            **{
                **values,
                "contenders": tuple(values["contenders"]),
                "jobs": tuple(values["jobs"]),
            }
        )

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One job on one contender, once.

    Attributes:
        iops: requests a second that fio saw.
        bandwidth: bytes a second.
        latency_mean, latency_median, latency_p99: seconds from submission to completion.
        server_cpu: seconds of processor time, user and system, that the server's threads took for
            each of fio's requests; None where no process serves the disk.
    """

    contender: str
    job: str
    repeat: int
    iops: float
    bandwidth: float
    latency_mean: float
    latency_median: float
    latency_p99: float
    server_cpu: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything of one run.

    Attributes:
        date: day of the run, as 2026-01-31.
        kernel: release of the kernel that was measured.
        processor: name of the processor; the emulator's name in a guest.
        counting: whether the clock counted instructions.
        missing: contenders that did not take part, with the reason in one sentence.
    """

    date: str
    kernel: str
    processor: str
    counting: bool
    plan: Plan
    measurements: tuple[Measurement, ...]
    missing: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        values["plan"] = Plan._from_values(values["plan"])
        values["measurements"] = tuple(Measurement(**one) for one in values["measurements"])
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
