# SPDX-License-Identifier: MIT
"""Zoned disks: what the kernel makes of them, and what clients may do.

Nothing in user space sends a zone append to a disk: file systems do. Its way is tested without a
kernel (`tests/unit/test_zoned.py`), and with one by btrfs, where that is to be had.
"""

import errno
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve
from filesystems import mounted
from fio import verified
from needs import Module, Program, needs
from variations import variations
from zones import manage, report

import pyublk
from pyublk.targets import Zoned
from pyublk.uapi import Feature, Op
from pyublk.zones import ZoneKind, ZoneState

MIB = 1 << 20
ZONE = 4 * MIB

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def the_kernel_has_zones() -> None:
    needs(Feature.ZONED)


BATCH = pytest.mark.parametrize("batch", [False, None], ids=["single", "batch where there is"])


class Counted(Zoned):
    """Counts what comes, by operation."""

    def __init__(self, zones: int = 8, **options: int) -> None:
        super().__init__(size=zones * ZONE, zone_size=ZONE, **options)
        self.seen: Counter[Op] = Counter()

    def handle(self, io: pyublk.IO) -> None:
        self.seen[io.op] += 1
        super().handle(io)


def setting(disk: pyublk.Device, name: str) -> str:
    return Path(f"/sys/block/{Path(disk.path).name}/queue/{name}").read_text().strip()


def state(client: Blocks, offset: int) -> ZoneState:
    return report(client, 1, offset)[0].state


@BATCH
def test_the_kernel_sees_a_zoned_disk(serve: Serve, batch: bool | None) -> None:
    target = Counted(conventional=1, zone_capacity=3 * MIB, max_open=3, max_active=5)
    disk = serve(target, batch=batch)
    assert setting(disk, "zoned") == "host-managed"
    assert int(setting(disk, "nr_zones")) == 8
    assert int(setting(disk, "chunk_sectors")) == ZONE // 512
    assert int(setting(disk, "max_open_zones")) == 3
    assert int(setting(disk, "max_active_zones")) == 5
    assert int(setting(disk, "zone_append_max_bytes")) > 0
    assert target.seen[Op.REPORT_ZONES] >= 1, "START_DEV asks for the zones"
    with Blocks(disk.path) as client:
        zones = report(client, 15)
    assert [zone.start for zone in zones] == [n * ZONE for n in range(8)]
    assert [zone.kind for zone in zones[:2]] == [ZoneKind.CONVENTIONAL, ZoneKind.SEQUENTIAL]
    assert [zone.capacity for zone in zones[:2]] == [ZONE, 3 * MIB]
    assert {zone.state for zone in zones[1:]} == {ZoneState.EMPTY}


@BATCH
def test_writes_follow_the_pointer(serve: Serve, batch: bool | None) -> None:
    disk = serve(Counted(), batch=batch)
    with Blocks(disk.path) as client:
        data = [os.urandom(4096), os.urandom(65536)]
        client.write(data[0], ZONE)
        client.write(data[1], ZONE + 4096)
        assert client.read(4096, ZONE) == data[0]
        assert client.read(65536, ZONE + 4096) == data[1]
        before = report(client, 1, ZONE)[0]
        assert (before.pointer, before.state) == (ZONE + 69632, ZoneState.IMPLICITLY_OPEN)
        for wrong in (ZONE, ZONE + 8192, ZONE + 135168):
            with pytest.raises(OSError, match="Input/output error"):
                client.write(bytes(4096), wrong)
        assert report(client, 1, ZONE)[0] == before
        client.write(data[0], before.pointer)
        assert client.read(4096, before.pointer) == data[0]


