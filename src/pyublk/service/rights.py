# SPDX-License-Identifier: MIT
"""A server that gives up root's rights once its disk is there, and what it needs them for later.

The helper, a process of its own, keeps those for control commands. The records and the log are
kept by another one, which is forked before anything else is begun: from the moment at which the
rights are given up, it does nothing but change one record's size, remove that record and log, and
start another helper in the place of one that was killed.
"""

import errno
import os
import pwd
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pyublk import _native
from pyublk.service import title
from pyublk.service.records import Record, remove_log, run_directory

#: Bytes of the longest message to the keeper: a record.
_LONGEST = 1 << 20

_keeper: "Keeper | None" = None


class Keeper:
    """A forked child that has its parent's rights, and does for it what is listed here. It ends
    when nobody can ask it any more."""

    def __init__(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._for_helpers, helpers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            try:
                # Whoever waits for the end of some pipe waits for the server, not for this one.
                low = 3
                for kept in sorted((its.fileno(), helpers.fileno())):
                    os.closerange(low, kept)
                    low = kept + 1
                os.closerange(low, os.sysconf("SC_OPEN_MAX"))
                title.show("pyublk-keeper", "pyublk-keeper")
                threading.Thread(target=_start_helpers, args=(helpers,), daemon=True).start()
                _keep(its)
            finally:
                os._exit(0)
        its.close()
        helpers.close()
        self._to = ours

    def start_helpers(self) -> None:
        """From now on the keeper does, since the process's own would have no rights."""
        _native.spawn_helpers_by(self._for_helpers.fileno())

    def ask(self, what: str) -> None:
        """Waits until it is done. Raises OSError for what failed, or when it is gone."""
        self._to.sendall(what.encode())
        said = self._to.recv(_LONGEST).decode()
        if said != "done":
            raise OSError(f"the record could not be changed: {said or 'its keeper is gone'}")


def _start_helpers(asker: socket.socket) -> None:
    """One each time that the C core asks (_core/spawn.h)."""
    while True:
        message, files, _, _ = socket.recv_fds(asker, 16, 2)
        if not message:
            return
        try:
            pidfd, number = _native.spawn_helper_for(*files)
            files.append(pidfd)
            along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", pidfd))]
        except OSError as error:
            number, along = -(error.errno or errno.EIO), []
        asker.sendmsg([struct.pack("i", number)], along)
        for file in files:
            os.close(file)


def _keep(asker: socket.socket) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the server
    record: Record | None = None
    while message := asker.recv(_LONGEST).decode():
        verb, _, rest = message.partition(" ")
        try:
            if verb == "record" and record is None:  # while the asker still has its rights
                record = Record.read(int(rest))
            elif verb == "size" and record is not None:
                disk = record.plan.disk | {"size": int(rest)}
                record = replace(record, plan=replace(record.plan, disk=disk))
                record.write()
            elif verb == "remove" and record is not None:
                record.remove()
            elif verb == "log":
                remove_log(sys.stderr.fileno())
            asker.sendall(b"done")
        except Exception as error:
            asker.sendall(str(error).encode()[:1000])


def begin(user: str | None) -> None:
    """Before anything else is begun by a server that will give up its rights to be `user`.

    Raises ValueError for an unknown user, PermissionError without the rights to become him.
    """
    global _keeper
    if user is None or _keeper is not None:
        return
    _entry(user)
    if os.geteuid() != 0:
        raise PermissionError(f"only root can serve as the user {user}")
    _keeper = Keeper()


def give_up(record: Record) -> None:
    """Of all threads, for good: from here on this process is the record's user, without any
    capability. The disk's node becomes his, so that it can be flushed. Raises OSError."""
    user = record.plan.disk.get("user")
    if user is None or _keeper is None:
        return
    _keeper.ask(f"record {record.id}")
    _keeper.start_helpers()
    entry = _entry(user)
    os.environ["PYUBLK_RUN_DIR"] = str(run_directory())  # which is not that of the user
    os.chown(record.path, entry.pw_uid, -1)
    os.initgroups(user, entry.pw_gid)
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    if left := [line for line in _capabilities() if int(line.split()[1], 16)]:
        raise OSError(f"the server is {user}, but keeps capabilities: {', '.join(left)}")
    for place, how in ((sys.executable, os.X_OK), (__file__, os.R_OK)):
        if not os.access(place, how):
            raise PermissionError(
                f"{user} may not use {place}, which the server needs: install Python and pyublk "
                "where every user can read them"
            )


def _capabilities() -> list[str]:
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended
            name, *lines = (task / "status").read_text().splitlines()
            # The kernel's own, for io_uring: each request has the rights of who submitted it.
            if not name.startswith("Name:\tiou-"):
                found += [line for line in lines if line.startswith(("CapPrm", "CapEff", "CapAmb"))]
    return found


def _entry(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise ValueError(f"there is no user {user!r}") from None


def _or_by_keeper(do: Callable[[], None], what: str) -> None:
    if _keeper is None:
        do()
        return
    with suppress(OSError):  # then it is left, as that of a server that was killed
        _keeper.ask(what)


def note_size(record: Record) -> None:
    """Keeps a record whose disk has another size."""
    _or_by_keeper(record.write, f"size {record.plan.disk.get('size')}")


def forget(record: Record) -> None:
    """Removes the record."""
    _or_by_keeper(record.remove, "remove")


def forget_log() -> None:
    """Removes the log that standard error goes to."""
    _or_by_keeper(lambda: remove_log(sys.stderr.fileno()), "log")
