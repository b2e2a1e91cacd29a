# SPDX-License-Identifier: MIT
"""Power cuts of zoned disks.

Writes to a sequential zone cannot be lost one by one, since there is no data behind its pointer.
"""

import errno
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any, Self

from pyublk._native import IO
from pyublk.errors import InvalidTarget
from pyublk.profile import ZoneLimits
from pyublk.target import Target
from pyublk.targets.zoned import Zoned
from pyublk.testing.disk import Disk
from pyublk.testing.power_cuts.crash import Crash, CrashedDisk
from pyublk.testing.power_cuts.record import Kind, Record, Write, content_hash
from pyublk.testing.power_cuts.recording import Recording
from pyublk.testing.power_cuts.saved import Saved
from pyublk.testing.power_cuts.states import Choices, Piece, Point
from pyublk.uapi import SECTOR_SIZE, Op
from pyublk.zoned import ZonedTarget
from pyublk.zones import REPORT_BYTES, Zone, ZoneKind, ZoneState

#: Bytes of the largest request.
MAX_IO_SIZE = 32 << 20
#: States that no request changes.
FIXED = (ZoneState.NO_POINTER, ZoneState.READ_ONLY, ZoneState.OFFLINE)


class ZonedRecord(Record):
    """Of a zoned disk: `before` are its zones before the record, `history` the requests that
    changed each sequential one, by its number."""

    def __init__(
        self, zones: list[Zone], size: int, unit: int, read: Callable[[int, memoryview], object]
    ) -> None:
        super().__init__(size, unit, read)
        self.before = [replace(zone) for zone in zones]
        self.zone_size = zones[0].length
        self.history: dict[int, list[Write]] = {}

    def zone_of(self, offset: int) -> int:
        """The number of the zone."""
        return offset // self.zone_size

    def sequential(self, zone: int) -> bool:
        """Whether it is written in order."""
        return self.before[zone].kind is not ZoneKind.CONVENTIONAL

    def _add(self, write: Write) -> None:
        super()._add(write)
        if self.sequential(zone := self.zone_of(write.offset)):
            self.history.setdefault(zone, []).append(write)

    def _drop(self, write: Write) -> None:
        super()._drop(write)
        if write in (history := self.history.get(self.zone_of(write.offset), [])):
            history.remove(write)

    def _settle_fua(self, write: Write, time: int) -> None:
        """The pointer stands behind it, so that nothing before it in its zone can be lost."""
        for one in self.history.get(self.zone_of(write.offset), [write]):
            if one.number <= write.number and one.completed is not None:
                self._settle(one, time)
        self._settle(write, time)

    def hash(self, unit: int, version: int) -> int:
        """Zeroes that were written are not what was never written: the pointer tells."""
        if not self.sequential(self.zone_of(unit * self.unit)):
            return super().hash(unit, version)
        key = unit, version
        if (found := self._hashes.get(key)) is None:
            now, then = self._told(unit, version), self._told(unit, 0)
            found = self._hashes[key] = 0 if now == then else content_hash(unit, now)
        return found

    def _told(self, unit: int, version: int) -> bytes:
        if version:
            written = self.changes[unit][version - 1].kind == "write"
        else:
            written = unit * self.unit < self.before[self.zone_of(unit * self.unit)].pointer
        return bytes([written]) + self.content(unit, version)


