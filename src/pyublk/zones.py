# SPDX-License-Identifier: MIT
"""Zones: what a host-managed disk keeps about itself, and the rules for writing to it.

`Zones` is the bookkeeping (kernel: include/uapi/linux/blkzoned.h; the rules are those of ZBC and
ZNS, as drivers/block/null_blk/zoned.c follows them) and holds no data.
"""

import ctypes
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from pyublk.uapi import SECTOR_SIZE, blk_zone


class ZoneKind(IntEnum):
    """How a zone is written: anywhere, or from its start on without gaps."""

    CONVENTIONAL = 1
    SEQUENTIAL = 2


class ZoneState(IntEnum):
    """The state of a zone (BLK_ZONE_COND_*); that of a conventional one is always NO_POINTER."""

    NO_POINTER = 0
    EMPTY = 1
    IMPLICITLY_OPEN = 2
    OPEN = 3
    CLOSED = 4
    READ_ONLY = 13
    FULL = 14
    OFFLINE = 15


_OPEN = (ZoneState.IMPLICITLY_OPEN, ZoneState.OPEN)


@dataclass(slots=True, kw_only=True)
class Zone:
    """One zone; `start`, `length`, `capacity` and `pointer` (where the next write goes) are bytes.

    A target whose zones survive restarts stores `state` and `pointer`, and sets them again.
    """

    start: int
    length: int
    capacity: int
    kind: ZoneKind
    state: ZoneState
    pointer: int

    @property
    def end(self) -> int:
        """The offset after the last byte that can be written."""
        return self.start + self.capacity

    def pack(self) -> bytes:
        """The 64 bytes of struct blk_zone."""
        return bytes(
            blk_zone(
                start=self.start // SECTOR_SIZE,
                len=self.length // SECTOR_SIZE,
                wp=self.pointer // SECTOR_SIZE,
                type=self.kind,
                cond=self.state,
                capacity=self.capacity // SECTOR_SIZE,
            )
        )

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Self:
        """A zone from struct blk_zone."""
        raw = blk_zone.from_buffer_copy(data)
        return cls(
            start=raw.start * SECTOR_SIZE,
            length=raw.len * SECTOR_SIZE,
            capacity=raw.capacity * SECTOR_SIZE,
            kind=ZoneKind(raw.type),
            state=ZoneState(raw.cond),
            pointer=raw.wp * SECTOR_SIZE,
        )


#: Bytes of one zone in the answer to a report.
REPORT_BYTES = ctypes.sizeof(blk_zone)


