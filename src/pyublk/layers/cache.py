# SPDX-License-Identifier: MIT
"""A cache: a local file before a slow target."""

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pyublk.arguments import whole
from pyublk.layers.caching.ahead import FETCH, Ahead
from pyublk.layers.caching.boot import BootTrace
from pyublk.layers.caching.crew import Crew, Urgency
from pyublk.layers.caching.dirty import DirtyBlocks
from pyublk.layers.caching.draining import Drainer
from pyublk.layers.caching.eviction import Clock, Evictor, Run, every, pieces
from pyublk.layers.caching.identity import check_kind, described, difference
from pyublk.layers.caching.marks import REGION, Marks
from pyublk.layers.caching.order import Order
from pyublk.layers.caching.room import LEAST, Room
from pyublk.layers.caching.source import Changed, Source
from pyublk.layers.fetching import fetching_threads
from pyublk.layers.mapfile import MapFile
from pyublk.layers.presence import PresenceLayer
from pyublk.profile import Profile
from pyublk.sizes import format_size
from pyublk.target import Target
from pyublk.uapi import Op

log = logging.getLogger("pyublk.cache")

Mode = Literal["write-through", "write-back"]
OnChange = Literal["refuse", "invalidate"]

#: Bytes of a block.
GRANULARITY = 64 << 10
#: Seconds that closing waits for threads that are in a call of the target below.
HANGS = 10.0


