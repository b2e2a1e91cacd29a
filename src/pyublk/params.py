# SPDX-License-Identifier: MIT
"""Device parameters (struct ublk_params), checked before the kernel checks them.

The kernel answers a wrong parameter with a bare EINVAL, ignores some, and drops groups that it does
not know without a word. Here a wrong one is a ValueError that names field, value and what is
allowed, and `Params.difference` finds what was dropped. Everything is in bytes; the rules are those
of drivers/block/ublk_drv.c, and of block/blk-settings.c where the driver leaves the check to it.
"""

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

from pyublk.arguments import DEFAULT_MAX_IO_SIZE
from pyublk.uapi import (
    MIN_SEGMENT_SIZE,
    SECTOR_SIZE,
    Attr,
    Checksum,
    Feature,
    IntegrityFlag,
    ParamType,
    ublk_param_basic,
    ublk_param_devt,
    ublk_param_discard,
    ublk_param_dma_align,
    ublk_param_integrity,
    ublk_param_segment,
    ublk_param_zoned,
    ublk_params,
)

_U32_MAX = (1 << 32) - 1
#: The most that a 32-bit number of sectors holds (bytes).
_SECTORS_MAX = _U32_MAX * SECTOR_SIZE
#: The largest disk: the block layer's byte offsets are signed 64-bit numbers.
_SIZE_MAX = (1 << 63) - SECTOR_SIZE
#: The largest block size hint (bytes).
_HINT_MAX = 1 << 28
#: Bytes of protection information by checksum.
_TUPLE_SIZES = {Checksum.NONE: 0, Checksum.IP: 8, Checksum.T10DIF: 8, Checksum.NVME: 16}


