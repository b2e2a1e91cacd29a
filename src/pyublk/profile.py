# SPDX-License-Identifier: MIT
"""The properties of a target's disk, as one value, which is read once the target is open."""

from dataclasses import dataclass
from typing import Literal

from pyublk.params import Basic, Discard, DmaAlign, Integrity, Params, Segment, Zoned
from pyublk.paths import DataPath
from pyublk.uapi import Feature

Concurrency = Literal["serial", "per_queue", "parallel"]
#: How requests reach a target: a C function, its files, its server, plain methods, or coroutines.
Dispatch = Literal["native", "mapped", "connected", "sync", "async"]

#: The most one DISCARD or WRITE_ZEROES request covers unless the target says otherwise (bytes).
MAX_DISCARD = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneLimits:
    """The zones of a zoned disk: their size in bytes, and how many may be open, or active, at once
    (0: no limit)."""

    zone_size: int
    max_open: int = 0
    max_active: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The properties of a target's disk; from `Target.profile`, once the target is open.

    To change properties, a target or a layer returns a changed copy (`dataclasses.replace`).

    Args:
        kind: how requests reach the target.
        concurrency: which calls may run at once; see `Target`.
        operations: the methods of the requests that it supports ("read", "write", "flush",
            "discard", "write_zeroes", "write_fua"; never "handle").
        size, block_size, physical_block_size, io_min, io_opt, discard_granularity, max_discard:
            bytes; see `Target`.
        read_only, rotational: whether the disk is.
        paths: the data paths that it supports, the best first.
        needs: device features that it cannot do without, besides those of its data path.
        max_stall: seconds that a request may take without a failure; see `Target`.
        recoverable: whether what was written is there again when the target is opened anew.
        integrity: the metadata for the data.
        zones: those of a zoned disk.
        segment, virt_boundary_mask: how the memory of a request may be split.
        dma_alignment: bytes to which zero copy requires a request's memory to be aligned.
    """

    kind: Dispatch
    concurrency: Concurrency
    operations: frozenset[str]
    size: int
    block_size: int
    physical_block_size: int
    io_min: int
    io_opt: int
    discard_granularity: int
    max_discard: int
    read_only: bool
    rotational: bool
    paths: tuple[DataPath, ...]
    needs: Feature
    max_stall: float
    recoverable: bool
    integrity: Integrity | None
    zones: ZoneLimits | None = None
    segment: Segment | None = None
    virt_boundary_mask: int = 0
    dma_alignment: int | None = None

    def params(self, max_io_size: int, *, zero_copy: bool = False) -> Params:
        """The device parameters of such a disk, whose requests have at most `max_io_size` bytes.

        Raises ValueError, naming field, value and what is allowed.
        """
        demanded = self.dma_alignment if zero_copy else None
        return Params(
            basic=self._basic(max_io_size),
            discard=self._discard(),
            zoned=self._zoned(max_io_size),
            dma_align=None if demanded is None else DmaAlign(alignment=demanded),
            segment=self.segment,
            integrity=self.integrity,
        )

    def _basic(self, max_io_size: int) -> Basic:
        return Basic(
            size=self.size,
            logical_block_size=self.block_size,
            physical_block_size=self.physical_block_size,
            io_min=self.io_min,
            io_opt=self.io_opt,
            max_io_size=max_io_size,
            chunk_size=self.zones.zone_size if self.zones is not None else 0,
            read_only=self.read_only,
            rotational=self.rotational,
            volatile_cache=bool(self.operations & {"flush", "write_fua"}),
            fua="write_fua" in self.operations,
            virt_boundary_mask=self.virt_boundary_mask,
        )

    def _discard(self) -> Discard | None:
        takes = self.operations & {"discard", "write_zeroes"}
        if not takes or self.read_only:
            return None
        limit = self.max_discard - self.max_discard % self.discard_granularity
        return Discard(
            granularity=self.discard_granularity,
            max_discard_size=limit if "discard" in takes else 0,
            max_write_zeroes_size=limit if "write_zeroes" in takes else 0,
        )

    def _zoned(self, max_io_size: int) -> Zoned | None:
        zones = self.zones
        if zones is None:
            return None
        return Zoned(
            max_append_size=min(max_io_size, zones.zone_size),
            max_open_zones=zones.max_open,
            max_active_zones=zones.max_active,
        )
