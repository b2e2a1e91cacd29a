# SPDX-License-Identifier: MIT
"""Ranges of regular files that one disk has, and no other: in this process, and in others.

Other processes see a lock (F_OFD_SETLK, fcntl(2)) of the bytes served: for writing, or for reading
when the disk is read-only. Every program that locks files sees it, QEMU among them. The lock ends
with the last descriptor of the opened file, and with `let_go`.

Such a lock belongs to a file as it was opened, even against others of the same process. A target
that is to replace another one opens the file while that has it: it holds a duplicate of the other's
descriptor, and the lock with it, so that at no time anybody else can have the file.
"""

import errno
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from pyublk.files import Identity, about
from pyublk.openers import openers, served_by

log = logging.getLogger("pyublk.backing")

#: First byte and end of each.
Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Kept:
    path: Path
    identity: Identity
    ranges: Ranges
    read_only: bool
    owner: object = None
    succeeds: bool = False
    #: A duplicate of the descriptor that locked it, where that is a predecessor's.
    inherited: int | None = None

    def in_the_way(self, other: "_Kept") -> bool:
        return (
            self.identity == other.identity
            and not (self.read_only and other.read_only)
            and any(
                start < stop and first < end
                for first, stop in self.ranges
                for start, end in other.ranges
            )
        )

    def may_succeed(self, other: "_Kept", after: object) -> bool:
        """Whether it is to replace the other, which is `after`'s, and both can be open at once."""
        same = other.owner is after and other.read_only == self.read_only
        return same and self.succeeds and other.succeeds

    def locked_by(self, fd: int) -> int:
        """The descriptor by which the file is locked that is open by `fd`."""
        return fd if self.inherited is None else self.inherited

    def shares_lock(self, other: "_Kept") -> bool:
        """Whether one of the two inherited its lock, maybe the other's."""
        inherits = self.inherited is not None or other.inherited is not None
        return inherits and self.identity == other.identity


_kept: dict[int, _Kept] = {}  # by descriptor
#: The descriptors of each file: a process with many disks does not look at all of them.
_of_file: dict[Identity, list[int]] = {}
_lock = threading.Lock()


def _with(identity: Identity) -> Iterator[tuple[int, _Kept]]:
    """What is kept of a file, by descriptor."""
    for fd in _of_file.get(identity, ()):
        yield fd, _kept[fd]


def _add(fd: int, kept: _Kept) -> None:
    _take(fd)
    _kept[fd] = kept
    _of_file.setdefault(kept.identity, []).append(fd)


def _take(fd: int) -> _Kept | None:
    if (kept := _kept.pop(fd, None)) is not None:
        fds = _of_file[kept.identity]
        fds.remove(fd)
        if not fds:
            del _of_file[kept.identity]
    return kept


#: For whom files are opened now, whom that one is to replace, and whether they may be made.
_opening: ContextVar[tuple[object, object, bool]] = ContextVar(
    "_opening", default=(None, None, True)
)


@contextmanager
def opened_for(owner: object, *, after: object = None, new: bool = True) -> Iterator[None]:
    """What is kept inside is `owner`'s, who may `succeed` the owner `after` in its files. `new`: a
    file that is not there is made."""
    token = _opening.set((owner, after, new))
    try:
        yield
    finally:
        _opening.reset(token)


def may_make() -> bool:
    """Whether a file that is opened now may be made."""
    return _opening.get()[2]


