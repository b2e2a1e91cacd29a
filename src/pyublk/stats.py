# SPDX-License-Identifier: MIT
"""Counters as frozen snapshots: taking one costs the serving threads nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from math import ceil, nan
from typing import Any, Self

from pyublk.uapi import Op

#: What latencies are told apart by, in the order of `Queue.latency`; "other" is of zones.
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes", "other")

#: What Queue.counters() gives: requests and bytes by operation, errors, enters, largest batch,
#: fallbacks.
Counters = tuple[tuple[int, ...], tuple[int, ...], int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """What one queue has done since it was made.

    Requests are counted when they arrive; `errors` counts those that were answered with an errno.
    `enters` counts io_uring_enter calls, `largest_batch` is the largest number of requests that one
    of them returned, and `fallbacks` counts how often a data path failed and another was taken.
    `held` is how many requests it has now and has not answered yet.
    """

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    write_zeroes: int = 0
    others: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_discarded: int = 0
    bytes_zeroed: int = 0
    errors: int = 0
    enters: int = 0
    largest_batch: int = 0
    fallbacks: int = 0
    held: int = 0

    @classmethod
    def from_counters(cls, counters: Counters, held: int = 0) -> "QueueStats":
        requests, lengths, errors, enters, largest_batch, fallbacks = counters
        named = (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES)
        return cls(
            reads=requests[Op.READ],
            writes=requests[Op.WRITE],
            flushes=requests[Op.FLUSH],
            discards=requests[Op.DISCARD],
            write_zeroes=requests[Op.WRITE_ZEROES],
            others=sum(requests) - sum(requests[op] for op in named),
            bytes_read=lengths[Op.READ],
            bytes_written=lengths[Op.WRITE],
            bytes_discarded=lengths[Op.DISCARD],
            bytes_zeroed=lengths[Op.WRITE_ZEROES],
            errors=errors,
            enters=enters,
            largest_batch=largest_batch,
            fallbacks=fallbacks,
            held=held,
        )

    @classmethod
    def sum(cls, parts: "Sequence[QueueStats]") -> "QueueStats":
        """All of them together; `largest_batch` is the largest of them."""
        sums = {
            field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)
        }
        sums["largest_batch"] = max((part.largest_batch for part in parts), default=0)
        return cls(**sums)

    @property
    def requests(self) -> int:
        """All requests, of whatever operation."""
        return (
            self.reads
            + self.writes
            + self.flushes
            + self.discards
            + self.write_zeroes
            + self.others
        )


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long the requests of one operation took, from their arrival to their answer.

    Latencies are counted in buckets: four for each power of two of nanoseconds, so that the bounds
    of a bucket are at most 25 % apart. `a - b`, of a later and an earlier snapshot, is what came
    between them, and `a + b` what both have.
    """

    #: The buckets that are not empty, ascending, each with its upper bound in nanoseconds, and how
    #: many requests took less than that, and no less than the bound below.
    buckets_ns: tuple[tuple[int, int], ...] = ()
    #: All latencies together, in nanoseconds.
    total_ns: int = 0

    @property
    def count(self) -> int:
        """How many requests there were."""
        return sum(count for _, count in self.buckets_ns)

    @property
    def total(self) -> float:
        """All latencies together, in seconds."""
        return self.total_ns / 1e9

    @property
    def buckets(self) -> tuple[tuple[float, int], ...]:
        """As `buckets_ns`, in seconds."""
        return tuple((bound / 1e9, count) for bound, count in self.buckets_ns)

    def quantile(self, q: float) -> float:
        """Seconds that a share `q` (0 to 1) of the requests did not exceed: the upper bound of the
        last bucket of these. NaN when there were no requests. Raises ValueError for another `q`."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is between 0 and 1, not {q}")
        wanted = max(1, ceil(q * self.count))
        for bound, count in self.buckets_ns:
            wanted -= count
            if wanted <= 0:
                return bound / 1e9
        return nan

    def __add__(self, other: "Histogram") -> "Histogram":
        return self._combined(other, 1)

    def __sub__(self, other: "Histogram") -> "Histogram":
        """Raises ValueError when `other` is not an earlier snapshot of this one."""
        return self._combined(other, -1)

    def _combined(self, other: "Histogram", sign: int) -> "Histogram":
        counts = Counter(dict(self.buckets_ns))
        for bound, count in other.buckets_ns:
            counts[bound] += sign * count
        if any(count < 0 for count in counts.values()):
            raise ValueError("only an earlier snapshot of a histogram can be taken from it")
        return Histogram(
            tuple((bound, count) for bound, count in sorted(counts.items()) if count),
            self.total_ns + sign * other.total_ns,
        )

    def told(self) -> dict[str, Any]:
        """It, as JSON has it (see `from_told`)."""
        return {
            "total_ns": self.total_ns,
            "buckets": [[bound, count] for bound, count in self.buckets_ns],
        }

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> Self:
        """What `told` told: the `latency` of an operation in a channel's answer to `stats`."""
        return cls(tuple((bound, count) for bound, count in told["buckets"]), told["total_ns"])


#: By each of OPERATIONS.
Latency = Mapping[str, Histogram]

NO_LATENCY: Latency = dict.fromkeys(OPERATIONS, Histogram())


def sum_latency(parts: Iterable[Latency]) -> Latency:
    """All of them together."""
    sums = dict(NO_LATENCY)
    for part in parts:
        for name, histogram in part.items():
            sums[name] = sums[name] + histogram if sums[name].buckets_ns else histogram
    return sums


def latency_of(counted: Sequence[tuple[int, tuple[tuple[int, int], ...]]]) -> Latency:
    """What `Queue.latency` gives."""
    return {
        name: Histogram(buckets, total_ns)
        for name, (total_ns, buckets) in zip(OPERATIONS, counted, strict=True)
    }


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """The counters of every queue, in queue order, and their sum; latencies, by operation: "read",
    "write", "flush", "discard", "write_zeroes", "other"."""

    queues: tuple[QueueStats, ...]
    latency: Latency = field(default_factory=lambda: NO_LATENCY, hash=False)

    @property
    def total(self) -> QueueStats:
        """Sums over the queues; `largest_batch` is the largest of them."""
        return QueueStats.sum(self.queues)

    def added(self, other: "DeviceStats") -> "DeviceStats":
        """Those of both, queue by queue; queues that one has not made yet have counted nothing."""
        pairs = zip_longest(self.queues, other.queues, fillvalue=QueueStats())
        return DeviceStats(
            tuple(QueueStats.sum(pair) for pair in pairs),
            sum_latency((self.latency, other.latency)),
        )
