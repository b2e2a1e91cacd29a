# SPDX-License-Identifier: MIT
"""The servers' logs in the run directory: kept small while written, removed with their disks.

A log is locked by the open file that its server's output goes to: no lock, no server.
"""

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pyublk.files import StrangeFile, inode_at, trusted_owners
from pyublk.service.records import Record, make_run_directory, run_directory

#: Bytes at which the older part of a log is removed, and about as many as are left then.
LIMIT = 1 << 20
KEPT = LIMIT // 2
#: Seconds between two looks at what was written since.
FOLLOW = 0.2


def begin() -> tuple[int, str]:
    """A new log, as a descriptor for a server's output and a name; logs of others that are gone
    are removed."""
    directory = make_run_directory()
    for path in abandoned():
        with suppress(OSError):
            path.unlink()
    log, name = tempfile.mkstemp(prefix="starting-", suffix=".log", dir=directory)
    fcntl.fcntl(log, fcntl.F_SETFL, os.O_APPEND)  # who writes goes on at the end, when it is cut
    fcntl.flock(log, fcntl.LOCK_EX)
    return log, name


def abandoned() -> list[Path]:
    """The logs to which nobody writes any more, and with which no other server goes on."""
    logs = sorted(run_directory().glob("*.log"))
    # A server of several disks has a name of its own for the same file.
    kept = {inode_at(path) for path in logs if _is_of_waiting_disk(path)}
    return [path for path in logs if inode_at(path) not in kept and _is_abandoned(path)]


def _is_of_waiting_disk(path: Path) -> bool:
    number = path.stem
    record = Record.read(int(number)) if number.isdecimal() else None
    return record is not None and record.may_be_recovered


def _is_abandoned(path: Path) -> bool:
    number = path.stem
    if number.isdecimal() and (record := Record.read(int(number))) is not None:
        server = record.server.open()
        if server is not None:
            with server:
                return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone, or none of ours
        return False
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and _nobody_writes(descriptor)
    finally:
        os.close(descriptor)


def trim(descriptor: int) -> None:
    """Keeps the newest part of a log that has become too long."""
    size = os.fstat(descriptor).st_size
    if size <= LIMIT:
        return
    newest = os.pread(descriptor, KEPT, size - KEPT).partition(b"\n")[2]
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"(older lines were removed)\n" + newest)


def carry_over(path: Path, descriptor: int) -> None:
    """Begins a log with what stands in that of a server before, if there is one: it may say why
    that one ended."""
    with suppress(OSError, StrangeFile):
        earlier, lines = last_lines(path, KEPT)
        os.close(earlier)
        text = "".join(lines).encode()[-KEPT:]
        os.write(descriptor, text + b"(the log of another server begins here)\n")


def last_lines(path: Path, count: int) -> tuple[int, list[str]]:
    """The log as a descriptor, read so far, and its last lines. Raises FileNotFoundError, and
    StrangeFile for what is no log of ours."""
    try:
        log = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StrangeFile(f"{path} is a symbolic link") from None
        raise
    found = os.fstat(log)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in trusted_owners():
        os.close(log)
        raise StrangeFile(f"{path} is no log of ours")
    text = b""
    while more := os.read(log, 1 << 16):
        text += more
    lines = text.decode(errors="replace").splitlines(keepends=True)
    return log, lines[len(lines) - min(count, len(lines)) :]


def follow(log: int) -> Iterator[str]:
    """What is written to a log from here on, until nobody writes to it any more; it may be trimmed
    meanwhile."""
    while True:
        over = _nobody_writes(log)
        if os.fstat(log).st_size < os.lseek(log, 0, os.SEEK_CUR):
            os.lseek(log, 0, os.SEEK_SET)
        while more := os.read(log, 1 << 16):
            yield more.decode(errors="replace")
        if over:
            return
        time.sleep(FOLLOW)


def _nobody_writes(log: int) -> bool:
    """Whether its server has let go of it, which has it locked while it lives."""
    other = os.open(f"/proc/self/fd/{log}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(other)
    return True
