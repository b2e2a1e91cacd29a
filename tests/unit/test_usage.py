"""Who uses a disk, read from files like those of /proc and /sys."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyublk.claiming import partitions
from pyublk.files import About
from pyublk.openers import Opener
from pyublk.service import stacking, usage
from pyublk.service.usage import Use, uses

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
60 22 259:0 / /mnt/with\\040space rw,relatime shared:9 master:2 - ext4 /dev/ublkb0 rw,errors=x
61 22 259:1 /sub /srv rw - xfs /dev/ublkb0p1 rw
62 22 0:44 / /tmp/fs rw - tmpfs tmpfs rw
"""
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


class Machine:
    """A part of /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc").mkdir()
        (root / "sys/class/block").mkdir(parents=True)
        self.mounted("")
        self.swaps(SWAPS)

    def disk(self, name: str, number: str) -> Path:
        place = self.root / "sys/class/block" / name
        (place / "holders").mkdir(parents=True)
        (place / "dev").write_text(f"{number}\n")
        return place

    def partition(self, disk: str, name: str, number: str) -> Path:
        """As in sysfs: in the disk's directory, and linked from the class."""
        place = self.root / "sys/class/block" / disk / name
        (place / "holders").mkdir(parents=True)
        (place / "dev").write_text(f"{number}\n")
        (place / "partition").write_text("1\n")
        (self.root / "sys/class/block" / name).symlink_to(place)
        return place

    def mounted(self, mountinfo: str) -> None:
        (self.root / "proc/mountinfo").write_text(mountinfo)

    def swaps(self, text: str) -> None:
        (self.root / "swaps").write_text(text)

    def uses(self, name: str) -> list[Use]:
        root = self.root
        return uses(name, proc=root / "proc", swaps=root / "swaps", sys=root / "sys")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_disk_that_nobody_uses(machine: Machine) -> None:
    machine.disk("ublkb0", "259:0")
    assert machine.uses("ublkb0") == []


def test_a_disk_that_does_not_exist(machine: Machine) -> None:
    machine.mounted(MOUNTINFO)
    assert machine.uses("ublkb7") == []


def test_mounts_of_the_disk_and_of_its_partition(machine: Machine) -> None:
    machine.disk("ublkb0", "259:0")
    machine.partition("ublkb0", "ublkb0p1", "259:1")
    machine.mounted(MOUNTINFO)
    found = machine.uses("ublkb0")
    assert found == [
        Use("ublkb0", "mounted", "/mnt/with space"),
        Use("ublkb0p1", "mounted", "/srv"),
    ]
    assert str(found[1]) == "/dev/ublkb0p1 is mounted at /srv"


def test_mounts_of_others_do_not_count(machine: Machine) -> None:
    machine.disk("ublkb1", "259:5")
    machine.mounted(MOUNTINFO)
    assert machine.uses("ublkb1") == []


def test_a_file_system_with_a_made_up_number_is_found_by_its_source(machine: Machine) -> None:
    node, number = _some_block_device()
    machine.disk("ublkb0", number)
    machine.mounted(f"70 22 0:99 / /data rw - btrfs {node} rw\n")
    assert machine.uses("ublkb0") == [Use("ublkb0", "mounted", "/data")]


def test_swap(machine: Machine) -> None:
    node, number = _some_block_device()
    machine.disk("ublkb0", number)
    machine.swaps(SWAPS + f"{node}\t\tpartition\t1048572\t\t0\t\t-2\n")
    found = machine.uses("ublkb0")
    assert found == [Use("ublkb0", "swap", node)]
    assert str(found[0]) == "/dev/ublkb0 is used as swap"


def test_a_device_on_top_of_a_partition(machine: Machine) -> None:
    machine.disk("ublkb0", "259:0")
    part = machine.partition("ublkb0", "ublkb0p1", "259:1")
    (part / "holders/dm-3").mkdir()
    found = machine.uses("ublkb0")
    assert found == [Use("ublkb0p1", "held", "dm-3")]
    assert str(found[0]) == "/dev/ublkb0p1 is held by dm-3"


def test_a_loop_device_over_the_disk(machine: Machine) -> None:
    node, number = _some_block_device()
    machine.disk("ublkb0", number)
    loop = machine.disk("loop4", "7:4")
    (loop / "loop").mkdir()
    (loop / "loop/backing_file").write_text(f"{node}\n")
    assert [str(use) for use in machine.uses("ublkb0")] == ["/dev/ublkb0 is behind loop4"]


def test_partitions(machine: Machine) -> None:
    machine.disk("ublkb0", "259:0")
    machine.partition("ublkb0", "ublkb0p1", "259:1")
    machine.partition("ublkb0", "ublkb0p2", "259:2")
    assert partitions("ublkb0", sys=machine.root / "sys") == ["ublkb0p1", "ublkb0p2"]


def test_the_machine_itself_can_be_asked() -> None:
    """The real files are understood: every mounted disk of this machine is found mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        number = line.split(" ")[2]
        node = Path("/sys/dev/block") / number
        if node.exists() and "partition" not in os.listdir(node):
            found = uses(node.resolve().name)
            assert any(use.how == "mounted" for use in found)


def _some_block_device() -> tuple[str, str]:
    """A block device's node in /dev and its number; nothing is done with it."""
    for node in sorted(Path("/dev").iterdir()):
        if node.is_block_device():
            number = node.stat().st_rdev
            return str(node), f"{os.major(number)}:{os.minor(number)}"
    pytest.skip("no block device has a node in /dev")


