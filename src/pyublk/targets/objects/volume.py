# SPDX-License-Identifier: MIT
"""An open disk in an object store: reads, buffered writes, flushes that are whole or not at all.

What a chunk reads as is its base, in the store, with layers of new bytes over it, the oldest first:

    base        the object that the map names, or one that was written since and that no manifest
                has yet (`_early`, and `_early_frozen` of the flush that runs)
    frozen      what the flush that runs is uploading
    uploading   what is uploaded before a flush, because the buffer is full
    dirty       what came since

A flush freezes all that is dirty at one moment, so that what it makes durable is the disk as it was
then. A chunk is uploaded early only if the flush that runs has none of its bytes: no chunk is
uploaded twice at once, so the base of one that is uploaded stays the same meanwhile.
"""

import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pyublk._native import become_io_flusher
from pyublk.targets.objects.chunks import Chunks
from pyublk.targets.objects.dirty import DirtyChunk
from pyublk.targets.objects.failures import Changed, Exists, Failure, Missing
from pyublk.targets.objects.manifest import (
    ChunkTable,
    Entry,
    Manifest,
    manifest_path,
    put_pages,
)
from pyublk.targets.objects.store import Objects, Version, log

#: What a dirty chunk counts at least: its memory's bookkeeping, and a request to come.
_LEAST_HELD = 4096
#: How often a swap is repeated whose conflict left the manifest as it was.
_CONFLICTS = 8


