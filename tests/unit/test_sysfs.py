# SPDX-License-Identifier: MIT
"""What is told of devices where io_uring is forbidden."""

import errno
import re
from pathlib import Path

import pytest

import pyublk
from pyublk.errors import io_uring_error
from pyublk.service import sysfs
from pyublk.service.sysfs import Sysfs, whom_to_ask
from pyublk.uapi import DeviceStatus, Feature


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Device 3 is served, device 11 was added and never started."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    for number in (11, 3):
        (tmp_path / f"class/ublk-char/ublkc{number}").mkdir(parents=True)
    block = tmp_path / "class/block/ublkb3"
    for queue in range(2):
        (block / f"mq/{queue}").mkdir(parents=True)
        (block / f"mq/{queue}/nr_tags").write_text("64\n")
    (block / "queue").mkdir()
    (block / "queue/max_hw_sectors_kb").write_text("512\n")
    return tmp_path


def test_devices_by_sysfs(sys: Path) -> None:
    live, dead = Sysfs(sys).devices()
    assert (live.id, live.status, live.queues, live.depth) == (3, DeviceStatus.LIVE, 2, 64)
    assert (live.max_io_size, live.flags, live.server_pid) == (512 * 1024, Feature(0), None)
    assert not live.ours
    assert (dead.id, dead.status, dead.queues, dead.depth) == (11, DeviceStatus.DEAD, 0, 0)


def test_a_device_that_is_not_there(sys: Path) -> None:
    with pytest.raises(OSError, match="GET_DEV_INFO on device 4: No such device") as refused:
        Sysfs(sys).info(4)
    assert refused.value.errno == errno.ENODEV


def test_no_driver_at_all(tmp_path: Path) -> None:
    assert Sysfs(tmp_path).devices() == []


def test_parameters_are_not_known(sys: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("parameters of device 3")):
        Sysfs(sys).get_params(3)


def test_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = pyublk.Controller.__new__(pyublk.Controller)
    controller._helper = None
    monkeypatch.setattr(sysfs, "Ring", lambda _entries: pyublk.Ring(4))
    assert whom_to_ask(controller) is controller

    def forbidden(_entries: int) -> None:
        raise io_uring_error(errno.EPERM)

    monkeypatch.setattr(sysfs, "Ring", forbidden)
    assert isinstance(whom_to_ask(controller), Sysfs)
