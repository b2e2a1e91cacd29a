# SPDX-License-Identifier: MIT
"""Which processes have a file open: those whose /proc/PID/fd we may read."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyublk.files import About, about


@dataclass(frozen=True, slots=True)
class Opener:
    """A process, and what it has open by one of its descriptors.

    `path` is the file's name as the kernel has it; `writes` tells that it was opened for writing,
    and `locks` that a lock of fcntl(2) was taken by it.
    """

    pid: int
    file: About
    path: str
    writes: bool
    locks: bool

    def __str__(self) -> str:
        return f"{command_name(self.pid) or '?'} (process {self.pid})"


def command_name(pid: int) -> str | None:
    """The process's name as the kernel has it; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if it has ended (proc(5), stat)."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = line.rpartition(")")[2].split()  # the name may hold spaces and parentheses
    return None if after_name[0] in "ZX" else int(after_name[19])  # dead, but not reaped yet


def openers(wanted: Callable[[About], bool]) -> Iterator[Opener]:
    """Everybody who has a file open that is `wanted`; once for each descriptor."""
    try:
        names = os.listdir("/proc")
    except OSError:  # it is hidden
        return
    for pid in sorted(int(name) for name in names if name.isdecimal()):
        yield from opened_by(pid, wanted)


def opened_by(pid: int, wanted: Callable[[About], bool]) -> Iterator[Opener]:
    """What one process has open; also where it is (its working directory and its root)."""
    try:
        names = [f"fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:  # it has ended, or is not ours to look at
        return
    for name in [*names, "cwd", "root"]:
        place = f"/proc/{pid}/{name}"
        try:
            found = about(place)
            if wanted(found):
                writes, locks = _how(f"/proc/{pid}/fdinfo/{name[3:]}") if "/" in name else (0, 0)
                yield Opener(pid, found, os.readlink(place), bool(writes), bool(locks))
        except OSError:  # closed meanwhile
            continue


def _how(fdinfo: str) -> tuple[bool, bool]:
    flags, locks = 0, False
    for line in Path(fdinfo).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "flags":
            flags = int(value, 8)
        locks |= key == "lock" and "FLOCK" not in value  # flock(2) is another matter
    return bool(flags & os.O_ACCMODE), locks


def served_by(pid: int) -> list[str]:
    """The ublk disks that a process serves (``ublkb0``)."""
    nodes = (one.path for one in opened_by(pid, lambda file: stat.S_ISCHR(file.mode)))
    matches = (re.fullmatch(r"/dev/ublkc(\d+)", node) for node in nodes)
    return sorted({f"ublkb{match[1]}" for match in matches if match})
