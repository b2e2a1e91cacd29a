"""Power cuts of zoned disks, without a kernel: the states are those of the model, and no others."""

import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pyublk
from pyublk.targets import Ram, Zoned
from pyublk.testing import Crash, Disk, PowerCut, PowerCutFailed, ZonedPowerCut
from pyublk.uapi import Op
from pyublk.zones import ZoneState

BLOCK = 512
ZONE = 8 * BLOCK
EMPTY, CLOSED, FULL = ZoneState.EMPTY, ZoneState.CLOSED, ZoneState.FULL


def zoned(zones: int = 3, **options: int) -> Zoned:
    return Zoned(size=zones * ZONE, zone_size=ZONE, **options)


def block(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (BLOCK * count)


def letters(crash: Crash) -> str:
    """What is there before the pointer of each zone, a letter for each block; `!` for a zone that
    is full."""
    with crash.disk() as disk:
        found = []
        for zone in disk.report_zones():
            assert zone.state in (ZoneState.NO_POINTER, EMPTY, CLOSED, FULL)
            data = disk.pread(ZONE, zone.start)[::BLOCK]
            if zone.state is FULL:
                found.append("!" + data.rstrip(b"\0").decode())
            else:
                assert not any(data[(zone.pointer - zone.start) // BLOCK :]), "behind the pointer"
                found.append(data[: (zone.pointer - zone.start) // BLOCK].decode())
        return "|".join(found)


def all_of(cut: ZonedPowerCut, limit: int = 10_000) -> list[str]:
    found = [letters(crash) for crash in cut.crashes(limit=limit)]
    assert len(found) == len(set(found))
    return found


def test_the_states_of_a_known_workload() -> None:
    cut = ZonedPowerCut(zoned())
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        disk.pwrite(block("b", 2), BLOCK)
        disk.pwrite(block("c"), ZONE)
    # The first zone has 0 to 3 blocks, the second 0 or 1, whatever the first has.
    assert sorted(all_of(cut)) == sorted(
        f"{one}|{two}|" for one in ("", "a", "ab", "abb") for two in ("", "c")
    )


def test_a_flush_and_a_fua_write() -> None:
    cut = ZonedPowerCut(zoned())
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        disk.pwrite(block("c"), ZONE)
        disk.flush()
        cut.mark("flushed")
        disk.pwrite(block("b"), BLOCK)
        disk.pwrite(block("d"), ZONE + BLOCK)
        disk.pwrite(block("f"), 2 * BLOCK, fua=True)
        cut.mark("forced")
        assert disk.params.basic.fua
    flushed = {letters(one) for one in cut.crashes() if one.reached("flushed")}
    assert all(one.startswith("a") and "|c" in one for one in flushed)
    # The pointer stands behind what was forced, and so behind what was written before that.
    forced = {letters(one) for one in cut.crashes() if one.reached("forced")}
    assert forced == {"abf|c|", "abf|cd|"}
    assert cut.volatile().ranges == ((ZONE + BLOCK, BLOCK),)


def test_a_reset_is_whole_and_what_follows_it_needs_it() -> None:
    cut = ZonedPowerCut(zoned())
    with Disk(cut) as disk:
        disk.pwrite(block("o", 3), 0)
        disk.flush()
        with cut.record():
            disk.manage_zone(Op.ZONE_RESET, 0)
            disk.pwrite(block("n", 2), 0)
        assert disk.pread(ZONE, 0) == block("n", 2) + bytes(ZONE - 2 * BLOCK)
    assert set(all_of(cut)) == {"n||", "nn||", "ooo||", "||"}


def test_appends_finished_zones_and_a_reset_of_all() -> None:
    cut = ZonedPowerCut(zoned(max_open=2))
    with Disk(cut) as disk:
        assert disk.zone_append(block("a"), 0) == 0
        assert disk.zone_append(block("b", 2), 0) == BLOCK
        disk.manage_zone(Op.ZONE_FINISH, 0)
        with pytest.raises(OSError, match="ZONE_APPEND") as refused:
            disk.zone_append(block("c"), 0)
        assert refused.value.errno == errno.EIO
    assert set(all_of(cut)) == {"!abb||", "ab||", "a||", "||"}
    with Disk(cut) as disk:
        disk.flush()
        with cut.record():
            disk.manage_zone(Op.ZONE_RESET_ALL)
            disk.flush()
        assert {zone.state for zone in disk.report_zones()} == {EMPTY}
    assert sorted(all_of(cut)) == ["!abb||", "||"]


def test_zeroes_that_were_written_move_the_pointer() -> None:
    cut = ZonedPowerCut(zoned())
    with Disk(cut) as disk:
        disk.pwrite(bytes(2 * BLOCK), 0)
    pointers = set()
    for crash in cut.crashes():
        with crash.disk() as disk:
            pointers.add(disk.report_zones()[0].pointer)
    assert pointers == {0, BLOCK, 2 * BLOCK}


def test_what_the_disk_refuses_is_not_recorded() -> None:
    cut = ZonedPowerCut(zoned(max_active=1))
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        for offset, error in ((0, errno.EIO), (4 * BLOCK, errno.EIO), (ZONE, errno.EOVERFLOW)):
            with pytest.raises(OSError, match="WRITE") as refused:
                disk.pwrite(block("x"), offset)
            assert refused.value.errno == error
        disk.pwrite(block("b"), BLOCK)
    assert all_of(cut) == ["||", "ab||", "a||"]


def test_a_crash_is_a_zoned_disk_of_its_own() -> None:
    cut = ZonedPowerCut(zoned(max_open=2, max_active=3, zone_capacity=6 * BLOCK))
    with Disk(cut) as disk:
        disk.pwrite(block("a", 6), 0)
        disk.pwrite(block("b"), ZONE)
        crash = cut.cut(keep=[1])
    with crash.disk() as one, crash.disk() as other:
        zoned_as = one.params.zoned
        assert zoned_as is not None
        assert (zoned_as.max_open_zones, zoned_as.max_active_zones) == (2, 3)
        zones = one.report_zones()
        assert [zone.state for zone in zones] == [FULL, EMPTY, EMPTY]
        assert {zone.capacity for zone in zones} == {6 * BLOCK}
        one.manage_zone(Op.ZONE_RESET, 0)
        assert one.pread(ZONE, 0) == bytes(ZONE)
        one.pwrite(block("n"), 0)
        assert one.pread(2 * BLOCK, 0) == block("n") + bytes(BLOCK)
        assert other.pread(2 * BLOCK, 0) == block("a", 2)
    assert crash.explain().splitlines()[1:] == [
        "lost: write 2, 512 bytes at 0x1000",
        "kept: 1 other requests that were not flushed",
    ]


# ---- another model ----


@dataclass
class ModelZone:
    """A sequential zone as it is durable, and what was done since: the blocks of a write, or None
    for a reset."""

    stable: str = ""
    events: list[str | None] = field(default_factory=list)

    def states(self) -> set[str]:
        found, now = {self.stable}, self.stable
        for written in self.events:
            if written is None:
                found.add(now := "")
            else:
                found |= {now + written[:count] for count in range(len(written) + 1)}
                now += written
        return found

    def settle(self) -> None:
        self.stable = self.newest
        self.events.clear()

    @property
    def newest(self) -> str:
        now = self.stable
        for written in self.events:
            now = "" if written is None else now + written
        return now


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "append", "fua", "reset", "flush"]),
        st.integers(1, 2),
        st.integers(1, 3),
    ),
    max_size=10,
)


def states_of(zones: list[ModelZone], blocks: list[set[str]]) -> Iterator[str]:
    for first in itertools.product(*blocks):
        for rest in itertools.product(*(sorted(zone.states()) for zone in zones)):
            full = ["!" + one if len(one) == 8 else one for one in rest]
            yield "|".join(["".join(first).replace(".", "\0"), *full])


@settings(max_examples=30, deadline=None)
@given(steps=STEPS)
@example(steps=[("write", 1, 3), ("reset", 1, 1), ("write", 1, 2), ("fua", 1, 1)])
def test_the_states_are_those_of_an_independent_model(steps: list[tuple[str, int, int]]) -> None:
    """One request at a time; what is durable when is reckoned by zones, not by blocks."""
    cut = ZonedPowerCut(zoned(conventional=1))
    zones = [ModelZone(), ModelZone()]
    conventional: list[set[str]] = [{"."} for _ in range(8)]
    conventional[1:3] = [{".", "C"}, {".", "C"}]
    expected: set[str] = set()
    after = False  # whether a cut is made when the next request has arrived

    def power_is_cut() -> None:
        expected.update(states_of(zones, conventional))

    with Disk(cut) as disk:
        disk.pwrite(block("C", 2), BLOCK)
        for number, (what, index, count) in enumerate(steps):
            zone, start = zones[index - 1], index * ZONE
            newest = zone.newest
            data = "abcdefghijkl"[number] * count
            if what == "flush":
                disk.flush()
                power_is_cut()
                for one in zones:
                    one.settle()
                conventional[1:3] = [{"C"}, {"C"}]
                power_is_cut()
                after = True
                continue
            if what == "reset":
                disk.manage_zone(Op.ZONE_RESET, start)
                if newest:
                    zone.events.append(None)
            elif len(newest) + count > 8:
                continue
            else:
                at, written = start + len(newest) * BLOCK, block(data[0], count)
                zone.events.append(data)
                if what == "append":
                    assert disk.zone_append(written, start) == at
                else:
                    disk.pwrite(written, at, fua=what == "fua")
            if after or what == "fua":
                power_is_cut()
            if after := what == "fua":
                zone.settle()
                power_is_cut()
    power_is_cut()
    found = [image(crash) for crash in cut.crashes(limit=400)]
    assert set(found) <= expected
    assert len(found) == len(set(found)) == min(len(expected), 400)


def image(crash: Crash) -> str:
    """As `letters`, with all blocks of the conventional zone."""
    with crash.disk() as disk:
        first = disk.pread(ZONE, 0)[::BLOCK].decode()
        return "|".join([first, *letters(crash).split("|")[1:]])


# ---- checks, and what is refused ----


class Journal:
    """A client that appends records to a zone, and resets it for new ones when it is full."""

    def __init__(self, disk: Disk, cut: ZonedPowerCut) -> None:
        self.disk, self.cut = disk, cut

    def append(self, letter: str, *, flush: bool) -> None:
        self.disk.zone_append(block(letter), ZONE)
        if flush:
            self.disk.flush()
        self.cut.mark(letter)


def test_a_journal_that_forgets_to_flush_is_caught() -> None:
    def check(crash: Crash) -> None:
        assert set(crash.marks) <= set(letters(crash).split("|")[1]), "a record is lost"

    for flush in (True, False):
        cut = ZonedPowerCut(zoned())
        with Disk(cut) as disk:
            journal = Journal(disk, cut)
            for letter in "abcde":
                journal.append(letter, flush=flush)
        if flush:
            assert cut.check(check) == 1 + 2 * 5  # empty; then each record, and its mark
            continue
        with pytest.raises(PowerCutFailed, match="a record is lost") as failed:
            cut.check(check)
        assert "\nlost: write 1, 512 bytes at 0x1000\n" in str(failed.value) + "\n"


def test_a_flush_that_fails_once() -> None:
    cut = ZonedPowerCut(zoned())
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        cut.fail_flush_once()
        with pytest.raises(OSError, match="FLUSH"):
            disk.flush()
        assert letters(cut.cut()) == "||"
        disk.flush()
        assert letters(cut.cut()) == "a||"


def test_a_saved_record_has_the_same_crashes(tmp_path: Path) -> None:
    target = zoned(4, conventional=1, zone_capacity=6 * BLOCK)
    with Disk(target) as disk:  # before the record
        disk.pwrite(block("o", 2), ZONE)
        disk.pwrite(block("p", 6), 2 * ZONE)
        disk.pwrite(block("q"), BLOCK)
    cut = ZonedPowerCut(target)
    with Disk(cut) as disk:
        disk.pwrite(block("a", 2), ZONE + 2 * BLOCK)
        disk.pwrite(block("c"), 0)
        disk.manage_zone(Op.ZONE_RESET, 2 * ZONE)
        disk.flush()
        with cut.record():
            disk.pwrite(block("b"), 2 * ZONE, fua=True)
            cut.mark("done")
            disk.pwrite(block("d"), 3 * ZONE)
            disk.manage_zone(Op.ZONE_FINISH, 3 * ZONE)
    cut.save(tmp_path / "saved")
    loaded = ZonedPowerCut.load(tmp_path / "saved")
    ids = [crash.id for crash in cut.crashes(limit=100)]
    assert ids == [crash.id for crash in loaded.crashes(limit=100)]
    for name in ids:
        assert image(cut.crash(name)) == image(loaded.crash(name))
        assert cut.crash(name).explain() == loaded.crash(name).explain()
    with Disk(loaded) as disk:
        assert disk.pread(4 * BLOCK, ZONE) == block("o", 2) + block("a", 2)
        disk.pwrite(block("e"), 2 * ZONE + BLOCK)
        assert loaded.volatile().writes[-1].offset == 2 * ZONE + BLOCK
    with pytest.raises(ValueError, match=r"is the record of a zoned disk: use ZonedPowerCut\.load"):
        PowerCut.load(tmp_path / "saved")
    plain = PowerCut(4096)
    with Disk(plain):
        plain.save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"a disk without zones: use PowerCut\.load"):
        ZonedPowerCut.load(tmp_path / "plain")


def test_what_has_no_zones_is_refused() -> None:
    with pytest.raises(pyublk.InvalidTarget, match="use ZonedPowerCut for zoned disks"):
        PowerCut(zoned())
    with pytest.raises(pyublk.InvalidTarget, match="Ram is not served by handle"):
        ZonedPowerCut(Ram(size=1 << 20))

    class Handled(pyublk.Target):
        def handle(self, io: pyublk.IO) -> None: ...

    with (
        pytest.raises(pyublk.InvalidTarget, match="Handled has no zones: use PowerCut"),
        Disk(ZonedPowerCut(Handled(size=4096))),
    ):
        pass
