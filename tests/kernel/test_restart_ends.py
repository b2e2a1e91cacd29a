"""Restarts of servers that hang or die at each start, and how they end."""

import os
import signal
from pathlib import Path

from blocks import Blocks
from command_line import added, run_here
from restarted import restarting, served_again
from servers import device_is_gone, state_in, until

from pyublk.control import Controller
from pyublk.service import restarts
from pyublk.service.records import log_place, recorded_ids


def states(pid: int) -> set[str]:
    """Those of a process's threads (proc(5))."""
    stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(map(state_in, stats))


def test_a_server_that_hangs_is_killed_and_restarted(place: Path, controller: Controller) -> None:
    disk = added("file", "disk.img", "--size", "1M", "--hang-timeout", "1")
    pid = disk["server_pid"]
    with Blocks(disk["path"]) as blocks:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: states(pid) == {"T"}, what="all of its threads have stopped")
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


def test_a_server_that_dies_at_each_start(place: Path, controller: Controller) -> None:
    """After the last restart that is allowed, nothing is left but the log."""
    Path("dying.py").write_text(DYING)
    disk = added("dying.py:Dying", "disk.img", "--size", "1M")
    Path("die").touch()
    os.kill(disk["server_pid"], signal.SIGKILL)
    until(lambda: device_is_gone(controller, disk["id"]), 200, "it is given up")
    until(lambda: restarting() == [], what="nobody restarts a server")
    assert recorded_ids() == []
    log = log_place(disk["id"]).read_text()
    assert f"restart {restarts.LIMIT} of its server" in log
    assert "it could not be restarted: the server ended with exit code 3" in log
    assert f"the disk is deleted: its server was restarted {restarts.LIMIT} times" in log


def test_a_stop_in_the_back_off(place: Path, controller: Controller) -> None:
    """By force at once, else when it is served again: nothing is lost then."""
    Path("dying.py").write_text(DYING)
    options = ("--size", "1M", "--server", "small")
    disks = [added("dying.py:Dying", f"{number}.img", *options) for number in range(2)]
    Path("die").touch()
    os.kill(disks[0]["server_pid"], signal.SIGKILL)
    until(lambda: "it could not be restarted" in log_place(disks[1]["id"]).read_text(), 60)
    assert run_here("stop", "--force", str(disks[0]["id"])).exit_code == 0
    Path("die").unlink()
    done = run_here("stop", str(disks[1]["id"]))
    assert done.exit_code == 0, done.stderr
    until(lambda: restarting() == [], what="nobody restarts a server")
    assert controller.devices() == []
    assert recorded_ids() == []
