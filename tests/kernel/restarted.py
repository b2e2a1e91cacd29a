"""Disks of `pyublk add` whose servers are killed, and started again by themselves."""

import json
from pathlib import Path
from typing import Any

from command_line import run_here
from servers import end_recorded_servers, until

from pyublk.control import Controller
from pyublk.service.records import Record, log_place

RESTARTING = "pyublk.service.restarting"


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


def leave_nothing() -> None:
    """Ends every server of the run directory, for good."""
    end_recorded_servers()
    until(lambda: restarting() == [], what="nobody restarts a server")
