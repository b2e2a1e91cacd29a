# SPDX-License-Identifier: MIT
"""Targets that say where their bytes live: the queue's own ring moves them."""

import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from pyublk._native import Layout, MappedQueue, PresenceLayout
from pyublk.backing import Backing
from pyublk.deferring import Deferred, Flushes
from pyublk.files import about
from pyublk.keeping import Ranges
from pyublk.paths import DataPath
from pyublk.profile import Dispatch, Profile
from pyublk.resizing import Ends, cut, cut_again, extend
from pyublk.target import Target
from pyublk.uapi import Op

#: A part of a file: its index among the target's files, offset, and length (bytes).
Extent = tuple[int, int, int]

#: More parts of a file than these are kept from others as one, from the first to the last.
_PARTS_KEPT = 64


class MappedTarget(Target):
    """A disk whose bytes are in files. Python says where, once; the queue's ring moves them.

    The disk is `extents()`, one after the other: by default all the files, each whole. A
    subclass returns other extents there, or defines

    ``map(op, offset, length)``
        called for each request except flush: returns where these bytes are, as an offset in the
        only file, one ``(file, offset, length)``, or a sequence of these that add up to `length`.
        Every queue's thread calls it, so data that it changes needs a lock. An exception fails the
        request, as in other targets.

    ``sync_metadata()``
        called for each flush, on a thread of its own, when the files are synced, and before the
        flush is answered: what it writes and syncs itself is durable after the data that it speaks
        of. One call stands for all flushes that came before it began. If it raises an OSError, they
        fail with that errno. Such a disk takes no FUA: the kernel sends write and flush instead.

    Reads and writes become reads and writes of the files, discard a hole punch, write-zeroes
    ``fallocate`` (or writing, where the file system cannot), flush ``fdatasync`` of every file,
    and a write with FUA is a durable write. A request that spans several parts is done when all
    are; when one fails, the request fails with its errno.

    Args:
        files: regular files, or block devices, which are opened exclusively, when the disk starts.
            No other disk may serve the same bytes of a regular file (unless both are read-only).
        size: bytes of the disk; by default, the sum of the extents. A target with `map` and more
            than one file needs it. A single file is created with, or extended to, this size.
        block_size: the disk's logical block size in bytes; at least that of its block devices.
        direct: bypass the page cache (O_DIRECT); the block size is then at least what the files'
            devices require.
        read_only: open the files for reading, and make the disk read-only.
        read_only_files: the indices of files that are opened for reading while the disk is not
            read-only: other disks may read them too. `map` may name them for reads only; another
            request fails as a whole, which is logged.
    """

    dispatch: ClassVar[Dispatch | None] = "mapped"
    concurrency = "parallel"
    flushes = True
    discards = True
    writes_zeroes = True
    takes_fua = True

    #: Whether the files are the disk's to their ends, and are cut when it shrinks.
    cuts_files: ClassVar[bool] = False

    #: Whether it may be opened while another of this kind, which it is to replace (`Device.swap`),
    #: still serves the same files: nothing that it reads when it opens changes meanwhile.
    succeeds: ClassVar[bool] = False

    #: The `map` method of a subclass, if it has one.
    map: ClassVar[Callable[..., object] | None] = None
    #: The `sync_metadata` method of a subclass, if it has one.
    sync_metadata: Callable[[], None] | None = None

    def __init__(
        self,
        files: Sequence[Path | str],
        *,
        size: int | None = None,
        block_size: int = 512,
        direct: bool = False,
        read_only: bool = False,
        read_only_files: Collection[int] = (),
    ) -> None:
        if not files:
            raise ValueError(f"{type(self).__name__} needs at least one file")
        for file in read_only_files:
            if not 0 <= file < len(files):
                raise ValueError(f"read_only_files names file {file}; there are {len(files)}")
        super().__init__(size=size or 0, block_size=block_size, read_only=read_only)
        self.files = [Path(file) for file in files]
        self.read_only_files = frozenset(read_only_files)
        #: The open files, while the disk is served.
        self.backing: list[Backing] = []
        #: Makes the queues look at the layout again; set by the device.
        self.wake_queues: Callable[[], None] = lambda: None
        self._wanted_size = size
        self._wanted_block_size = block_size
        self._direct = direct
        self._layout: Layout | None = None
        self._table: list[Extent] | None = None
        self._cut: set[int] = set()  # files that were, when the disk shrank
        self._flushes: Flushes | None = None  # of sync_metadata, while the disk is served

    # ---- what a subclass may say ----

    def extents(self) -> Iterable[Extent]:
        """The disk from its first byte to its last; called with the files open."""
        for number, backing in enumerate(self.backing):
            yield number, 0, backing.size

    def make_layout(self, files: list[tuple[int, bool, bool]]) -> Layout:
        """The layout of the open files (descriptor, in memory, block device)."""
        if self.map is not None:
            size = self._wanted_size
            if size is None and len(files) == 1:
                size = self.backing[0].size
            if size is None:
                raise ValueError("a target with map and several files needs a size")
            return Layout.per_request(files, size)
        extents = _cut_off(list(self.extents()), self._wanted_size)
        self._check_extents(extents)
        self._table = extents
        return Layout.table(files, extents)

    def ranges(self, file: int) -> Ranges:
        """First byte and end of what the disk has of a file, and nobody else may have."""
        if self._table is None:
            return [(0, self.backing[file].size)]
        parts = [(first, first + length) for one, first, length in self._table if one == file]
        if len(parts) > _PARTS_KEPT:
            parts = [(min(first for first, _ in parts), max(end for _, end in parts))]
        return parts

    def ends(self, size: int) -> Ends:
        """Where a disk of this size would end, in each file in which it can end.

        Raises ValueError when the disk cannot have that size while it is served.
        """
        if self._table is None:
            raise ValueError(
                f"{type(self).__name__} has a map method, and cannot be resized while it is "
                "served: stop the disk, and serve it with the new size"
            )
        file, offset, length = self._table[-1]
        start = self.layout.size - length
        if size <= start:
            raise ValueError(
                f"the disk cannot shrink to {size} bytes while it is served: {self.files[file]} "
                f"begins at {start}; stop it, and serve it without that file"
            )
        end = offset + size - start
        for other, begin, _ in self._table[:-1]:
            if other == file and offset < begin < end:
                raise ValueError(
                    f"the disk's end cannot move to {end} in {self.files[file]}: another extent "
                    f"begins at {begin}"
                )
        return {file: end}

    def size_changed(self, *, fresh: bool) -> None:
        """The layout has another size, which clients do not know yet when it has grown. `fresh`:
        what is new reads as zeroes in every file."""

    def leg_failed(self, leg: int, error: int, file_generation: int | None = None) -> None:
        """A mirror's leg failed; called before the request that noticed it is answered.

        `error` 0: that it failed is known, and only to be put on record. `file_generation`: of the
        leg's file; a leg with another file now has not failed.
        """
        raise NotImplementedError

    def written_late(self, file: int) -> bool:
        """Whether a request that was given up may still write to it."""
        return False

    def check_threads(self, threads: int) -> None:
        """Raises ValueError when so many threads cannot serve a queue together."""

    def check_shared_memory(self) -> None:
        """Raises ValueError when it must not work in memory that clients share."""

    def as_files(self) -> tuple[Layout, list[tuple[int, bool, bool]]] | None:
        """Its layout, and the open files that this is about (descriptor, in memory, block device),
        for a presence map to lie over. None: the files alone do not say where a byte is."""
        if not PresenceLayout.can_lie_over(self.layout):
            return None
        files = [(one.fd, one.in_memory, one.is_device) for one in self.backing]
        return self.layout, files

    # ---- how it is served ----

    @property
    def layout(self) -> Layout:
        """Where the bytes are, while the disk is served."""
        if self._layout is None:
            raise RuntimeError("the target is not open")
        return self._layout

    @property
    def paths(self) -> tuple[DataPath, ...]:  # type: ignore[override]
        """The data paths that it can be served by, the best first; they depend on the files."""
        if self.layout.in_memory:
            return (DataPath.USER_COPY, DataPath.COPY, DataPath.ZERO_COPY, DataPath.AUTO_BUFFER)
        return (DataPath.AUTO_BUFFER, DataPath.COPY, DataPath.ZERO_COPY, DataPath.USER_COPY)

    def check_closed(self) -> None:
        """Raises ValueError when it is open: its files would be the disk's twice over."""
        if self.backing:
            raise ValueError(
                f"this {type(self).__name__} of {self.backing[0].path} is served already: each "
                "disk needs a target of its own"
            )

    def open(self) -> None:
        self.check_closed()
        try:
            self._open_files()
            self.block_size = max(
                self._wanted_block_size, *(backing.block_size for backing in self.backing)
            )
            self._layout = self.make_layout(
                [(backing.fd, backing.in_memory, backing.is_device) for backing in self.backing]
            )
            self._protect_files(self._layout)
            self.size = self._layout.size
            if self.size == 0 or self.size % self.block_size:
                raise ValueError(
                    f"the size is {self.size} bytes: it must be a positive multiple of the block "
                    f"size, {self.block_size}"
                )
            self._keep_files()
            if self.sync_metadata is not None:
                self._flushes = Flushes(self.sync_metadata)
                self._layout.defer(self._defer, flushes=True)
            if self._layout.in_memory:
                self._layout.map_memory()
        except BaseException:
            for backing in self.backing:
                if backing.made:
                    backing.path.unlink()
            self.close()
            raise

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        before = self.layout.size
        ends = self.ends(before)
        if size > before:

            def use(fresh: bool) -> None:
                self._set_size(size, fresh=fresh)
                try:
                    update(size)
                except BaseException:
                    self._set_size(before)
                    raise

            extend(self.backing, ends, self.ends(size), use, read_only=self.read_only)
        elif size < before:
            after = self.ends(size)
            update(size)  # from here on, clients may not use what is beyond
            self._set_size(size)
            try:
                # Others begin where a file before the last ends.
                files = self.cuts_files and not self.read_only and max(after) == len(self.files) - 1
                self._cut |= cut(self.backing, ends, after, files=files)
            except OSError:
                self._set_size(before)
                update(before)
                raise

    def _set_size(self, size: int, *, fresh: bool = True) -> None:
        self.size = size
        if self._wanted_size is not None:
            self._wanted_size = size
        if self._layout is None:  # it was closed meanwhile
            return
        if self._table is not None:
            file, offset, length = self._table[-1]
            self._table[-1] = (file, offset, length + size - self._layout.size)
        self._layout.resize(size)
        self.size_changed(fresh=fresh)

    def _open_files(self) -> None:
        alone = len(self.files) == 1
        for file, path in enumerate(self.files):
            with self._told_when_named_twice(path, self.backing):
                size = self._wanted_size if alone else None
                read_only = file in self.read_only_files
                self.backing.append(self.open_file(path, size, read_only=read_only))

    def _protect_files(self, layout: Layout) -> None:
        if self.read_only:
            return
        for file, _, _ in self._table or ():
            if file in self.read_only_files:
                raise ValueError(
                    f"part of the disk is in {self.files[file]}, which is opened for reading: make "
                    "the disk read-only, or say with a map method where writes go"
                )
        for file in self.read_only_files:
            layout.protect(file)

    def _keep_files(self) -> None:
        for file, backing in enumerate(self.backing):
            with self._told_when_named_twice(backing.path, self.backing[:file]):
                read_only = self.read_only or file in self.read_only_files
                backing.keep(self.ranges(file), read_only=read_only, succeeds=self.succeeds)

    @contextmanager
    def _told_when_named_twice(self, path: Path, before: list[Backing]) -> Iterator[None]:
        """Says it better when a file is in use because it is one of those before it."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EBUSY:
                for other in before:
                    if other.identity == about(path).identity:
                        twice = f"{path} and {other.path} are the same file"
                        if path == other.path:
                            twice = f"{path} is named twice"
                        raise ValueError(
                            f"{twice}: no byte of it can be in two places of a disk"
                        ) from None
            raise

    def open_file(self, path: Path, size: int | None = None, *, read_only: bool = False) -> Backing:
        read_only = read_only or self.read_only
        return Backing.open(path, size=size, direct=self._direct, read_only=read_only)

    def _defer(
        self, queue: MappedQueue, tag: int, generation: int, op: Op, offset: int, length: int
    ) -> None:
        """By a queue's thread: a flush whose files are synced. It raises nothing."""
        assert self._flushes is not None
        self._flushes.defer(Deferred(queue, tag, generation, op, offset, length))

    def announces(self, method: str) -> bool:
        if method == "write_fua" and self.sync_metadata is not None:
            return False
        return super().announces(method)

    def close(self) -> None:
        if self._flushes is not None:
            self._flushes.close()
            self._flushes = None
        layout = self._layout
        late = [layout is not None and self.written_late(n) for n in range(len(self.backing))]
        if layout is not None and not layout.in_use:
            for file, end in self.ends(layout.size).items() if self._cut else ():
                if file in self._cut and not late[file]:
                    cut_again(self.backing[file], end)
        self._cut.clear()
        self._layout = self._table = None
        if layout is not None and not layout.in_use:
            layout.unmap_memory()
        while self.backing:
            backing = self.backing.pop()
            if layout is not None and layout.in_use:
                backing.let_go(written_late=True)
                layout.give_up(backing.fd)
            else:
                backing.close(written_late=late.pop())

    def profile(self) -> Profile:
        alignment = None
        if self._direct:
            demanded = (backing.memory_alignment for backing in self.backing)
            alignment = max(self.block_size, *demanded)
        return replace(super().profile(), dma_alignment=alignment)

    def _check_extents(self, extents: list[Extent]) -> None:
        for number, offset, length in extents:
            if not 0 <= number < len(self.backing):
                raise ValueError(f"an extent names file {number}; there are {len(self.backing)}")
            whole = self.backing[number].size
            if offset == 0 and length == whole and (not whole or whole % self.block_size):
                raise ValueError(
                    f"{self.files[number]} has {whole} bytes: a disk needs a positive multiple of "
                    f"its block size, {self.block_size}; give a size, or another block size"
                )
            if offset % self.block_size or length % self.block_size or offset < 0 or length <= 0:
                raise ValueError(
                    f"the extent at {offset} of {length} bytes in {self.files[number]} must be "
                    f"positive multiples of the block size, {self.block_size}"
                )
            if offset + length > whole:
                raise ValueError(
                    f"the extent at {offset} of {length} bytes is not inside {self.files[number]}, "
                    f"which has {whole}"
                )
        for one, other in pairwise(sorted(extents)):
            if one[0] == other[0] and other[1] < one[1] + one[2] and not self.read_only:
                raise ValueError(
                    f"the extents at {one[1]} and at {other[1]} in {self.files[one[0]]} overlap: "
                    "no byte of it can be in two places of a disk, unless that is read-only"
                )


def _cut_off(extents: list[Extent], size: int | None) -> list[Extent]:
    """The first `size` bytes of the extents."""
    if size is None:
        return extents
    kept: list[Extent] = []
    for number, offset, length in extents:
        if size > 0:
            kept.append((number, offset, min(length, size)))
        size -= length
    if size > 0:
        raise ValueError(f"size is {size} bytes more than all extents together")
    return kept
