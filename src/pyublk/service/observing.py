# SPDX-License-Identifier: MIT
"""What the disks of this machine do: samples of their counters, and what happened between two."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from time import monotonic
from typing import Any, Self

from pyublk.control import Controller, DeviceInfo, has_node
from pyublk.service.channel import ask
from pyublk.service.inventory import PATIENCE, counters, size_of
from pyublk.service.records import Record
from pyublk.service.sysfs import whom_to_ask
from pyublk.stats import Histogram, QueueStats

#: How many servers are asked at the same time.
_ASKED_AT_ONCE = 32
_COUNTERS = {one.name for one in fields(QueueStats)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A disk at one moment, `time` by time.monotonic().

    `size` is in bytes. `counters` and `latency` (by operation) are the server's since it began,
    if it `answers`. Else `counters` are the kernel's since the disk began, which knows of no
    errors, and `silence` says why a server of `pyublk add` does not answer: it is None for the
    disks of other programs. `restarts` is None for those, and `status` is what the target says of
    itself, if it was asked for.
    """

    id: int
    path: str
    target: str | None
    state: str
    size: int
    cookie: int
    server_pid: int | None
    time: float
    answers: bool
    counters: QueueStats
    latency: Mapping[str, Histogram] = field(default_factory=dict)
    restarts: int | None
    silence: str | None
    status: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a disk did between two samples: requests and bytes a second, and the latencies of all
    that were answered meanwhile."""

    seconds: float
    iops: float
    read_iops: float
    write_iops: float
    bytes_read: float
    bytes_written: float
    latency: Histogram


def activity(before: Sample | None, now: Sample) -> Activity | None:
    """What happened since another sample of the same disk; None if they cannot be compared."""
    if before is None or (before.cookie, before.answers) != (now.cookie, now.answers):
        return None
    seconds = now.time - before.time
    if seconds <= 0:
        return None
    then, latency = before.counters, before.latency
    if before.server_pid != now.server_pid and now.answers:  # a new server counts from 0
        then, latency = QueueStats(), {}

    def rate(name: str) -> float:
        return float(max(0, getattr(now.counters, name) - getattr(then, name)) / seconds)

    merged = Histogram()
    for operation, histogram in now.latency.items():
        merged += histogram - latency.get(operation, Histogram())
    return Activity(
        seconds=seconds,
        iops=rate("requests"),
        read_iops=rate("reads"),
        write_iops=rate("writes"),
        bytes_read=rate("bytes_read"),
        bytes_written=rate("bytes_written"),
        latency=merged,
    )


class Observer:
    """Takes samples of all disks of this machine; use `with`.

    A server that does not answer within `patience` seconds is given up.
    """

    def __init__(self, controller: Controller, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._source = whom_to_ask(controller)
        self._threads = ThreadPoolExecutor(_ASKED_AT_ONCE, "pyublk-observer")

    def samples(self, *, with_status: bool = False) -> list[Sample]:
        """One of each disk, by id. Many servers are asked at the same time."""
        found = self._threads.map(
            lambda device: _sample(device, with_status, self._patience), self._source.devices()
        )
        return [one for one in found if one is not None]

    def close(self) -> None:
        """Waits for servers that are being asked."""
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _sample(device: DeviceInfo, with_status: bool, patience: float) -> Sample | None:
    """None of a disk that is gone meanwhile."""
    name = f"ublkb{device.id}"
    record = Record.of(device)
    told, silence, status = None, None, None
    if record is not None:
        try:
            told = ask(record, "stats", timeout=patience)
            if with_status:
                status = ask(record, "status", timeout=patience)["target_status"]
        except Exception as error:  # also what the target's own `status` raised
            silence = str(error)
    if not has_node(device.id):
        return None
    return Sample(
        id=device.id,
        path=device.path,
        target=record.plan.target if record else None,
        state=device.status.name.lower(),
        size=size_of(name),
        cookie=device.cookie,
        server_pid=device.server_pid,
        time=monotonic(),
        answers=told is not None,
        counters=_told(told["total"]) if told else _of_kernel(name),
        latency={
            operation: Histogram.from_told(histogram)
            for operation, histogram in (told or {}).get("latency", {}).items()
        },
        restarts=record.restarts.count if record and record.restarts else None,
        silence=silence,
        status=status,
    )


def _told(total: Mapping[str, Any]) -> QueueStats:
    """A server of another version has other counters besides."""
    return QueueStats(**{name: value for name, value in total.items() if name in _COUNTERS})


def _of_kernel(name: str, sys: Path = Path("/sys")) -> QueueStats:
    found = counters(name, sys)
    try:
        waiting = (sys / "class/block" / name / "inflight").read_text().split()
    except FileNotFoundError:  # no disk yet, or gone
        waiting = []
    return QueueStats(**asdict(found) if found else {}, held=sum(map(int, waiting)))
