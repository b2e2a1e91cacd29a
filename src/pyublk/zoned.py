# SPDX-License-Identifier: MIT
"""The base of zoned disks: requests, checked by the rules of zones, become calls for data."""

import dataclasses
import errno
from collections.abc import Callable

from pyublk._native import IO
from pyublk.paths import DataPath
from pyublk.profile import Profile, ZoneLimits
from pyublk.target import Target
from pyublk.uapi import SECTOR_SIZE, Feature, Op
from pyublk.zones import Zones


class ZonedTarget(Target):
    """A host-managed zoned disk (Linux 6.6). Subclass it and define `load`, `store`, and `erase`:

    - ``load(io)``: a read; fill `io.buffer`, or `io.write_from` memory of your own.
    - ``store(io, offset)``: a write to `offset` (for a zone append, `io.offset` is another one);
      take `io.buffer`, or `io.read_into` memory of your own.
    - ``erase(offset, length)``: a zone was reset; its bytes are not needed any more.

    Before these are called, `zones` (a `pyublk.zones.Zones`) checks the rules; it also answers
    reports and keeps the write pointers. A target whose zones survive restarts sets their `state`
    and `pointer` in `open`. A target with rules of its own (with a real zoned disk behind it)
    overrides ``handle(io)``, which gets every request.

    Args:
        size, zone_size, zone_capacity, conventional, max_open, max_active: see `Zones`.
        block_size: the disk's logical block size, in bytes.
    """

    needs = Feature.ZONED
    paths = (DataPath.USER_COPY,)

    def __init__(
        self,
        *,
        size: int,
        zone_size: int,
        zone_capacity: int | None = None,
        conventional: int = 0,
        max_open: int = 0,
        max_active: int = 0,
        block_size: int = 512,
    ) -> None:
        super().__init__(size=size, block_size=block_size)
        self.zones = Zones(
            size=size,
            zone_size=zone_size,
            capacity=zone_capacity,
            conventional=conventional,
            max_open=max_open,
            max_active=max_active,
        )

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        raise ValueError("a zoned disk cannot be resized: its zones are laid out when it starts")

    def profile(self) -> Profile:
        zones = self.zones
        limits = ZoneLimits(
            zone_size=zones.zone_size, max_open=zones.max_open, max_active=zones.max_active
        )
        return dataclasses.replace(super().profile(), zones=limits)

    def load(self, io: IO) -> None:
        """Answers a read."""
        raise NotImplementedError(f"{type(self).__name__} must define load(self, io)")

    def store(self, io: IO, offset: int) -> None:
        """Takes the data of a write to `offset`."""
        raise NotImplementedError(f"{type(self).__name__} must define store(self, io, offset)")

    def erase(self, offset: int, length: int) -> None:
        """Forgets these bytes: they read as zeroes, or as anything."""

    def handle(self, io: IO) -> None:
        """Every request; see the class."""
        zones, offset, length = self.zones, io.offset, io.length
        match io.op:
            case Op.READ:
                self.load(io)
            case Op.WRITE:
                zones.check_write(offset, length)
                self.store(io, offset)
                zones.advance(offset, length)
            case Op.ZONE_APPEND:
                at = zones.check_append(offset, length)
                self.store(io, at)
                zones.advance(at, length)
                io.complete(zone_sector=at // SECTOR_SIZE)
            case Op.REPORT_ZONES:
                io.write_from(zones.report(offset, io.zones))
            case Op.ZONE_OPEN:
                zones.open(offset)
            case Op.ZONE_CLOSE:
                zones.close(offset)
            case Op.ZONE_FINISH:
                zones.finish(offset)
            case Op.ZONE_RESET:
                zone = zones.reset(offset)
                self.erase(zone.start, zone.length)
            case Op.ZONE_RESET_ALL:
                for zone in zones.reset_all():
                    self.erase(zone.start, zone.length)
            case _:
                raise OSError(errno.EOPNOTSUPP, f"a zoned disk takes no {io.op!r}")
