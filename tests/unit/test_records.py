"""Specs and records: what is written can be read, and is believed only of the same device."""

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pyublk.control import DeviceInfo
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
from pyublk.service.records import (
    Record,
    log_place,
    make_run_directory,
    place,
    record_trouble,
    recorded_ids,
    run_directory,
)
from pyublk.targets import Null, Ram
from pyublk.uapi import DeviceStatus, Feature

SPEC = DiskSpec(
    target="file",
    arguments=("disk.img",),
    options={"direct": "yes"},
    disk={"size": 1 << 30, "queues": 2, "affinity": [[0], [1, 2]]},
)


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    return make_run_directory()


def record(number: int = 3, cookie: int = 77) -> Record:
    return Record(
        id=number, cookie=cookie, server=ProcessId.own(), plan=SPEC, log=log_place(number)
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
    assert DiskSpec.from_fields(json.loads(json.dumps(asdict(SPEC)))) == SPEC


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


def newer(**more: object) -> dict[str, Any]:
    """A record as another version may write it."""
    record().write()
    fields: dict[str, Any] = json.loads(place(3).read_text()) | more
    return fields


def test_what_a_newer_version_says_besides_is_left_out() -> None:
    fields = newer(channel="/run/pyublk/3.sock")
    fields["plan"]["restart"] = {"limit": 3}
    fields["plan"]["disk"]["colour"] = "red"
    fields["server"]["namespace"] = 4026531836
    place(3).write_text(json.dumps(fields))
    assert Record.read(3) == record()
    assert record_trouble(3) is None
    record().remove()
    assert recorded_ids() == []


@pytest.mark.parametrize(
    "change",
    [
        {"id": 4},
        {"id": "3"},
        {"cookie": None},
        {"server": {"pid": -1, "started": 0}},
        {"server": {"pid": 0, "started": 0}},
        {"server": {"pid": True, "started": 0}},
        {"server": {"pid": 1.5, "started": 0}},
        {"server": "123"},
        {"server": {"pid": 1}},
        {"plan": {"target": 4}},
        {"plan": {"target": "ram", "arguments": "ab", "options": []}},
        {"plan": {"target": "ram", "arguments": [], "options": {}, "disk": []}},
        {"plan": {"target": "ram", "arguments": [], "options": {}, "name": 3}},
        {"plan": []},
        {"directory": 5},
        {"log": 5},
        {"data_path": ["copy"]},
    ],
    ids=str,
)
def test_a_record_that_says_something_else(change: dict[str, object]) -> None:
    place(3).write_text(json.dumps(newer(**change)))
    assert Record.read(3) is None
    assert Record.of(device()) is None
    trouble = f"{place(3)} is a record that this version of pyublk cannot read"
    assert record_trouble(3) == trouble


def test_what_lies_in_a_record_s_place_is_told(tmp_path: Path, run_dir: Path) -> None:
    record(3).write()
    moved = place(3).rename(tmp_path / "elsewhere")
    place(3).symlink_to(moved)
    place(4).mkdir()
    os.mkfifo(place(5))
    place(6).write_bytes(moved.read_bytes()[:-9])
    place(7).write_bytes(b"\xff" * 9)
    troubles = {number: record_trouble(number) for number in recorded_ids()}
    assert troubles == {
        3: f"{place(3)} is a symbolic link",
        4: f"{place(4)} is a directory",
        5: f"{place(5)} is a FIFO",
        6: f"{place(6)} is no record: it was cut off, or overwritten",
        7: f"{place(7)} is not text",
    }
    assert not any(Record.read(number) for number in recorded_ids())
    record(3).remove()  # what it does not know it does not remove
    assert place(3).is_symlink()
    assert moved.exists()
    record(3).write()
    assert not place(3).is_symlink()
    assert json.loads(moved.read_text())["id"] == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_record_that_another_user_wrote_is_not_believed() -> None:
    record().write()
    os.chown(place(3), 1234, 1234)
    assert Record.of(device()) is None
    assert record_trouble(3) == f"{place(3)} belongs to another user, 1234"


@pytest.mark.parametrize("name", ["03", "٣", "-3", "3 ", "12345678"])
def test_names_that_no_record_has(run_dir: Path, name: str) -> None:
    (run_dir / f"{name}.json").write_text("{}")
    assert recorded_ids() == []


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
    made = DiskSpec(target="ram", disk={"size": 1 << 20, "block_size": 4096}).device()
    assert isinstance(made.target, Ram)
    assert (made.target.size, made.target.block_size) == (1 << 20, 4096)


def test_a_class_need_not_know_of_read_only() -> None:
    made = DiskSpec(target="null", disk={"read_only": True}).device()
    assert isinstance(made.target, Null)
    assert made.target.read_only


def test_a_wrong_plan_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"there is no target 'rma'.*did you mean 'ram'"):
        DiskSpec(target="rma").device()
    with pytest.raises(ValueError, match="workers=2 needs a target"):
        DiskSpec(target="null", disk={"workers": 2}).device()
