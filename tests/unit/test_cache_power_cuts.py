"""Caches under power cuts: any page that was not synced may be old or new, in every file of theirs.

The states of some lives are tried here. For more of them, run it by hand:

    .venv/bin/python tests/unit/test_cache_power_cuts.py 1000      # lives from that many seeds
"""

import os
import random
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk.layers import mapfile
from pyublk.layers.cache import Cache
from pyublk.layers.caching.eviction import every
from pyublk.testing import Disk

PAGE = 4096
SIZE = 4 << 20
#: States that are tried of one life.
STATES = 8


class Origin(pyublk.Target):
    """What is below: a page of it that was not flushed may be old or new after a power cut, too."""

    concurrency = "parallel"

    def __init__(self, data: bytes) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(data)
        self.durable = bytes(data)
        self.lock = threading.Lock()

    def read(self, offset: int, buffer: memoryview) -> None:
        with self.lock:
            buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        with self.lock:
            self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        with self.lock:
            self.durable = bytes(self.data)


@dataclass
class State:
    """What may be left: of each file, and of the source, durable and new; and what a client may
    find in each page."""

    files: dict[str, tuple[bytes, bytes]]
    origin: tuple[bytes, bytes]
    allowed: list[set[bytes]]
    when: str


class Files:
    """The files of a folder, and what of them is durable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synced: dict[int, bytes] = {}
        self.lock = threading.RLock()
        #: Called around each sync.
        self.at_sync: Callable[[], None] = lambda: None

    @contextmanager
    def watched(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("fsync", "fdatasync")}

        def watching(sync: Callable[[int], None]) -> Callable[[int], None]:
            def watched(fd: int) -> None:
                found = os.stat(fd)
                if not stat.S_ISREG(found.st_mode):
                    sync(fd)
                    return
                with self.lock:
                    self.at_sync()
                    had = Path(f"/proc/self/fd/{fd}").read_bytes()
                sync(fd)
                with self.lock:
                    self.synced[found.st_ino] = had
                    self.at_sync()

            return watched

        for name, sync in real.items():
            setattr(os, name, watching(sync))
        try:
            yield
        finally:
            for name, sync in real.items():
                setattr(os, name, sync)

    def now(self) -> dict[str, tuple[bytes, bytes]]:
        found = {}
        for path in sorted(self.folder.iterdir()):
            if not path.name.startswith("."):
                synced = self.synced.get(path.stat().st_ino, b"")
                found[path.name] = (synced, path.read_bytes())
        return found


def mixed(durable: bytes, new: bytes, chance: float, dice: random.Random) -> bytes:
    """Each page is the old or the new one."""
    made = bytearray(max(len(durable), len(new)))
    for at in range(0, len(made), PAGE):
        page = (new if dice.random() < chance else durable)[at : at + PAGE]
        made[at : at + len(page)] = page
    return bytes(made)


class Life:
    """Random requests to a cache, and what there was at random moments of it."""

    def __init__(self, seed: int, mode: str, folder: Path) -> None:
        self.dice = random.Random(f"{mode}-{seed}")
        self.mode = mode
        self.files = Files(folder)
        self.origin = Origin(self.dice.randbytes(PAGE) * (SIZE // PAGE))
        old = bytes(self.origin.data[:PAGE])
        self.now = [old] * (SIZE // PAGE)
        self.allowed: list[set[bytes]] = [{old} for _ in self.now]
        self.states: list[State] = []
        self.moments = 0
        self.step = "opening"
        self.ready = False

    def seen(self) -> None:
        """At some of the moments, a state is kept: each has the same chance."""
        self.moments += 1
        if not self.ready:
            return
        place = len(self.states) if len(self.states) < STATES else self.dice.randrange(self.moments)
        if place < STATES:
            with self.origin.lock:
                origin = self.origin.durable, bytes(self.origin.data)
            allowed = [set(one) for one in self.allowed]
            state = State(self.files.now(), origin, allowed, self.step)
            self.states[place : place + 1] = [state]

    def cache(self, origin: Origin, folder: Path) -> Cache:
        return Cache(
            origin,
            folder / "cache",
            mode=self.mode,  # type: ignore[arg-type]
            granularity=2 * PAGE,
            readahead=0,
            drain_after=3600,
            fetchers=2,
        )

    def live(self) -> None:
        target = self.cache(self.origin, self.files.folder)
        with self.files.watched(), Disk(target) as disk:
            self.files.at_sync = self.seen
            self.ready = True
            for number in range(40):
                self.request(disk, target, number)
                with self.files.lock:
                    self.seen()
            self.ready = False

    def request(self, disk: Disk, target: Cache, number: int) -> None:
        kind = self.dice.choices(
            ["write", "read", "flush", "drain", "evict", "tidy"], [40, 10, 12, 8, 12, 6]
        )[0]
        self.step = f"step {number}, {kind}"
        page = self.dice.randrange(SIZE // PAGE // 16) * self.dice.choice([1, 1, 15])
        count = min(self.dice.choice([1, 1, 2, 3, 20]), SIZE // PAGE - page)
        if kind == "write":
            data = [f"{number}-{one}".encode().ljust(PAGE, b".") for one in range(count)]
            for one in range(count):
                self.allowed[page + one].add(data[one])
            disk.pwrite(b"".join(data), page * PAGE)
            self.now[page : page + count] = data
        elif kind == "read":
            found = disk.pread(count * PAGE, page * PAGE)
            assert found == b"".join(self.now[page : page + count])
        elif kind == "flush":
            disk.flush()
            with self.files.lock:
                self.allowed = [{one} for one in self.now]
        elif kind == "drain":
            target.drain()
        elif kind == "evict":
            runs = every(SIZE, target)
            self.dice.shuffle(runs)
            target._evict(runs[: len(runs) // 2 + 1])
        else:
            target.tidy()


def check(life: Life, state: State, number: int, folder: Path) -> None:
    """The cache that is served after the cut has what it promised, and goes on having it."""
    dice = random.Random(number)
    chance = dice.choice([0.0, 1.0, 0.5, 0.1, 0.9])
    for name, (durable, new) in state.files.items():
        (folder / name).write_bytes(mixed(durable, new, chance, dice))
    origin = Origin(mixed(*state.origin, chance, dice))
    target = life.cache(origin, folder)
    with Disk(target) as disk:
        first = disk.pread(SIZE, 0)
        for page, allowed in enumerate(state.allowed):
            found = first[page * PAGE : (page + 1) * PAGE]
            assert found in allowed, f"page {page}: {found[:16]!r}, {state.when}, chance {chance}"
        target.drain()
        target.invalidate()
        assert disk.pread(SIZE, 0) == first, f"it does not stay so: {state.when}, chance {chance}"
    assert origin.data == first


def tried(seed: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> int:
    with tempfile.TemporaryDirectory() as place:
        life = Life(seed, mode, Path(place, "life"))
        life.files.folder.mkdir()
        life.live()
        with monkeypatch.context() as patch:
            patch.setattr(mapfile, "_boot", lambda: b"another boot....")
            for number, state in enumerate(life.states):
                folder = Path(place, f"state-{number}")
                folder.mkdir()
                check(life, state, number, folder)
    return len(life.states)


@pytest.mark.parametrize("mode", ["write-through", "write-back"])
@pytest.mark.parametrize("seed", range(2))
def test_what_was_flushed_is_there_and_stays(
    seed: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tried(seed, mode, monkeypatch) == STATES


def test_a_cut_that_loses_what_was_flushed_is_seen(tmp_path: Path) -> None:
    """The check itself can fail."""
    life = Life(0, "write-back", tmp_path / "life")
    life.files.folder.mkdir()
    life.live()
    state = life.states[-1]
    state.allowed[0] = {b"planted"}
    folder = tmp_path / "state"
    folder.mkdir()
    with pytest.raises(AssertionError, match="page 0"):
        check(life, state, 0, folder)


def main(arguments: list[str]) -> None:
    states: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(int(arguments[0])):
            for mode in ("write-through", "write-back"):
                print(f"\r{mode} {seed}: {states} states so far ", end="", flush=True)
                states += tried(seed, mode, patch)
    print("\nall of them pass")


if __name__ == "__main__":
    main(sys.argv[1:])