def _whole(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{field} must be a whole number from {low} to {high}, not {value!r}")


def _power_of_two(field: str, value: object, low: int, high: int, *, or_zero: bool = False) -> None:
    if or_zero and value == 0:
        return
    if not isinstance(value, int) or not low <= value <= high or value & (value - 1):
        start = "0, or a power of two" if or_zero else "a power of two"
        raise ValueError(f"{field} must be {start} from {low} to {high} bytes, not {value!r}")


def _multiple(field: str, value: object, unit: int, low: int, high: int, unit_name: str) -> None:
    if not isinstance(value, int) or not low <= value <= high or value % unit:
        raise ValueError(
            f"{field} must be a multiple of {unit_name} ({unit} bytes) from {low} to "
            f"{high - high % unit} bytes, not {value!r}"
        )


def _shift(size: int) -> int:
    """The base-2 logarithm of a power of two; 0 for 0, which is how the kernel says "none"."""
    return max(size.bit_length() - 1, 0)


def _unshift(shift: int) -> int:
    return 1 << shift if shift else 0


_Group = TypeVar("_Group")


def _stored(group: type[_Group], **values: Any) -> _Group:
    """A group as the kernel has it: shown, not judged, since another server may have set it."""
    made = object.__new__(group)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Basic:
    """What every disk has.

    Args:
        size: of the disk, a multiple of `logical_block_size`.
        logical_block_size: the smallest unit clients read and write; a power of two from 512 to
            the page size.
        physical_block_size: the smallest unit written without reading first; 0 means
            `logical_block_size`.
        io_min: the smallest request worth sending; 0 means `physical_block_size`.
        io_opt: the best request size for streaming, 0 for none.
        max_io_size: of one request, a multiple of `logical_block_size`, at least a page. The block
            layer sends no more than 1280 KiB (Linux 6.12) or 4 MiB (6.18), unless `io_opt` is
            larger or the admin raises queue/max_sectors_kb.
        chunk_size: requests do not cross a multiple of it; the zone size of a zoned disk; 0 for
            none.
        read_only: clients cannot write.
        rotational: a disk that seeks, for which clients sort their requests.
        volatile_cache: completed writes may be lost until a flush. Without it no FLUSH ever comes.
        fua: single writes can be made durable by a flag; needs `volatile_cache`.
        virt_boundary_mask: one less than a power of two; a request's memory has no gaps but at its
            multiples. 0 for none.
    """

    size: int
    logical_block_size: int = 512
    physical_block_size: int = 0
    io_min: int = 0
    io_opt: int = 0
    max_io_size: int = DEFAULT_MAX_IO_SIZE
    chunk_size: int = 0
    read_only: bool = False
    rotational: bool = False
    volatile_cache: bool = False
    fua: bool = False
    virt_boundary_mask: int = 0

    def __post_init__(self) -> None:
        block = self.logical_block_size
        _power_of_two("logical_block_size", block, SECTOR_SIZE, mmap.PAGESIZE)
        if self.physical_block_size == 0:
            object.__setattr__(self, "physical_block_size", block)
        _power_of_two("physical_block_size", self.physical_block_size, block, _HINT_MAX)
        if self.io_min == 0:
            object.__setattr__(self, "io_min", self.physical_block_size)
        # The kernel would raise a smaller io_min, and round a smaller io_opt down to none.
        _power_of_two("io_min", self.io_min, self.physical_block_size, _HINT_MAX)
        _power_of_two("io_opt", self.io_opt, self.io_min, _HINT_MAX, or_zero=True)
        unit_name = "the logical block size"
        _multiple("size", self.size, block, block, _SIZE_MAX, unit_name)
        # Below a page SET_PARAMS or START_DEV fails, on one kernel with a warning in its log.
        _multiple("max_io_size", self.max_io_size, block, mmap.PAGESIZE, _SECTORS_MAX, unit_name)
        _multiple("chunk_size", self.chunk_size, block, 0, _SECTORS_MAX, unit_name)
        _whole("virt_boundary_mask", self.virt_boundary_mask, 0, (1 << 64) - 1)
        if self.virt_boundary_mask & (self.virt_boundary_mask + 1):
            raise ValueError(
                "virt_boundary_mask must be 0 or one less than a power of two, not "
                f"{self.virt_boundary_mask:#x}"
            )
        if self.fua and not self.volatile_cache:
            raise ValueError("fua needs volatile_cache: the kernel would ignore it")

    def _fill(self, raw: ublk_param_basic) -> None:
        raw.attrs = (
            (Attr.READ_ONLY if self.read_only else 0)
            | (Attr.ROTATIONAL if self.rotational else 0)
            | (Attr.VOLATILE_CACHE if self.volatile_cache else 0)
            | (Attr.FUA if self.fua else 0)
        )
        raw.logical_bs_shift = _shift(self.logical_block_size)
        raw.physical_bs_shift = _shift(self.physical_block_size)
        raw.io_min_shift = _shift(self.io_min)
        raw.io_opt_shift = _shift(self.io_opt)
        raw.max_sectors = self.max_io_size // SECTOR_SIZE
        raw.chunk_sectors = self.chunk_size // SECTOR_SIZE
        raw.dev_sectors = self.size // SECTOR_SIZE
        raw.virt_boundary_mask = self.virt_boundary_mask

    @classmethod
    def _read(cls, raw: ublk_param_basic) -> Self:
        return _stored(
            cls,
            size=raw.dev_sectors * SECTOR_SIZE,
            logical_block_size=1 << raw.logical_bs_shift,
            physical_block_size=1 << raw.physical_bs_shift,
            io_min=_unshift(raw.io_min_shift),
            io_opt=_unshift(raw.io_opt_shift),
            max_io_size=raw.max_sectors * SECTOR_SIZE,
            chunk_size=raw.chunk_sectors * SECTOR_SIZE,
            read_only=bool(raw.attrs & Attr.READ_ONLY),
            rotational=bool(raw.attrs & Attr.ROTATIONAL),
            volatile_cache=bool(raw.attrs & Attr.VOLATILE_CACHE),
            fua=bool(raw.attrs & Attr.FUA),
            virt_boundary_mask=raw.virt_boundary_mask,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Discard and write-zeroes; needed for either.

    Args:
        granularity: what is discarded at once, a multiple of the logical block size.
        alignment: where the first such unit starts.
        max_discard_size: of one DISCARD request; 0 if there are none.
        max_write_zeroes_size: of one WRITE_ZEROES request; 0 if there are none.
    """

    granularity: int
    alignment: int = 0
    max_discard_size: int = 0
    max_write_zeroes_size: int = 0

    def __post_init__(self) -> None:
        self._check(SECTOR_SIZE, "a sector")

    def _check(self, unit: int, unit_name: str) -> None:
        _multiple("discard.granularity", self.granularity, unit, unit, _U32_MAX, unit_name)
        _multiple("discard.alignment", self.alignment, unit, 0, _U32_MAX, unit_name)
        for field in ("max_discard_size", "max_write_zeroes_size"):
            value = getattr(self, field)
            _multiple(f"discard.{field}", value, unit, 0, _SECTORS_MAX, unit_name)

    def _fill(self, raw: ublk_param_discard) -> None:
        raw.discard_alignment = self.alignment
        raw.discard_granularity = self.granularity
        raw.max_discard_sectors = self.max_discard_size // SECTOR_SIZE
        raw.max_write_zeroes_sectors = self.max_write_zeroes_size // SECTOR_SIZE
        # The driver hands over one range a request, and insists that this is said.
        raw.max_discard_segments = 1 if self.max_discard_size else 0

    @classmethod
    def _read(cls, raw: ublk_param_discard) -> Self:
        return _stored(
            cls,
            granularity=raw.discard_granularity,
            alignment=raw.discard_alignment,
            max_discard_size=raw.max_discard_sectors * SECTOR_SIZE,
            max_write_zeroes_size=raw.max_write_zeroes_sectors * SECTOR_SIZE,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Devt:
    """Device numbers: the kernel tells them, nobody sets them. The disk's are 0 until started."""

    char_major: int
    char_minor: int
    disk_major: int
    disk_minor: int

    @classmethod
    def _read(cls, raw: ublk_param_devt) -> Self:
        return cls(
            char_major=raw.char_major,
            char_minor=raw.char_minor,
            disk_major=raw.disk_major,
            disk_minor=raw.disk_minor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Zoned:
    """A zoned disk (Linux 6.6); its zones are `Basic.chunk_size` bytes, a power of two.

    Args:
        max_append_size: of one zone append, a multiple of 512.
        max_open_zones: at most so many zones are open at once; 0 for no limit.
        max_active_zones: the same for active ones, and not less than `max_open_zones`.
    """

    max_append_size: int
    max_open_zones: int = 0
    max_active_zones: int = 0

    def __post_init__(self) -> None:
        _multiple(
            "zoned.max_append_size",
            self.max_append_size,
            SECTOR_SIZE,
            SECTOR_SIZE,
            _SECTORS_MAX,
            "a sector",
        )
        self._check(_U32_MAX)

    def _check(self, zones: int) -> None:
        _whole("zoned.max_open_zones", self.max_open_zones, 0, zones)
        _whole("zoned.max_active_zones", self.max_active_zones, 0, zones)
        if self.max_active_zones and self.max_open_zones > self.max_active_zones:
            raise ValueError(
                f"zoned.max_open_zones must be at most max_active_zones ({self.max_active_zones}), "
                f"not {self.max_open_zones}"
            )

    def _fill(self, raw: ublk_param_zoned) -> None:
        raw.max_open_zones = self.max_open_zones
        raw.max_active_zones = self.max_active_zones
        raw.max_zone_append_sectors = self.max_append_size // SECTOR_SIZE

    @classmethod
    def _read(cls, raw: ublk_param_zoned) -> Self:
        return _stored(
            cls,
            max_append_size=raw.max_zone_append_sectors * SECTOR_SIZE,
            max_open_zones=raw.max_open_zones,
            max_active_zones=raw.max_active_zones,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DmaAlign:
    """How the memory of requests is aligned (Linux 6.15); zero copy to a file opened with O_DIRECT
    needs that file's alignment.

    Args:
        alignment: a power of two from 1 to the page size; the kernel's default is 4.
    """

    alignment: int

    def __post_init__(self) -> None:
        _power_of_two("dma_align.alignment", self.alignment, 1, mmap.PAGESIZE)

    def _fill(self, raw: ublk_param_dma_align) -> None:
        raw.alignment = self.alignment - 1

    @classmethod
    def _read(cls, raw: ublk_param_dma_align) -> Self:
        return _stored(cls, alignment=raw.alignment + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The pieces of memory that make up one request (Linux 6.15).

    Args:
        boundary: no piece crosses a multiple of it; a power of two from 4096.
        max_segment_size: of one piece, at least 4096.
        max_segments: the most pieces.
    """

    boundary: int
    max_segment_size: int = _U32_MAX
    max_segments: int = 65535

    def __post_init__(self) -> None:
        _power_of_two("segment.boundary", self.boundary, MIN_SEGMENT_SIZE, 1 << 63)
        _whole("segment.max_segment_size", self.max_segment_size, MIN_SEGMENT_SIZE, _U32_MAX)
        _whole("segment.max_segments", self.max_segments, 1, 65535)

    def _fill(self, raw: ublk_param_segment) -> None:
        raw.seg_boundary_mask = self.boundary - 1
        raw.max_segment_size = self.max_segment_size
        raw.max_segments = self.max_segments

    @classmethod
    def _read(cls, raw: ublk_param_segment) -> Self:
        return _stored(
            cls,
            boundary=raw.seg_boundary_mask + 1,
            max_segment_size=raw.max_segment_size,
            max_segments=raw.max_segments,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Integrity:
    """Metadata beside the data (Linux 7.0, with Feature.INTEGRITY).

    Args:
        metadata_size: for each interval, 1 to 255.
        interval: of data that has one piece of metadata; a power of two from 512 to the logical
            block size.
        pi_offset: where in the metadata the protection information starts.
        checksum: of the protection information, which takes 8 bytes (IP, T10DIF) or 16 (NVME).
        ref_tag: the protection information has a reference tag; needs a checksum.
        capable: the target checks and keeps protection information itself.
        tag_size: bytes of application tag.
        max_segments: the most pieces of memory that hold one request's metadata; 0 for no limit.
    """

    metadata_size: int
    interval: int = 512
    pi_offset: int = 0
    checksum: Checksum = Checksum.NONE
    ref_tag: bool = False
    capable: bool = False
    tag_size: int = 0
    max_segments: int = 0

    def __post_init__(self) -> None:
        _whole("integrity.metadata_size", self.metadata_size, 1, 255)
        self._check(mmap.PAGESIZE)
        if self.checksum not in _TUPLE_SIZES:
            allowed = ", ".join(one.name for one in Checksum)
            raise ValueError(f"integrity.checksum must be one of {allowed}, not {self.checksum!r}")
        room = self.metadata_size - _TUPLE_SIZES[self.checksum]
        if room < 0:
            raise ValueError(
                f"integrity.metadata_size must be at least {_TUPLE_SIZES[self.checksum]} for the "
                f"checksum {Checksum(self.checksum).name}, not {self.metadata_size}"
            )
        _whole("integrity.pi_offset", self.pi_offset, 0, room)
        _whole("integrity.tag_size", self.tag_size, 0, 255)
        _whole("integrity.max_segments", self.max_segments, 0, 65535)
        if self.ref_tag and self.checksum == Checksum.NONE:
            raise ValueError("integrity.ref_tag needs a checksum, not NONE")

    def _check(self, block_size: int) -> None:
        _power_of_two("integrity.interval", self.interval, SECTOR_SIZE, block_size)

    def _fill(self, raw: ublk_param_integrity) -> None:
        raw.flags = (IntegrityFlag.INTEGRITY_CAPABLE if self.capable else 0) | (
            IntegrityFlag.REF_TAG if self.ref_tag else 0
        )
        raw.max_integrity_segments = self.max_segments
        raw.interval_exp = _shift(self.interval)
        raw.metadata_size = self.metadata_size
        raw.pi_offset = self.pi_offset
        raw.csum_type = self.checksum
        raw.tag_size = self.tag_size

    @classmethod
    def _read(cls, raw: ublk_param_integrity) -> Self:
        known = raw.csum_type in Checksum._value2member_map_
        return _stored(
            cls,
            metadata_size=raw.metadata_size,
            interval=_unshift(raw.interval_exp),
            pi_offset=raw.pi_offset,
            checksum=Checksum(raw.csum_type) if known else raw.csum_type,
            ref_tag=bool(raw.flags & IntegrityFlag.REF_TAG),
            capable=bool(raw.flags & IntegrityFlag.INTEGRITY_CAPABLE),
            tag_size=raw.tag_size,
            max_segments=raw.max_integrity_segments,
        )


#: Our name of a group, its type, its member of ublk_params, its class.
_GROUPS: tuple[tuple[str, ParamType, str, Any], ...] = (
    ("basic", ParamType.BASIC, "basic", Basic),
    ("discard", ParamType.DISCARD, "discard", Discard),
    ("zoned", ParamType.ZONED, "zoned", Zoned),
    ("dma_align", ParamType.DMA_ALIGN, "dma", DmaAlign),
    ("segment", ParamType.SEGMENT, "seg", Segment),
    ("integrity", ParamType.INTEGRITY, "integrity", Integrity),
    ("devt", ParamType.DEVT, "devt", Devt),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """All parameters of a device; a group that is None is not sent.

    `devt` is filled in by the kernel and never sent, so that parameters that were read can be
    changed (`dataclasses.replace`) and set again.
    """

    basic: Basic
    discard: Discard | None = None
    zoned: Zoned | None = None
    dma_align: DmaAlign | None = None
    segment: Segment | None = None
    integrity: Integrity | None = None
    devt: Devt | None = None

    def __post_init__(self) -> None:
        block = self.basic.logical_block_size
        if self.discard is not None:
            self.discard._check(block, "the logical block size")
        if self.integrity is not None:
            self.integrity._check(block)
        if self.zoned is not None:
            zone = self.basic.chunk_size
            _power_of_two("chunk_size of a zoned disk", zone, block, _SECTORS_MAX)
            self.zoned._check(self.basic.size // zone)

    @property
    def types(self) -> ParamType:
        """The groups that are there."""
        return ParamType(sum(kind for name, kind, _, _ in _GROUPS if getattr(self, name)))

    def check_granted(self, *, max_io_size: int, flags: Feature) -> None:
        """Checks against the device as ADD_DEV granted it, before SET_PARAMS does.

        `max_io_size` (bytes) and `flags` are the granted ones. Raises ValueError.
        """
        if self.basic.max_io_size > max_io_size:
            raise ValueError(
                f"max_io_size must be at most {max_io_size} bytes, which is what the device was "
                f"granted, not {self.basic.max_io_size}"
            )
        if (self.zoned is not None) != bool(flags & Feature.ZONED):
            raise ValueError("zoned parameters and Feature.ZONED go together: give both or neither")
        if self.integrity is not None and not flags & Feature.INTEGRITY:
            raise ValueError("integrity parameters need a device with Feature.INTEGRITY")

    def pack(self) -> bytes:
        """The 152 bytes of struct ublk_params, with all groups: SET_PARAMS replaces everything."""
        raw = ublk_params(len=ctypes.sizeof(ublk_params), types=self.types & ~ParamType.DEVT)
        for name, kind, member, _ in _GROUPS:
            if raw.types & kind:
                getattr(self, name)._fill(getattr(raw, member))
        return bytes(raw)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Self:
        """Parameters from a struct ublk_params; an older kernel's is shorter.

        Types without a place in `data`, and types of newer kernels, are left out. Values are not
        checked: the device may be another server's. Raises ValueError if no parameters were set.
        """
        raw = ublk_params.from_buffer_copy(bytes(data).ljust(ctypes.sizeof(ublk_params), b"\0"))
        groups = {}
        for name, kind, member, group in _GROUPS:
            place = getattr(ublk_params, member)
            there = raw.types & kind and place.offset + place.size <= len(data)
            groups[name] = group._read(getattr(raw, member)) if there else None
        if groups["basic"] is None:
            raise ValueError("the device has no parameters: none were ever set")
        return _stored(cls, **groups)

    def difference(self, got: Self) -> list[str]:
        """What the kernel made of this wish: dropped groups and changed fields, one string each."""
        return list(self._differences(got))

    def _differences(self, got: Self) -> Iterator[str]:
        for name, kind, _, _ in _GROUPS:
            wish, grant = getattr(self, name), getattr(got, name)
            if wish is None or kind is ParamType.DEVT or wish == grant:
                continue
            if grant is None:
                yield f"no {name}"
                continue
            for field in fields(wish):
                before, after = getattr(wish, field.name), getattr(grant, field.name)
                if before != after:
                    yield f"{name}.{field.name} {after} instead of {before}"
