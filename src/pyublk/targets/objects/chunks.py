# SPDX-License-Identifier: MIT
"""Chunks as objects: fetched once however many want one, and kept for a while."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from pyublk.targets.objects.codec import Codec
from pyublk.targets.objects.manifest import Entry, Manifest
from pyublk.targets.objects.store import Objects

#: Chunks of which is remembered where the last read ended.
_READERS = 64


class Chunks:
    """Reads and writes chunks' objects. Its methods may be called at once.

    A read that goes on where another ended, or begins a chunk, or wants a quarter of it, fetches
    the whole chunk, and so does any read of a compressed one; others fetch what they want.

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
        self._kept: OrderedDict[str, memoryview] = OrderedDict()
        self._coming: dict[str, Future[memoryview]] = {}
        self._ends: OrderedDict[int, int] = OrderedDict()
        self.hits = 0
        self.fetched = 0
        self.written = 0
        self.bytes_fetched = 0
        self.bytes_written = 0

    def read(self, entry: Entry, index: int, start: int, end: int) -> memoryview:
        """The bytes of a chunk from `start` to `end`. Raises Failure."""
        path = self._manifest.chunk_path(index, entry)
        with self._lock:
            # Requests of one reader may come here out of order: nearly to the end is enough.
            comes = start == 0 and self._ends.get(index - 1, 0) >= self._size * 3 // 4
            goes_on = start in (0, self._ends.pop(index, None))
            self._ends[index] = end
            if len(self._ends) > _READERS:
                self._ends.popitem(last=False)
            known = path in self._kept or path in self._coming
        if comes:
            self._ahead(index)
        much = end - start >= self._size // 4
        if known or goes_on or much or self._codec.compression != "none":
            return self._whole(path)[start:end]
        data = self._objects.get(path, start, end)
        self._count_fetch(len(data))
        return data

    def whole(self, entry: Entry, index: int) -> memoryview:
        """All of a chunk. Raises Failure."""
        return self._whole(self._manifest.chunk_path(index, entry))

    def _whole(self, path: str) -> memoryview:
        with self._lock:
            if (data := self._kept.get(path)) is not None:
                self._kept.move_to_end(path)
                self.hits += 1
                return data
            coming = self._coming.get(path)
            if coming is None:
                mine = self._coming[path] = Future()
            else:
                self.hits += 1
        if coming is not None:
            return coming.result()
        try:
            raw = self._objects.get(path)
            self._count_fetch(len(raw))
            data = self._codec.decode(raw, path)
        except BaseException as error:
            with self._lock:
                del self._coming[path]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._coming[path]
            self._keep(path, data)
        mine.set_result(data)
        return data

    def put(self, entry: Entry, index: int, data: bytes) -> None:
        """Writes all of a chunk, and keeps it: who writes a part of it next needs the rest."""
        path = self._manifest.chunk_path(index, entry)
        encoded = self._codec.encode(data)
        self._objects.put(path, encoded)
        with self._lock:
            self.written += 1
            self.bytes_written += len(encoded)
            self._keep(path, memoryview(data))

    def _keep(self, path: str, data: memoryview) -> None:
        self._kept[path] = data
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

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
