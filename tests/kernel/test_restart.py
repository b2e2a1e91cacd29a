"""Servers that are killed under load, and started again by themselves."""

import os
import signal
from pathlib import Path

from command_line import added, run_here
from load import Load
from restarted import restart_of, served_again
from servers import helpers_of, until

from pyublk.control import Controller
from pyublk.service.records import log_place, recorded_ids


def keepers_of_memory() -> set[int]:
    """The processes that have the memory of a disk open."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor).startswith("/memfd:pyublk-ram"):
                found.add(int(descriptor.parts[2]))
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
    assert keepers_of_memory() == {pid, *helpers_of(pid)}
    # One that is stopped is forgotten, with its memory.
    assert run_here("stop", str(disks[1]["id"])).exit_code == 0
    until(lambda: keepers_of_memory() == set(), what="the memory is given back")
    assert run_here("stop", str(disks[0]["id"])).exit_code == 0
    assert recorded_ids() == []
    until(lambda: helpers_of(pid) == [], what="its helper ends")