class Cache(PresenceLayer):
    """A disk like the one below, of which a local file has what was used.

    What the file has is read by the ring, without Python. What it has not is fetched once, whoever
    asks for it, and kept. In mode ``write-through`` a write is done when the target below has it
    too; in mode ``write-back`` when the file has it, durable after a flush, and it is brought below
    in the background. Beside `file` lie ``FILE.map`` (which blocks it has), ``FILE.dirty`` (where
    it may differ from below), and ``FILE.boot`` (with `record`).

    The first opening notes size and identity of what is below. Later ones do not need it: it is
    opened when something is wanted of it, and must be the same one then.

    Args:
        below: the target that is slow; of any kind.
        file: the local file.
        mode: when a write is done.
        limit: bytes of the disk that the file may have; None for all of them.
        granularity: bytes of a block, which is fetched and evicted whole; a power of two, 64 KiB
            if nothing else is said when the file is made.
        readahead: bytes that are fetched ahead of somebody who reads on; 0 for none.
        record: note in ``FILE.boot`` what is wanted first, unless that is there: then it is fetched
            in the background as soon as the disk is open.
        fetchers: threads that fetch and drain in the background, and as many for requests; by
            default as many as serve what is below when it is a disk, and at least 8.
        changed: what to do when the source is not the one that the file was filled from: refuse
            it, or forget what the file has (at the opening, and only if nothing is dirty).
        patience: seconds that a request waits for a source that cannot be opened, or for room when
            nothing can be drained.
        drain_after: seconds between two drains, and syncs of what was fetched, in the background.
        drain_within: seconds that a stop may spend on draining; what is left stays dirty.
    """

    gated = True
    evicts = True
    sync_always = True
    #: A discard that only one of the two places did would bring old bytes back.
    discards = False

    def __init__(
        self,
        below: Target,
        file: Path,
        *,
        mode: Mode = "write-through",
        limit: int | None = None,
        granularity: int | None = None,
        readahead: int = 8 << 20,
        record: bool = False,
        fetchers: int | None = None,
        changed: OnChange = "refuse",
        patience: float = 10.0,
        drain_after: float = 5.0,
        drain_within: float = 30.0,
    ) -> None:
        if mode not in ("write-through", "write-back"):
            raise ValueError(f"mode is {mode!r}: it must be write-through or write-back")
        if changed not in ("refuse", "invalidate"):
            raise ValueError(f"changed is {changed!r}: it must be refuse or invalidate")
        least = max(LEAST, 64 * (granularity or GRANULARITY))
        if limit is not None and whole("limit", limit) < least:
            raise ValueError(
                f"limit is {format_size(limit)}: it must be at least {format_size(least)}"
            )
        if fetchers is not None:
            whole("fetchers", fetchers, least=1)
        whole("readahead", readahead, least=0)
        source = Source(below, check=self._check_source, patience=patience)
        super().__init__(source, Path(file), granularity=granularity, workers=fetchers)
        self.mode: Mode = mode
        # Of each cache, not of the class: it is asked for when the layout is made.
        self.writes_through = mode == "write-through"  # type: ignore[misc]
        self._source = source
        if self.outlives_below:
            source.recoverable = True
        self._fetchers = fetchers or fetching_threads(below)
        self.max_discard = LEAST // 8 if limit is None else limit // 64
        self._most_ahead = readahead if limit is None else min(readahead, limit // 8)
        self._record = record
        self._on_change: OnChange = changed
        self._patience = patience
        self._drain_after = drain_after
        self._drain_within = drain_within
        self._room = Room(limit, self.count_present, self._is_hopeless)
        self._known: dict[str, Any] | None = None
        self._replaced: dict[str, Any] | None = None
        self._may_replace = False
        self._order = Order()
        self._changing = threading.Lock()  # for who notes that writes go below
        self._unflushed = False
        self._spoilt = 0
        self._works = False

    # ---- opening ----

    @property
    def read_only(self) -> bool:
        """Whether its own files are only read: they never are. Of the disk, `profile` tells."""
        return False

    @read_only.setter
    def read_only(self, wanted: bool) -> None:
        """By who lies over it and writes nothing, such as an overlay: the cache fills all the same,
        and what is below is opened for reading."""
        if wanted:
            self._source.target.read_only = True

    def open(self) -> None:
        self.check_closed()
        with ExitStack() as undo:
            self._source.open()
            undo.callback(self._source.close)
            self._know_source()
            super().open()
            undo.callback(super().close)
            self._take_up()
            undo.pop_all()

    def _know_source(self) -> None:
        """What is below, as it was noted, or as it is."""
        self._known, self._replaced = None, None
        if MapFile.path_of(self.file).exists():
            self._known = MapFile.read_header(self.file).record
            check_kind(self._known, self.file)
        if self._known is None:
            self._wanted_granularity = self._wanted_granularity or GRANULARITY
            self._source.reach(patience=0)
        elif self._on_change == "invalidate":
            self._may_replace = True
            try:
                self._source.reach(patience=0)
            except OSError as error:
                log.warning("%s is served without its source: %s", self.file, error)
            finally:
                self._may_replace = False
        assert self._known is not None
        self._source.be(self._known)
        self._metadata = self._known

    def _check_source(self, target: Target) -> None:
        """Called with what is below open. Raises Changed."""
        found = described(target)
        if self._known is None:
            self._known = found
            return
        why = difference(self._known, found)
        if why is None:
            return
        if self._may_replace and found["size"] == self._known["size"]:
            self._replaced = found
            return
        raise Changed(
            f"the source of {self.file} is not the one that it was filled from: {why}; serve that "
            "one, or remove the cache's files, or have it forget what it has (changed=invalidate)"
        )

    @property
    def outlives_below(self) -> bool:
        """Whether it has itself what was written, also when those below forget it with the server:
        in write-back, until they have flushed it."""
        return self.mode == "write-back"

    def why_of_this_size(self) -> str:
        return (
            "a cache has the size of its source: stop the disk, give the source another size, and "
            f"remove {self.file} with the files beside it"
        )

    def identity(self) -> str | None:
        """That of what is below, without asking it; None when it has none, or is written to."""
        known = self._known
        return known["identity"] if known is not None and known["read_only"] else None

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        check_kind(metadata, self.file)

    def _take_up(self) -> None:
        """Everything that works for the open disk."""
        region = max(REGION, self.granularity)
        self._dirty = DirtyBlocks(self.granularity, region)
        self._own_fd = os.dup(self.upper_fd)
        self._marks: Marks | None = None
        try:
            if not self._source.read_only:
                place = self.file.with_name(f"{self.file.name}.dirty")
                self._marks = Marks(place, size=self.size, region=region, purpose=self.mode)
                self._recover(self._marks)
            self._forget_replaced()
        except BaseException:
            os.close(self._own_fd)
            if self._marks is not None:
                self._marks.close()
            raise
        self._start()

    def _recover(self, marks: Marks) -> None:
        """After a crash, what counts in a marked region is what the file has of it (write-back), or
        what is below (write-through)."""
        regions = [run for number in marks.marked() for run in self._region(number, marks.region)]
        if marks.purpose == "write-back" and regions:
            if self.mode != "write-back":
                raise ValueError(
                    f"{self.file} may have bytes that are not below yet: serve it in mode "
                    "write-back until it is drained, before it is served in another mode"
                )
            for run in regions:
                self._dirty.add(*run)
            return
        self.evict(regions)
        marks.clear(marks.quiet())
        marks.use_for(self.mode)

    def _region(self, number: int, length: int) -> list[Run]:
        offset = number * length
        return list(self.present(offset, min(length, self.size - offset)))

    def _forget_replaced(self) -> None:
        if self._replaced is None:
            return
        if self._dirty.bytes():
            raise Changed(
                f"the source of {self.file} is not the one that it was filled from, and "
                f"{format_size(self._dirty.bytes())} of the file are not in that one yet: serve it "
                "over that one and drain it first"
            )
        self.evict(every(self.size, self))
        self._known = self._replaced
        self.set_metadata(self._known)

    def _start(self) -> None:
        self._crew = Crew(self._fetchers, "cache")
        self._room.open()
        self._ahead = Ahead(
            self,
            self._crew,
            self._room,
            size=self.size,
            granularity=self.granularity,
            most=self._most_ahead,
        )
        self._drainer = Drainer(self, self._dirty, self._crew, self._drain_after)
        self._clock = Clock(self.size)
        self._evicting: list[Run] = []
        self._choosing = threading.Lock()
        self._evictor: Evictor | None = None
        if self._room.limit is not None:
            self._evictor = Evictor(
                self._room, self._choose, self._evict_chosen, self._drainer.hurry.set
            )
        self._boot: BootTrace | None = None
        self._works = True
        self._drainer.start()
        if self._evictor is not None:
            self._evictor.start()
            self._room.short.set()
        if self._record:
            place = self.file.with_name(f"{self.file.name}.boot")
            boot = BootTrace(place, size=self.size, block_size=self.granularity)
            if (runs := boot.read()) is None:
                self._boot = boot
            else:
                scale = self.granularity
                self._ahead.warm([(first * scale, count * scale) for first, count in runs])

    # ---- closing ----

    def close(self) -> None:
        self._works = False
        self._room.close()
        until = time.monotonic() + self._drain_within
        left = self._drain_at_the_end(until)
        if self._evictor is not None:
            self._evictor.end()
        self._save_boot()
        ended = self._crew.close(HANGS) and not left
        if not left:
            with suppress(OSError):
                self._note_source()
                self.tidy()
                self.tidy()  # what was written to just now is quiet at the second look
        super().close()
        try:
            self._source.close()
        finally:
            if ended:  # else a thread may still be in a call below, and come back
                os.close(self._own_fd)
                if self._marks is not None:
                    self._marks.close()

    def _drain_at_the_end(self, until: float) -> int:
        """How many bytes are left dirty."""
        stopped = self._drainer.end(self._drain_within)
        if stopped and self._dirty.regions():
            stopped = self._drainer.drain_until(until)
        left = self._dirty.bytes()
        if left or not stopped:
            why = self._drainer.trouble or f"it took more than {self._drain_within:g} s"
            log.warning(
                "%s of %s are not below yet, and stay in the file as dirty until it is served "
                "again: %s",
                format_size(left),
                self.file,
                why,
            )
        return left or not stopped

    def _note_source(self) -> None:
        """Its identity, after all that was written to it."""
        if self._known is not None and self._known["identity"] is None and self._source.is_reached:
            self._source.flush()
            found = described(self._source.target)
            if found["identity"] is not None:
                self._known = found
                self.set_metadata(found)

    def _save_boot(self) -> None:
        if self._boot is not None:
            try:
                self._boot.save()
            except OSError as error:
                log.warning("the boot trace %s cannot be written: %s", self._boot.path, error)

    # ---- requests that the ring does not answer ----

    def widen(self, offset: int, length: int) -> Run:
        self._ahead.wanted(offset, length)
        return offset, length

    def fetch(self, offset: int, buffer: memoryview) -> None:
        patience = 0.0 if self._ahead.in_background else self._patience
        with self._room.coming(len(buffer), patience) as fits:
            if not fits:
                raise self._full()
            done = self._ahead.take(offset, buffer)
            if done < len(buffer):
                self.read_below(offset + done, buffer[done:])
        if self._boot is not None:
            self._boot.missed(offset // self.granularity, -(-len(buffer) // self.granularity))

    def fetch_now(self, offset: int, length: int) -> None:
        """Fetches what is absent of these bytes, on the calling thread. Raises OSError."""
        held = self.layout.claim(offset, length, FETCH)
        if error := self._served(self._fetcher).fetch_held(held):
            raise OSError(error, f"not all of {length} bytes at {offset} can be fetched")

    def fetched(self, offset: int, length: int) -> None:
        self._clock.fetched(offset, length)

    def may_write(self, offset: int, length: int) -> None:
        assert self._marks is not None
        absent = length - sum(run[1] for run in self.present(offset, length))
        # A write to both places holds up who evicts: it must not wait for him.
        patience = 0.0 if self.writes_through else self._patience
        with self._room.coming(max(0, absent), patience) as fits:
            if not fits and not self.writes_through:
                raise self._full()
            self._marks.enter(offset, length)
            if self.writes_through:
                return  # until it is `written`
            try:
                self._dirty.add(offset, length)
                self.set_writable(offset, length)
            finally:
                self._marks.leave(offset, length)

    def written(self, op: Op, offset: int, length: int) -> None:
        assert self._marks is not None
        try:
            # The last one of those that overlap passes on what the file has then.
            with self._order.alone(offset, length):
                self._below_changes()
                self._unflushed = True
                if op is Op.WRITE_ZEROES:
                    self._source.write_zeroes(offset, length)
                else:
                    self._copy_below(offset, length)
        except BaseException:
            # Some of it may be below: what is there now is told by reading it again.
            self._spoilt += 1
            self._crew.submit(Urgency.DEMAND, partial(self._forget, offset, length))
            raise
        self._marks.leave(offset, length)

    def _forget(self, offset: int, length: int) -> None:
        assert self._marks is not None
        first = offset - offset % self.granularity
        end = min(self.size, -(-(offset + length) // self.granularity) * self.granularity)
        self._evict([(first, end - first)])
        self._marks.leave(offset, length)

    def sync_metadata(self) -> None:
        super().sync_metadata()
        if self.writes_through and self._unflushed:
            self._unflushed = False
            try:
                self._source.flush()
            except BaseException:
                self._unflushed = True
                raise

    def read_below(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer; zeroes beyond the end of the disk."""
        inside = max(0, min(len(buffer), self.size - offset))
        if inside:
            self._source.read(offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    def _copy_below(self, offset: int, length: int) -> None:
        data = os.pread(self._own_fd, length, offset)
        if len(data) < length:
            raise OSError(errno.EIO, f"{self.file} ends at {offset + len(data)}: it was cut")
        if data.count(0) == length:
            self._source.write_zeroes(offset, length)
        else:
            self._source.write(offset, memoryview(data))

    def _below_changes(self) -> None:
        """Called before each write below. The identity that is noted is not the source's then."""
        with self._changing:
            assert self._known is not None
            if self._known["identity"] is not None:
                self._source.reached()
                self._known = {**self._known, "identity": None}
                self.set_metadata(self._known)

    def _full(self) -> OSError:
        trouble = self._drainer.trouble
        why = f"it cannot be drained: {trouble}" if trouble else "all of it is in use"
        return OSError(
            (trouble and trouble.errno) or errno.ENOSPC, f"{self.file} is full, and {why}"
        )

    def _is_hopeless(self) -> bool:
        return self._drainer.trouble is not None or self.writes_through

    # ---- what the file has ----

    def present(self, offset: int, length: int) -> Iterator[Run]:
        """The runs of these bytes that the file has."""
        for start, count, there in self.runs(offset, length):
            if there:
                yield start, min(count, self.size - start)

    def was_used(self, offset: int, length: int) -> bool:
        """Whether any of it was used since it was last asked."""
        return self.take_touched(offset, length)

    def clean(self, offset: int, length: int) -> list[Run]:
        """The parts of it that are below as well."""
        parts = self._dirty.clean(offset, length)
        return [(start, min(count, self.size - start)) for start, count in parts]

    def _choose(self, wanted: int) -> list[Run]:
        with self._choosing:
            self._evicting = self._clock.choose(wanted, self)
            return self._evicting

    def _evict_chosen(self, runs: list[Run]) -> int:
        try:
            return self._evict(runs)
        finally:
            self._evicting = []

    def _evict(self, runs: list[Run]) -> int:
        self._ahead.forget(runs)
        with self._room.leaving(sum(length for _, length in runs)):
            return self.evict(runs)

    # ---- draining ----

    def take(self, offset: int, length: int) -> bool:
        """These blocks are on their way below: who writes to one of them says so first."""
        with self._choosing:
            if any(a < offset + length and offset < a + n for a, n in self._evicting):
                return False
            self._dirty.begin(offset, length)
        inside = min(length, self.size - offset)
        for start, count in pieces([(offset, inside)], self.region_bytes):
            with self.hold(start, count):
                self.set_writable(start, count, False)
        return True

    def pass_on(self, offset: int, length: int) -> None:
        """Writes below what the file has of these bytes."""
        self._below_changes()
        for run in self.present(offset, min(length, self.size - offset)):
            self._copy_below(*run)

    def flush_below(self) -> None:
        """What was passed on is durable."""
        self._source.flush()

    def settled(self) -> None:
        """There may be something to evict now."""
        self._room.short.set()

    def tidy(self) -> None:
        """Makes durable which marks may go, and what the file has: the machine may be cut off."""
        marks = self._marks
        if marks is not None and (quiet := marks.quiet() - self._dirty.regions()):
            self.sync()
            marks.clear(quiet - self._dirty.regions())
            marks.write()
        if not self.layout.synced:
            super().sync_metadata()
        self._save_boot()

    # ---- what is asked of it while it is served ----

    def drain(self) -> dict[str, Any]:
        """Brings below, durably, all that was written before the call. Raises OSError."""
        self._drainer.drain()
        if self._unflushed:
            self.sync()
        self.tidy()
        return self.status()

    def invalidate(self) -> dict[str, Any]:
        """Forgets all that the file has: it is fetched again. Raises OSError EBUSY when some of it
        is not below yet."""
        if left := self._dirty.bytes():
            raise OSError(
                errno.EBUSY,
                f"{format_size(left)} of {self.file} are not below yet: drain the cache first",
            )
        with self._choosing:
            self._evict(every(self.size, self))
        return self.status()

    def profile(self) -> Profile:
        profile = super().profile()
        if not self._source.read_only:
            return profile
        writes = {"write", "write_fua", "write_zeroes", "discard"}
        return replace(profile, read_only=True, operations=profile.operations - writes)

    def status(self) -> dict[str, Any]:
        if not self._works:
            return {"mode": self.mode}
        source = self._source
        return {
            "mode": self.mode,
            "source": source.trouble() or ("in use" if source.is_reached else "not needed so far"),
            "limit": self._room.limit,
            "dirty_bytes": self._dirty.bytes(),
            "marked_regions": 0 if self._marks is None else len(self._marks),
            "drained_bytes": self._drainer.drained_bytes,
            "drain_failures": self._drainer.failures,
            "drain_trouble": self._drainer.trouble and str(self._drainer.trouble),
            "ahead_bytes": self._ahead.ahead_bytes,
            "background_failures": self._ahead.failures,
            "failed_writes": self._spoilt,
            "warmed": f"{self._ahead.warmed} of {self._ahead.to_warm}",
            **self.counters(),
        }
