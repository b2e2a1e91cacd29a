"""The doctor's checks, on files like a machine's."""

import gzip
import os
import resource
from pathlib import Path
from typing import Self

import pytest

from pyublk.control import DeviceInfo, new_cookie
from pyublk.defects import DEFECTS
from pyublk.service import doctor, records
from pyublk.service.doctor import (
    Check,
    Status,
    check_devices,
    check_driver,
    check_io_uring,
    check_kernel,
    check_locked_memory,
    check_nodes,
    check_open_files,
    check_records,
    repair,
    stale_records,
)
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
from pyublk.uapi import DeviceStatus, Feature

RELEASE = "6.12.9-amd64"


@pytest.mark.parametrize("there", [True, False])
def test_a_driver_that_is_not_there_has_no_defects(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    found = Check("driver", Status.FAILED, "", "modprobe" if there else doctor._ANOTHER_KERNEL)
    monkeypatch.setattr(doctor, "check_driver", lambda _: found)
    assert ("kernel" in {check.name for check in doctor.examine()}) is there


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
        ("6.12.23", ["after 30 seconds", "sends requests again", "START_DEV after STOP_DEV"]),
        ("6.12.24", ["after 30 seconds", "START_DEV after STOP_DEV"]),
        ("6.13", ["after 30 seconds", "sends requests again", "START_DEV after STOP_DEV"]),
        ("6.17.0-1017-aws", ["ADD_DEV crashes some of Ubuntu's", "UPDATE_SIZE", "START_DEV"]),
        ("6.17.0-14-generic", ["UPDATE_SIZE", "START_DEV after STOP_DEV"]),
        ("6.18.5-arch1-1", ["the first ADD_DEV crashes", "UPDATE_SIZE", "START_DEV after"]),
        ("6.18.15", ["UPDATE_SIZE", "START_DEV after STOP_DEV"]),
        ("7.2.13", ["START_DEV after STOP_DEV"]),
        ("7.3.3", ["in the middle of a recovery [the log of Linux 7.3.4"]),
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


@pytest.mark.parametrize("release", ["7.3.4", "7.4.0", "8.0.0-rc1"])
def test_kernels_that_nothing_is_said_of(release: str) -> None:
    [check] = check_kernel(release, in_pid_namespace=True)
    assert check.status is Status.OK


def test_every_defect_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/errors.md").read_text()
    for defect in DEFECTS:
        assert f"| {defect.what} | {defect.remedy} | {defect.source} |" in page


def test_who_makes_nodes(tmp_path: Path) -> None:
    root = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    file(tmp_path / "proc/self/mountinfo", root + "23 22 0:5 / /dev rw - devtmpfs udev rw\n")
    assert check_nodes(tmp_path).status is Status.OK
    file(tmp_path / "proc/self/mountinfo", root + "23 22 0:40 / /dev rw - tmpfs tmpfs rw\n")
    assert check_nodes(tmp_path).status is Status.WARNING
    file(tmp_path / "run/udev/control")
    assert check_nodes(tmp_path).status is Status.OK


@pytest.mark.parametrize("node", ["ublk-char/ublkc0", "block/ublkb12", "block/ublkb3p1"])
def test_nodes_that_a_containers_dev_lacks(tmp_path: Path, node: str) -> None:
    mountinfo = "23 22 0:5 / /dev rw - devtmpfs udev rw\n23 22 0:40 / /dev rw - tmpfs tmpfs rw\n"
    file(tmp_path / "proc/self/mountinfo", mountinfo)
    file(tmp_path / "run/udev/control")  # the machine's: it is no help in here
    file(tmp_path / "sys/class" / node / "dev")
    check = check_nodes(tmp_path)
    name = node.partition("/")[2]
    assert check.status is Status.FAILED
    assert check.finding.endswith(f"lacks nodes of devices that the kernel has made: {name}")
    assert check.finding.startswith("/dev is a tmpfs, ")
    assert "--volume /dev:/dev" in (check.remedy or "")
    file(tmp_path / "dev" / name)
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
            id=number, cookie=number, server=server, plan=DiskSpec(target="null"), log=log
        ).write()
    records.place(9).write_text("not understood")
    left = [records.place(1), records.log_place(1), records.place(9)]
    assert stale_records() == left
    assert [check.status for check in check_records()] == [Status.WARNING] * 3
    assert list(repair()) == [f"{path} was removed" for path in left]
    assert [check.status for check in check_records()] == [Status.OK]
    assert sorted(os.listdir(tmp_path)) == ["0.json", "0.log"]


def test_what_is_no_record_of_ours_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("pyublk.service.doctor.CONTROL_NODE", str(tmp_path / "none"))
    alive = ProcessId.own()
    records.Record(id=0, cookie=1, server=alive, plan=DiskSpec(target="null"), log=None).write()
    content = records.place(0).read_text()
    file(records.place(1), content.replace('"id": 0', '"id": 1').replace('"pid"', '"process"'))
    records.place(2).symlink_to(records.place(0))
    records.place(3).mkdir()
    os.mkfifo(records.place(4))
    devices = tmp_path / "devices"
    monkeypatch.setattr(doctor, "_CHAR_DEVICES", devices)
    file(devices / "ublkc5")
    file(records.place(5), content[:-5])  # beside a disk: being looked at, or a full file system
    assert stale_records() == []
    checks = list(check_records())
    assert [check.finding.removeprefix(f"{tmp_path}/") for check in checks] == [
        "1.json is a record that this version of pyublk cannot read",
        "2.json is a symbolic link",
        "3.json is a directory",
        "4.json is a FIFO",
        "5.json is no record: it was cut off, or overwritten",
    ]
    assert {check.status for check in checks} == {Status.WARNING}
    assert checks[0].remedy == "look at it, and remove it when there is no /dev/ublkb1"
    before = sorted(os.listdir(tmp_path))
    assert list(repair()) == []
    assert sorted(os.listdir(tmp_path)) == before
    (devices / "ublkc5").unlink()
    assert stale_records() == [records.place(5)]


