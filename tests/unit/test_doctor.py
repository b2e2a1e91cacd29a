"""The doctor's checks, on files like a machine's."""

import gzip
import os
from pathlib import Path

import pytest

from pyublk.service import records
from pyublk.service.doctor import (
    Status,
    check_driver,
    check_io_uring,
    check_kernel,
    check_nodes,
    check_records,
    repair,
    stale_records,
)
from pyublk.service.plan import Plan
from pyublk.service.processes import ProcessId

RELEASE = "6.12.9-amd64"


def file(path: Path, content: str | bytes = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_a_loaded_driver(tmp_path: Path) -> None:
    file(tmp_path / "sys/module/ublk_drv/refcnt")
    assert check_driver(RELEASE, tmp_path).status is Status.OK


def test_a_driver_that_is_not_loaded(tmp_path: Path) -> None:
    file(tmp_path / f"lib/modules/{RELEASE}/kernel/drivers/block/ublk_drv.ko.xz")
    check = check_driver(RELEASE, tmp_path)
    assert check.status is Status.FAILED
    assert check.finding == "ublk_drv is there, but not loaded"
    assert check.remedy is not None
    assert check.remedy.startswith("modprobe ublk_drv")


def test_the_module_of_another_kernel_does_not_count(tmp_path: Path) -> None:
    file(tmp_path / "lib/modules/7.0.0/kernel/drivers/block/ublk_drv.ko")
    assert check_driver(RELEASE, tmp_path).status is Status.FAILED


@pytest.mark.parametrize(
    ("line", "status", "finding"),
    [
        ("CONFIG_BLK_DEV_UBLK=y", Status.OK, "ublk_drv is part of the kernel"),
        ("CONFIG_BLK_DEV_UBLK=m", Status.FAILED, "has ublk as a module, which is not in"),
        ("# CONFIG_BLK_DEV_UBLK is not set", Status.FAILED, "is built without ublk"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_configuration(
    tmp_path: Path, line: str, status: Status, finding: str, packed: bool
) -> None:
    text = f"CONFIG_BLOCK=y\n{line}\nCONFIG_BLKDEV_UBLK_LEGACY_OPCODES=y\n"
    if packed:
        file(tmp_path / "proc/config.gz", gzip.compress(text.encode()))
    else:
        file(tmp_path / f"boot/config-{RELEASE}", text)
    check = check_driver(RELEASE, tmp_path)
    assert check.status is status
    assert finding in check.finding


def test_a_kernel_that_nothing_is_known_of(tmp_path: Path) -> None:
    check = check_driver(RELEASE, tmp_path)
    assert (check.status, check.finding) == (
        Status.FAILED,
        f"kernel {RELEASE} seems to have no ublk_drv",
    )
    assert check.remedy is not None
    assert "pyublk vm" in check.remedy


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.1.0-40-amd64", ["older than Linux 6.8"]),
        ("6.12.107+deb13-amd64", ["noticed only after 30 seconds", "START_DEV after STOP_DEV"]),
        ("6.18.15", ["UPDATE_SIZE", "START_DEV after STOP_DEV"]),
        ("7.2.13", ["START_DEV after STOP_DEV"]),
    ],
)
def test_kernels_known_to_be_bad(release: str, expected: list[str]) -> None:
    checks = list(check_kernel(release, in_pid_namespace=False))
    assert {check.status for check in checks} == {Status.WARNING}
    assert len(checks) == len(expected)
    for check, words in zip(checks, expected, strict=True):
        assert words in check.finding


def test_a_pid_namespace_matters_to_some_kernels() -> None:
    checks = list(check_kernel("6.18.3", in_pid_namespace=True))
    assert any("pid namespace" in check.finding for check in checks)
    assert not any(
        "pid namespace" in check.finding for check in check_kernel("7.2.13", in_pid_namespace=True)
    )


@pytest.mark.parametrize("release", ["7.3.4", "8.0.0-rc1"])
def test_kernels_that_nothing_is_said_of(release: str) -> None:
    [check] = check_kernel(release, in_pid_namespace=True)
    assert check.status is Status.OK


def test_who_makes_nodes(tmp_path: Path) -> None:
    root = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    file(tmp_path / "proc/self/mountinfo", root + "23 22 0:5 / /dev rw - devtmpfs udev rw\n")
    assert check_nodes(tmp_path).status is Status.OK
    file(tmp_path / "proc/self/mountinfo", root + "23 22 0:40 / /dev rw - tmpfs tmpfs rw\n")
    assert check_nodes(tmp_path).status is Status.WARNING
    file(tmp_path / "run/udev/control")
    assert check_nodes(tmp_path).status is Status.OK


def test_a_ring_is_really_opened() -> None:
    assert check_io_uring().status is Status.OK


def test_records_of_dead_servers_are_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("pyublk.service.doctor.CONTROL_NODE", str(tmp_path / "none"))
    alive = ProcessId.own()
    for number, server in enumerate([alive, ProcessId(alive.pid, alive.started - 1)]):
        log = records.log_place(number)
        log.write_text("")
        records.Record(
            id=number, cookie=number, server=server, plan=Plan(target="null"), log=log
        ).write()
    records.place(9).write_text("not understood")
    left = [records.place(1), records.log_place(1), records.place(9)]
    assert stale_records() == left
    assert [check.status for check in check_records()] == [Status.WARNING] * 3
    assert list(repair()) == [f"{path} was removed" for path in left]
    assert [check.status for check in check_records()] == [Status.OK]
    assert sorted(os.listdir(tmp_path)) == ["0.json", "0.log"]
