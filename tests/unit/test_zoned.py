# SPDX-License-Identifier: MIT
"""Zoned targets: pointers, states and limits as clients of a zoned disk know them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import pyublk
from pyublk.targets import Zoned, build, resolve
from pyublk.testing import Disk
from pyublk.uapi import Feature, Op
from pyublk.zones import Zone, ZoneKind, Zones, ZoneState

KIB, MIB = 1 << 10, 1 << 20
ZONE = MIB


def zoned(**options: int) -> Zoned:
    return Zoned(size=8 * ZONE, zone_size=ZONE, **options)


@contextmanager
def refused(error: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 -- the errno is looked at
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[error]


def states(disk: Disk) -> list[ZoneState]:
    return [zone.state for zone in disk.report_zones()]


def test_the_parameters_say_that_it_is_zoned() -> None:
    target = zoned(max_open=3, max_active=5)
    params = target.profile().params(128 * KIB)
    assert params.basic.chunk_size == ZONE
    assert params.zoned is not None
    assert (params.zoned.max_open_zones, params.zoned.max_active_zones) == (3, 5)
    assert params.zoned.max_append_size == 128 * KIB
    assert target.needs == Feature.ZONED
    assert target.paths == (pyublk.DataPath.USER_COPY,)


def test_a_fresh_disk_reports_empty_zones() -> None:
    with Disk(zoned(conventional=2, zone_capacity=768 * KIB)) as disk:
        zones = disk.report_zones()
    assert [zone.start for zone in zones] == [n * ZONE for n in range(8)]
    assert [zone.kind for zone in zones[1:3]] == [ZoneKind.CONVENTIONAL, ZoneKind.SEQUENTIAL]
    assert [zone.state for zone in zones[1:3]] == [ZoneState.NO_POINTER, ZoneState.EMPTY]
    assert [zone.capacity for zone in zones[1:3]] == [ZONE, 768 * KIB]
    assert all(zone.pointer == zone.start for zone in zones[2:])


def test_a_report_longer_than_the_disk_ends_in_zeroes() -> None:
    zones = Zones(size=4 * ZONE, zone_size=ZONE)
    answer = zones.report(3 * ZONE, 5)
    assert len(answer) == 5 * 64
    assert Zone.unpack(answer[:64]).start == 3 * ZONE
    assert answer[64:] == bytes(4 * 64)


def test_writes_follow_the_pointer() -> None:
    with Disk(zoned()) as disk:
        disk.pwrite(b"a" * 4096, ZONE)
        disk.pwrite(b"b" * 8192, ZONE + 4096)
        assert disk.pread(16384, ZONE) == b"a" * 4096 + b"b" * 8192 + bytes(4096)
        zone = disk.report_zones()[1]
        assert (zone.pointer, zone.state) == (ZONE + 12288, ZoneState.IMPLICITLY_OPEN)
        for wrong in (ZONE, ZONE + 8192, ZONE + 16384):
            with refused(errno.EIO):
                disk.pwrite(b"c" * 4096, wrong)
        assert disk.report_zones()[1] == zone
        assert disk.pread(4096, ZONE) == b"a" * 4096


def test_conventional_zones_are_written_anywhere() -> None:
    with Disk(zoned(conventional=1)) as disk:
        disk.pwrite(b"x" * 4096, 64 * KIB)
        disk.pwrite(b"y" * 4096, 64 * KIB)
        assert disk.pread(4096, 64 * KIB) == b"y" * 4096
        for op in (Op.ZONE_RESET, Op.ZONE_OPEN, Op.ZONE_CLOSE, Op.ZONE_FINISH):
            with refused(errno.EIO):
                disk.manage_zone(op, 0)
        with refused(errno.EIO):
            disk.zone_append(b"z" * 4096, 0)


def test_a_zone_is_full_at_its_capacity() -> None:
    with Disk(zoned(zone_capacity=768 * KIB)) as disk:
        disk.pwrite(b"x" * (768 * KIB), 0)
        zone = disk.report_zones()[0]
        assert (zone.state, zone.pointer) == (ZoneState.FULL, ZONE)
        for offset in (0, 768 * KIB):
            with refused(errno.EIO):
                disk.pwrite(b"y" * 4096, offset)
        with refused(errno.EIO):
            disk.manage_zone(Op.ZONE_OPEN, 0)
        disk.pwrite(b"x" * (764 * KIB), ZONE)
        with refused(errno.EIO):
            disk.pwrite(b"y" * (8 * KIB), ZONE + 764 * KIB)


def test_an_append_tells_where_it_went() -> None:
    with Disk(zoned()) as disk:
        places = [disk.zone_append(bytes([n]) * 4096, 2 * ZONE) for n in (1, 2, 3)]
        assert places == [2 * ZONE, 2 * ZONE + 4096, 2 * ZONE + 8192]
        assert disk.pread(4096, places[1]) == b"\2" * 4096
        disk.manage_zone(Op.ZONE_FINISH, 2 * ZONE)
        with refused(errno.EIO):
            disk.zone_append(b"x" * 4096, 2 * ZONE)


def test_only_the_answer_to_an_append_carries_a_place() -> None:
    """The kernel refuses the commit of any other request that has one."""
    with Disk(zoned()) as disk:
        disk.zone_append(b"x" * 4096, 3 * ZONE)
        assert disk._queue is not None
        assert disk._queue.zone_sector(0) == 3 * ZONE // 512
        disk.pread(4096, 0)
        assert disk._queue.zone_sector(0) == 0


def test_a_reset_forgets() -> None:
    target = zoned()
    with Disk(target) as disk:
        for n in range(4):
            disk.pwrite(b"x" * 4096, n * ZONE)
        disk.manage_zone(Op.ZONE_RESET, ZONE)
        assert disk.pread(4096, ZONE) == bytes(4096)
        assert disk.pread(4096, 2 * ZONE) == b"x" * 4096
        disk.manage_zone(Op.ZONE_RESET_ALL)
        assert set(states(disk)) == {ZoneState.EMPTY}
        assert disk.pread(4096, 2 * ZONE) == bytes(4096)
        disk.pwrite(b"y" * 4096, 0)


def test_open_close_finish() -> None:
    with Disk(zoned()) as disk:
        disk.manage_zone(Op.ZONE_OPEN, 0)
        disk.manage_zone(Op.ZONE_OPEN, ZONE)
        disk.pwrite(b"x" * 4096, ZONE)
        assert states(disk)[:2] == [ZoneState.OPEN, ZoneState.OPEN]
        disk.manage_zone(Op.ZONE_CLOSE, 0)
        disk.manage_zone(Op.ZONE_CLOSE, ZONE)
        assert states(disk)[:2] == [ZoneState.EMPTY, ZoneState.CLOSED]
        with refused(errno.EIO):
            disk.manage_zone(Op.ZONE_CLOSE, 0)
        disk.manage_zone(Op.ZONE_FINISH, ZONE)
        disk.manage_zone(Op.ZONE_FINISH, ZONE)
        assert states(disk)[1] is ZoneState.FULL
        assert disk.report_zones()[1].pointer == 2 * ZONE


def test_a_write_closes_what_a_write_opened() -> None:
    with Disk(zoned(max_open=2)) as disk:
        for n in range(3):
            disk.pwrite(b"x" * 4096, n * ZONE)
        open_ones = [ZoneState.CLOSED, ZoneState.IMPLICITLY_OPEN, ZoneState.IMPLICITLY_OPEN]
        assert states(disk)[:3] == open_ones
        disk.manage_zone(Op.ZONE_OPEN, 3 * ZONE)
        disk.manage_zone(Op.ZONE_OPEN, 4 * ZONE)
        with refused(errno.ETOOMANYREFS):
            disk.manage_zone(Op.ZONE_OPEN, 5 * ZONE)
        with refused(errno.ETOOMANYREFS):
            disk.pwrite(b"x" * 4096, 5 * ZONE)
        disk.manage_zone(Op.ZONE_CLOSE, 3 * ZONE)
        disk.pwrite(b"x" * 4096, 5 * ZONE)


def test_active_zones_are_limited() -> None:
    with Disk(zoned(max_open=1, max_active=2)) as disk:
        disk.pwrite(b"x" * 4096, 0)
        disk.pwrite(b"x" * 4096, ZONE)
        with refused(errno.EOVERFLOW):
            disk.pwrite(b"x" * 4096, 2 * ZONE)
        disk.manage_zone(Op.ZONE_FINISH, 0)
        disk.pwrite(b"x" * 4096, 2 * ZONE)


def test_content_and_zones_outlive_the_disk() -> None:
    target = zoned()
    with Disk(target) as disk:
        disk.pwrite(b"x" * 4096, 0)
    with Disk(target) as disk:
        assert disk.pread(4096, 0) == b"x" * 4096
        disk.pwrite(b"y" * 4096, 4096)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 8 * MIB, "zone_size": 3 * MIB}, "zone_size must be a power of two"),
        ({"size": 7 * MIB, "zone_size": 2 * MIB}, "size must be a multiple of the zone size"),
        ({"size": 8 * MIB, "zone_size": MIB, "conventional": 8}, "conventional must be 0 to 7"),
        ({"size": 8 * MIB, "zone_size": MIB, "zone_capacity": 2 * MIB}, "zone_capacity must be"),
    ],
)
def test_what_cannot_be_zoned_is_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Zoned(**options)


def test_limits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="max_open_zones must be at most max_active_zones"):
        zoned(max_open=4, max_active=2).profile().params(128 * KIB)


def test_the_command_can_make_one() -> None:
    made = build(resolve("zoned"), {"zone_size": "1M", "max_open": "4"}, size=8 * MIB)
    assert isinstance(made, Zoned)
    assert len(made.zones) == 8


class Journal(pyublk.ZonedTarget):
    """A zoned disk of one's own, that fails when it is told to."""

    def __init__(self) -> None:
        super().__init__(size=4 * ZONE, zone_size=ZONE)
        self.stored: list[tuple[int, bytes]] = []
        self.broken = False

    def load(self, io: pyublk.IO) -> None:
        io.buffer[:] = b"j" * io.length

    def store(self, io: pyublk.IO, offset: int) -> None:
        if self.broken:
            raise OSError(errno.ENOSPC, "no room")
        self.stored.append((offset, bytes(io.buffer)))


def test_a_zoned_disk_of_ones_own() -> None:
    target = Journal()
    with Disk(target) as disk:
        disk.pwrite(b"1" * 512, 0)
        assert disk.zone_append(b"2" * 512, 0) == 512
        assert disk.pread(512, 0) == b"j" * 512
        target.broken = True
        with refused(errno.ENOSPC):
            disk.pwrite(b"3" * 512, 1024)
        target.broken = False
        disk.pwrite(b"3" * 512, 1024)  # what failed has not moved the pointer
    assert target.stored == [(0, b"1" * 512), (512, b"2" * 512), (1024, b"3" * 512)]


def test_a_disk_without_zones_says_so() -> None:
    with Disk(pyublk.targets.Ram(size=MIB)) as disk, refused(errno.EOPNOTSUPP):
        disk.report_zones()
