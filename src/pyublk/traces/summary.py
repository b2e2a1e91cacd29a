# SPDX-License-Identifier: MIT
"""A trace in numbers."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import ceil
from operator import attrgetter

from pyublk.traces.requests import Request, Trace

QUANTILES = (0.5, 0.9, 0.99, 0.999)
#: How many requests back one may continue: several streams come in turn, and out of order.
_STREAMS = 16
#: Into how many ranges, at most, the used part of a disk is divided, and how many are told.
_RANGES, _BUSIEST = 64, 5
_SMALLEST_RANGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationSummary:
    """The requests of one operation.

    `sizes` says how many had each length in bytes. `latency` has the quantiles 0.5, 0.9, 0.99 and
    0.999 of the answered ones, in seconds; it is empty if there are none, as `mean` and `longest`
    are None then.
    """

    operation: str
    requests: int
    bytes: int
    errors: int
    unanswered: int
    sizes: dict[int, int]
    latency: dict[float, float]
    mean: float | None
    longest: float | None


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a disk, in bytes, with the reads and writes that began in it."""

    offset: int
    length: int
    requests: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `summarize` returns.

    `duration` is in seconds. `mean_depth` is how many requests the server had on average over the
    time, and `largest_depth` the most. `sequential` is the share of the reads and writes that began
    where one of the 16 before ended: None if there are none. `busiest` are the ranges
    with the most bytes.
    """

    name: str
    device: str
    duration: float
    lost: int
    orphans: int
    operations: tuple[OperationSummary, ...]
    mean_depth: float
    largest_depth: int
    sequential: float | None
    busiest: tuple[Range, ...]


def summarize(trace: Trace) -> Summary:
    """The numbers of a trace."""
    by_operation = sorted(trace.requests, key=attrgetter("operation"))
    transfers = [one for one in trace.requests if one.operation in ("read", "write")]
    depths = list(depth(trace))
    area = sum(have * (later - time) for (time, have), (later, _) in pairwise(depths))
    return Summary(
        name=trace.name,
        device=trace.device,
        duration=trace.duration,
        lost=trace.lost,
        orphans=trace.orphans,
        operations=tuple(
            _operation(name, list(requests))
            for name, requests in groupby(by_operation, key=attrgetter("operation"))
        ),
        mean_depth=area / trace.duration if trace.duration else 0.0,
        largest_depth=max((have for _, have in depths), default=0),
        sequential=_sequential(transfers),
        busiest=tuple(_busiest(transfers)),
    )


def depth(trace: Trace) -> Iterator[tuple[float, int]]:
    """How many requests the server had: each moment of a change, in seconds, and the number from
    then on. One that was not answered is there until the end."""
    changes: Counter[float] = Counter()
    for one in trace.requests:
        changes[one.arrived] += 1
        changes[trace.duration if one.answered is None else one.answered] -= 1
    have = 0
    for time, change in sorted(changes.items()):
        have += change
        yield time, have


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def _operation(name: str, requests: list[Request]) -> OperationSummary:
    latencies = sorted(one.latency for one in requests if one.latency is not None)
    return OperationSummary(
        operation=name,
        requests=len(requests),
        bytes=sum(one.length for one in requests),
        errors=sum(1 for one in requests if one.error),
        unanswered=len(requests) - len(latencies),
        sizes=dict(sorted(Counter(one.length for one in requests).items())),
        latency={share: quantile(latencies, share) for share in QUANTILES} if latencies else {},
        mean=sum(latencies) / len(latencies) if latencies else None,
        longest=latencies[-1] if latencies else None,
    )


def _sequential(transfers: list[Request]) -> float | None:
    ends: deque[int] = deque(maxlen=_STREAMS)
    found = 0
    for one in transfers:
        found += one.offset in ends
        ends.append(one.offset + one.length)
    return found / len(transfers) if transfers else None


def _busiest(transfers: Iterable[Request]) -> Iterator[Range]:
    """Ranges of one size, a power of two, so that a few dozen cover what was used."""
    counts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    requests = list(transfers)
    length = _SMALLEST_RANGE
    while requests and max(one.offset for one in requests) >= _RANGES * length:
        length *= 2
    for one in requests:
        counts[one.offset // length] += 1
        sizes[one.offset // length] += one.length
    for place, size in sizes.most_common(_BUSIEST):
        yield Range(place * length, length, counts[place], size)
