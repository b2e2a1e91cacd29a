# SPDX-License-Identifier: MIT
"""Disks some of whose blocks are in a file of their own, and the others below."""

import errno
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pyublk._native import FileMemory, Layout, MappedQueue, PresenceLayout
from pyublk.backing import Backing
from pyublk.deferring import Deferred, Flushes, Threads, errno_of
from pyublk.files import write_all
from pyublk.keeping import may_make
from pyublk.layers.base import Below
from pyublk.layers.durable import DurableMap
from pyublk.layers.eviction import Eviction
from pyublk.layers.fetching import Fetcher, Fetching, fetching_threads
from pyublk.layers.mapfile import (
    PAGE,
    SMALLEST_GRANULARITY,
    Header,
    MapFile,
    check_granularity,
    drop_live,
    make_live,
    put_map,
    read_live,
)
from pyublk.layers.scratch import Scratch
from pyublk.mapped import MappedTarget
from pyublk.resizing import Ends
from pyublk.target import Target
from pyublk.uapi import Op

log = logging.getLogger("pyublk.layers.presence")

Part = TypeVar("Part")

#: Beyond the end of every file: all of it is kept from others.
_ALL = 1 << 62


class PresenceLayer(MappedTarget):
    """A disk over another target. A block is in `file` if the map beside it says so, else below.

    Present blocks are read and written by the kernel, without Python; so are the others, as far as
    they are read only and what is below has its bytes in files. Else they are fetched: a request
    that needs such blocks waits for them, and others go on. Writes go to `file`, never below.

    It promises what a file does. A completed write is there as long as the machine runs, also when
    the server is killed; once it is flushed, it outlives the machine. A block shows what is below,
    or what was written, never anything else.

    Subclasses define policies: `fetch`, `widen`, `fetched`, `check_metadata`, `open_below`; with
    `gated`, `may_write`; with `writes_through`, `written`; and `sync_metadata`.

    Args:
        below: the target to lie over, which is opened and closed with this one, and not written;
            None if `open_below` makes it.
        file: the upper file, sparse and as large as the disk. Its map is beside it, ``FILE.map``.
            Both are made if neither is there.
        granularity: bytes of a block, a power of two from 4096 on; by default that of the map that
            is there, else 4096. A smaller write to an absent block copies the rest of it.
        size: bytes of the disk, when it is made; by default that of what is below. What is beyond
            the end of that reads as zeroes.
        metadata: JSON to be kept in the map when it is made.
        workers: threads that fetch; by default as many as serve what is below when it is a disk,
            and at least 8.
        read_only: share the file with others, and make the disk read-only.
        block_size: the disk's logical block size in bytes; at least that of what is below.
    """

    takes_fua = False
    #: Whether a write waits until `may_write` has allowed it for its blocks (`set_writable`).
    gated: ClassVar[bool] = False
    #: Whether `written` is called of each write, before it is answered.
    writes_through: ClassVar[bool] = False
    #: Whether blocks may become absent (`evict`, `hold`, `uses`, `take_touched`).
    evicts: ClassVar[bool] = False
    #: Whether `sync_metadata` is called for every flush; else for those after which the map
    #: differs.
    sync_always: ClassVar[bool] = False

    def __init__(
        self,
        below: Target | None,
        file: Path,
        *,
        granularity: int | None = None,
        size: int | None = None,
        metadata: dict[str, Any] | None = None,
        workers: int | None = None,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        if granularity is not None:
            check_granularity(granularity)
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be 1 or more threads, not {workers}")
        super().__init__([file], block_size=block_size, read_only=read_only)
        self.file = Path(file)
        self._given_below = below
        self._wanted_granularity = granularity
        self._disk_size = size
        self._metadata = metadata or {}
        self._workers = workers
        # While it is open:
        self._below: Below | None = None
        self._durable: DurableMap | None = None
        self._fetcher: Fetcher | None = None
        self._eviction: Eviction | None = None
        self._hooks: Threads | None = None
        self._scratch: Scratch | None = None
        self._evicted_bytes = 0

    # ---- what a policy may say ----

    def open_below(self, record: dict[str, Any]) -> Below:
        """Opens what lies below: by the metadata, with the file locked, when it was not given."""
        if self._given_below is None:
            raise ValueError(f"{type(self).__name__} over nothing: give it a target to lie over")
        opened = Below(self._given_below, blocking=True)
        opened.open()
        return opened

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        """Raises ValueError when the map is not for this disk; what is below is open."""

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with whole absent blocks, on one of several threads. Raises OSError."""
        self._served(self._below).read(offset, buffer)

    def widen(self, offset: int, length: int) -> tuple[int, int]:
        """The range (bytes) that is fetched when this one is wanted: more, to read ahead."""
        return offset, length

    def fetched(self, offset: int, length: int) -> None:
        """These blocks were fetched, and are present. [any thread]"""

    def may_write(self, offset: int, length: int) -> None:
        """With `gated`: a write to these blocks waits. Calls `set_writable`, and returns, or raises
        OSError, and the write fails."""
        self.set_writable(offset, length)

    def written(self, op: Op, offset: int, length: int) -> None:
        """With `writes_through`: a request changed these bytes in the upper file, and is answered
        when this returns; it raises OSError to fail it. Not to `hold` or `evict`."""

    def sync_metadata(self) -> None:
        """Makes what was written durable, and then the map; called for flushes, on a thread of its
        own, with the files not synced yet. Raises OSError."""
        self._served(self._durable).sync(self.layout)

    # ---- looking at it ----

    @property
    def below(self) -> Target:
        """What it lies over."""
        below = self._given_below if self._below is None else self._below.target
        if below is None:
            # One that has no such attribute, until it is open.
            raise AttributeError("the target is not open, and what lies below it is not known")
        return below

    @property
    def layout(self) -> PresenceLayout:
        layout = super().layout
        assert isinstance(layout, PresenceLayout)
        return layout

    @property
    def map_file(self) -> Path:
        """The file with the map."""
        return MapFile.path_of(self.file)

    @staticmethod
    def read_header(file: Path) -> Header:
        """What the map of an upper file says, whether that is served or not. Raises OSError, and
        ValueError when it is not one."""
        return MapFile.read_header(file)

    def _served(self, part: Part | None) -> Part:
        if part is None:
            raise RuntimeError("the target is not open")
        return part

    @property
    def header(self) -> Header:
        """The map's, while the target is open."""
        return self._served(self._durable).header

    @property
    def granularity(self) -> int:
        """Bytes of a block, while the target is open."""
        return self.header.granularity

    @property
    def metadata(self) -> dict[str, Any]:
        """What the map's record says, while the target is open; before, what it is made with."""
        return self._metadata if self._durable is None else self._durable.header.record

    @property
    def upper_fd(self) -> int:
        """The upper file, while the target is open."""
        return self.backing[0].fd

    @property
    def recoverable(self) -> bool:  # type: ignore[override]
        """As what is below."""
        below = self._given_below if self._below is None else self._below.target
        return below is None or below.recoverable

    @property
    def _map(self) -> PresenceLayout:
        """The layout whose bits are those of the map."""
        return self.layout if self._scratch is None else self._scratch.map

    def is_present(self, offset: int, length: int) -> bool:
        """Whether all blocks of a range are."""
        return self._map.is_present(offset, length)

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, bool]]:
        """Offset and length (bytes) of each run of blocks that are alike, and whether they are
        present. `offset` is the start of a block."""
        layout = self._map
        end = layout.size if length is None else offset + length
        while offset < end:
            run, present = layout.run(offset, end)
            yield offset, run, present
            offset += run

    def count_present(self) -> int:
        """Bytes of all present blocks."""
        return self._map.count_present() * self.granularity

    def counters(self) -> dict[str, int]:
        """What was counted since the target was opened: requests by `hits` (all their blocks were
        present) and `misses`; `copy_ups` of parts of blocks; `fetches`, and what became of them."""
        hits, misses, copy_ups = self.layout.counters()
        fetcher = self._served(self._fetcher)
        return {
            "hits": hits,
            "misses": misses,
            "copy_ups": copy_ups,
            "fetches": fetcher.fetches,
            "fetch_errors": fetcher.fetch_errors,
            "fetched_bytes": fetcher.fetched_bytes,
            "evicted_bytes": self._evicted_bytes,
            "present_bytes": self.count_present(),
        }

    def status(self) -> dict[str, Any] | None:
        return None if self._layout is None else dict(self.counters())

    # ---- changing it; from any thread but a queue's ----

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Puts another record into the map, durably. Raises OSError, and ValueError when it is too
        long."""
        self._served(self._durable).set_record(metadata)

    def prefetch(self, offset: int, length: int) -> None:
        """Has the absent blocks of a range fetched; returns when they are present. Raises OSError
        when one cannot be had."""
        self._served(self._fetcher).prefetch(offset, length)

    def fill(self, offset: int, data: bytes | memoryview) -> int:
        """Gives absent blocks these bytes, as if fetched; whole blocks, but for the disk's last
        one. What is present, or being written, stays as it is. How many bytes were taken."""
        if offset % self.granularity or (
            len(data) % self.granularity and offset + len(data) != self.layout.size
        ):
            raise ValueError(
                f"{len(data)} bytes at {offset} are not whole blocks of {self.granularity} bytes"
            )
        return self._served(self._fetcher).fill(offset, memoryview(data))

    def sync(self) -> None:
        """Makes all that was written durable, as a flush."""
        self.sync_metadata()

    def evict(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Makes the present blocks that are wholly in one of the ranges (offset, length) absent:
        they show what is below again. With `gated`, those that may be written stay. How many bytes
        that were. Raises OSError, and all of them stay."""
        evicted = self._served(self._eviction).evict(ranges)
        self._evicted_bytes += evicted
        return evicted

    @contextmanager
    def hold(self, offset: int, length: int) -> Iterator[None]:
        """No request is under way in the range, and none begins; for a short time. The range lies
        in one region (`region_bytes`)."""
        with self._served(self._eviction).hold(offset, length):
            yield

    @property
    def region_bytes(self) -> int:
        """Of the pieces of the disk whose requests are counted."""
        return self.layout.region_bytes

    def uses(self, region: int) -> int:
        """How many requests have begun in a region; wraps around at 2**32."""
        return self.layout.uses(region)

    def take_touched(self, offset: int, length: int) -> bool:
        """Whether a request used a block of the range since this was asked last."""
        return self.layout.take_touched(offset, length)

    def set_writable(self, offset: int, length: int, writable: bool = True) -> None:
        """Whether the blocks may be written without asking `may_write`."""
        self.layout.set_writable(offset, length, writable)

    # ---- writes that ask ----

    def _ask_to_write(
        self, queue: MappedQueue, tag: int, generation: int, offset: int, length: int
    ) -> None:
        asking = Deferred(queue, tag, generation, Op.WRITE, offset, length)

        def ask() -> None:
            asking.finish(errno_of(partial(self.may_write, offset, length), "may_write()"))

        self._submit(ask, asking)

    def _defer(
        self, queue: MappedQueue, tag: int, generation: int, op: Op, offset: int, length: int
    ) -> None:
        request = Deferred(queue, tag, generation, op, offset, length)
        if op is Op.FLUSH:
            assert self._flushes is not None
            self._flushes.defer(request)
            return

        def tell() -> None:
            request.finish(errno_of(partial(self.written, op, offset, length), "written()"))

        self._submit(tell, request)

    def _submit(self, job: Callable[[], object], request: Deferred) -> None:
        """By a queue's thread: it raises nothing."""
        assert self._hooks is not None
        if errno_of(partial(self._hooks.submit, job), "a thread for a request"):
            request.finish(errno.EIO)

    # ---- open and close ----

    def open(self) -> None:
        self.check_closed()
        made: list[Path] = []
        try:
            self._open(made)
        except BaseException:
            for path in made:
                with suppress(OSError):
                    path.unlink()
            self._close_all()
            raise

    def _open(self, made: list[Path]) -> None:
        """`made`: what is to go again if it fails."""
        new = self._is_new()
        backing = self.open_file(self.file, 0 if new else None)
        self.backing.append(backing)
        if backing.is_device:
            raise ValueError(f"{self.file} is a block device, and blocks need a regular file")
        if backing.made:
            made.append(self.file)
        backing.keep([(0, _ALL)], read_only=self.read_only)  # before its map is looked at
        record = self._metadata if new else MapFile.read_header(self.file).record
        self._below = self.open_below(record)
        below = self._below.target
        found = self._make_map(below, made) if new else MapFile.read_durable(self.file)
        self._check(below, found.header)
        self.check_metadata(found.header.record)
        self.block_size = max(self._wanted_block_size, below.block_size)
        self.size = found.size
        if self.size % self.block_size:
            raise ValueError(
                f"the disk has {self.size} bytes, not a multiple of the block size, "
                f"{self.block_size}"
            )
        self.discard_granularity = found.granularity
        self._begin(found)

    def _is_new(self) -> bool:
        """Whether there is nothing yet; a start that was cut short leaves an empty file."""
        size = self.file.stat().st_size if self.file.exists() else None
        if self.map_file.exists():
            if size is None:
                raise ValueError(
                    f"{self.map_file} is a map, but {self.file} is not there: put that in its "
                    "place again, or remove the map to begin with nothing"
                )
            return False
        if size:
            raise ValueError(
                f"{self.file} is there, and {self.map_file}, which would say what of it counts, is "
                "not: name another file"
            )
        if self.read_only or not may_make():
            raise FileNotFoundError(errno.ENOENT, f"{self.file} and its map do not exist")
        return True

    def _make_map(self, below: Target, made: list[Path]) -> MapFile:
        size = below.size if self._disk_size is None else self._disk_size
        if size < below.size:
            raise ValueError(
                f"size {size} is less than what is below has, {below.size} bytes: none of it may "
                "be left out"
            )
        found = MapFile.new(
            size=size,
            granularity=self._wanted_granularity or SMALLEST_GRANULARITY,
            below_size=below.size,
            record=self._metadata,
        )
        os.ftruncate(self.upper_fd, size)
        tail = below.size % found.granularity
        if tail and size > below.size:  # its block is present
            buffer = memoryview(bytearray(tail))
            self._served(self._below).read(below.size - tail, buffer)
            write_all(self.upper_fd, buffer, below.size - tail)
        os.fsync(self.upper_fd)
        made.append(self.map_file)
        mode = os.fstat(self.upper_fd).st_mode
        os.close(put_map(self.map_file, found.header, found.bits, mode=mode))
        return found

    def _check(self, below: Target, header: Header) -> None:
        if self._wanted_granularity not in (None, header.granularity):
            raise ValueError(
                f"{self.map_file} is of blocks of {header.granularity} bytes, not of "
                f"{self._wanted_granularity}: leave the granularity out"
            )
        if self._disk_size not in (None, header.size):
            raise ValueError(
                f"{self.file} is of a disk of {header.size} bytes, not of {self._disk_size}: leave "
                "the size out"
            )
        if below.size < header.below_size:
            raise ValueError(
                f"what is below {self.file} has {below.size} bytes, and had {header.below_size} "
                "when that was made: it is another, or was cut short"
            )
        there = os.fstat(self.upper_fd).st_size
        if there < header.size:
            raise ValueError(
                f"{self.file} was cut short: it has {there} bytes, and the disk {header.size}"
            )
        if header.granularity < below.block_size:
            raise ValueError(
                f"blocks of {header.granularity} bytes are smaller than those of what is below, "
                f"{below.block_size}"
            )

    def _begin(self, durable: MapFile) -> None:
        """With everything checked: the bits, and who changes them."""
        header = durable.header
        self._durable = DurableMap(self.file, self.upper_fd, header, read_only=self.read_only)
        live = read_live(self.file, header)
        now = durable.bits if live is None else live
        bits: FileMemory | mmap.mmap
        if self.read_only:
            bits = mmap.mmap(-1, header.map_bytes)
            bits[:] = bytes(now)
        else:
            bits = make_live(self.file, header, now)
        lower = self._served(self._below).as_files()
        layout = PresenceLayout(
            [_as_file(one) for one in self.backing] + (lower[1] if lower else []),
            header.size,
            bits,
            block_bytes=header.granularity,
            below=lower[0] if lower else None,
            gated=self.gated,
            evicts=self.evicts,
            writes_through=self.writes_through,
            always_deferred=self.sync_always,
        )
        policy: Fetching = self
        upper_fd = self.upper_fd
        if self.read_only and lower is None:
            self._scratch = policy = Scratch(self, layout, upper_fd)
            layout, upper_fd = self._scratch.layout, self._scratch.fd
        for at in range(0, header.map_bytes, PAGE):
            if live is not None and live[at : at + PAGE] != durable.bits[at : at + PAGE]:
                layout.mark_dirty(at)
        workers = self._workers or fetching_threads(self.below)
        self._fetcher = Fetcher(policy, layout, upper_fd, workers, self._wake)
        self._eviction = Eviction(layout, self._durable, self.upper_fd, self._wake)
        self._hooks = Threads(workers, "hook")
        self._flushes = Flushes(self.sync_metadata)
        layout.ask(fetch=self._fetcher.want, write=self._ask_to_write, wake=self._wake)
        layout.defer(self._defer, flushes=False)
        if layout.in_memory:
            layout.map_memory()
        self._layout = layout

    def as_files(self) -> tuple[Layout, list[tuple[int, bool, bool]]] | None:
        below = self._served(self._below)
        deeper = below.as_files() if self.read_only else None  # else the map changes
        if deeper is None:
            return None
        return self.layout, [_as_file(self.backing[0]), *deeper[1]]

    def _wake(self) -> None:
        self.wake_queues()

    def close(self) -> None:
        for one in (self._hooks, self._flushes, self._fetcher):
            if one is not None and not one.close():
                log.warning("%s is closed while a request to what is below it hangs", self.file)
        clean = self._layout is not None and not self.read_only
        if clean and errno_of(self.sync_metadata, "sync_metadata()"):
            log.error("%s could not be synced: its map may miss what was not flushed", self.file)
            clean = False
        if clean:
            drop_live(self.file)
        self._close_all()

    def _close_all(self) -> None:
        for layout in (self._layout, self._scratch and self._scratch.layout):
            if isinstance(layout, PresenceLayout):  # it knows who knows it, and has a file mapped
                layout.ask(fetch=None, write=None, wake=None)
                layout.defer(None, flushes=False)
        super().close()
        if self._durable is not None:
            self._durable.close()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        below = self._below
        self._durable = self._below = self._fetcher = self._eviction = None
        self._hooks = self._flushes = None
        if below is not None:
            below.close()

    # ---- another size ----

    def why_of_this_size(self) -> str:
        """Why it cannot be resized, and what to do instead, as one sentence."""
        return f"{self.file} cannot have another size: its map is of this one"

    def ends(self, size: int) -> Ends:
        if self._layout is not None and size != self._layout.size:
            raise ValueError(self.why_of_this_size())
        return {}

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        self.ends(size)


def _as_file(backing: Backing) -> tuple[int, bool, bool]:
    return backing.fd, backing.in_memory, backing.is_device
