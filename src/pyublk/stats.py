# SPDX-License-Identifier: MIT
"""Counters as frozen snapshots: taking one costs the serving threads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest

from pyublk.uapi import Op

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
class DeviceStats:
    """The counters of every queue, in queue order, and their sum."""

    queues: tuple[QueueStats, ...]

    @property
    def total(self) -> QueueStats:
        """Sums over the queues; `largest_batch` is the largest of them."""
        return QueueStats.sum(self.queues)

    def added(self, other: "DeviceStats") -> "DeviceStats":
        """Those of both, queue by queue; queues that one has not made yet have counted nothing."""
        pairs = zip_longest(self.queues, other.queues, fillvalue=QueueStats())
        return DeviceStats(tuple(QueueStats.sum(pair) for pair in pairs))
