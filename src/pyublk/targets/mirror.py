# SPDX-License-Identifier: MIT
"""The same bytes in several files or block devices: the disk outlives all but one of them."""

import errno
import logging
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pyublk._native import MirrorLayout
from pyublk.backing import Backing
from pyublk.files import Identity, about
from pyublk.keeping import Ranges, move
from pyublk.mapped import MappedTarget
from pyublk.paths import DataPath
from pyublk.resizing import Ends
from pyublk.scheduling import NamedThread
from pyublk.targets.copying import PIECE, Job, Step, copy_steps, sync_steps
from pyublk.targets.record import LegRecord, LegState, MirrorState, find_record, point_to_record

log = logging.getLogger("pyublk.targets.mirror")

#: How long a stop waits for a leg, at most.
STOP_SECONDS = 5.0
#: After what time a copy that could not go on is tried again.
RETRY_SECONDS = 30.0


class _Stopped(Exception):
    """The mirror is being closed: its copier ends."""


class Mirror(MappedTarget):
    """Writes to every leg, reads from one, as RAID 1 does.

    A leg on which a request fails, or takes longer than `leg_timeout`, is not used any more, and
    the disk goes on with the others; a read is tried on another leg. The failure is recorded,
    durably, before the request that noticed it is answered: a leg that missed a write is never read
    again, not even after a restart. The last leg in step is never given up: its errors go to the
    client.

    A failed leg is resynced by `replace`, or by `rebuild` at the next start: everything is copied
    to it while the disk is in use. After a crash or a power cut, legs may differ in what was being
    written: then the first leg in step is copied to the others. Without a record, the legs may
    differ anywhere: then the first one is copied to the others, where they differ from it.

    Args:
        files: the legs, regular files or block devices; the disk is as large as the smallest.
        size: bytes of the disk, at most the size of the smallest leg.
        state: the file with the record; by default beside the first leg, with the suffix
            ".mirror". Required when the first leg is a block device. It should lie on another disk
            than the legs: while a failure cannot be recorded, nothing can be written.
        leg_timeout: seconds; 0 waits for ever, and allows zero copy.
        rebuild: resync failed legs at the start.
        direct, read_only, block_size: as for `File`.
    """

    cuts_files = True
    recoverable = True

    def __init__(
        self,
        *files: Path,
        size: int | None = None,
        state: Path | None = None,
        leg_timeout: float = 20.0,
        rebuild: bool = False,
        direct: bool = False,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        if len(files) < 2:
            raise ValueError("a mirror needs at least two files")
        if len(files) > MirrorLayout.MAX_LEGS:
            raise ValueError(
                f"a mirror has at most {MirrorLayout.MAX_LEGS} files, not {len(files)}"
            )
        if leg_timeout < 0:
            raise ValueError(f"leg_timeout must be 0 or more seconds, not {leg_timeout}")
        super().__init__(
            files, size=size, direct=direct, read_only=read_only, block_size=block_size
        )
        self._state_path = None if state is None else Path(state)
        self._beside_first = state is None
        self._leg_timeout = leg_timeout
        if leg_timeout:  # they are looked for four times in that time
            self.max_stall = 1.25 * leg_timeout + 1
        self._rebuild = rebuild
        self._lock = threading.Lock()  # the record, and changes of legs
        self._since: list[float | None] = [None] * len(files)
        self._resyncs = [0] * len(files)  # how often each leg began to be brought in step
        self._progress = 0.0
        self._stopping = threading.Event()
        self._copier: threading.Thread | None = None
        self._copying = False  # the copier will look for legs again
        self._jobs: list[Job] = []  # that were given up
        self._failed: dict[Identity, int] = {}  # files that failed, and as which leg
        self._incarnations: list[dict[Identity, int]] = []  # of each leg, by its files
        self._taken_up = False  # the record is ours to write
        self._record_fails = False  # and could not be written

    # ---- looking at it ----

    def status(self) -> dict[str, Any]:
        """Each leg's path, state, errors, and since when (seconds since 1970) it is not in step;
        `progress` of a resync from 0 to 1."""
        legs = [
            {
                "path": str(path),
                "state": str(self._state(leg)),
                "errors": self.layout.leg_errors(leg),
                "since": self._since[leg],
            }
            for leg, path in enumerate(self.files)
        ]
        return {"legs": legs, "progress": self._progress}

    @property
    def degraded(self) -> bool:
        """Whether a leg is not in step."""
        return len(self._legs(LegState.SYNCED)) < len(self.files)

    @property
    def _regions(self) -> int:
        return -(-self.layout.size // self.layout.region_bytes)

    def _state(self, leg: int) -> LegState:
        return LegState(self.layout.leg_state(leg))

    def _legs(self, state: LegState) -> list[int]:
        return [leg for leg in range(len(self.files)) if self._state(leg) == state]

    # ---- as a mapped target ----

    @property
    def paths(self) -> tuple[DataPath, ...]:  # type: ignore[override]
        if self._leg_timeout:
            # Memory that a hanging leg may still read must not be the request's own.
            return (DataPath.COPY, DataPath.USER_COPY)
        return super().paths

    def check_threads(self, threads: int) -> None:
        if threads > 1 and self._leg_timeout:
            # A request that a leg keeps leaves its buffer behind, which one thread only knows.
            raise ValueError(
                f"threads={threads} needs a mirror with leg_timeout 0, which waits for ever"
            )

    def check_shared_memory(self) -> None:
        if self._leg_timeout:
            raise ValueError(
                "shared_memory=True needs a mirror with leg_timeout 0: a leg that answers late "
                "would write into memory that the client uses again already"
            )

    def make_layout(self, files: list[tuple[int, bool, bool]]) -> MirrorLayout:
        smallest = min(backing.size for backing in self.backing)
        size = smallest - smallest % self.block_size
        if self._wanted_size is not None:
            if self._wanted_size > size:
                raise ValueError(
                    f"size {self._wanted_size} is more than the smallest leg has, {size} bytes"
                )
            size = self._wanted_size
        return MirrorLayout(files, size, leg_timeout=self._leg_timeout)

    @property
    def layout(self) -> MirrorLayout:
        layout = super().layout
        assert isinstance(layout, MirrorLayout)
        return layout

    def ranges(self, file: int) -> Ranges:
        return [(0, self.layout.size)]

    def ends(self, size: int) -> Ends:
        return dict.fromkeys(range(len(self.files)), size)

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        for leg, path in enumerate(self.files):
            state = self._state(leg)
            if state == LegState.FAILED:
                raise ValueError(
                    f"leg {leg} ({path}) has failed, and a mirror with a failed leg cannot "
                    "be resized: replace that leg first"
                )
            if state == LegState.RESYNC and size < self.layout.size:
                raise ValueError(
                    f"leg {leg} ({path}) is being brought in step: shrink the disk after that"
                )
        super().resize(size, update)

    def size_changed(self, *, fresh: bool) -> None:
        """What is new has to be the same in every leg."""
        with self._lock:
            for leg in self._legs(LegState.RESYNC):  # up to the new end, from the beginning
                self._resyncs[leg] += 1
            if fresh or self.read_only:
                return
            for leg in self._legs(LegState.SYNCED)[1:]:
                self.layout.set_leg_state(leg, LegState.RESYNC)
                self._resyncs[leg] += 1
            self._try_to_record()
            self._begin_resync()
        self.wake_queues()

    def open(self) -> None:
        super().open()
        self.files = [path.absolute() for path in self.files]  # a daemon changes its directory
        try:
            if self._state_path is None:
                if self.backing[0].is_device:
                    raise ValueError(
                        f"{self.files[0]} is a block device: name a file for the record of "
                        "failed legs by the option state"
                    )
                self._state_path = _record_beside(self.files[0])
            self._state_path = find_record(self._state_path)
            for path in self.files:
                self._refuse_other_record(path)
            self._stopping = threading.Event()
            self._incarnations = [{backing.identity: 0} for backing in self.backing]
            if self._take_up_record():
                with self._lock:
                    self._begin_resync()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stopping.set()
        if self._copier is not None:
            self._copier.join(2 * STOP_SECONDS)
            self._copier = None
            self._copying = False
        if self._taken_up:
            self._taken_up = False
            alike = self.read_only or self._legs_are_alike()
            with self._lock:
                self._try_to_record(active=not alike)
        super().close()

    def written_late(self, file: int) -> bool:
        return any(self.layout.leg_orphans(file)) or self._hangs(file)

    def _legs_are_alike(self) -> bool:
        """Whether all legs in step have the same, durably; else a start has to copy, as after a
        crash. One that cannot be synced has failed."""
        if not all(self.layout.is_drained(region) for region in range(self._regions)):
            log.warning("the disk was stopped while it was written: its legs may differ")
            return False
        try:
            while True:
                leg, error = self._sync(self._legs(LegState.SYNCED))
                if not error:
                    return True
                if error != errno.ETIMEDOUT:
                    self.leg_failed(leg, error)
                if self._state(leg) == LegState.SYNCED:  # it is slow, or the last one
                    reason = os.strerror(error)
                    break
        except (OSError, RuntimeError) as failure:  # no descriptors or threads
            reason = str(failure)
        log.warning("the disk was stopped, but its legs could not be synced: %s", reason)
        return False

    def leg_failed(self, leg: int, error: int, file_generation: int | None = None) -> None:
        with self._lock:
            fails_now = error != 0 and self.layout.fail_leg(leg, file_generation)
            if fails_now:
                self._since[leg] = time.time()
            if not self.layout.recorded:
                self._try_to_record()
        if fails_now:
            log.error(
                "leg %d (%s) failed: %s; the disk goes on without it",
                leg,
                self.files[leg],
                os.strerror(error),
            )

    # ---- the record ----

    def _refuse_other_record(self, leg: Path) -> None:
        """One beside a leg may know of failures that ours does not."""
        other = _record_beside(leg)
        if other.exists() and other.resolve() != self._state_path:
            raise ValueError(
                f"{other} is the record of a mirror with {leg.name} as its first leg, and may say "
                f"what {self._state_path} does not: start with that leg first, with "
                f"state={other}, or without that file if it is out of date"
            )

    def _take_up_record(self) -> bool:
        """Puts legs into the state on record; whether one is to be brought in step."""
        assert self._state_path is not None
        record = MirrorState.read(self._state_path)
        states = [LegState.SYNCED] * len(self.files)
        known = {leg.path: leg for leg in record.legs}
        if not known:
            log.warning(
                "%s, the mirror's record, is not there: copying %s to the others where they differ",
                self._state_path,
                self.files[0],
            )
        for leg, path in enumerate(self.files):
            before = known.get(str(path))
            if before is None and (known or leg):
                states[leg] = LegState.RESYNC  # new here
            elif before is not None and before.state != LegState.SYNCED:
                self._since[leg] = before.since
                again = self._rebuild or before.state == LegState.RESYNC
                states[leg] = LegState.RESYNC if again else LegState.FAILED
        if LegState.SYNCED not in states:
            raise ValueError(
                f"no leg is in step according to {self._state_path}: name one that is, or remove "
                "that file, and the first leg will be copied to the others"
            )
        if record.active:
            first = states.index(LegState.SYNCED)
            log.warning("the mirror was not stopped: copying %s to the others", self.files[first])
            for leg, state in enumerate(states):
                if leg != first and state == LegState.SYNCED:
                    states[leg] = LegState.RESYNC
                    self._since[leg] = time.time()
        for leg, state in enumerate(states):
            self.layout.set_leg_state(leg, state)
        self._record()
        self._taken_up = True
        return LegState.RESYNC in states and not self.read_only

    def _record(self, *, active: bool = True) -> None:
        """Puts the state of every leg on record, with the lock held. Raises OSError."""
        if not self.read_only:
            assert self._state_path is not None
            legs = [
                LegRecord(str(path), self._state(leg), self._since[leg])
                for leg, path in enumerate(self.files)
            ]
            MirrorState(active, legs).write(self._state_path)
        self.layout.set_recorded()

    def _try_to_record(self, *, active: bool = True) -> None:
        """While a leg that failed is not on record, the queues fail every write, and each asks for
        another try."""
        try:
            self._record(active=active)
        except OSError as error:
            if not self._record_fails:
                log.error(
                    "cannot write the record of legs that failed: %s; while a leg that failed is "
                    "not on it, nothing can be written to the disk",
                    error,
                )
            self._record_fails = True
        else:
            self._record_fails = False

    # ---- bringing a leg in step ----

    def replace(self, leg: int, path: Path | None = None) -> None:
        """Puts a new file in a failed leg's place (None: the same again), and copies all to it.

        Returns at once; `status` tells how far it is, `wait_in_step` waits.

        Raises ValueError for a leg that has not failed; a file that is too small, takes larger
        blocks than the disk has, or may still write late what it was asked before it failed; and
        for another file while two before it hang.
        """
        with self._lock:
            layout = self.layout
            if not 0 <= leg < len(self.files):
                raise ValueError(f"there is no leg {leg}, only 0 to {len(self.files) - 1}")
            if self._state(leg) != LegState.FAILED:
                raise ValueError(f"leg {leg} ({self.files[leg]}) has not failed")
            wanted = self._refuse_late_writers(leg, path)
            if path is not None:
                self._put_in_place(leg, Path(path).absolute(), wanted)
            layout.set_leg_state(leg, LegState.RESYNC)
            self._resyncs[leg] += 1
            self._try_to_record()
            self._begin_resync()
        self.wake_queues()

    def _refuse_late_writers(self, leg: int, path: Path | None) -> Identity:
        """What a file writes late would undo what is copied to it. The file's identity."""
        failed = self.backing[leg].identity
        self._failed[failed] = leg
        wanted = failed if path is None else about(path).identity
        before = self._failed.get(wanted)
        if before is not None and (any(self.layout.leg_orphans(before)) or self._hangs(before)):
            raise ValueError(
                f"{path or self.files[leg]} still holds requests that it did not answer in time: "
                f"replace leg {leg} when it has answered them, or by another file"
            )
        _, held_before = self.layout.leg_orphans(leg)
        if wanted != failed and held_before:  # each such file keeps memory
            raise ValueError(
                f"leg {leg} cannot have a third file while {self.files[leg]} and the one before it "
                "hold requests that they did not answer in time"
            )
        return wanted

    def _put_in_place(self, leg: int, path: Path, identity: Identity) -> None:
        assert self._state_path is not None
        self._refuse_other_record(path)
        old, ranges = self.backing[leg], self.ranges(leg)
        if identity == old.identity:
            old.let_go()
        backing = self.open_file(path)
        try:
            self._check_replacement(backing)
            backing.keep(ranges, read_only=self.read_only)
            if leg == 0 and self._beside_first and not backing.is_device:
                # From beside the new first leg, where the next start looks.
                point_to_record(_record_beside(path), self._state_path)
        except (ValueError, OSError):
            backing.close()
            if identity == old.identity:
                old.keep(ranges, read_only=self.read_only)
            raise
        old.let_go(written_late=self.written_late(leg))
        # The same number: a queue that is about to write by it must not find another's file.
        os.dup2(backing.fd, old.fd, inheritable=False)
        move(backing.fd, old.fd)
        os.close(backing.fd)
        self.backing[leg] = replace(backing, fd=old.fd)
        self.files[leg] = path
        known = self._incarnations[leg]
        file_generation = known.setdefault(identity, len(known))
        self.layout.replace_file(
            leg, old.fd, backing.in_memory, backing.is_device, file_generation=file_generation
        )

    def _check_replacement(self, backing: Backing) -> None:
        if backing.size < self.layout.size:
            raise ValueError(
                f"{backing.path} has {backing.size} bytes, the mirror needs {self.layout.size}"
            )
        if backing.block_size > self.block_size:
            raise ValueError(
                f"{backing.path} takes blocks of {backing.block_size} bytes, larger than the "
                f"disk's, {self.block_size}: a mirror with such a leg starts with larger blocks"
            )

    def wait_in_step(self, timeout: float | None = None) -> bool:
        """Waits, at most `timeout` seconds, until no leg is being brought in step; whether the
        mirror is whole then."""
        copier = self._copier
        if copier is not None:
            copier.join(timeout)
        return not self.degraded

    def _begin_resync(self) -> None:
        """With the lock held, as the copier decides with it to end."""
        if not self._copying:
            self._copying = True
            self._copier = NamedThread(target=self._resync, name="mirror-resync", daemon=True)
            self._copier.start()

    def _resync(self) -> None:
        while legs := self._legs_to_copy():
            try:
                self._copy_everything(legs)
            except _Stopped:
                return
            except Exception:  # no descriptors, memory or threads
                log.exception("bringing the mirror in step: it is tried again")
                if self._stopping.wait(RETRY_SECONDS):
                    return

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _Stopped

    def _legs_to_copy(self) -> dict[int, int]:
        """Legs to bring in step, and which of their resyncs that is."""
        with self._lock:
            legs = {leg: self._resyncs[leg] for leg in self._legs(LegState.RESYNC)}
            self._copying = bool(legs)
            return legs

    def _still(self, legs: dict[int, int]) -> list[int]:
        """Those that did not fail since; one that was replaced again needs everything again."""
        return [leg for leg in self._legs(LegState.RESYNC) if legs.get(leg) == self._resyncs[leg]]

    def _copy_everything(self, legs: dict[int, int]) -> None:
        layout = self.layout
        self._progress = 0.0
        for region in range(self._regions):
            if not self._until_done(legs, partial(self._copy, region)):
                return
            self._progress = (region + 1) / self._regions
        if not self._until_done(legs, self._sync):
            return
        with self._lock:
            for leg in self._still(legs):
                layout.set_leg_state(leg, LegState.SYNCED)
                self._since[leg] = None
            self._try_to_record()
        if not self.degraded:
            log.info("the mirror is in step again")

    def _until_done(
        self, legs: dict[int, int], work: Callable[[list[int]], tuple[int, int]]
    ) -> bool:
        """Does it with those that are left of `legs`, and again without those that fail in it;
        whether any is left."""
        while left := self._still(legs):
            self._pause(0)
            resyncs = list(self._resyncs)
            leg, error = work(left)
            if not error:
                return True
            if resyncs[leg] == self._resyncs[leg]:
                self.leg_failed(leg, error)
            if self._state(leg) == LegState.SYNCED:  # the last one, which all others wait for
                log.error(
                    "leg %d (%s) cannot be read: %s; as it is the last in step, no other can be "
                    "brought in step until it can",
                    leg,
                    self.files[leg],
                    os.strerror(error),
                )
                self._pause(RETRY_SECONDS)
                while self._hangs(leg):
                    self._pause(RETRY_SECONDS)
        return False

    def _copy(self, region: int, legs: list[int]) -> tuple[int, int]:
        layout = self.layout
        offset = region * layout.region_bytes
        length = min(layout.region_bytes, layout.size - offset)
        memory = memoryview(mmap.mmap(-1, min(length, PIECE)))  # page-aligned, for direct I/O
        layout.block_writes(region)
        try:
            while not layout.is_drained(region):
                self._pause(0.001)
            source = self._legs(LegState.SYNCED)[0]
            fds = self._duplicates([source, *legs])
            # One that failed may hold in the page cache what never reached its disk.
            alike = [leg for leg in legs if self._since[leg] is None]
            steps = copy_steps(fds, source, legs, alike, memory, offset, length)
            return self._run(steps, fds)
        finally:
            layout.block_writes(None)
            self.wake_queues()

    def _sync(self, legs: list[int]) -> tuple[int, int]:
        fds = self._duplicates(legs)
        return self._run(sync_steps(fds), fds)

    def _duplicates(self, legs: list[int]) -> dict[int, int]:
        fds: dict[int, int] = {}
        try:
            with self._lock:
                for leg in legs:
                    fds[leg] = os.dup(self.backing[leg].fd)
        except BaseException:
            for fd in fds.values():
                os.close(fd)
            raise
        return fds

    def _run(self, steps: Iterator[Step], fds: dict[int, int]) -> tuple[int, int]:
        """Which leg failed, and its errno; 0: none. A leg that takes too long is left alone, with
        the job that waits for it."""
        job = Job(steps, list(fds.values()))
        try:
            job.start()
        except RuntimeError:  # this process may have no more threads
            job.close()
            raise
        while job.is_alive():
            job.join(0.1)
            limit = self._leg_timeout or math.inf
            if job.give_up(min(limit, STOP_SECONDS) if self._stopping.is_set() else limit):
                self._jobs.append(job)
                return job.leg, errno.ETIMEDOUT
        return job.leg, job.error

    def _hangs(self, leg: int) -> bool:
        """Whether a job that was given up still waits for the leg."""
        self._jobs = [job for job in self._jobs if job.is_alive()]
        return any(job.leg == leg for job in self._jobs)


def _record_beside(path: Path) -> Path:
    return path.with_name(path.name + ".mirror")
