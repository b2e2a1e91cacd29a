# SPDX-License-Identifier: MIT
"""A disk with a volatile write cache that records what is done to it."""

import errno
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pyublk.arguments import whole
from pyublk.engines import dispatch_of
from pyublk.errors import InvalidTarget
from pyublk.profile import Concurrency, Profile
from pyublk.target import Target
from pyublk.targets.ram import Ram
from pyublk.testing.power_cuts.log_writes import write_log
from pyublk.testing.power_cuts.record import Record
from pyublk.testing.power_cuts.recording import Recording
from pyublk.testing.power_cuts.saved import Saved
from pyublk.testing.power_cuts.states import Point

#: Bytes of the largest unit that a power cut leaves whole.
MAX_ATOMIC = 1 << 20


class PowerCut(Recording):
    """A disk with a volatile write cache, from which `crashes` makes the disks that may be left
    when the power is cut.

    Serve it as any target, on a `Device` or on a `Disk`. From the moment when it is opened, it
    records every request, when it arrived and when it was completed. A flush makes durable what was
    completed when it arrived, a FUA write itself; of all other writes, any block may be as it was
    before, or as it was written, whatever became of the others.

    ::

        cut = PowerCut(1 << 20)
        with Disk(cut) as disk:
            disk.pwrite(b"record".ljust(512), 4096)
            disk.flush()
            cut.mark("committed")
        for crash in cut.crashes():
            with crash.disk() as disk:
                if crash.reached("committed"):
                    assert disk.pread(6, 4096) == b"record"

    Args:
        target: bytes of a disk in memory, or a target of any kind; of zoned ones, `ZonedPowerCut`.
            Its content is the disk's; it is opened and closed with it, and must not be written
            otherwise.
        block_size: bytes; by default the target's, or 512.
        atomic: bytes that a power cut leaves whole, when they are aligned; by default a block. A
            unit of several blocks then has what was written to it in the order of arrival.
        garbage: a block that was being written may also have neither old nor new content.
    """

    def __init__(
        self,
        target: Target | int,
        *,
        block_size: int | None = None,
        atomic: int | None = None,
        garbage: bool = False,
    ) -> None:
        if isinstance(target, int):
            target = Ram(size=whole("size", target, least=512), block_size=block_size or 512)
        super().__init__(_recordable(target))
        block = whole("block_size", block_size or target.block_size, least=target.block_size)
        unit = whole("atomic", atomic or block, least=block)
        if unit & (unit - 1) or unit > MAX_ATOMIC:
            raise ValueError(f"atomic must be a power of two up to {MAX_ATOMIC} bytes, not {unit}")
        self.block_size = block
        self.unit = unit
        self._garbage = garbage
        self._calls: Mapping[str, Callable[..., Any]] = self.below.methods
        if self.concurrency != "parallel":  # crashes are read while the disk is used
            lock = threading.Lock()
            self._calls = {name: _locked(call, lock) for name, call in self._calls.items()}

    # ---- as a target ----

    @property
    def concurrency(self) -> Concurrency:  # type: ignore[override]
        """Coroutines take turns on their loop, whoever calls them."""
        below = self.below.target
        return "parallel" if dispatch_of(below) == "async" else below.concurrency

    def announces(self, method: str) -> bool:
        if method in ("discard", "write_zeroes"):
            return self.below.target.announces(method)
        return super().announces(method)

    def profile(self) -> Profile:
        below = super().profile()
        return replace(
            below,
            block_size=self.block_size,
            physical_block_size=max(below.physical_block_size, self.block_size),
            io_min=max(below.io_min, self.block_size),
            discard_granularity=max(below.discard_granularity, self.block_size),
        )

    def read(self, offset: int, buffer: memoryview) -> None:
        self._calls["read"](offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        with self._record.writing("write", offset, len(data), bytes(data)):
            self._calls["write"](offset, data)

    def write_fua(self, offset: int, data: memoryview) -> None:
        with self._record.writing("write", offset, len(data), bytes(data), fua=True):
            if "write_fua" in self._calls:
                self._calls["write_fua"](offset, data)
            else:
                self._calls["write"](offset, data)
                self._flush_below()

    def discard(self, offset: int, length: int) -> None:
        with self._record.writing("discard", offset, length, None):
            self._calls["discard"](offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with self._record.writing("write_zeroes", offset, length, None):
            self._calls["write_zeroes"](offset, length, unmap)

    def flush(self) -> None:
        with self._flushing():
            self._flush_below()

    def _flush_below(self) -> None:
        if "flush" in self._calls:
            self._calls["flush"]()

    # ---- what is recorded ----

    def _new_record(self) -> Record:
        return Record(self.below.target.profile().size, self.unit, self.read)

    def _new_point(self, time: int) -> Point:
        return Point(self._record, time, garbage=self._garbage)

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"garbage": self._garbage}

    def fail_flush_once(self, error: int = errno.EIO, *, forget: bool = True) -> None:
        """The next flush fails with that errno, those after it do not.

        With `forget`, what that flush should have made durable may be lost even after later flushes
        have succeeded, as when the kernel has marked pages clean that could not be written: an
        application that calls fsync again after an error loses data. Without, the next flush makes
        it durable.
        """
        self._fail_next_flush(error, forget=forget)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The PowerCut that was saved, in memory. Raises ValueError for another file."""
        with closing(Saved(path)) as saved:
            about = saved.about
            if "zones" in about:
                raise ValueError(f"{path} is the record of a zoned disk: use ZonedPowerCut.load")
            block, unit, garbage = about["block_size"], about["unit"], about["garbage"]
            cut = cls(about["size"], block_size=block, atomic=unit, garbage=garbage)
            cut.open()
            for offset, piece in saved.pieces():
                cut._calls["write"](offset, memoryview(piece))
            for write in saved.writes():
                cut._record.restore(write)
                data = bytes(write.length) if write.data is None else write.data
                cut._calls["write"](write.offset, memoryview(data))
            saved.restore_rest(cut._record)
            cut._windows = [(start, stop) for start, stop in about["windows"]]
            cut.close()
        return cut

    def write_log(self, path: Path | str) -> None:
        """Writes the record in the format of dm-log-writes, for the replay-log of xfstests.

        As in that, a write stands where the flush was completed that made it durable; those that
        never were stand at the end.
        """
        write_log(self._record, self.block_size, path)


def _locked(call: Callable[..., Any], lock: threading.Lock) -> Callable[..., Any]:
    def locked(*arguments: object) -> None:
        with lock:
            call(*arguments)

    return locked


def _recordable(target: Target) -> Target:
    dispatch_of(target)  # whether it is a target at all
    if callable(getattr(target, "handle", None)):
        raise InvalidTarget(
            f"{type(target).__name__} is served by handle, and a PowerCut is a layer over targets "
            "with methods, native ones and mapped ones: use ZonedPowerCut for zoned disks"
        )
    return target