class ZonedPoint(Point):
    """A sequential zone is left as it was after some first of its requests, of which the last may
    be torn, if it is a write. The blocks of other zones are kept or lost by themselves."""

    record: ZonedRecord

    def __init__(self, record: ZonedRecord, time: int) -> None:
        super().__init__(record, time)
        self._by_zone: dict[int, list[Write]] = {}
        for write in self.writes:
            if record.sequential(zone := record.zone_of(write.offset)):
                self._by_zone.setdefault(zone, []).append(write)

    # ---- choices ----

    def allowed(self, choices: Choices) -> Choices:
        """Without what stands behind something that is lost. Changes what it is given."""
        for writes in self._by_zone.values():
            whole = True
            for write in writes:
                places = self.places(write)
                if whole:
                    kept = list(itertools.takewhile(lambda at: choices[at[0]] >= at[1], places))
                    if len(kept) == len(places):
                        continue
                    whole = False
                    places = places if write.kind == "reset" else places[len(kept) :]
                for index, choice in places:
                    choices[index] = min(choices[index], choice - 1)
        return choices

    def without(self, lost: Iterable[Piece]) -> Choices:
        return self.allowed(super().without(lost))

    def single_lost(self) -> Iterator[Choices]:
        return map(self.allowed, super().single_lost())

    def single_kept(self) -> Iterator[Choices]:
        """Each request kept with those before it in its zone, all others lost."""
        for write in self.writes:
            choices = self.all_lost
            zone = self._by_zone.get(self.record.zone_of(write.offset), [write])
            for one in zone[: zone.index(write) + 1]:
                for index, choice in self.places(one):
                    choices[index] = choice
            yield choices

    def torn(self) -> Iterator[Choices]:
        return map(self.allowed, super().torn())

    def chosen_by(self, seed: int, number: int) -> Choices:
        return self.allowed(super().chosen_by(seed, number))

    def _zone_states(self, writes: list[Write]) -> list[dict[int, int]]:
        """The choices for the units of a sequential zone, for each state that it may be left in."""
        state = {index: 0 for write in writes for index, _ in self.places(write)}
        found = [state]
        for write in writes:
            places = self.places(write)
            steps = [dict(places)] if write.kind == "reset" else [dict([one]) for one in places]
            for step in steps:
                found.append(state := state | step)
        return found

    def count(self) -> int:
        return prod(len(part) for part in self._parts())

    def every(self) -> Iterator[Choices]:
        for states in itertools.product(*self._parts()):
            choices = self.all_lost
            for index, choice in itertools.chain.from_iterable(one.items() for one in states):
                choices[index] = choice
            yield choices

    def _parts(self) -> list[list[dict[int, int]]]:
        """What is left in a state of its own: a sequential zone, or a unit of another one."""
        parts = [self._zone_states(writes) for writes in self._by_zone.values()]
        for unit, index in self.index.items():
            if not self.record.sequential(self.record.zone_of(unit * self.record.unit)):
                first = {hashed: choice for choice, hashed in enumerate(self.hashes[index])}
                parts.append([{index: choice} for choice in sorted(first.values())])
        return parts

    # ---- zones ----

    def zones(self, choices: Choices) -> list[Zone]:
        """As they are when the power comes back."""
        found = [replace(zone) for zone in self.record.before]
        for zone in found:
            if zone.state not in FIXED:
                self._replay(zone, choices)
        return found

    def _replay(self, zone: Zone, choices: Choices) -> None:
        finished = zone.state is ZoneState.FULL
        for write in self.record.history.get(self.record.zone_of(zone.start), []):
            places = self.places(write)
            if write.arrived > self.time or not (places or self._was_done(write)):
                break
            missing = [index for index, choice in places if choices[index] < choice]
            if missing:
                if write.kind == "write":
                    zone.pointer = self.units[missing[0]] * self.record.unit
                break
            finished = write.kind == "finish"
            if write.kind != "finish":
                zone.pointer = write.offset + (write.length if write.kind == "write" else 0)
        if finished or zone.pointer >= zone.end:
            zone.state, zone.pointer = ZoneState.FULL, zone.start + zone.length
        else:  # none is open any more
            empty = zone.pointer == zone.start
            zone.state = ZoneState.EMPTY if empty else ZoneState.CLOSED

    def _was_done(self, write: Write) -> bool:
        """Of one that nothing is lost of: it is durable, or changed no data."""
        return write.completed is not None and write.completed <= self.time


