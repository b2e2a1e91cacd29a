# SPDX-License-Identifier: MIT
"""The requests of a trace: when each arrived, and when it was answered."""

import re
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

from pyublk.traces.records import Action, Category, Record, TraceError, read_records, write_records

Operation = Literal["read", "write", "flush", "discard", "other"]

_SECTOR = 512
#: Plain numbers: an IntFlag's operators would take half of the time of reading.
_READ, _WRITE, _FLUSH, _DISCARD = map(
    int, (Category.READ, Category.WRITE, Category.FLUSH, Category.DISCARD)
)
_NOTIFY, _FUA = int(Category.NOTIFY), int(Category.FUA)
_DATA = _READ | _WRITE | _FLUSH | _DISCARD
_CATEGORIES: dict[str, Category] = {
    "read": Category.READ,
    "write": Category.WRITE,
    "flush": Category.WRITE | Category.FLUSH,
    "discard": Category.WRITE | Category.DISCARD,
    "other": Category.PC,
}


class Request(NamedTuple):
    """One request.

    `offset` and `length` are in bytes; `arrived`, `waited` and `latency` in seconds. `arrived`
    counts from the trace's first record, `waited` is how long the server held the request before it
    was begun, and `latency` is the time from its arrival to its answer: None if that is not
    in the trace. `error` is an errno, 0 if it succeeded.
    """

    operation: Operation
    offset: int
    length: int
    arrived: float
    latency: float | None
    waited: float = 0.0
    error: int = 0
    queue: int = 0
    fua: bool = False

    @property
    def answered(self) -> float | None:
        """When it was answered, in seconds as `arrived`."""
        return None if self.latency is None else self.arrived + self.latency


@dataclass(frozen=True, slots=True)
class Trace:
    """What was recorded of a disk.

    `device` is its "major:minor". `requests` are in the order of their arrival; `duration` is the
    time from the first record to the last, in seconds. `lost` counts records that are missing
    between others, `orphans` answers to requests that arrived before the trace began.
    """

    name: str
    device: str
    requests: tuple[Request, ...]
    duration: float
    lost: int
    orphans: int


