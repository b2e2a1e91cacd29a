"""Servers that have given up root's rights."""

import json
import os
import pwd
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import Blocks
from command_line import added, run_here
from needs import python_for_everybody
from servers import end_recorded_servers, helpers_of, until

import pyublk
from pyublk.service.records import Record, recorded_ids
from pyublk.uapi import Feature

MIB = 1 << 20
NOBODY = pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    with python_for_everybody():
        yield tmp_path
        end_recorded_servers()


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def statuses(pid: int) -> list[dict[str, str]]:
    """What the kernel says of each thread, but for those that it has made itself for io_uring."""
    found = [
        dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return [one for one in found if not one["Name"].startswith("iou-")]


def test_a_server_becomes_another_user(memory: Path, place: Path) -> None:
    image = memory / "disk.img"  # which only root may open
    image.touch(mode=0o600)
    options = ["--size", "1M", "--recovery", "resend", "--user", "nobody"]
    made = added("file", str(image), *options)
    pid = made["server_pid"]
    found = statuses(pid)
    assert len(found) > 2  # its threads too
    for one in found:
        assert one["Uid"].split() == [str(NOBODY)] * 4
        assert {one[name] for name in ("CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        assert "0" not in one["Groups"].split()
    with Blocks(made["path"]) as disk:
        disk.write(b"kept".ljust(4096), 0)
        assert disk.read(MIB, 0) == b"kept".ljust(4096).ljust(MIB, b"\0")
    # Though a stranger is not told where the file's holes are.
    assert image.stat().st_blocks * 512 == 4096
    # A helper that is killed is replaced by one that has root's rights as well.
    (helper,) = helpers_of(pid)
    os.kill(helper, signal.SIGKILL)
    until(lambda: helpers_of(pid) not in ([helper], []), what="there is another helper")
    (helper,) = helpers_of(pid)
    (found_out,) = statuses(helper)
    assert found_out["Uid"].split() == ["0"] * 4
    assert found_out["CapEff"] != "0" * 16
    counters = run_here("stats", str(made["id"]), "--json")
    assert json.loads(counters.stdout)["total"]["writes"] == 1
    with pyublk.Controller() as controller:
        resizable = controller.features().has(Feature.UPDATE_SIZE)
    if resizable:
        assert run_here("resize", str(made["id"]), "2M").exit_code == 0
        assert image.stat().st_size == 2 * MIB
        record = Record.read(made["id"])
        assert record is not None
        assert record.plan.disk["size"] == 2 * MIB
    assert "serving file" in run_here("logs", str(made["id"])).stdout
    done = run_here("stop", str(made["id"]))
    assert done.exit_code == 0, done.stderr
    assert image.read_bytes().startswith(b"kept")
    assert list((place / "run").iterdir()) == []


def test_a_server_of_another_user_removes_its_record(place: Path) -> None:
    """Also when nobody with root's rights stops it; what was written is flushed."""
    image = place / "disk.img"
    options = ["--size", "1M", "--recovery", "resend", "--user", "nobody"]
    made = added("file", str(image), *options)
    with open(made["path"], "r+b", buffering=0) as disk:
        disk.write(b"kept".ljust(4096))
    os.kill(made["server_pid"], signal.SIGTERM)
    until(lambda: not Path(made["path"]).exists(), what="the disk is gone")
    until(lambda: list((place / "run").iterdir()) == [], what="nothing is left")
    assert recorded_ids() == []
    assert image.read_bytes().startswith(b"kept")


def test_users_that_cannot_be(place: Path) -> None:
    done = run_here("add", "null", "--user", "no-such-user")
    assert done.exit_code == 2
    assert "there is no user 'no-such-user'" in done.stderr
    done = run_here("add", "null", "--user", "nobody", "--server", "shared")
    assert done.exit_code == 2
    assert "user is for a disk with a server of its own" in done.stderr
    until(lambda: list((place / "run").iterdir()) == [], what="nothing is left")
