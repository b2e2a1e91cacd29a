# SPDX-License-Identifier: MIT
"""blktrace's records (linux/blktrace_api.h, version 7): 48 bytes each, then what belongs to one.

A trace is a file for each queue, `NAME.blktrace.N`, as blktrace itself writes one for each CPU.
"""

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import NamedTuple

from pyublk import errors

_LAYOUT = struct.Struct("<IIQQIIIIIHH")
_MAGIC = 0x65617400
_VERSION = 7
#: What the magic number looks like on a machine of the other byte order.
_SWAPPED = struct.unpack("<I", struct.pack(">I", _MAGIC | _VERSION))[0]


class TraceError(errors.UblkError):
    """A file is no trace that can be read."""


class Action(IntEnum):
    """What happened: the low half of a record's `action`. Others are skipped by `read`."""

    QUEUE = 1
    ISSUE = 7
    COMPLETE = 8


class Category(IntFlag):
    """What it happened to: the high half of a record's `action`."""

    READ = 1 << 0
    WRITE = 1 << 1
    FLUSH = 1 << 2
    SYNC = 1 << 3
    QUEUE = 1 << 4
    REQUEUE = 1 << 5
    ISSUE = 1 << 6
    COMPLETE = 1 << 7
    FS = 1 << 8
    PC = 1 << 9
    NOTIFY = 1 << 10
    AHEAD = 1 << 11
    META = 1 << 12
    DISCARD = 1 << 13
    DRV_DATA = 1 << 14
    FUA = 1 << 15


class Record(NamedTuple):
    """One record: the fields of the kernel's struct blk_io_trace.

    `time` is in nanoseconds of any clock that all files of a trace share, `sector` in units of 512
    bytes, `length` in bytes. `sequence` counts the records of a `cpu` (of ours: of a
    queue), lost ones too.
    """

    sequence: int
    time: int
    sector: int
    length: int
    action: int
    pid: int
    device: int
    cpu: int
    error: int
    pdu: bytes = b""


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of one file, in its order.

    Zeros at the end are left out: a server that was killed has not cut off what it did not use.
    Raises TraceError for another kind of file, or one that ends in the middle of a record, and
    OSError for one that cannot be read.
    """
    data = Path(path).read_bytes()
    at, end = 0, len(data)
    while at < end:
        if end - at < _LAYOUT.size:
            if not any(data[at:]):
                return
            raise _cut_off(path, at)
        magic, *fields, pdu = _LAYOUT.unpack_from(data, at)
        if magic != _MAGIC | _VERSION:
            if at and not any(data[at:]):
                return
            raise _wrong_magic(path, at, magic)
        begin, at = at, at + _LAYOUT.size
        if end - at < pdu:
            raise _cut_off(path, begin)
        yield Record._make((*fields, data[at : at + pdu]))
        at += pdu


def _cut_off(path: str | Path, at: int) -> TraceError:
    return TraceError(f"{path} ends in the middle of a record, which begins at byte {at}")


def _wrong_magic(path: str | Path, at: int, magic: int) -> TraceError:
    if at:
        return TraceError(f"{path} has something at byte {at} that is not a record of blktrace")
    if magic & 0xFFFFFF00 == _MAGIC:
        return TraceError(
            f"{path} is of version {magic & 0xFF} of blktrace's format; only {_VERSION} is read"
        )
    if magic == _SWAPPED:
        return TraceError(f"{path} was recorded on a machine of the other byte order")
    return TraceError(f"{path} is not a trace: it does not begin with a record of blktrace")


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Writes a file of them. Raises OSError, and ValueError for what does not fit a field."""
    with open(path, "wb") as file:
        for record in records:
            *fields, pdu = record
            try:
                file.write(_LAYOUT.pack(_MAGIC | _VERSION, *fields, len(pdu)) + pdu)
            except struct.error as error:
                raise ValueError(f"{record} does not fit blktrace's format: {error}") from None
