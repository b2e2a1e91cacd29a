"""Power cuts for programs that work on files: what a directory may hold after one.

Nobody records each write. Whenever the program does what orders writes (sync, rename, link,
unlink), the files are compared with what they had before: what differs was written since, by
whatever means.

What may be left: of each file, every block, its size and the time of its last write may be as at
the last sync or as later; fdatasync leaves the time open. Of the names, some first part of the
changes since the last sync of the directory has been made.
"""

import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pyublk.testing import Disk

BLOCK = 512
#: What is done to files besides syncs, and is a moment for a cut or a failure.
OTHERS = ("replace", "rename", "link", "unlink", "remove", "ftruncate", "write", "pwrite", "utime")
#: Parts of a file that are no blocks.
SIZE, TIME = -1, -2
#: Parts that are lost, and kept, each by itself, at one moment.
CHOSEN = 6


def parts_of(content: bytes, time: int) -> dict[int, Any]:
    """A file, in the parts that a power cut keeps or loses by themselves."""
    blocks: dict[int, Any] = {
        n // BLOCK: content[n : n + BLOCK] for n in range(0, len(content), BLOCK)
    }
    return blocks | {SIZE: len(content), TIME: time}


@dataclass(eq=False)
class Inode:
    """What of a file is durable, and what it has."""

    durable: dict[int, Any] = field(default_factory=lambda: parts_of(b"", 0))
    newest: dict[int, Any] = field(default_factory=lambda: parts_of(b"", 0))

    def volatile(self) -> list[int]:
        """Parts that a cut may lose."""
        keys = self.durable.keys() | self.newest.keys()
        return sorted(key for key in keys if self.durable.get(key) != self.newest.get(key))

    def sync(self, *, time: bool) -> None:
        before = self.durable[TIME]
        self.durable = dict(self.newest)
        if not time:
            self.durable[TIME] = before

    def kept(self, lost: frozenset[int]) -> tuple[bytes, int]:
        """Content and time without the lost parts."""
        found: dict[int, Any] = {
            key: (self.durable if key in lost else self.newest).get(key)
            for key in self.durable.keys() | self.newest.keys()
        }
        size = found[SIZE]
        blocks = [(found.get(n) or b"").ljust(BLOCK, b"\0") for n in range(-(-size // BLOCK))]
        return b"".join(blocks)[:size], found[TIME]


Names = dict[str, Inode]


@dataclass
class State:
    """What a cut may leave, and how far the program had come."""

    event: str
    files: dict[str, tuple[bytes, int]]

    def restore(self, directory: Path) -> None:
        """Makes the directory what a cut left of it."""
        for file in directory.iterdir():
            file.unlink()
        for name, (content, time) in self.files.items():
            file = directory / name
            file.write_bytes(content)
            os.utime(file, ns=(time, time))


class Recorder:
    """Watches a directory while a program runs; `states` are what may be left of it."""

    def __init__(self, directory: Path, seed: int = 1, subsets: int = 3) -> None:
        self.directory = directory
        self.states: list[State] = []
        self.events: list[str] = []
        #: After so many events, this is raised.
        self.failure: tuple[int, BaseException] | None = None
        self._random = random.Random(seed)
        self._subsets = subsets
        self._inodes: dict[int, Inode] = {}
        self._open: list[int] = []  # keeps the numbers of inodes from being used again
        self._seen: set[int] = set()
        self._names: Names = {}
        self._pending: list[Names] = []  # names after each change that is not durable
        self._scan()
        for inode in self._inodes.values():
            inode.sync(time=True)
        self._names, self._pending = self._pending[-1] if self._pending else {}, []

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)

    # ---- the directory as it is ----

    def _read(self, place: str) -> Inode:
        found = os.stat(place)
        fd = os.open(place, os.O_RDONLY)
        content = os.pread(fd, found.st_size + 1, 0)
        if found.st_ino in self._inodes:
            os.close(fd)
        else:
            self._open.append(fd)
        inode = self._inodes.setdefault(found.st_ino, Inode())
        inode.newest = parts_of(content, found.st_mtime_ns)
        return inode

    def _scan(self) -> None:
        names = {file.name: self._read(str(file)) for file in sorted(self.directory.iterdir())}
        if names != (self._pending[-1] if self._pending else self._names):
            self._pending.append(names)

    # ---- what the program does ----

    @contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "fdatasync"):
                patch.setattr(os, name, self._around(getattr(os, name), name, self._synced))
            for name in OTHERS:
                patch.setattr(os, name, self._around(getattr(os, name), name))
            patch.setattr(Disk, "flush", self._around(Disk.flush, "flush", self._flushed))
            for name in ("pwrite", "write_zeroes", "resize"):
                patch.setattr(Disk, name, self._around(getattr(Disk, name), name))
            yield
        self._event("end")

    def _around(
        self, call: Callable[..., Any], name: str, then: Callable[[Any], None] = lambda arg: None
    ) -> Callable[..., Any]:
        def called(first: Any, *args: Any, **options: Any) -> Any:
            self._event(f"before {name} {first}")
            result = call(first, *args, **options)
            self._scan()
            if isinstance(first, int):  # maybe of a file without a name
                self._inode_of(first)
            then(first)
            self._event(f"after {name} {first}")
            return result

        return called

    def _inode_of(self, fd: int) -> Inode | None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        return self._read(f"/proc/self/fd/{fd}")

    def _synced(self, fd: int) -> None:
        if (inode := self._inode_of(fd)) is not None:
            inode.sync(time=True)
        elif self._pending:
            self._names, self._pending = self._pending[-1], []

    def _flushed(self, disk: Disk) -> None:
        for backing in getattr(disk.target, "backing", ()):
            inode = self._inode_of(backing.fd)
            assert inode is not None
            inode.sync(time=False)

    # ---- what may be left ----

    def _event(self, what: str) -> None:
        self._scan()
        self.events.append(what)
        if self.failure is not None and len(self.events) == self.failure[0]:
            raise self.failure[1]
        for names in [self._names, *self._pending]:
            for files in self._contents(names):
                key = hash(tuple(sorted(files.items())))
                if key not in self._seen:
                    self._seen.add(key)
                    self.states.append(State(f"{len(self.events)}: {what}", files))

    def _contents(self, names: Names) -> Iterator[dict[str, tuple[bytes, int]]]:
        parts = [(name, part) for name, inode in names.items() for part in inode.volatile()]
        losses: list[set[tuple[str, int]]] = [set(), set(parts)]
        for name in names:  # each file by itself
            own = {one for one in parts if one[0] == name}
            losses += [own, set(parts) - own]
        chosen = parts if len(parts) <= CHOSEN else self._random.sample(parts, CHOSEN)
        losses += itertools.chain.from_iterable([{one}, set(parts) - {one}] for one in chosen)
        for _ in range(self._subsets if len(parts) > 2 else 0):
            losses.append({one for one in parts if self._random.random() < 0.5})
        for lost in losses:
            yield {
                name: inode.kept(frozenset(part for other, part in lost if other == name))
                for name, inode in names.items()
            }