class ZonedPowerCut(Recording):
    """`PowerCut` for zoned disks, as `pyublk.targets.Zoned` is, and each `ZonedTarget`.

    A sequential zone is left as it was after some first of its requests since it was durable. If
    the last of these is a write, any number of its blocks may be there, from its begin on; a reset
    is whole. What a zone has says nothing about others. A flush makes durable what was completed
    when it arrived, a FUA write also all before it in its zone. The blocks of conventional zones
    are those of `PowerCut`. No zone is open after a cut. A zone that was finished is full, unless
    something before that is lost.

    ::

        cut = ZonedPowerCut(Zoned(size=64 << 20, zone_size=4 << 20))
        with Disk(cut) as disk:
            disk.pwrite(b"record".ljust(512), 0)
            disk.flush()
            cut.mark("committed")
        for crash in cut.crashes():
            with crash.disk() as disk:
                assert not crash.reached("committed") or disk.report_zones()[0].pointer == 512

    Args:
        target: of any kind. Its content and its zones are the disk's; it is opened and closed with
            it, and must not be written otherwise.
    """

    concurrency = "serial"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        if not callable(getattr(target, "handle", None)):
            raise InvalidTarget(
                f"{type(target).__name__} is not served by handle, as zoned disks are: use PowerCut"
            )
        self.unit = target.block_size
        self._disk = Disk(target, depth=1, max_io_size=MAX_IO_SIZE)
        self._disk_lock = threading.Lock()  # crashes are read while the disk is used
        self._pointers: list[int] = []

    # ---- as a target ----

    def _open_below(self) -> None:
        self._disk.open()

    def _close_below(self) -> None:
        self._disk.close()

    def announces(self, method: str) -> bool:
        return method in ("read", "write", "flush", "write_fua")

    def handle(self, io: IO) -> None:
        """Every request."""
        offset, length, zone = io.offset, io.length, self._zones.zone_of(io.offset)
        match io.op:
            case Op.READ:
                io.write_from(self._read_below(offset, length))
            case Op.WRITE:
                self._write(offset, bytes(io.buffer), fua=io.fua)
            case Op.ZONE_APPEND:
                at = self._append(zone, bytes(io.buffer), fua=io.fua)
                io.complete(zone_sector=at // SECTOR_SIZE)
            case Op.FLUSH:
                with self._flushing(), self._disk_lock:
                    self._disk.flush()
            case Op.ZONE_RESET:
                self._reset(offset)
            case Op.ZONE_RESET_ALL:
                for one in self._report():
                    if one.state not in (*FIXED, ZoneState.EMPTY):
                        self._reset(one.start)
            case Op.ZONE_FINISH:
                with self._changing("finish", offset, 0, None):
                    self._disk.manage_zone(Op.ZONE_FINISH, offset)
                self._pointers[zone] = self._zones.before[zone].end
            case Op.ZONE_OPEN | Op.ZONE_CLOSE as op:
                with self._disk_lock:
                    self._disk.manage_zone(op, offset)
            case Op.REPORT_ZONES:
                packed = b"".join(one.pack() for one in self._report()[zone : zone + io.zones])
                io.write_from(packed.ljust(io.zones * REPORT_BYTES, b"\0"))
            case _:
                raise OSError(errno.EOPNOTSUPP, f"a zoned disk takes no {io.op!r}")

    def _write(self, offset: int, data: bytes, *, fua: bool) -> None:
        with self._changing("write", offset, len(data), data, fua=fua):
            self._disk.pwrite(data, offset, fua=fua)
        if self._zones.sequential(zone := self._zones.zone_of(offset)):
            self._pointers[zone] = offset + len(data)

    def _append(self, zone: int, data: bytes, *, fua: bool) -> int:
        """Returns where it went."""
        start, at = self._zones.before[zone].start, self._pointers[zone]
        if at + len(data) > self._zones.before[zone].end:  # which the disk refuses
            with self._disk_lock:
                return self._disk.zone_append(data, start)
        with self._changing("write", at, len(data), data, fua=fua):
            if (found := self._disk.zone_append(data, start)) != at:
                raise OSError(errno.EIO, f"{len(data)} bytes were appended at {found}, not {at}")
            if fua:
                self._disk.flush()
        self._pointers[zone] = at + len(data)
        return at

    def _reset(self, start: int) -> None:
        zone = self._zones.before[self._zones.zone_of(start)]
        data = min(self._pointers[self._zones.zone_of(start)], zone.end) - start
        with self._changing("reset", start, data, None):
            self._disk.manage_zone(Op.ZONE_RESET, start)
        self._pointers[self._zones.zone_of(start)] = start

    @contextmanager
    def _changing(
        self, kind: Kind, offset: int, length: int, data: bytes | None, *, fua: bool = False
    ) -> Iterator[None]:
        """Around what does it below. If that refuses to, because a rule of zones forbids it, it is
        not recorded."""
        with self._zones.writing(kind, offset, length, data, fua=fua) as write, self._disk_lock:
            zone = self._zones.zone_of(offset)
            try:
                yield
            except OSError:
                pointer = self._disk.report_zones()[zone].pointer
                write.refused = self._zones.sequential(zone) and pointer == self._pointers[zone]
                raise

    def _report(self) -> list[Zone]:
        with self._disk_lock:
            return self._disk.report_zones()

    def _read_below(self, offset: int, length: int) -> bytes:
        with self._disk_lock:
            return self._disk.pread(length, offset)

    # ---- what is recorded ----

    @property
    def _zones(self) -> ZonedRecord:
        record = self._record
        assert isinstance(record, ZonedRecord)
        return record

    def _new_record(self) -> Record:
        profile = self.below.target.profile()
        if profile.zones is None:
            raise InvalidTarget(f"{type(self.below.target).__name__} has no zones: use PowerCut")

        def read(offset: int, buffer: memoryview) -> None:
            buffer[:] = self._read_below(offset, len(buffer))

        zones = self._report()
        self._pointers = [zone.pointer for zone in zones]
        return ZonedRecord(zones, profile.size, self.unit, read)

    def _new_point(self, time: int) -> ZonedPoint:
        return ZonedPoint(self._zones, time)

    def crashed(self, crash: Crash) -> Target:
        return ZonedCrashedDisk(crash, self.below.target.profile().zones)

    def fail_flush_once(self, error: int = errno.EIO) -> None:
        """The next flush fails with that errno and makes nothing durable; those after it do."""
        self._fail_next_flush(error, forget=False)

    # ---- kept for later ----

    def _about(self) -> dict[str, Any]:
        limits = self.below.target.profile().zones
        assert limits is not None
        return super()._about() | {
            "zones": [asdict(zone) for zone in self._zones.before],
            "max_open": limits.max_open,
            "max_active": limits.max_active,
        }

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The ZonedPowerCut that was saved, in memory. Raises ValueError for another file."""
        with closing(Saved(path)) as saved:
            about = saved.about
            if "zones" not in about:
                raise ValueError(f"{path} is the record of a disk without zones: use PowerCut.load")
            cut = cls(_restored(about, saved.pieces()))
            cut.open()
            for write in saved.writes():
                cut._zones.restore(write)
                cut._redo(write)
            saved.restore_rest(cut._record)
            cut._windows = [(start, stop) for start, stop in about["windows"]]
            cut.close()
        return cut

    def _redo(self, write: Write) -> None:
        zone = self._zones.zone_of(write.offset)
        if write.data is not None:
            self._disk.pwrite(write.data, write.offset)
            after = write.offset + write.length
        elif write.kind == "reset":
            self._disk.manage_zone(Op.ZONE_RESET, after := write.offset)
        else:
            self._disk.manage_zone(Op.ZONE_FINISH, write.offset)
            after = self._zones.before[zone].end
        if self._zones.sequential(zone):
            self._pointers[zone] = after


def _lay_out(target: ZonedTarget, zones: list[Zone]) -> None:
    """Gives a target's zones the states, the capacities and the pointers of others."""
    for own, other in zip(target.zones, zones, strict=True):
        own.kind, own.capacity = other.kind, other.capacity
        own.state, own.pointer = other.state, other.pointer


class _Memory(Zoned):
    """With content from the beginning."""

    def __init__(self, pieces: list[tuple[int, bytes]], **options: int) -> None:
        super().__init__(**options)
        self._pieces = pieces

    def open(self) -> None:
        super().open()
        for offset, piece in self._pieces:
            self._bytes[offset : offset + len(piece)] = piece
        self._pieces = []


def _restored(about: dict[str, Any], pieces: list[tuple[int, bytes]]) -> Zoned:
    zones = [
        Zone(**one | {"kind": ZoneKind(one["kind"]), "state": ZoneState(one["state"])})
        for one in about["zones"]
    ]
    target = _Memory(
        pieces,
        size=about["size"],
        zone_size=zones[0].length,
        max_open=about["max_open"],
        max_active=about["max_active"],
        block_size=about["block_size"],
    )
    _lay_out(target, zones)
    return target


class ZonedCrashedDisk(ZonedTarget):
    """The disk after a crash. What is written is kept in memory, beside what the cut left."""

    def __init__(self, crash: Crash, limits: ZoneLimits | None) -> None:
        point, choices = crash.state
        assert isinstance(point, ZonedPoint)
        assert limits is not None
        super().__init__(
            size=crash.cut.size,
            zone_size=limits.zone_size,
            max_open=limits.max_open,
            max_active=limits.max_active,
            block_size=crash.cut.block_size,
        )
        _lay_out(self, point.zones(choices))
        self._data = CrashedDisk(crash)

    def open(self) -> None:
        self._data.open()

    def close(self) -> None:
        self._data.close()

    def load(self, io: IO) -> None:
        self._data.read(io.offset, io.buffer)

    def store(self, io: IO, offset: int) -> None:
        self._data.write(offset, io.buffer)

    def erase(self, offset: int, length: int) -> None:
        self._data.discard(offset, length)
