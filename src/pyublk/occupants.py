# SPDX-License-Identifier: MIT
"""Who has a device's id, which stays taken as long as anybody has one of its nodes open.

By name, in /proc: the device itself may be deleted long since, and then nothing else knows of it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pyublk.uapi import DeviceStatus


def who_has(
    number: int,
    status: DeviceStatus | None,
    server: int | None,
    *,
    proc: Path = Path("/proc"),
) -> str:
    """In words, who has the id: the device, whose `server` it is, and all who have it open.

    `status` None: it was deleted. Other users' processes are seen by root only.
    """
    words = [f"/dev/ublkb{number} was deleted, and its id is free once nobody has it open"]
    if status is not None and server is not None:
        words = [f"/dev/ublkb{number} is {status.name.lower()}, served by {_process(server, proc)}"]
    elif status is not None:
        words = [f"/dev/ublkb{number} is {status.name.lower()} and has no server"]
    return "; it is ".join([*words, *dict.fromkeys(_users(number, server, proc))])


def _users(number: int, server: int | None, proc: Path) -> Iterator[str]:
    name = rf"/dev/ublk[bc]{number}(?:p\d+)?"
    seen: set[str] = set()
    processes = sorted((int(one.name) for one in proc.glob("[0-9]*")), key=int)
    for pid in processes:
        place = proc / str(pid)
        namespace = _link(place / "ns/mnt")
        if namespace not in seen:
            seen.add(namespace)
            yield from (f"mounted at {where}" for where in _mounts(place / "mountinfo", name))
    for pid in processes:
        if pid != server and _has_open(proc / str(pid), re.compile(rf"{name}(?: \(deleted\))?")):
            yield f"open in {_process(pid, proc)}"


def _mounts(table: Path, name: str) -> Iterator[str]:
    for line in _text(table).splitlines():
        fields = line.split(" ")
        if re.fullmatch(name, fields[fields.index("-", 6) + 2]):
            yield re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])


def _has_open(process: Path, name: re.Pattern[str]) -> bool:
    try:
        descriptors = list(process.joinpath("fd").iterdir())
    except OSError:  # it has ended, or is not ours to look at
        return False
    if any(name.fullmatch(_link(descriptor)) for descriptor in descriptors):
        return True
    mapped = (line.split(maxsplit=5)[5:] for line in _text(process / "maps").splitlines())
    return any(name.fullmatch(file[0]) for file in mapped if file)


def _process(pid: int, proc: Path) -> str:
    return f"{_text(proc / str(pid) / 'comm').strip() or '?'} (process {pid})"


def _link(place: Path) -> str:
    try:
        return os.readlink(place)
    except OSError:
        return ""


def _text(place: Path) -> str:
    try:
        return place.read_text(errors="replace")
    except OSError:
        return ""
