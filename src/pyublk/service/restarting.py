# SPDX-License-Identifier: MIT
"""The program that a helper process executes when a server has ended without stopping its disks:
the next server is started, or, after too many, the disks are deleted.

    python -P -m pyublk.service.restarting ended|hung ID:COOKIE[:DESCRIPTOR]...

The descriptor is that of a file in memory which has the disk's data.
Exit code 0: every disk is in other hands, or gone. Otherwise it is executed again.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from pyublk.control import Controller, DeviceInfo, has_node
from pyublk.recovery import NOTICED
from pyublk.service import restarts
from pyublk.service.records import Record, log_place
from pyublk.service.recovering import recover
from pyublk.service.stopping import has_server, unless_gone
from pyublk.uapi import DeviceStatus

#: Seconds between two looks at a disk.
_LOOK = 0.05


@dataclass(frozen=True, slots=True)
class Lost:
    """A disk without its server; `memory` is the path of a file which has its data, if there is
    one, and leads there as long as this process lives."""

    id: int
    cookie: int
    memory: str | None = None

    @classmethod
    def of_word(cls, word: str) -> Self:
        """Of an argument, ID:COOKIE[:DESCRIPTOR]."""
        number, cookie, *file = word.split(":")
        memory = f"/proc/{os.getpid()}/fd/{file[0]}" if file else None
        return cls(int(number), int(cookie), memory)

    @property
    def path(self) -> str:
        return f"/dev/ublkb{self.id}"

    def look(self, controller: Controller) -> DeviceInfo | None:
        """What the kernel says of it; None: it is gone."""
        if not has_node(self.id):
            return None
        with unless_gone():
            device = controller.info(self.id)
            return device if device.cookie == self.cookie else None
        return None

    def record(self) -> Record | None:
        """Its record, unless that is another's."""
        found = Record.read(self.id)
        return found if found is not None and found.cookie == self.cookie else None

    def tell(self, text: str) -> None:
        """A line for its log, where its server's lines are."""
        now = time.time()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = f"{when},{now % 1 * 1000:03.0f} WARNING pyublk.restarting: {self.path}: {text}\n"
        try:
            log = os.open(log_place(self.id), os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        except OSError:  # nobody can be told
            return
        with open(log, "w") as file:
            file.write(line)


def bring_back(controller: Controller, lost: Iterable[Lost], *, hung: bool) -> None:
    """Returns when every disk is served by others, or deleted. Raises OSError when one cannot be
    deleted."""
    left = list(lost)
    for one in left:
        one.tell(_how_it_ended(one.record(), hung=hung))
    while left := [one for one in left if _is_to_be_served(controller, one)]:
        _pause(left)
        for one in left:
            _serve(controller, one)


def _how_it_ended(record: Record | None, *, hung: bool) -> str:
    pid = "?" if record is None else record.server.pid
    if hung and record is not None:
        seconds = record.plan.disk.get("hang_timeout") or 0.0
        return f"the server (process {pid}) answered nothing for {seconds:g} s, and was killed"
    return f"the server (process {pid}) ended without having stopped the disk"


def _is_to_be_served(controller: Controller, one: Lost) -> bool:
    """Whether it waits for a server, and is to get one; if it is not, it is deleted."""
    device = _once_noticed(controller, one)
    record = one.record()
    if device is None:
        if record is not None:
            record.remove()
        return False
    if device.status is DeviceStatus.LIVE:
        return False
    if device.status is DeviceStatus.DEAD:
        why = "it was stopped"
    elif record is None or not record.is_restarted:
        why = "its server was not to be restarted any more"
    elif record.restarts is not None and record.restarts.pause(restarts.now()) is None:
        minutes = restarts.WINDOW / 60
        why = f"its server was restarted {restarts.LIMIT} times in {minutes:g} minutes"
    else:
        return True
    with unless_gone():
        controller.delete(one.id, wait=False)
    one.tell(f"the disk is deleted: {why}")
    if record is not None:
        record.remove()
    return False


def _once_noticed(controller: Controller, one: Lost) -> DeviceInfo | None:
    """The device, once the kernel knows that its server is gone; LIVE: it has another one. None:
    it is gone."""
    until = time.monotonic() + NOTICED
    while (device := one.look(controller)) is not None:
        if device.status is not DeviceStatus.LIVE or _is_served(device, one.record()):
            break
        if time.monotonic() > until:
            raise TimeoutError(f"{one.path} still has a server after {NOTICED:g} s")
        time.sleep(_LOOK)
    return device


def _is_served(device: DeviceInfo, record: Record | None) -> bool:
    """Whether the server that the kernel names is there. Linux 6.12 goes on naming one that has
    ended, whose pid another process may have by now."""
    if record is None or device.server_pid != record.server.pid:
        return has_server(device)
    if (server := record.server.open()) is None:
        return False
    with server:
        return True


def _pause(left: list[Lost]) -> None:
    """Before they are served again; as long as one of them is there."""
    records = [record for one in left if (record := one.record()) is not None]
    pauses = [r.restarts.pause(restarts.now()) for r in records if r.restarts is not None]
    until = time.monotonic() + max((pause or 0.0 for pause in pauses), default=0.0)
    while time.monotonic() < until and any(has_node(one.id) for one in left):
        time.sleep(_LOOK)


def _serve(controller: Controller, one: Lost) -> None:
    """Starts the next server, or tells why it could not be."""
    record, device = one.record(), one.look(controller)
    if record is None or record.restarts is None or device is None:
        return
    if not device.status.awaits_server or not record.is_restarted:
        return
    counted = record.restarts.counted(restarts.now())
    replace(record, restarts=counted).write()
    one.tell(f"restart {counted.count} of its server")
    try:
        recover(controller, device, memory=one.memory)
    except Exception as error:
        one.tell(f"it could not be restarted: {error}")


def main(words: list[str]) -> int:
    """Of the program."""
    how, *named = words
    lost = [Lost.of_word(word) for word in named]
    try:
        with Controller() as controller:
            bring_back(controller, lost, hung=how == "hung")
    except Exception:
        for one in lost:
            one.tell(traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