@BATCH
def test_zones_are_managed(serve: Serve, batch: bool | None) -> None:
    target = Counted()
    disk = serve(target, batch=batch)
    with Blocks(disk.path) as client:
        manage(client, Op.ZONE_OPEN, 0, ZONE)
        assert state(client, 0) is ZoneState.OPEN
        client.write(os.urandom(4096), 0)
        manage(client, Op.ZONE_CLOSE, 0, ZONE)
        assert state(client, 0) is ZoneState.CLOSED
        manage(client, Op.ZONE_FINISH, 0, ZONE)
        assert state(client, 0) is ZoneState.FULL
        with pytest.raises(OSError, match="Input/output error"):
            client.write(bytes(4096), 4096)
        client.write(b"x" * 4096, ZONE)
        manage(client, Op.ZONE_RESET, 0, ZONE)
        assert state(client, 0) is ZoneState.EMPTY
        assert client.read(4096, 0) == bytes(4096)
        assert client.read(4096, ZONE) == b"x" * 4096
        manage(client, Op.ZONE_RESET_ALL, 0, 8 * ZONE)
        assert {zone.state for zone in report(client, 8)} == {ZoneState.EMPTY}
        assert client.read(4096, ZONE) == bytes(4096)
        client.write(b"y" * 4096, 0)
        assert client.read(4096, 0) == b"y" * 4096
    one_each = (Op.ZONE_OPEN, Op.ZONE_CLOSE, Op.ZONE_FINISH, Op.ZONE_RESET, Op.ZONE_RESET_ALL)
    assert [target.seen[op] for op in one_each] == [1] * 5


def test_limits_reach_the_client(serve: Serve) -> None:
    disk = serve(Counted(max_open=2, max_active=3))
    with Blocks(disk.path) as client:
        for n in range(2):
            manage(client, Op.ZONE_OPEN, n * ZONE, ZONE)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            manage(client, Op.ZONE_OPEN, 2 * ZONE, ZONE)
        assert caught.value.errno == errno.ETOOMANYREFS
        for n in range(2):
            client.write(bytes(4096), n * ZONE)
            manage(client, Op.ZONE_CLOSE, n * ZONE, ZONE)
        client.write(bytes(4096), 2 * ZONE)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            client.write(bytes(4096), 3 * ZONE)
        assert caught.value.errno == errno.EOVERFLOW
        manage(client, Op.ZONE_FINISH, 0, ZONE)
        # After a failed write the kernel takes no other before it was told of the zone again.
        assert state(client, 3 * ZONE) is ZoneState.EMPTY
        client.write(bytes(4096), 3 * ZONE)


JOBS: dict[str, dict[str, Any]] = {
    "sequential": {"rw": "write", "bs": "64k", "size": 6 * ZONE},
    "random, deep": {
        "rw": "randwrite",
        "bs": "16k",
        "size": 4 * ZONE,
        "io_size": 4 * MIB,
        "iodepth": 8,
        "max_open_zones": 3,
    },
}


@pytest.mark.parametrize("job", variations(JOBS, ["random, deep"]))
def test_fio_finds_what_it_wrote(serve: Serve, job: str) -> None:
    disk = serve(Counted(zone_capacity=3 * MIB, max_open=4), queues=2)
    done = verified(disk.path, zonemode="zbd", **JOBS[job])
    assert done.bytes_written >= 4 * MIB
    assert disk.stats().total.errors == 0


def test_several_threads_serve_it(serve: Serve) -> None:
    needs(Feature.PER_IO_DAEMON)
    disk = serve(Counted(), threads=2, depth=16)
    verified(disk.path, zonemode="zbd", rw="write", bs="32k", size=2 * ZONE, iodepth=4)
    assert disk.stats().total.errors == 0


@BATCH
def test_btrfs_appends(serve: Serve, tmp_path: Path, batch: bool | None) -> None:
    """A file system that writes its data by zone append, and reads it back."""
    needs(Program("mkfs.btrfs"), Module("btrfs"))
    target = Counted(64)
    disk = serve(target, batch=batch)
    made = subprocess.run(
        ["mkfs.btrfs", "-q", "-O", "zoned", "-d", "single", "-m", "single", disk.path],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    data = os.urandom(3 * MIB)
    place = tmp_path / "mounted"
    with mounted(disk.path, place):
        (place / "file").write_bytes(data)
    with mounted(disk.path, place, "-o", "ro"):
        assert (place / "file").read_bytes() == data
    assert target.seen[Op.ZONE_APPEND] > 0
