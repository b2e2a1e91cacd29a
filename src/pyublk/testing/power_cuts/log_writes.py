# SPDX-License-Identifier: MIT
"""The record in the format of dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst
in the kernel's source): a superblock, then an entry of one sector for each request, with its data
behind it. Numbers are little-endian."""

import struct
from collections.abc import Iterator
from pathlib import Path

from pyublk.testing.power_cuts.record import Flush, Mark, Record, Write

MAGIC = 0x6A736677736872
VERSION = 1
#: magic, version, number of entries, bytes of a sector
SUPER = struct.Struct("<QQQI")
#: first sector, number of sectors, flags, bytes of a mark's name
ENTRY = struct.Struct("<QQQQ")
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
#: The mark that dm-log-writes sets when it is removed.
END = "dm-log-writes-end"


def _in_order(record: Record) -> Iterator[Write | Flush | Mark]:
    """A write stands where it became durable, before the flush that made it so; those that never
    were stand at the end, as when the kernel's device is removed."""
    order: list[tuple[tuple[float, int, int], Write | Flush | Mark]] = [
        ((one.stable or float("inf"), 0, one.completed), one)
        for one in record.writes
        if one.completed is not None
    ]
    order += [
        ((one.completed, 1, 0), one)
        for one in record.flushes
        if one.completed is not None and not one.failed
    ]
    order += [((one.time, 0, 0), one) for one in record.marks]
    yield from (one for _, one in sorted(order, key=lambda found: found[0]))
    yield Mark(END, record.now)


def _entry(one: Write | Flush | Mark, sector: int) -> bytes:
    """An entry with its data."""
    if isinstance(one, Mark):
        name = one.name.encode()[: sector - ENTRY.size - 1]
        return (ENTRY.pack(0, 0, MARK, len(name)) + name).ljust(sector, b"\0")
    if isinstance(one, Flush):
        return ENTRY.pack(0, 0, FLUSH, 0).ljust(sector, b"\0")
    flags = (FUA if one.fua else 0) | (DISCARD if one.kind == "discard" else 0)
    header = ENTRY.pack(one.offset // sector, one.length // sector, flags, 0)
    if one.kind == "discard":
        return header.ljust(sector, b"\0")
    return header.ljust(sector, b"\0") + (bytes(one.length) if one.data is None else one.data)


def write_log(record: Record, sector: int, path: Path | str) -> None:
    """Writes the record into a file; `sector`: bytes, the block size of the disk."""
    count = 0
    with open(path, "wb") as file:
        file.seek(sector)
        for one in _in_order(record):
            file.write(_entry(one, sector))
            count += 1
        file.seek(0)
        file.write(SUPER.pack(MAGIC, VERSION, count, sector).ljust(sector, b"\0"))