class _Open:
    """A request that has arrived."""

    __slots__ = ("issued", "queue", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.queue = record.cpu
        self.issued: int | None = None


class _Pairing:
    """Finds the arrival that belongs to an answer.

    Records have no request's number. The oldest request that has the same place and direction is
    meant, one of the same queue if there is one.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.orphans = 0
        self.began = self.ended = 0
        self._open: defaultdict[tuple[int, int], deque[_Open]] = defaultdict(deque)

    def add(self, record: Record) -> None:
        category = record.action >> 16
        if category & _NOTIFY:
            return
        action = record.action & 0xFFFF
        key = record.sector, category & _DATA
        waiting = self._open[key]
        if action == Action.QUEUE:
            waiting.append(_Open(record))
        elif action == Action.ISSUE:
            found = self._oldest([one for one in waiting if one.issued is None], record.cpu)
            if found is None:  # recorded without arrivals
                found = _Open(record)
                waiting.append(found)
            found.issued = record.time
        elif action == Action.COMPLETE:
            found = self._oldest(waiting, record.cpu)
            if found is None:
                self.orphans += 1
            else:
                waiting.remove(found)
                self.requests.append(self._request(found, record))
        if not waiting:
            del self._open[key]

    def finish(self) -> tuple[Request, ...]:
        """All of them, those that were not answered too."""
        for waiting in self._open.values():
            self.requests += [self._request(one, None) for one in waiting]
        self.requests.sort(key=attrgetter("arrived"))
        return tuple(self.requests)

    @staticmethod
    def _oldest(waiting: Iterable[_Open], queue: int) -> _Open | None:
        oldest = None
        for one in waiting:
            if one.queue == queue:
                return one
            oldest = oldest or one
        return oldest

    def _request(self, one: _Open, answer: Record | None) -> Request:
        arrival = one.record
        return Request(
            operation=_operation(arrival),
            offset=arrival.sector * _SECTOR,
            length=arrival.length,
            arrived=(arrival.time - self.began) / 1e9,
            latency=None if answer is None else (answer.time - arrival.time) / 1e9,
            waited=0.0 if one.issued is None else (one.issued - arrival.time) / 1e9,
            error=0 if answer is None else _errno(answer.error),
            queue=one.queue,
            fua=bool(arrival.action >> 16 & _FUA),
        )


def _operation(record: Record) -> Operation:
    category = record.action >> 16
    if category & _DISCARD:
        return "discard"
    if category & _FLUSH and not record.length:
        return "flush"
    if category & _WRITE:
        return "write"
    return "read" if category & _READ else "other"


def _errno(error: int) -> int:
    """The kernel's own records have it negative, in 16 bits."""
    return error if error < 0x8000 else 0x10000 - error


def files_of(name: str | Path) -> list[Path]:
    """The files of a trace, by queue; `name` may also be one file. Raises FileNotFoundError."""
    whole = Path(name)
    if whole.is_file():
        return [whole]
    form = re.compile(re.escape(whole.name) + r"\.blktrace\.(\d+)")
    found = {}
    if whole.parent.is_dir():
        for path in whole.parent.iterdir():
            if match := form.fullmatch(path.name):
                found[int(match[1])] = path
    if not found:
        raise FileNotFoundError(2, "there is no such trace", f"{whole}.blktrace.0")
    return [found[number] for number in sorted(found)]


def read(name: str | Path) -> Trace:
    """The trace in `NAME.blktrace.0`, `NAME.blktrace.1` and so on, or in one file.

    Raises FileNotFoundError if there is none, TraceError for files that are no trace.
    """
    pairing = _Pairing()
    lost = 0
    last: dict[int, int] = {}
    device = None
    paths = files_of(name)
    for record in merge(*map(read_records, paths), key=attrgetter("time")):
        if device is None:
            pairing.began, device = record.time, record.device
        gap = (record.sequence - last.get(record.cpu, record.sequence - 1) - 1) & 0xFFFFFFFF
        if gap < 1 << 31:  # else: not in its order
            lost += gap
        last[record.cpu] = record.sequence
        pairing.ended = max(pairing.ended, record.time)
        pairing.add(record)
    if device is None:
        raise TraceError(f"{name} is an empty trace: no record is in {', '.join(map(str, paths))}")
    return Trace(
        name=str(name),
        device=f"{device >> 20}:{device & 0xFFFFF}",
        requests=pairing.finish(),
        duration=(pairing.ended - pairing.began) / 1e9,
        lost=lost,
        orphans=pairing.orphans,
    )


def write(name: str | Path, requests: Iterable[Request], *, device: str = "259:0") -> list[Path]:
    """Writes requests as the trace `NAME`, and returns its files.

    Offsets and lengths must be multiples of 512. Raises ValueError for what blktrace's format
    cannot hold, and OSError.
    """
    major, minor = map(int, device.split(":"))
    events: defaultdict[int, list[Record]] = defaultdict(list)
    for one in requests:
        if one.offset % _SECTOR or one.length % _SECTOR:
            raise ValueError(f"offset and length of {one} must be multiples of {_SECTOR}")
        about = _CATEGORIES[one.operation] | (Category.FUA if one.fua else 0)
        arrived = round(one.arrived * 1e9)
        steps = [
            (arrived, Action.QUEUE, Category.QUEUE),
            (arrived + round(one.waited * 1e9), Action.ISSUE, Category.ISSUE),
        ]
        if one.latency is not None:
            answered = arrived + round(one.latency * 1e9)
            steps.append((answered, Action.COMPLETE, Category.COMPLETE))
        for time, action, category in steps:
            events[one.queue].append(
                Record(
                    sequence=0,
                    time=time,
                    sector=one.offset // _SECTOR,
                    length=one.length,
                    action=action | (about | category) << 16,
                    pid=0,
                    device=major << 20 | minor,
                    cpu=one.queue,
                    error=one.error if action is Action.COMPLETE else 0,
                )
            )
    paths = []
    for queue, records in sorted(events.items()):
        records.sort(key=attrgetter("time"))
        paths.append(Path(f"{name}.blktrace.{queue}"))
        numbered = (one._replace(sequence=place + 1) for place, one in enumerate(records))
        write_records(paths[-1], numbered)
    return paths