def keep(fd: int, path: Path, ranges: Ranges, *, read_only: bool, succeeds: bool = False) -> None:
    """Keeps ranges of the file for the disk that has it open by `fd`.

    `succeeds`: they may be the predecessor's too (`opened_for`), if that one's target allows it.
    Raises OSError EBUSY, naming who has one of them, when another disk or process does.
    """
    owner, after, _ = _opening.get()
    wanted = _Kept(path, about(fd).identity, ranges, read_only, owner, succeeds)
    with _lock:
        before = None
        for number, other in _with(wanted.identity):
            if wanted.in_the_way(other):
                if after is None or not wanted.may_succeed(other, after):
                    raise _in_use(path, other.path, "this process serves it already")
                before = other.locked_by(number)
        if before is not None:
            wanted = replace(wanted, inherited=os.dup(before))
        locked_by = wanted.locked_by(fd)
        try:
            for first, end in ranges:
                kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
                _set_lock(locked_by, kind, first, end - first)
        except OSError as error:
            if wanted.inherited is None:
                _unlock(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                if wanted.inherited is not None:
                    os.close(wanted.inherited)
                raise _in_use(path, path, _who(wanted)) from None
            log.warning(
                "%s cannot be locked (%s): other processes can use it at the same time",
                path,
                error.strerror,
            )
        _add(fd, wanted)


def keep_also(fd: int, first: int, end: int) -> None:
    """Keeps more of a file that is kept: raises OSError EBUSY when another has some of it."""
    with _lock:
        kept = _kept.get(fd)
        if kept is None or end <= first:
            return
        wanted = replace(kept, ranges=[(first, end)])
        for one, other in _with(wanted.identity):
            if one != fd and wanted.in_the_way(other):
                raise _in_use(kept.path, other.path, "this process serves it already")
        try:
            kind = fcntl.F_RDLCK if kept.read_only else fcntl.F_WRLCK
            _set_lock(kept.locked_by(fd), kind, first, end - first)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(kept.path, kept.path, _who(wanted)) from None
        _kept[fd] = replace(kept, ranges=[*kept.ranges, (first, end)])


def keep_no_more(fd: int, first: int, end: int, *, of: Path) -> None:
    """Lets others have this part of a file, if it is still kept."""
    with _lock:
        kept = _kept.get(fd)
        if kept is None or kept.path != of or end <= first:
            return
        with suppress(OSError):  # it could not be locked either
            _set_lock(kept.locked_by(fd), fcntl.F_UNLCK, first, end - first)
        left = [(a, min(b, first)) for a, b in kept.ranges if a < first]
        left += [(max(a, end), b) for a, b in kept.ranges if b > end]
        _kept[fd] = replace(kept, ranges=left)


def let_go(fd: int, *, written_late: bool = False) -> None:
    """Ends what `keep` began; also for those who have the descriptor by dup or fork.

    `written_late`: a request is still under way, which has the file open; until it has ended, the
    lock stays.
    """
    with _lock:
        if (kept := _take(fd)) is None:
            return
        others = (one for _, one in _with(kept.identity))
        if not written_late and not any(kept.shares_lock(one) for one in others):
            _unlock(kept.locked_by(fd))
        if kept.inherited is not None:
            os.close(kept.inherited)


def move(fd: int, to: int) -> None:
    """The same file is open by another descriptor now."""
    with _lock:
        if (kept := _take(fd)) is not None:
            _add(to, kept)


def _unlock(fd: int) -> None:
    with suppress(OSError):  # it could not be locked either
        _set_lock(fd, fcntl.F_UNLCK, 0, 0)


def _set_lock(fd: int, kind: int, first: int, length: int) -> None:
    """`length` 0: to the end, wherever that will be."""
    # struct flock: kind, from where `first` is counted, first, length, process.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, first, length, 0))


def _who(wanted: _Kept) -> str:
    """The kernel does not name the owner of such a lock; who has the file open is seen."""
    found = [one for one in openers(lambda file: file.identity == wanted.identity) if one.locks]
    if not found:
        return "it is locked, by whom could not be found"
    if any(one.pid == os.getpid() for one in found):
        return "a request to it that was given up is not over yet"
    disks = " and ".join(f"/dev/{disk}" for disk in served_by(found[0].pid))
    return f"{found[0]} has locked it" + (f", which serves {disks}" if disks else "")


def _in_use(path: Path, other: Path, who: str) -> OSError:
    name = f"{path}" if path == other else f"{path}, the same file as {other},"
    return OSError(errno.EBUSY, f"{name} is in use: {who}")
