"""What becomes of a disk without its server, and what the next one must have in common with it."""

import fcntl
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import pyublk
from pyublk import keeping
from pyublk.defects import defects_of
from pyublk.features import Features
from pyublk.paths import DataPath, path_of
from pyublk.recovery import (
    Recovery,
    differences,
    recovery_flags,
    recovery_of,
    shortcomings,
)
from pyublk.targets import File, Linear, Mirror, Null, Ram, Slice, Stripe, Zoned
from pyublk.testing import Disk
from pyublk.uapi import Feature

MIB = 1 << 20


def features(mask: int) -> Features:
    return Features(mask=mask, kernel_release="6.12.30", privileged=True)


LINUX_6_12, LINUX_6_18 = features(0x1FE), features(0x7FFF)


@pytest.mark.parametrize("mode", list(Recovery))
@pytest.mark.parametrize("kernel", [LINUX_6_12, LINUX_6_18])
def test_a_mode_is_known_by_its_flags(mode: Recovery, kernel: Features) -> None:
    if mode is Recovery.FAIL and kernel is LINUX_6_12:
        with pytest.raises(pyublk.FeatureMissing, match=r"USER_RECOVERY_FAIL_IO .* Linux 6\.13"):
            recovery_flags(mode, kernel)
        return
    flags = recovery_flags(mode, kernel)
    assert recovery_of(flags | Feature.USER_COPY) is mode
    assert (Feature.QUIESCE in flags) == (mode is Recovery.RESEND and kernel is LINUX_6_18)


@pytest.mark.parametrize(
    ("release", "flawed"),
    [
        ("6.12.23-amd64", True),
        ("6.12.24", False),
        ("6.12.107+deb13-amd64", False),
        ("6.18.15", False),
        ("7.3.3", True),
        ("7.3-rc1", True),
        ("7.3.4-cloud", False),
        ("7.4.0", False),
        ("a kernel of our own", False),
    ],
)
def test_kernels_whose_recovery_is_bad(release: str, flawed: bool) -> None:
    assert any(defect.of_recovery for defect in defects_of(release)) == flawed


def test_all_that_differs_is_named() -> None:
    disk = Null(size=MIB).profile().params(65536)
    assert differences(disk, disk) == []
    profile = Null(size=2 * MIB, block_size=4096).profile()
    assert differences(profile.params(65536), disk)[:2] == [
        "basic.size 1048576, and the target has 2097152",
        "basic.logical_block_size 512, and the target has 4096",
    ]
    without = replace(disk, discard=None)
    full = Ram(size=MIB).profile().params(65536)
    assert full.discard is not None
    assert "discard, which the target has not" in differences(without, full)
    assert "no discard" in differences(full, without)


def test_a_disk_of_other_software_needs_only_what_its_clients_were_told() -> None:
    ram = Ram(size=MIB).profile().params(65536)
    assert ram.discard is not None
    ours = replace(ram, basic=replace(ram.basic, volatile_cache=True, fua=True))
    told = replace(ours, basic=replace(ours.basic, io_opt=1 << 20))
    assert shortcomings(ours, told) == []
    assert shortcomings(ours, replace(told, discard=None)) == []
    plain = Null(size=2 * MIB).profile().params(65536)
    through = replace(told, basic=replace(told.basic, volatile_cache=False, fua=False))
    assert shortcomings(ours, through) == [
        "no volatile cache: nobody asks for the flushes that the target needs"
    ]
    assert shortcomings(replace(plain, discard=None), told)[0] == (
        "basic.size 1048576, and the target has 2097152"
    )
    missing = shortcomings(replace(plain, discard=None), told)
    assert any("discard.max_discard_size" in one for one in missing)


@pytest.mark.parametrize("path", list(DataPath))
def test_the_data_path_of_a_device(path: DataPath) -> None:
    from pyublk.paths import choose_path

    for batch in (False, True):
        if batch and path is DataPath.GET_DATA:
            continue
        kernel = features(0x1FFFFF)
        flags = choose_path([path], kernel, path=path, batch=batch).flags
        found = path_of(flags | Feature.USER_RECOVERY | Feature.CMD_IOCTL_ENCODE)
        assert (found.path, found.batch) == (path, batch)