def test_a_device_that_only_the_options_name(machine: Machine) -> None:
    """The external log of an XFS, for one."""
    node, number = _some_block_device()
    machine.disk("ublkb0", number)
    machine.mounted(f"70 22 8:77 / /data rw - xfs /dev/none rw,logdev={node},noquota\n")
    assert machine.uses("ublkb0") == [Use("ublkb0", "mounted", "/data")]


def test_one_of_several_sources(machine: Machine) -> None:
    node, number = _some_block_device()
    machine.disk("ublkb0", number)
    machine.mounted(f"70 22 0:99 / /data rw - bcachefs /dev/none:{node} rw\n")
    assert machine.uses("ublkb0") == [Use("ublkb0", "mounted", "/data")]


def btrfs(machine: Machine, *names: str) -> None:
    """A file system of devices that are in `machine`, as sysfs shows a mounted one."""
    places = machine.root / "sys/fs/btrfs/1d-2d/devices"
    places.mkdir(parents=True)
    numbers = machine.root / "sys/dev/block"
    numbers.mkdir(parents=True)
    for name in names:
        disk = machine.root / "sys/class/block" / name
        (places / name).symlink_to(disk)
        (numbers / (disk / "dev").read_text().strip()).symlink_to(disk)


def test_a_member_of_a_file_system_of_several_devices(machine: Machine) -> None:
    node, number = _some_block_device()
    machine.disk("named", number)
    machine.disk("ublkb0", "259:0")
    machine.disk("ublkb1", "259:1")
    btrfs(machine, "named", "ublkb0")
    machine.mounted(f"70 22 0:99 / /data rw - btrfs {node} rw\n")
    assert machine.uses("ublkb0") == [Use("ublkb0", "mounted", "/data")]
    assert machine.uses("ublkb1") == []
    machine.mounted("")  # in a namespace that is not seen
    assert [str(use) for use in machine.uses("ublkb0")] == ["/dev/ublkb0 is held by btrfs 1d-2d"]


def test_the_journal_of_another_file_system(machine: Machine) -> None:
    machine.disk("ublkb0", "259:0")
    (machine.root / "fs/jbd2/ublkb0").mkdir(parents=True)
    [use] = machine.uses("ublkb0")
    assert str(use) == "/dev/ublkb0 is held by a file system, as its journal"


def test_other_mount_namespaces_are_told_once_and_only_where_ours_has_none(
    machine: Machine,
) -> None:
    machine.disk("ublkb0", "259:0")

    def process(pid: int, namespace: str, mountinfo: str) -> None:
        place = machine.root / str(pid)
        (place / "ns").mkdir(parents=True)
        (place / "mountinfo").write_text(mountinfo)
        (place / "ns/mnt").symlink_to(namespace)

    table = "60 22 259:0 / /inside rw - ext4 /dev/ublkb0 rw\n"
    pid = os.getpid()
    process(pid, "mnt:[2]", table)
    process(2_000_000_000, "mnt:[2]", table)
    comm = Path("/proc/self/comm").read_text().strip()
    [use] = machine.uses("ublkb0")
    assert use.how == "mounted"
    assert use.by in (
        f"/inside in the mount namespace of {comm} (process {pid})",
        "/inside in the mount namespace of ? (process 2000000000)",
    )
    machine.mounted(table.replace("/inside", "/outside"))
    assert machine.uses("ublkb0") == [Use("ublkb0", "mounted", "/outside")]


def test_processes_that_have_a_disk_open(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    node, number = _some_block_device()
    machine.disk("ublkb0", number)

    def one(path: str, *, special: str = "", device: str = "", **how: bool) -> Opener:
        kind = stat.S_IFBLK if special else stat.S_IFREG
        return Opener(7, About(kind, device, 3, special), path, **{"locks": False, **how})

    table = [
        one(node, special=number, writes=False),
        one(node, special=number, writes=True),
        one("/gone/file", device=number, writes=True),
        one("/dev/other", special="1:99", writes=True),
        one("/other/file", device="1:99", writes=True),
    ]
    monkeypatch.setattr(usage, "openers", lambda wanted: [o for o in table if wanted(o.file)])
    monkeypatch.setattr(usage, "served_by", lambda _pid: [])
    sys = machine.root / "sys"
    found = usage.opened("ublkb0", sys=sys)
    assert [use.how for use in found] == ["open", "written", "files"]
    assert str(found[1]).startswith("/dev/ublkb0 is open for writing in ")
    assert usage.opened("ublkb0", but=7, sys=sys) == []
    monkeypatch.setattr(usage, "served_by", lambda _pid: ["ublkb1", "ublkb3"])
    first = usage.opened("ublkb0", sys=sys)[0]
    assert str(first) == "/dev/ublkb0 is under /dev/ublkb1, /dev/ublkb3"
    # A program that uses its own disk.
    monkeypatch.setattr(usage, "served_by", lambda _pid: ["ublkb0", "ublkb3"])
    assert [use.how for use in usage.opened("ublkb0", sys=sys)] == ["open", "written", "files"]


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        ({}, [0, 1, 2]),
        ({0: {1}, 1: {2}}, [0, 1, 2]),
        ({2: {1}, 1: {0}}, [2, 1, 0]),
        ({2: {0}, 1: {0}}, [1, 2, 0]),
        ({0: {2}, 1: {9}}, [0, 1, 2]),
        ({0: {1}, 1: {0}}, [2, 1, 0]),  # of one process: nobody can tell
    ],
)
def test_the_order_of_disks_on_disks(
    monkeypatch: pytest.MonkeyPatch, below: dict[int, set[int]], expected: list[int]
) -> None:
    monkeypatch.setattr(stacking, "_below", lambda device: below.get(device.id, set()))
    devices: list[Any] = [SimpleNamespace(id=number) for number in range(3)]
    assert [device.id for device in stacking.top_first(devices)] == expected