def test_a_run_directory_that_others_can_change_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(run))
    assert [check.status for check in check_records()] == [Status.OK]
    run.mkdir()
    for mode, status in ((0o755, Status.OK), (0o775, Status.WARNING), (0o1777, Status.WARNING)):
        run.chmod(mode)
        [check] = check_records()
        assert check.status is status
    assert check.finding == (
        f"{run}, with the records and logs of servers, can be changed by other users"
    )


# ---- limits ----

UNLIMITED = resource.RLIM_INFINITY


def limited(monkeypatch: pytest.MonkeyPatch, wanted: int, soft: int, user: int = 1000) -> None:
    limits = {wanted: (soft, UNLIMITED)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[kind])
    monkeypatch.setattr(os, "geteuid", lambda: user)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (UNLIMITED, (Status.OK, "limit none", None)),
        (256, (Status.OK, "limit 256", None)),
        (255, (Status.WARNING, "limit 255: few queues fit in it", "ulimit -n 1024")),
    ],
)
def test_few_open_files_are_told(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: tuple[Status, str, str | None]
) -> None:
    limited(monkeypatch, resource.RLIMIT_NOFILE, limit)
    assert check_open_files() == Check("open files", *expected)


@pytest.mark.parametrize(
    ("limit", "user", "expected"),
    [
        (UNLIMITED, 1000, (Status.OK, "limit none", None)),
        (8 << 20, 1000, (Status.OK, "limit 8388608", None)),
        (65536, 0, (Status.OK, "limit 65536", None)),  # root may lock what it likes
        (
            (8 << 20) - 1,
            1000,
            (
                Status.WARNING,
                "limit 8388607 bytes: registering rings and buffers may be refused",
                "ulimit -l 65536, or LimitMEMLOCK= of the service",
            ),
        ),
    ],
)
def test_little_locked_memory_is_told(
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    user: int,
    expected: tuple[Status, str, str | None],
) -> None:
    limited(monkeypatch, resource.RLIMIT_MEMLOCK, limit, user)
    assert check_locked_memory() == Check("locked memory", *expected)


# ---- devices ----


def device(
    number: int, status: DeviceStatus, *, cookie: int | None = None, server: int | None = None
) -> DeviceInfo:
    return DeviceInfo(
        id=number,
        queues=1,
        depth=1,
        max_io_size=4096,
        flags=Feature.USER_RECOVERY,
        status=status,
        server_pid=server,
        owner_uid=0,
        owner_gid=0,
        cookie=new_cookie() if cookie is None else cookie,
    )


def driver_with(monkeypatch: pytest.MonkeyPatch, devices: "list[DeviceInfo] | OSError") -> None:
    class Driver:
        def __init__(self, *, deadline: float) -> None:
            assert deadline <= 10

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def devices(self) -> list[DeviceInfo]:
            if isinstance(devices, OSError):
                raise devices
            return devices

    monkeypatch.setattr(doctor, "Controller", Driver)


def test_records_of_others_are_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are readable for their owner only: another user's doctor goes on without them."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path))
    file(tmp_path / "0.json")

    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records, "read_record", refuse)
    assert list(check_records()) == [
        Check(
            "records",
            Status.WARNING,
            f"the records in {tmp_path} are for their owner's eyes only",
            "run pyublk doctor as root, or as that owner",
        )
    ]


@pytest.mark.parametrize("status", [DeviceStatus.QUIESCED, DeviceStatus.FAIL_IO])
@pytest.mark.parametrize(
    ("cookie", "remedy"),
    [(None, "pyublk recover 5"), (4711, "start its server again, or pyublk recover 5 TARGET")],
    ids=["ours", "somebody's"],
)
def test_a_device_that_waits_for_a_new_server_is_told(
    monkeypatch: pytest.MonkeyPatch, status: DeviceStatus, cookie: int | None, remedy: str
) -> None:
    live = device(3, DeviceStatus.LIVE, server=os.getpid())
    driver_with(monkeypatch, [live, device(5, status, cookie=cookie)])
    assert list(check_devices()) == [
        Check(
            "devices",
            Status.WARNING,
            f"device 5 is {status.name}: it waits for a new server",
            f"{remedy}, or give it up: pyublk del --force 5",
        )
    ]


def test_an_orphan_is_told_and_one_that_may_still_start_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = device(1_000_001, DeviceStatus.DEAD)  # no node of it either
    starting = device(2, DeviceStatus.DEAD, server=os.getpid())
    others = device(4, DeviceStatus.DEAD, cookie=4711)
    driver_with(monkeypatch, [gone, starting, others])
    assert list(check_devices()) == [
        Check(
            "devices",
            Status.WARNING,
            "device 1000001 is an orphan: its server is gone",
            "pyublk doctor --repair",
        )
    ]
    driver_with(monkeypatch, [starting, others])
    assert list(check_devices()) == [Check("devices", Status.OK, "2 devices, none orphaned")]


def test_a_driver_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = TimeoutError(110, "GET_DEV_INFO on device 0: not answered within 10 s")
    silent.add_note("Cause: the driver.")
    silent.add_note("What to do: look at dmesg.")
    driver_with(monkeypatch, silent)
    assert list(check_devices()) == [
        Check("devices", Status.FAILED, silent.strerror, "look at dmesg.")
    ]
