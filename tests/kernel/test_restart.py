"""Servers that are killed, hang or crash, and are started again by themselves."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
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
from pyublk.service.restarts import Restarts

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
    """The pid of the next server, once it serves and nobody restarts one any more."""
    until(lambda: server_of(disk) != before and restarting() == [], 60, "it is served again")
    pid = server_of(disk)
    assert controller.info(disk["id"]).server_pid == pid, log_place(disk["id"]).read_text()
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


def test_disks_of_a_killed_server_are_served_on_under_load(
    place: Path, controller: Controller
) -> None:
    """From one server to the next, and by the helper in the place of one that was killed."""
    options = ("--size", "4M", "--server", "small")
    disks = [added("file", "disk.img", *options), added("ram", *options)]
    pid = disks[0]["server_pid"]
    with Load(disks[0]["path"], clients=2) as one, Load(disks[1]["path"], clients=2) as two:
        (first,) = helpers_of(pid)
        os.kill(first, signal.SIGKILL)
        until(lambda: set(helpers_of(pid)) - {first}, 20, "there is another helper")
        for _ in range(2):
            os.kill(pid, signal.SIGKILL)
            before, pid = pid, served_again(controller, disks[0], pid)
            assert served_again(controller, disks[1], before) == pid
            one.goes_on()
            two.goes_on()
    for load in (one, two):
        load.check()
        assert load.failed == 0
    for disk in disks:
        restart = restart_of(disk)
        assert (restart["on"], restart["count"]) == (True, 2)
    log = log_place(disks[1]["id"]).read_text()
    assert f"the server (process {disks[0]['server_pid']}) ended without having stopped" in log
    assert "restart 2 of its server" in log
    assert memory_files() == 2  # the server's and its helper's
    # One that is stopped is forgotten, with its memory.
    assert run_here("stop", str(disks[1]["id"])).exit_code == 0
    until(lambda: memory_files() == 0, what="the memory is given back")
    assert run_here("stop", str(disks[0]["id"])).exit_code == 0
    assert recorded_ids() == []
    until(lambda: helpers_of(pid) == [], what="its helper ends")


def test_a_server_that_hangs_is_killed_and_restarted(place: Path, controller: Controller) -> None:
    disk = added("file", "disk.img", "--size", "1M", "--hang-timeout", "1")
    pid = disk["server_pid"]
    with Blocks(disk["path"]) as blocks:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: restart_of(disk)["count"] == 0, what="nobody hangs without a request")
        blocks.write(b"kept".ljust(4096), 0)  # answered by the next one
        served_again(controller, disk, pid)
        assert blocks.read(4096, 0).startswith(b"kept")
    log = log_place(disk["id"]).read_text()
    assert f"the server (process {pid}) answered nothing for 1 s, and was killed" in log
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


def test_a_server_that_dies_too_often(place: Path, controller: Controller) -> None:
    """After the last restart that is allowed, nothing is left but the log."""
    disk = added("file", "disk.img", "--size", "1M")
    record = Record.read(disk["id"])
    assert record is not None
    allowed = Restarts(count=9, times=(restarts.now(),) * restarts.LIMIT)
    replace(record, restarts=allowed).write()
    os.kill(disk["server_pid"], signal.SIGKILL)
    until(lambda: device_is_gone(controller, disk["id"]), what="it is given up")
    until(lambda: restarting() == [], what="nobody restarts a server")
    assert recorded_ids() == []
    log = log_place(disk["id"]).read_text()
    assert f"the disk is deleted: its server was restarted {restarts.LIMIT} times" in log


def test_a_stop_in_the_back_off(place: Path, controller: Controller) -> None:
    """By force at once, else when it is served again: nothing is lost then."""
    Path("dying.py").write_text(DYING)
    options = ("--size", "1M", "--server", "small")
    disks = [added("dying.py:Dying", f"{number}.img", *options) for number in range(2)]
    Path("die").touch()
    os.kill(disks[0]["server_pid"], signal.SIGKILL)
    failed = "it could not be restarted: the server ended with exit code 3"
    until(lambda: failed in log_place(disks[1]["id"]).read_text(), 60)
    assert run_here("stop", "--force", str(disks[0]["id"])).exit_code == 0
    Path("die").unlink()
    done = run_here("stop", str(disks[1]["id"]))
    assert done.exit_code == 0, done.stderr
    until(lambda: restarting() == [], what="nobody restarts a server")
    assert controller.devices() == []
    assert recorded_ids() == []