@pytest.mark.parametrize(
    "name", ["queues", "depth", "id", "max_io_size", "path", "batch", "recovery", "shared_memory"]
)
def test_what_is_the_disks_is_not_asked_of_a_take_over(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is device 7's, and stays as it is: leave it out"):
        pyublk.Device.take_over(7, Null(size=MIB), **{name: 1})  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="recovery must be one of none, resend, fail, not 'x'"):
        pyublk.Device(Null(size=MIB), recovery="x")
    with pytest.raises(ValueError, match="recovery does not go together with shared_memory"):
        pyublk.Device(Null(size=MIB), recovery="resend", shared_memory=True)
    with pytest.raises(pyublk.DeviceClosed, match="is created, only a live one's target is"):
        pyublk.Device(Null(size=MIB), recovery="resend").swap(Null(size=MIB))
    with pytest.raises(ValueError, match="device must be"):
        pyublk.Device.take_over(-1, Null(size=MIB))


def test_who_can_be_brought_back(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(bytes(MIB))
    for target, recoverable in (
        (File(one), True),
        (Linear(one, two), True),
        (Stripe(one, two), True),
        (Mirror(one, two), True),
        (Slice(one), True),
        (Null(size=MIB), True),
        (pyublk.Layer(Null(size=MIB)), False),
        (Ram(size=MIB), False),
        (Zoned(size=256 * MIB), False),
    ):
        with Disk(target):
            assert target.profile().recoverable is recoverable, target


# ---- a file that one target takes from another ----


def locked(path: Path) -> bool:
    """Whether another process is kept from the file."""
    program = (
        "import fcntl, os, struct, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 1, 0))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program, path], capture_output=True)
    return done.returncode != 0


def opened(path: Path, owner: object, after: object = None, **options: bool) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        with keeping.opened_for(owner, after=after):
            keeping.keep(fd, path, [(0, MIB)], read_only=False, **options)
    except BaseException:
        os.close(fd)
        raise
    return fd


def let_go(fd: int) -> None:
    keeping.let_go(fd)
    os.close(fd)


@pytest.mark.parametrize("first_to_go", ["the old one", "the new one"])
def test_a_file_is_never_free_while_it_changes_hands(tmp_path: Path, first_to_go: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    fds = set(os.listdir("/proc/self/fd"))
    old, new = object(), object()
    first = opened(path, old, succeeds=True)
    second = opened(path, new, old, succeeds=True)
    assert locked(path)
    goes, stays = (first, second) if first_to_go == "the old one" else (second, first)
    let_go(goes)
    assert locked(path)
    third = opened(path, object(), new if stays == second else old, succeeds=True)
    let_go(stays)
    assert locked(path)
    let_go(third)
    assert not locked(path)
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(
    ("first", "second", "after"),
    [(False, True, "old"), (True, False, "old"), (True, True, "another"), (True, True, None)],
)
def test_a_file_is_shared_with_no_other(
    tmp_path: Path, first: bool, second: bool, after: str | None
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    fd = opened(path, "old", succeeds=first)
    with pytest.raises(OSError, match="this process serves it already"):
        opened(path, "new", after, succeeds=second)
    assert locked(path)
    let_go(fd)


def test_more_of_a_file_than_the_old_one_had(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * MIB))
    fd = os.open(path, os.O_RDWR)
    other = os.open(path, os.O_RDWR)
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, MIB, MIB, 0)
    fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)
    old = object()
    first = opened(path, old, succeeds=True)
    with keeping.opened_for(object(), after=old), pytest.raises(OSError, match="is in use: "):
        keeping.keep(fd, path, [(0, 2 * MIB)], read_only=False, succeeds=True)
    assert locked(path)
    let_go(first)
    for each in (fd, other):
        os.close(each)
