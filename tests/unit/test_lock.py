"""ShardedLock: who waits for whom, and what can go on meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from pyublk import ShardedLock

GRANULE = 4096


class Taker:
    """A thread that takes a range, and has it until it is told to let go."""

    def __init__(self, held: AbstractContextManager[None]) -> None:
        self.has, self.begins = threading.Event(), threading.Event()
        self._release = threading.Event()
        self._held = held
        # Not waited for by the interpreter's end: a lock that never comes fails its test alone.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self.begins.wait(30)

    def _run(self) -> None:
        self.begins.set()
        with self._held:
            self.has.set()
            assert self._release.wait(60)

    def waits(self) -> bool:
        """Whether it is kept out: only the lapse of a time can show it."""
        return not self.has.wait(0.05)

    def let_go(self) -> None:
        self._release.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def lock() -> ShardedLock:
    return ShardedLock(shards=8, granule=GRANULE)


@pytest.fixture
def takers() -> Iterator[list[Taker]]:
    made: list[Taker] = []
    yield made
    for taker in made:
        taker.let_go()


#: Ranges that have a byte, and so a shard, in common: the same, a part, beginning or end, all.
OVERLAPS = [
    ((0, 512), (0, 512)),
    ((0, 3 * GRANULE), (GRANULE, 512)),
    ((GRANULE, 2 * GRANULE), (2 * GRANULE, 4 * GRANULE)),
    ((5 * GRANULE, 512), (0, 1 << 40)),
    ((6 * GRANULE, 4 * GRANULE), (9 * GRANULE, 512)),  # round the end of the shards
]


@pytest.mark.parametrize(("first", "second"), OVERLAPS)
@pytest.mark.parametrize(
    ("has", "wants"),
    [("writing", "reading"), ("writing", "writing"), ("reading", "writing")],
)
def test_a_writer_excludes_whoever_overlaps(
    lock: ShardedLock,
    takers: list[Taker],
    has: str,
    wants: str,
    first: tuple[int, int],
    second: tuple[int, int],
) -> None:
    with getattr(lock, has)(*first):
        takers.append(Taker(getattr(lock, wants)(*second)))
        # While it waits, this thread runs Python: the GIL was released.
        assert takers[0].waits()
    assert takers[0].has.wait(30)


def test_readers_share_a_range(lock: ShardedLock, takers: list[Taker]) -> None:
    for _ in range(3):
        takers.append(Taker(lock.reading(0, 4 * GRANULE)))
    for taker in takers:
        assert taker.has.wait(30)
    takers.append(Taker(lock.writing(GRANULE, 512)))
    assert takers[-1].waits()
    for reader in takers[:3]:
        reader.let_go()
    assert takers[-1].has.wait(30)


def test_distant_ranges_pass_at_once(lock: ShardedLock, takers: list[Taker]) -> None:
    for shard in range(8):
        takers.append(Taker(lock.writing(shard * GRANULE, GRANULE)))
    for taker in takers:
        assert taker.has.wait(30)


def test_what_is_empty_waits_for_nobody(lock: ShardedLock, takers: list[Taker]) -> None:
    takers.append(Taker(lock.writing(0, 1 << 40)))
    assert takers[0].has.wait(30)
    with lock.writing(0, 0), lock.reading(GRANULE, 0):
        pass


def test_an_exception_lets_go(lock: ShardedLock) -> None:
    with pytest.raises(LookupError), lock.writing(0, 512):
        raise LookupError
    with lock.writing(0, 512):
        pass


def test_a_held_range_keeps_its_lock() -> None:
    held = ShardedLock(1, 1).writing(0, 1)  # the lock itself is dropped
    with held:
        pass


@pytest.mark.parametrize("arguments", [{"shards": 0}, {"granule": 0}, {"shards": 0, "granule": 0}])
def test_a_lock_of_nothing_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^shards and granule must be at least 1$"):
        ShardedLock(**arguments)


def test_a_lock_is_made_once(lock: ShardedLock) -> None:
    with pytest.raises(RuntimeError, match="this lock is made already"):
        lock.__init__()  # type: ignore[misc]


@pytest.mark.parametrize("span", [(-1, 1), (0, -1), (1 << 64, 1)])
def test_a_range_that_is_none_is_refused(lock: ShardedLock, span: tuple[int, int]) -> None:
    for take in (lock.reading, lock.writing):
        with pytest.raises(OverflowError):
            take(*span)
