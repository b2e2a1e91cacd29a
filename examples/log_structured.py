"""A log-structured translation layer: whatever clients write, the target below is written in order.

pyublk add file log.img --size 1G --layer examples/log_structured.py:LogStructured

The target below is cut into segments of 64 blocks. Blocks are appended to the open segment, and a
map in memory says where each block of the disk is; what it was before is dead. When few segments
are free, the collector takes the one with the fewest blocks alive, appends these again, and frees
it. What it moves is what such a layer costs: its write amplification.

A segment is a chain of records: a summary block, then the blocks that it names. A summary has the
number of the record, that of the segment's first record, and for each block which one of the disk
it is, and its checksum. So no block of a client's is ever taken for a summary, and a block that did
not reach the target before the power was cut is not taken for what the summary says it is.

Opening reads all of the log; the newest of each block counts. What was flushed is there again, also
after a power cut: a flush writes the summary of what was appended since the last one, and flushes
below. A freed segment is written again only after a flush, when no record in it is needed. Of a
killed server, what was not flushed is lost: the layer is not `recoverable`.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyublk

BLOCK = 4096
SEGMENT = 64  # blocks
RESERVE = 2  # free segments that the collector begins at
MAGIC = b"pyublk log 1\0\0\0\0"
HEAD = struct.Struct("<16s16sQQI")  # magic, checksum, record, the segment's first record, blocks
ENTRY = struct.Struct("<Q16s")  # which block of the disk, and its checksum
ROOM = (BLOCK - HEAD.size) // ENTRY.size  # blocks that a summary can name


def checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class LogStructured(pyublk.Layer):
    concurrency = "serial"

    def __init__(self, below: pyublk.Target, *, spare: float = 0.2) -> None:
        super().__init__(below)
        if not 0.05 <= spare <= 0.9:
            raise ValueError(f"spare is {spare}: it must be from 0.05 to 0.9 of the target below")
        self.spare = spare

    # ---- the log as it is found ----

    def open(self) -> None:
        super().open()
        try:
            self._segments = self.below.target.size // BLOCK // SEGMENT
            blocks = int((self._segments - RESERVE - 2) * (SEGMENT - 1) * (1 - self.spare))
            if blocks < 1:
                raise ValueError(f"the log needs at least {(RESERVE + 4) * SEGMENT * BLOCK} bytes")
            self.size = blocks * BLOCK
            self.map: dict[int, int] = {}  # block of the disk -> place in the log
            self._owner: dict[int, int] = {}  # the other way round
            self._live = [0] * self._segments
            self._record = 0
            self.written = self.moved = self.summaries = 0
            self._read_log()
            self._flush_below()  # so that no segment that is free now is needed after a power cut
        except BaseException:
            super().close()
            raise
        self._free = [n for n in range(self._segments) if not self._live[n]]
        self._free.reverse()
        self._take_segment()

    def _read_log(self) -> None:
        newest: dict[int, tuple[int, int]] = {}
        for segment in range(self._segments):
            data = bytearray(SEGMENT * BLOCK)
            self.below.read(segment * SEGMENT * BLOCK, memoryview(data))
            at, opened = 0, None
            while at < SEGMENT:
                found = self._summary(segment * SEGMENT + at, data[at * BLOCK : (at + 1) * BLOCK])
                if found is None or found[1] != (found[0] if at == 0 else opened):
                    break  # nothing, or of the time before the segment was freed
                record, opened, entries = found
                self._record = max(self._record, record + 1)
                for number, (block, check) in enumerate(entries, at + 1):
                    kept = bytes(data[number * BLOCK : (number + 1) * BLOCK])
                    place = segment * SEGMENT + number
                    if checksum(kept) == check and newest.get(block, (-1, 0)) < (record, place):
                        newest[block] = (record, place)
                at += 1 + len(entries)
        for block, (_, place) in newest.items():
            if block < self.size // BLOCK:
                self._point(block, place)

    def _summary(self, place: int, data: bytes) -> "tuple[int, int, list[Any]] | None":
        magic, check, record, opened, count = HEAD.unpack_from(data)
        rest = data[32 : HEAD.size + count % (ROOM + 1) * ENTRY.size]
        if magic != MAGIC or check != checksum(place.to_bytes(8, "little") + rest):
            return None
        return record, opened, list(ENTRY.iter_unpack(rest[HEAD.size - 32 :]))

    # ---- appending ----

    def _take_segment(self) -> None:
        self._segment = self._free.pop()
        self._opened = self._record
        self._begin_record(0)

    def _begin_record(self, at: int) -> None:
        """The next summary is there, in blocks from the segment's first."""
        self._start = at
        self._entries: list[tuple[int, bytes]] = []

    def _seal(self) -> None:
        """Writes the summary of what was appended since the last one."""
        if not self._entries:
            return
        place = self._segment * SEGMENT + self._start
        body = HEAD.pack(MAGIC, b"", self._record, self._opened, len(self._entries))[32:]
        body += b"".join(ENTRY.pack(*entry) for entry in self._entries)
        head = MAGIC + checksum(place.to_bytes(8, "little") + body)
        self._put(place, (head + body).ljust(BLOCK, b"\0"))
        self.summaries += 1
        self._record += 1
        self._begin_record(self._start + 1 + len(self._entries))

    def _append(self, block: int, data: bytes) -> None:
        if self._start + 1 + len(self._entries) >= SEGMENT:
            self._seal()
            self._take_segment()
        place = self._segment * SEGMENT + self._start + 1 + len(self._entries)
        self._put(place, data)
        self._entries.append((block, checksum(data)))
        self._point(block, place)

    def _put(self, place: int, data: bytes) -> None:
        self.below.write(place * BLOCK, memoryview(data))

    def _point(self, block: int, place: int | None) -> None:
        before = self.map.pop(block, None)
        if before is not None:
            self._live[before // SEGMENT] -= 1
            del self._owner[before]
        if place is not None:
            self.map[block] = place
            self._owner[place] = block
            self._live[place // SEGMENT] += 1

    # ---- collecting ----

    def _make_room(self) -> None:
        while len(self._free) < RESERVE:
            full = [n for n in range(self._segments) if n not in (self._segment, *self._free)]
            victim = min(full, key=self._live.__getitem__)
            data = bytearray(BLOCK)
            for place in range(victim * SEGMENT, (victim + 1) * SEGMENT):
                if (block := self._owner.get(place)) is not None:
                    self.below.read(place * BLOCK, memoryview(data))
                    self._append(block, bytes(data))
                    self.moved += 1
            self.flush()  # from here on, no record in it is needed
            self._free.insert(0, victim)

    # ---- as a disk ----

    def read(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), BLOCK):
            place = self.map.get((offset + at) // BLOCK)
            if place is None:
                buffer[at : at + BLOCK] = bytes(BLOCK)
            else:
                self.below.read(place * BLOCK, buffer[at : at + BLOCK])

    def write(self, offset: int, data: memoryview) -> None:
        for at in range(0, len(data), BLOCK):
            self._make_room()
            self._append((offset + at) // BLOCK, bytes(data[at : at + BLOCK]))
            self.written += 1

    def flush(self) -> None:
        self._seal()
        self._flush_below()

    def _flush_below(self) -> None:
        if "flush" in self.below.methods:
            self.below.flush()

    def discard(self, offset: int, length: int) -> None:
        """Clients get zeroes from here on, or, after a power cut, maybe what was there once."""
        for block in range(offset // BLOCK, (offset + length) // BLOCK):
            self._point(block, None)

    def profile(self) -> pyublk.Profile:
        return replace(
            super().profile(),
            size=self.size,
            block_size=BLOCK,
            physical_block_size=BLOCK,
            io_min=BLOCK,
            discard_granularity=BLOCK,
        )

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        raise ValueError("a log keeps its size: make another, and copy the disk")

    def close(self) -> None:
        try:
            self.flush()
        finally:
            super().close()

    def status(self) -> dict[str, Any]:
        amplification = (self.written + self.moved + self.summaries) / max(1, self.written)
        return {
            "written": self.written,
            "moved": self.moved,
            "summaries": self.summaries,
            "write_amplification": round(amplification, 3),
            "free_segments": len(self._free),
        }