class Volume:
    """A disk that is open. Its methods may be called at once, from any thread.

    Args:
        objects: where it is.
        name: of the disk there.
        manifest, version: its state; `version` None opens it for reading.
        buffer: bytes of new data to keep in memory before chunks are uploaded early.
        cache: bytes of chunks that were read to keep.
        uploads: chunks that a flush uploads at once.
        ahead: chunks to fetch before sequential reads come to them.
    """

    def __init__(
        self,
        objects: Objects,
        name: str,
        manifest: Manifest,
        version: Version | None,
        *,
        buffer: int,
        cache: int,
        uploads: int,
        ahead: int,
    ) -> None:
        self.name = name
        self.size = manifest.size
        self._objects = objects
        self._path = manifest_path(name)
        self._manifest = manifest
        self._version = version
        self._chunk = manifest.chunk_size
        self._bound = max(buffer, 2 * manifest.chunk_size)
        self._ahead = min(ahead, cache // manifest.chunk_size // 2)
        self._chunks = Chunks(objects, manifest, cache=cache, ahead=self._fetch_ahead)
        self._table = ChunkTable(objects, manifest)
        self._zeroes = bytes(manifest.chunk_size)
        self._pool = ThreadPoolExecutor(
            uploads, thread_name_prefix="pyublk-upload", initializer=become_io_flusher
        )
        self._fetchers = ThreadPoolExecutor(
            max(1, self._ahead), thread_name_prefix="pyublk-fetch", initializer=become_io_flusher
        )
        self._flush_lock = threading.Lock()
        self._lock = threading.Condition()
        self._dirty: dict[int, DirtyChunk] = {}
        self._uploading: dict[int, DirtyChunk] = {}
        self._frozen: dict[int, DirtyChunk] = {}
        self._early: dict[int, Entry | None] = {}
        self._early_frozen: dict[int, Entry | None] = {}
        self._freezing = False
        self._held = 0  # by what is dirty
        self._held_else = 0  # by what is frozen, or uploading
        self._seq = 0
        self._failure: Failure | None = None
        self.early_uploads = 0

    # ---- reads ----

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer`. Raises Failure."""
        for index, start, end, at in self._pieces(offset, len(buffer)):
            self._read_piece(index, start, buffer[at : at + end - start])

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Of a request: (chunk, start and end in it, offset in the request)."""
        at = 0
        while at < length:
            index, start = divmod(offset + at, self._chunk)
            end = min(self._chunk, start + length - at)
            yield index, start, end, at
            at += end - start

    def _read_piece(self, index: int, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        self._table.ensure(index)
        while True:
            with self._lock:
                self._check()
                newest = self._layers(index)[-1:]
                if newest and newest[0].covers(start, end):
                    newest[0].overlay(start, buffer)
                    return
                base = self._base(index)
            if base is not None:
                self._chunks.read(base, index, start, buffer)
            else:
                buffer[:] = memoryview(self._zeroes)[: end - start]
            with self._lock:
                if self._base(index) == base:  # else layers may have gone into another base
                    for layer in self._layers(index):
                        layer.overlay(start, buffer)
                    return

    def _fetch_ahead(self, index: int) -> None:
        """Begins to fetch the chunks after this one."""
        last = min(index + self._ahead, (self.size - 1) // self._chunk)
        for following in range(index + 1, last + 1):
            with suppress(RuntimeError):  # the disk is being closed
                self._fetchers.submit(self._fetch, following)

    def _fetch(self, index: int) -> None:
        with suppress(OSError):  # whoever reads it is told
            self._table.ensure(index)
            with self._lock:
                base = self._base(index)
            if base is not None:
                self._chunks.fetch(base, index)

    def _layers(self, index: int) -> list[DirtyChunk]:
        """A chunk's new bytes, the oldest first. [locked]"""
        found = (self._frozen.get(index), self._uploading.get(index), self._dirty.get(index))
        return [layer for layer in found if layer is not None]

    def _base(self, index: int) -> Entry | None:
        """The object under the layers; None: zeroes. [locked, and the table has the page]"""
        for early in (self._early, self._early_frozen):
            if index in early:
                return early[index]
        return self._table.get(index)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ---- writes ----

    def write(self, offset: int, data: memoryview) -> None:
        """Takes `data` into the buffer. Raises Failure."""
        for index, start, end, at in self._pieces(offset, len(data)):
            with self._lock:
                self._check()
                chunk = self._dirty_chunk(index)
                self._held -= chunk.held
                chunk.write(start, data[at : at + end - start])
                self._held += chunk.held
        self._relieve()

    def zero(self, offset: int, length: int, *, partly: bool = True) -> None:
        """Makes these bytes zero. Without `partly`, only chunks that are all in the range."""
        for index, start, end, _ in self._pieces(offset, length):
            is_all = start == 0 and end == self._limit(index)
            if not (is_all or partly):
                continue
            self._table.ensure(index)
            with self._lock:
                self._check()
                if self._layers(index) or self._base(index) is not None:
                    end = self._chunk if is_all else end
                    chunk = self._dirty_chunk(index)
                    self._held -= chunk.held
                    chunk.zero(start, end)
                    self._held += chunk.held
        self._relieve()

    def _limit(self, index: int) -> int:
        """Where a chunk ends, or the disk in it."""
        return min(self._chunk, self.size - index * self._chunk)

    def _dirty_chunk(self, index: int) -> DirtyChunk:
        chunk = self._dirty.get(index)
        if chunk is None:
            chunk = self._dirty[index] = DirtyChunk(self._chunk)
            self._held += _LEAST_HELD
        return chunk

    def _moved(self) -> None:
        """Chunks were moved between the layers. [locked]"""
        self._held = _held(self._dirty)
        self._held_else = _held(self._uploading) + _held(self._frozen)
        self._lock.notify_all()

    def _relieve(self) -> None:
        """Uploads chunks while the buffer is full, or one if it is half full, or waits."""
        while self._relieve_once():
            pass

    def _relieve_once(self) -> bool:
        """Whether the buffer is still full."""
        with self._lock:
            while True:
                if self._held <= self._bound // 2:
                    return False
                if not self._freezing and (index := self._victim()) is not None:
                    self._uploading[index] = chunk = self._dirty.pop(index)
                    self._moved()
                    break
                if self._held + self._held_else <= self._bound:
                    return False
                self._lock.wait()
                self._check()
        try:
            self._table.ensure(index)
            with self._lock:
                base = self._base(index)
            entry = self._upload(index, chunk, base)
        except BaseException:
            with self._lock:
                self._dirty[index] = chunk.put_under(self._dirty.get(index))
                del self._uploading[index]
                self._moved()
            raise
        with self._lock:
            self._early[index] = entry
            del self._uploading[index]
            self.early_uploads += 1
            self._moved()
            return self._held + self._held_else > self._bound

    def _victim(self) -> int | None:
        """The dirty chunk to upload early: one that is complete, else the oldest. [locked]"""
        free = [
            index
            for index in self._dirty
            if index not in self._frozen and index not in self._uploading
        ]
        for index in free:
            if self._dirty[index].covers(0, self._limit(index)):
                return index
        return free[0] if free else None

    def _upload(self, index: int, chunk: DirtyChunk, base: Entry | None) -> Entry | None:
        """Writes the chunk's object, and returns its name; None for zeroes, which need none."""
        if base is None or chunk.covers(0, self._limit(index)):
            data = bytearray(self._chunk)
        else:
            data = self._chunks.whole(base, index)
        chunk.overlay(0, data)
        if data == self._zeroes:
            return None
        entry = self._new_entry()
        self._chunks.put(entry, index, bytes(data))
        return entry

    def _new_entry(self) -> Entry:
        with self._lock:
            self._seq += 1
            return Entry(self._manifest.own, self._manifest.epoch, self._seq)

    # ---- flush ----

    def flush(self) -> None:
        """Makes all that was written durable, at once: new objects, and then the manifest.

        Raises Failure; then nothing is lost, and the next flush tries again. After another writer
        has opened the disk, every call fails.
        """
        with self._flush_lock:
            self._flush()

    def _flush(self, *, closing: bool = False) -> None:
        with self._lock:
            self._check()
            self._freezing = True
            try:
                while self._uploading:
                    self._lock.wait()
                self._frozen, self._dirty = self._dirty, {}
                self._early_frozen, self._early = self._early, {}
                size, settled = self.size, self._seq
            finally:
                self._freezing = False
                self._moved()
            nothing = not self._frozen and not self._early_frozen
        if nothing and size == self._manifest.size and not closing:
            return
        uploaded: dict[int, Entry | None] = {}
        try:
            self._upload_frozen(uploaded)
            changes = {**self._early_frozen, **uploaded}
            self._commit(changes, size=size, seq=settled, closing=closing)
        except BaseException:
            self._thaw(uploaded)
            raise

    def _upload_frozen(self, uploaded: dict[int, Entry | None]) -> None:
        """Uploads what is frozen; `uploaded` has what succeeded, also when it raises."""

        def upload(index: int, chunk: DirtyChunk) -> None:
            self._table.ensure(index)
            with self._lock:
                base = self._early_frozen[index] if index in self._early_frozen else (
                    self._table.get(index)
                )  # fmt: skip
            uploaded[index] = self._upload(index, chunk, base)

        self._all_of([lambda i=i, c=c: upload(i, c) for i, c in self._frozen.items()])  # type: ignore[misc]

    def _all_of(self, steps: list[Callable[[], None]]) -> None:
        """Runs them side by side, waits for all, and raises the first failure."""
        if len(steps) == 1:
            steps[0]()
            return
        futures = [self._pool.submit(step) for step in steps]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        if failures:
            raise failures[0]

    def _commit(
        self, changes: Mapping[int, Entry | None], *, size: int, seq: int, closing: bool
    ) -> None:
        pages = self._table.with_changes(changes)
        manifest = put_pages(self._objects, self._manifest, pages, self._new_entry)
        manifest = replace(
            manifest,
            size=size,
            seq=seq,
            flushes=manifest.flushes + 1,
            attempt=secrets.token_hex(8),
            writer=None if closing else manifest.writer,
        )
        version = self._swap(manifest)
        with self._lock:
            self._table.use(pages)
            self._manifest, self._version = manifest, version
            self._frozen, self._early_frozen = {}, {}
            self._moved()

    def _swap(self, manifest: Manifest) -> Version:
        """Replaces the manifest in the store, unless another writer has done so."""
        assert self._version is not None
        version = self._version
        for conflict in range(_CONFLICTS):
            try:
                return self._objects.swap(self._path, manifest.dump(), version)
            except (Changed, Exists, Missing):
                found, version = self._look()
            if found.attempt == manifest.attempt:
                return version  # an attempt whose answer was lost
            if found.session != manifest.session:
                raise self._fence(found)
            # It is as we left it, or one that was given up has come through after all; what that
            # had is in this one too. Some stores answer so when two requests meet.
            time.sleep(0.05 * conflict)
        raise Failure(errno.EIO, f"{self._objects.retrying.place}: the manifest is not replaced")

    def _look(self) -> tuple[Manifest, Version]:
        try:
            data, version = self._objects.get_version(self._path)
            return Manifest.load(data, self._path), version
        except Missing:
            raise self._fence(None) from None

    def _fence(self, found: Manifest | None) -> Failure:
        """Another has the disk: from now on every request fails."""
        what = "it was removed" if found is None else (
            f"{found.writer or 'another process'} has opened it for writing after this one"
        )  # fmt: skip
        failure = Failure(
            errno.EIO,
            f"{self._objects.retrying.place}: {what}: nothing more is read or written here, and "
            "what was not flushed is lost",
        )
        with self._lock:
            first, self._failure = self._failure is None, self._failure or failure
            self._lock.notify_all()
        if first:
            log.error("%s", failure.why)
        return failure

    def _thaw(self, uploaded: Mapping[int, Entry | None]) -> None:
        """After a flush that failed: what it had is dirty again, below what came since."""
        with self._lock:
            for index, chunk in self._frozen.items():
                if index not in uploaded:
                    self._dirty[index] = chunk.put_under(self._dirty.get(index))
            self._early = {**self._early_frozen, **uploaded, **self._early}
            self._frozen, self._early_frozen = {}, {}
            self._moved()

    # ---- the rest ----

    def resize(self, size: int) -> None:
        """Has another size from the next flush on; bytes that are cut off are zeroes later."""
        if size < self.size:
            self.zero(size, self.size - size)
        with self._lock:
            self.size = size

    def close(self) -> None:
        """The end: a last flush, which also says that nobody writes any more. Raises Failure."""
        try:
            if self._version is not None and self._failure is None:
                with self._flush_lock:
                    self._flush(closing=True)
        finally:
            self._fetchers.shutdown(cancel_futures=True)
            self._pool.shutdown()

    @property
    def manifest(self) -> Manifest:
        """The state that is durable."""
        return self._manifest

    def content(self) -> str | None:
        """Tells the bytes that are durable from all others; None while others are not flushed."""
        with self._lock:
            new = (self._dirty, self._uploading, self._frozen, self._early, self._early_frozen)
            unflushed = any(new) or self.size != self._manifest.size
            return None if unflushed else self._manifest.content

    def status(self) -> dict[str, Any]:
        """Counters, and how much is not flushed yet."""
        with self._lock:
            dirty = self._held + self._held_else
        return {
            "epoch": self._manifest.epoch,
            "flushes": self._manifest.flushes,
            "dirty_bytes": dirty,
            "early_uploads": self.early_uploads,
            "fenced": self._failure is not None,
            **self._chunks.status(),
            **self._objects.retrying.status(),
        }


def _held(chunks: Mapping[int, DirtyChunk]) -> int:
    return sum(chunk.held + _LEAST_HELD for chunk in chunks.values())
