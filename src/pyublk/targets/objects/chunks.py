# SPDX-License-Identifier: MIT
"""Chunks as objects: fetched once however many want one, and kept for a while."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable

from pyublk.targets.objects.codec import Codec
from pyublk.targets.objects.manifest import Entry, Manifest
from pyublk.targets.objects.store import Objects

#: Chunks of which is remembered where the last read ended.
_READERS = 64


class _Chunk:
    """A chunk's bytes, in the pieces in which they arrive. Who changes it has a lock; what is there
    stays, and is read without."""

    __slots__ = ("_pieces", "_starts", "came", "failure", "waiting")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[memoryview] = []
        self.came = 0
        self.failure: BaseException | None = None
        self.waiting: list[tuple[int, threading.Event]] = []

    def add(self, start: int, piece: memoryview) -> None:
        """What came before, by an attempt that failed, is not taken again."""
        end = start + len(piece)
        if end > self.came:
            self._pieces.append(piece[self.came - start :])
            self._starts.append(self.came)
            self.came = end
            self._wake(end)

    def fail(self, failure: BaseException) -> None:
        self.failure = failure
        self._wake(None)

    def _wake(self, came: int | None) -> None:
        for waiting in list(self.waiting):
            if came is None or waiting[0] <= came:
                self.waiting.remove(waiting)
                waiting[1].set()

    def copy(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with bytes that have come, from `start` on."""
        at, number = 0, bisect_right(self._starts, start) - 1
        while at < len(buffer):
            skip = start + at - self._starts[number]
            piece = self._pieces[number][skip : skip + len(buffer) - at]
            buffer[at : at + len(piece)] = piece
            at += len(piece)
            number += 1


class Chunks:
    """Reads and writes chunks' objects. Its methods may be called at once.

    A read that goes on where another ended, or begins a chunk, or wants a quarter of it, fetches
    the whole chunk, and so does any read of a compressed one; others fetch what they want. Who
    wants a part of a chunk that is under way has it as soon as it is there.

    Args:
        objects: where they are.
        manifest: whose they are.
        cache: bytes of chunks to keep; at least one chunk is.
        ahead: called with the number of a chunk that sequential reads have come to.
    """

    def __init__(
        self, objects: Objects, manifest: Manifest, *, cache: int, ahead: Callable[[int], None]
    ) -> None:
        self._ahead = ahead
        self._objects = objects
        self._manifest = manifest
        self._size = manifest.chunk_size
        self._codec = Codec(manifest.compression, manifest.chunk_size)
        self._most = max(1, cache // manifest.chunk_size)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Chunk] = OrderedDict()  # and those that are under way
        self._ends: OrderedDict[int, int] = OrderedDict()
        self.hits = 0
        self.fetched = 0
        self.written = 0
        self.bytes_fetched = 0
        self.bytes_written = 0

    def read(self, entry: Entry, index: int, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes of a chunk from `start` on. Raises Failure."""
        path = self._manifest.chunk_path(index, entry)
        end = start + len(buffer)
        with self._lock:
            # Requests of one reader may come here out of order: nearly to the end is enough.
            comes = start == 0 and self._ends.get(index - 1, 0) >= self._size * 3 // 4
            goes_on = start in (0, self._ends.pop(index, None))
            self._ends[index] = end
            if len(self._ends) > _READERS:
                self._ends.popitem(last=False)
            known = path in self._kept
        if comes:
            self._ahead(index)
        much = len(buffer) >= self._size // 4
        if known or goes_on or much or self._codec.compression != "none":
            self._copy(path, start, buffer)
            return
        buffer[:] = self._objects.get(path, start, end)
        self._count_fetch(len(buffer))

    def whole(self, entry: Entry, index: int) -> bytearray:
        """All of a chunk. Raises Failure."""
        data = bytearray(self._size)
        self._copy(self._manifest.chunk_path(index, entry), 0, memoryview(data))
        return data

    def fetch(self, entry: Entry, index: int) -> None:
        """Has a chunk here for reads to come, unless it is under way. Raises Failure."""
        self._copy(self._manifest.chunk_path(index, entry), 0, memoryview(bytearray()))

    def _copy(self, path: str, start: int, buffer: memoryview) -> None:
        """By way of the whole chunk, which is kept."""
        with self._lock:
            chunk = self._kept.get(path)
            if mine := chunk is None:
                chunk = _Chunk()
                self._keep(path, chunk)
            else:
                self._kept.move_to_end(path)
                self.hits += 1
        if mine:
            self._fetch(path, chunk)
        else:
            self._wait(chunk, start + len(buffer))
        chunk.copy(start, buffer)

    def _wait(self, chunk: _Chunk, end: int) -> None:
        if chunk.came >= end:
            return
        there = threading.Event()
        with self._lock:
            if chunk.came >= end or chunk.failure is not None:
                there.set()
            else:
                chunk.waiting.append((end, there))
        there.wait()
        if chunk.came < end and chunk.failure is not None:
            raise chunk.failure

    def _fetch(self, path: str, chunk: _Chunk) -> None:
        def arrived(start: int, piece: memoryview) -> None:
            with self._lock:
                chunk.add(start, piece)

        try:
            if self._codec.compression == "none":
                length = self._size
                self._objects.pieces(path, length, arrived)
            else:
                raw = self._objects.get(path)
                length = len(raw)
                arrived(0, self._codec.decode(raw, path))
        except BaseException as error:
            with self._lock:
                self._kept.pop(path, None)
                chunk.fail(error)
            raise
        self._count_fetch(length)

    def put(self, entry: Entry, index: int, data: bytes) -> None:
        """Writes all of a chunk, and keeps it: who writes a part of it next needs the rest."""
        path = self._manifest.chunk_path(index, entry)
        encoded = self._codec.encode(data)
        self._objects.put(path, encoded)
        with self._lock:
            self.written += 1
            self.bytes_written += len(encoded)
            chunk = _Chunk()
            chunk.add(0, memoryview(data))
            self._keep(path, chunk)

    def _keep(self, path: str, chunk: _Chunk) -> None:
        """In the place of those that were used last the longest ago. [locked]"""
        there = [one for one, kept in self._kept.items() if kept.came == self._size]
        for one in there[: max(0, len(self._kept) + 1 - self._most)]:
            del self._kept[one]
        self._kept[path] = chunk

    def _count_fetch(self, length: int) -> None:
        with self._lock:
            self.fetched += 1
            self.bytes_fetched += length

    def status(self) -> dict[str, int]:
        """Counters."""
        return {
            "chunk_hits": self.hits,
            "fetches": self.fetched,
            "bytes_fetched": self.bytes_fetched,
            "chunks_written": self.written,
            "bytes_written": self.bytes_written,
        }
