# SPDX-License-Identifier: MIT
"""The service manager that runs this process, such as systemd: what it is told, and what it keeps
for the next server (sd_notify(3), sd_listen_fds(3))."""

import array
import logging
import os
import socket
from contextlib import suppress

from pyublk.target import Target
from pyublk.targets import Ram

log = logging.getLogger("pyublk.server")

#: What a disk's memory is called in the manager's store.
MEMORY = "pyublk-ram"
#: The first descriptor that a manager passes on.
_FIRST = 3


def _place() -> str | None:
    """Of the manager's socket, if there is a manager that wants to know."""
    place = os.environ.get("NOTIFY_SOCKET")
    if place and place.startswith("@"):  # a name without a file
        return "\0" + place[1:]
    return place or None


def tell(state: str, *files: int) -> None:
    """Tells the service manager, if there is one that wants to know: `READY=1` and its like; it
    gets the descriptors `files` along."""
    if (place := _place()) is None:
        return
    along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.sendmsg([state.encode()], along, 0, place)


def passed_on() -> dict[str, int]:
    """The descriptors that the manager has passed on to this process, by name. The first call takes
    them: programs that are started later get none."""
    found = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if found["PID"] != str(os.getpid()) or not found["FDS"].isdecimal():
        return {}
    files = range(_FIRST, _FIRST + int(found["FDS"]))
    for file in files:
        os.set_inheritable(file, False)
    return dict(zip(found["FDNAMES"].split(":"), files, strict=False))


class Store:
    """The memory of a `ram` disk, in the manager's store while there is no server."""

    def __init__(self) -> None:
        self._memory = passed_on().get(MEMORY)

    def prepare(self, target: Target, *, new: bool) -> None:
        """Before it is opened: a `ram` target has the bytes that the manager keeps, and a `new`
        disk without any gets memory for it to keep. One that is not new has lost them if there are
        none. Raises OSError, and ValueError for memory that is too small for a disk that is there.
        """
        if _place() is None or not isinstance(target, Ram):
            return
        if self._memory is not None:
            try:
                target.keep(f"/proc/self/fd/{self._memory}")
            except ValueError as why:
                if not new:
                    raise
                log.warning("the disk begins empty: %s", why)
                tell(f"FDSTOREREMOVE=1\nFDNAME={MEMORY}")
            else:
                return
            finally:
                with suppress(OSError):
                    os.close(self._memory)
                self._memory = None
        if new:
            target.keep()
            assert target.file is not None
            tell(f"FDSTORE=1\nFDNAME={MEMORY}", target.file)
