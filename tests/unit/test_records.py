"""Plans and records: what is written can be read, and is believed only of the same device."""

import errno
import os
import stat
from pathlib import Path

import pytest

from pyublk.control import DeviceInfo
from pyublk.service.plan import Plan
from pyublk.service.processes import ProcessId
from pyublk.service.records import (
    Record,
    log_place,
    make_run_directory,
    place,
    recorded_ids,
    run_directory,
)
from pyublk.service.server import _keep_status
from pyublk.targets import Null, Ram
from pyublk.uapi import DeviceStatus, Feature

PLAN = Plan(
    target="file",
    arguments=("disk.img",),
    options={"direct": "yes"},
    size=1 << 30,
    queues=2,
    affinity=[[0], [1, 2]],
)


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    return make_run_directory()


def record(number: int = 3, cookie: int = 77) -> Record:
    return Record(
        id=number, cookie=cookie, server=ProcessId.own(), plan=PLAN, log=log_place(number)
    )


def device(number: int = 3, cookie: int = 77) -> DeviceInfo:
    return DeviceInfo(
        id=number,
        queues=1,
        depth=128,
        status=DeviceStatus.LIVE,
        max_io_size=4096,
        flags=Feature(0),
        server_pid=os.getpid(),
        cookie=cookie,
        owner_uid=0,
        owner_gid=0,
    )


def test_a_plan_survives_being_written_down() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_a_record_survives_being_written_down() -> None:
    record().write()
    assert Record.read(3) == record()
    assert Record.of(device()) == record()
    assert recorded_ids() == [3]


def test_a_record_is_for_its_owner_only() -> None:
    record().write()
    assert stat.S_IMODE(place(3).stat().st_mode) == 0o600


def test_the_record_of_an_earlier_device_is_not_believed() -> None:
    record(cookie=1).write()
    assert Record.of(device(cookie=2)) is None


def test_removing_leaves_the_record_of_a_later_device_alone() -> None:
    earlier, later = record(cookie=1), record(cookie=2)
    later.write()
    earlier.remove()
    assert Record.read(3) == later
    later.remove()
    assert Record.read(3) is None
    later.remove()
    assert recorded_ids() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": 3, "more": 1}', '{"plan": 4}'])
def test_what_cannot_be_understood_is_no_record(text: str) -> None:
    place(3).write_text(text)
    assert Record.read(3) is None


def test_other_files_in_the_directory_are_not_records(run_dir: Path) -> None:
    (run_dir / "note.json").write_text("{}")
    (run_dir / "4.log").write_text("")
    assert recorded_ids() == []


def test_the_directory_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYUBLK_RUN_DIR")
    assert run_directory() == Path("/run/pyublk")


def test_a_directory_that_cannot_be_made_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "file/run"))
    with pytest.raises(OSError, match="Not a directory") as caught:
        make_run_directory()
    assert "PYUBLK_RUN_DIR" in caught.value.__notes__[0]


def test_a_plan_becomes_a_device() -> None:
    made = Plan(target="ram", size=1 << 20, block_size=4096).device()
    assert isinstance(made.target, Ram)
    assert (made.target.size, made.target.block_size) == (1 << 20, 4096)


def test_a_class_need_not_know_of_read_only() -> None:
    made = Plan(target="null", read_only=True).device()
    assert isinstance(made.target, Null)
    assert made.target.read_only


def test_a_wrong_plan_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"there is no target 'rma'.*did you mean 'ram'"):
        Plan(target="rma").device()
    with pytest.raises(ValueError, match="workers=2 needs a target"):
        Plan(target="null", workers=2).device()


def test_what_a_target_says_goes_with_its_record(run_dir: Path) -> None:
    one = record()
    one.write()
    assert one.read_status() is None
    one.write_status({"legs": ["synced", "failed"]})
    assert one.read_status() == {"legs": ["synced", "failed"]}
    (run_dir / "3.status").write_text("half a")
    assert one.read_status() is None
    one.remove()
    assert not list(run_dir.glob("3.*"))


def test_failed_requests_are_told_beside_the_status(run_dir: Path) -> None:
    class Telling(Null):
        def status(self) -> dict[str, object]:
            return {"mood": "fine"}

    for target, said in ((Null(size=1 << 20), {}), (Telling(size=1 << 20), {"mood": "fine"})):
        failed, one = 0, record()
        keep = _keep_status(one, target, lambda: failed)  # noqa: B023 - called here only
        keep()
        assert (one.read_status() or {}) == said
        failed = 3
        keep()
        assert one.read_status() == said | {"failed_requests": 3}
        written = (run_dir / "3.status").stat().st_ino
        keep()
        assert (run_dir / "3.status").stat().st_ino == written, "only when it changes"
        (run_dir / "3.status").unlink()


def test_a_status_that_cannot_be_written_ends_no_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Telling(Null):
        def status(self) -> dict[str, object]:
            return {"mood": "fine"}

    def full(_record: Record, _status: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target, one = Telling(size=1 << 20), record()
    _keep_status(one, target)
    assert one.read_status() == {"mood": "fine"}
    monkeypatch.setattr(Record, "write_status", full)
    target.status_changed()
    assert "the status of /dev/ublkb3 cannot be written down: [Errno 28] No space" in caplog.text