class Zones:
    """The zones of a disk, and what each request does to them. Not locked: one call at a time.

    Every method raises OSError with the errno that the client is to get: EIO for a request that
    breaks a rule, ETOOMANYREFS and EOVERFLOW for one beyond the limits of open and active zones.
    Offsets and lengths are bytes.

    Args:
        size: of the disk, a multiple of `zone_size`.
        zone_size: a power of two.
        capacity: of each sequential zone, where it is less than its size.
        conventional: how many zones, from the first on, can be written anywhere.
        max_open: how many zones are open at once; 0: no limit.
        max_active: how many are open or closed at once, and not empty or full; 0: no limit.
    """

    def __init__(
        self,
        *,
        size: int,
        zone_size: int,
        capacity: int | None = None,
        conventional: int = 0,
        max_open: int = 0,
        max_active: int = 0,
    ) -> None:
        capacity = zone_size if capacity is None else capacity
        if zone_size < 4096 or zone_size & (zone_size - 1):
            raise ValueError(f"zone_size must be a power of two from 4096 on, not {zone_size}")
        if size < zone_size or size % zone_size:
            raise ValueError(f"size must be a multiple of the zone size ({zone_size}), not {size}")
        if capacity % SECTOR_SIZE or not 0 < capacity <= zone_size:
            raise ValueError(
                f"zone_capacity must be a multiple of {SECTOR_SIZE} up to the zone size "
                f"({zone_size}), not {capacity}"
            )
        count = size // zone_size
        if not 0 <= conventional < count:
            raise ValueError(
                f"conventional must be 0 to {count - 1}, not {conventional}: at least one of the "
                f"{count} zones must be sequential"
            )
        self.zone_size = zone_size
        self.max_open = max_open
        self.max_active = max_active
        self._zones = [
            _new_zone(index * zone_size, zone_size, capacity, index < conventional)
            for index in range(count)
        ]

    def __len__(self) -> int:
        return len(self._zones)

    def __iter__(self) -> Iterator[Zone]:
        return iter(self._zones)

    def at(self, offset: int) -> Zone:
        """The zone in which byte `offset` lies."""
        return self._zones[offset // self.zone_size]

    def report(self, offset: int, count: int) -> bytes:
        """The answer to REPORT_ZONES: `count` zones from `offset` on, zeroes behind the last."""
        first = offset // self.zone_size
        found = b"".join(zone.pack() for zone in self._zones[first : first + count])
        return found.ljust(count * REPORT_BYTES, b"\0")

    # ---- data ----

    def check_write(self, offset: int, length: int) -> None:
        """Before a write: it starts at the pointer of its zone, ends in it, and may open it."""
        zone = self.at(offset)
        if zone.kind is ZoneKind.CONVENTIONAL:
            if offset + length > zone.start + zone.length:
                raise OSError(errno.EIO, f"{length} bytes at {offset} are in two zones")
            return
        if offset != zone.pointer:
            raise OSError(
                errno.EIO, f"a write at {offset} is not at the zone's pointer, {zone.pointer}"
            )
        self._check_room(zone, length)

    def check_append(self, offset: int, length: int) -> int:
        """Before an append to the zone at `offset`; returns where its data goes."""
        zone = self._sequential(offset)
        self._check_room(zone, length)
        return zone.pointer

    def _check_room(self, zone: Zone, length: int) -> None:
        if zone.state in (ZoneState.FULL, ZoneState.READ_ONLY, ZoneState.OFFLINE):
            raise OSError(errno.EIO, f"the zone at {zone.start} is {zone.state.name}")
        if zone.pointer + length > zone.end:
            raise OSError(
                errno.EIO,
                f"{length} bytes do not fit into the zone at {zone.start}: "
                f"{zone.end - zone.pointer} are left",
            )
        if zone.state not in _OPEN:
            self._make_room(zone)
            zone.state = ZoneState.IMPLICITLY_OPEN

    def advance(self, offset: int, length: int) -> None:
        """After a write or an append of `length` bytes at `offset`: moves the zone's pointer."""
        zone = self.at(offset)
        if zone.kind is ZoneKind.CONVENTIONAL:
            return
        zone.pointer = offset + length
        if zone.pointer == zone.end:
            _fill(zone)

    # ---- management ----

    def open(self, offset: int) -> None:
        """Opens a zone until it is closed, filled or reset."""
        zone = self._sequential(offset)
        if zone.state not in (*_OPEN, ZoneState.EMPTY, ZoneState.CLOSED):
            raise OSError(errno.EIO, f"the zone at {zone.start} is {zone.state.name}")
        if zone.state not in _OPEN:
            self._make_room(zone)
        zone.state = ZoneState.OPEN

    def close(self, offset: int) -> None:
        """Closes an open zone; one without data is empty again."""
        zone = self._sequential(offset)
        if zone.state not in (*_OPEN, ZoneState.CLOSED):
            raise OSError(errno.EIO, f"the zone at {zone.start} is {zone.state.name}, not open")
        _close(zone)

    def finish(self, offset: int) -> None:
        """Makes a zone full, whatever is in it."""
        zone = self._sequential(offset)
        if zone.state in (ZoneState.READ_ONLY, ZoneState.OFFLINE):
            raise OSError(errno.EIO, f"the zone at {zone.start} is {zone.state.name}")
        if zone.state is ZoneState.FULL:
            return
        if zone.state not in _OPEN:  # on its way to full it is open for a moment
            self._make_room(zone)
        _fill(zone)

    def reset(self, offset: int) -> Zone:
        """Makes a zone empty; returns it, for its data to be forgotten."""
        zone = self._sequential(offset)
        if zone.state in (ZoneState.READ_ONLY, ZoneState.OFFLINE):
            raise OSError(errno.EIO, f"the zone at {zone.start} is {zone.state.name}")
        zone.state = ZoneState.EMPTY
        zone.pointer = zone.start
        return zone

    def reset_all(self) -> list[Zone]:
        """Makes every sequential zone empty; returns those that had data or were open."""
        fixed = (ZoneState.NO_POINTER, ZoneState.EMPTY, ZoneState.READ_ONLY, ZoneState.OFFLINE)
        return [self.reset(zone.start) for zone in self._zones if zone.state not in fixed]

    def _sequential(self, offset: int) -> Zone:
        zone = self.at(offset)
        if zone.kind is ZoneKind.CONVENTIONAL:
            raise OSError(errno.EIO, f"the zone at {zone.start} is conventional")
        return zone

    def _make_room(self, zone: Zone) -> None:
        """For one more open zone: the limits, at the price of one that was opened by a write."""
        open_zones = [other for other in self._zones if other.state in _OPEN]
        if self.max_active and zone.state is ZoneState.EMPTY:
            closed = sum(other.state is ZoneState.CLOSED for other in self._zones)
            if len(open_zones) + closed >= self.max_active:
                raise OSError(errno.EOVERFLOW, f"{self.max_active} zones are active already")
        if self.max_open and len(open_zones) >= self.max_open:
            for other in open_zones:
                if other.state is ZoneState.IMPLICITLY_OPEN:
                    _close(other)
                    return
            raise OSError(errno.ETOOMANYREFS, f"{self.max_open} zones are open already")


def _new_zone(start: int, length: int, capacity: int, conventional: bool) -> Zone:
    kind = ZoneKind.CONVENTIONAL if conventional else ZoneKind.SEQUENTIAL
    return Zone(
        start=start,
        length=length,
        capacity=length if conventional else capacity,
        kind=kind,
        state=ZoneState.NO_POINTER if conventional else ZoneState.EMPTY,
        pointer=start + length if conventional else start,
    )


def _close(zone: Zone) -> None:
    zone.state = ZoneState.EMPTY if zone.pointer == zone.start else ZoneState.CLOSED


def _fill(zone: Zone) -> None:
    zone.state = ZoneState.FULL
    zone.pointer = zone.start + zone.length
