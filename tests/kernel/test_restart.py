"""Servers that are killed, hang or crash, and are started again by themselves."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import added, run_here
from load import Load
from servers import device_is_gone, end_recorded_servers, helpers_of, until

from pyublk.control import Controller
from pyublk.service import restarts
from pyublk.service.records import Record, log_place, recorded_ids

MIB = 1 << 20
RESTARTING = "pyublk.service.restarting"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.chdir("/")
    end_recorded_servers()
    until(lambda: restarting() == [], what="nobody restarts a server")
    for number in recorded_ids():
        run_here("del", "--force", str(number))


def restarting() -> list[str]:
    """The command lines of the processes that restart servers."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_text()
        except OSError:  # ended meanwhile
            continue
        if RESTARTING in words:
            found.append(words)
    return found


def server_of(disk: dict[str, Any]) -> int:
    record = Record.read(disk["id"])
    return 0 if record is None else record.server.pid


def served_again(controller: Controller, disk: dict[str, Any], before: int) -> int:
    """The pid of the next server, once it serves, and its helper alone knows of it."""
    until(lambda: helpers_of(before) == [], 60, "the helper of the one before ends")
    pid = server_of(disk)
    assert pid != before
    assert controller.info(disk["id"]).server_pid == pid
    return pid


def restart_of(disk: dict[str, Any]) -> dict[str, Any]:
    """What `pyublk info` says of it."""
    (entry,) = json.loads(run_here("info", str(disk["id"]), "--json").stdout)
    return dict(entry["restart"])


def memory_files() -> int:
    """Descriptors of disks' memory, in all processes."""
    found = 0
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found += os.readlink(descriptor).startswith("/memfd:pyublk-ram")
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.parametrize("target", ["file", "ram"])
def test_a_killed_server_is_restarted_under_load(
    place: Path, controller: Controller, target: str
) -> None:
    """The second one too, whose helper was told by a server that the restart began."""
    disk = added(target, *(["disk.img"] if target == "file" else []), "--size", "4M")
    with Load(disk["path"]) as load:
        pid = disk["server_pid"]
        for _ in range(2):
            os.kill(pid, signal.SIGKILL)
            pid = served_again(controller, disk, pid)
            load.goes_on()
    load.check()
    assert load.failed == 0
    restart = restart_of(disk)
    assert (restart["on"], restart["count"]) == (True, 2)
    log = log_place(disk["id"]).read_text()
    assert f"the server (process {disk['server_pid']}) ended without having stopped" in log
    assert "restart 2 of its server" in log
    assert memory_files() == (0 if target == "file" else 2)  # the server's and its helper's
    assert run_here("stop", str(disk["id"])).exit_code == 0
    assert recorded_ids() == []
    until(lambda: helpers_of(pid) == [], what="its helper ends")
    assert memory_files() == 0


def test_two_disks_of_one_server_and_a_helper_that_was_killed(
    place: Path, controller: Controller
) -> None:
    disks = [
        added("file", "disk.img", "--size", "1M", "--server", "small"),
        added("ram", "--size", "1M", "--server", "small"),
    ]
    pid = disks[0]["server_pid"]
    for disk in disks:
        with Blocks(disk["path"]) as blocks:
            blocks.write(b"kept".ljust(4096), 0)
    (first,) = helpers_of(pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: len(set(helpers_of(pid)) - {first}) == 1, 20, "there is another helper")
    os.kill(pid, signal.SIGKILL)
    next_ones = {served_again(controller, disk, pid) for disk in disks}
    assert len(next_ones) == 1
    for disk in disks:
        with Blocks(disk["path"]) as blocks:
            assert blocks.read(4096, 0).startswith(b"kept")
    # One that is stopped is not brought back with the other.
    assert run_here("stop", str(disks[1]["id"])).exit_code == 0
    assert memory_files() == 0
    (pid,) = next_ones
    os.kill(pid, signal.SIGKILL)
    served_again(controller, disks[0], pid)
    assert device_is_gone(controller, disks[1]["id"])
    assert run_here("stop", str(disks[0]["id"])).exit_code == 0
    assert recorded_ids() == []


def test_a_server_that_hangs_is_killed_and_restarted(place: Path, controller: Controller) -> None:
    disk = added("file", "disk.img", "--size", "1M", "--hang-timeout", "2")
    pid = disk["server_pid"]
    with Blocks(disk["path"]) as blocks:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: restart_of(disk)["count"] == 0, what="nobody hangs without a request")
        blocks.write(b"kept".ljust(4096), 0)  # answered by the next one
        served_again(controller, disk, pid)
        assert blocks.read(4096, 0).startswith(b"kept")
    log = log_place(disk["id"]).read_text()
    assert f"the server (process {pid}) answered nothing for 2 s, and was killed" in log
    assert run_here("stop", str(disk["id"])).exit_code == 0


DYING = """
import os
from pathlib import Path
from pyublk.targets import File

class Dying(File):
    def open(self):
        if Path("die").exists():
            os._exit(3)
        super().open()
"""


def test_a_server_that_dies_at_each_start(place: Path, controller: Controller) -> None:
    Path("dying.py").write_text(DYING)
    disk = added("dying.py:Dying", "disk.img", "--size", "1M")
    Path("die").touch()
    os.kill(disk["server_pid"], signal.SIGKILL)
    until(lambda: device_is_gone(controller, disk["id"]), 100, "it is given up")
    until(lambda: helpers_of(disk["server_pid"]) == [], what="the helper ends")
    assert restarting() == []
    assert recorded_ids() == []
    log = log_place(disk["id"]).read_text()
    assert f"restart {restarts.LIMIT} of its server" in log
    assert "it could not be restarted: the server ended with exit code 3" in log
    assert f"the disk is deleted: its server was restarted {restarts.LIMIT} times" in log


def test_what_is_stopped_is_not_restarted(place: Path, controller: Controller) -> None:
    Path("dying.py").write_text(DYING)
    disks = [added("dying.py:Dying", f"{n}.img", "--size", "1M") for n in range(2)]
    Path("die").touch()
    for disk in disks:
        os.kill(disk["server_pid"], signal.SIGKILL)
    for disk in disks:
        until(lambda disk=disk: "could not be restarted" in log_place(disk["id"]).read_text())
    # In its back-off: by force at once, else when it is served again.
    assert run_here("stop", "--force", str(disks[0]["id"])).exit_code == 0
    Path("die").unlink()
    done = run_here("stop", str(disks[1]["id"]))
    assert done.exit_code == 0, done.stderr
    until(lambda: not any(helpers_of(disk["server_pid"]) for disk in disks), what="helpers end")
    assert controller.devices() == []
    assert recorded_ids() == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["file", "disk.img", "--no-restart"], "no: it was added so"),
        (["ram", "--recovery", "none"], "no: it was added with recovery=none"),
        (["zoned", "--option", "zone_size=1M"], "no: the class Zoned does not say"),
    ],
)
def test_what_is_not_restarted_is_deleted(
    place: Path, controller: Controller, arguments: list[str], why: str
) -> None:
    disk = added(*arguments, "--size", "4M")
    assert why in " ".join(run_here("info", str(disk["id"])).stdout.split())
    os.kill(disk["server_pid"], signal.SIGKILL)
    until(lambda: device_is_gone(controller, disk["id"]), what="it is deleted")
    assert restarting() == []
