# SPDX-License-Identifier: MIT
"""Who uses a block device: mounts, swap, other devices on top of it, processes.

Nothing is opened but files of /proc and /sys: a disk whose server hangs can be asked about as well.
What cannot be found so (another claim of the kernel's) shows when the disk is claimed (`Claim`).
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyublk.files import About, about
from pyublk.openers import command_name, openers, served_by

_WORDS = {
    "mounted": "mounted at {}",
    "swap": "used as swap",
    "held": "held by {}",
    "loop": "behind {}",
    "served": "under {}",
    "files": "unmounted, but its files are open in {}",
    "written": "open for writing in {}",
    "open": "open in {}",
}


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a disk.

    `device` is the disk or partition (``ublkb0p1``); `how` and `by` say what has it: "mounted" at
    a directory, as "swap", "held" by a device such as ``dm-0``, or behind a "loop" device, "served"
    as another ublk disk; a process that has its "files", has "written" to it or has it "open".
    """

    device: str
    how: Literal["mounted", "swap", "held", "loop", "served", "files", "written", "open"]
    by: str

    def __str__(self) -> str:
        return f"/dev/{self.device} is {_WORDS[self.how].format(self.by)}"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo (proc(5)): the file system's number, its devices, and where it is."""

    number: str
    sources: tuple[str, ...]
    place: str


def uses(
    name: str,
    *,
    proc: Path = Path("/proc/self"),
    swaps: Path = Path("/proc/swaps"),
    sys: Path = Path("/sys"),
) -> list[Use]:
    """The uses of disk `name` (``ublkb0``) and of its partitions; empty if it does not exist.

    `proc`, `swaps` and `sys` are where the kernel's files are (proc(5), sysfs-block). Processes are
    not looked at: `opened` does.
    """
    numbers = {number: part for part, number in _parts(name, sys)}
    if not numbers:
        return []
    found = [Use(part, "mounted", place) for part, place in _mounted(numbers, proc, sys)]
    named = {use.device for use in found}
    for source in _swap_devices(swaps):
        if (part := numbers.get(number_of(source))) is not None:
            found.append(Use(part, "swap", source))
    for number, part in numbers.items():
        holders = sys / "class/block" / part / "holders"
        found += [Use(part, "held", holder.name) for holder in sorted(holders.glob("*"))]
        if part not in named and (place := _btrfs(number, sys)) is not None:
            found.append(Use(part, "held", f"btrfs {place.name}"))
        if (proc.parent / "fs/jbd2" / part).exists():
            found.append(Use(part, "held", "a file system, as its journal"))
    for loop in sorted((sys / "class/block").glob("loop*/loop/backing_file")):
        if (part := numbers.get(number_of(loop.read_text().strip()))) is not None:
            found.append(Use(part, "loop", loop.parent.parent.name))
    return found


def opened(name: str, *, but: int | None = None, sys: Path = Path("/sys")) -> list[Use]:
    """Which processes, `but` one, have the disk or its partitions open, or files on them. Those of
    others are seen by root only."""
    numbers = {number: part for part, number in _parts(name, sys)}

    def wanted(file: About) -> bool:
        return file.special in numbers if stat.S_ISBLK(file.mode) else file.device in numbers

    found: dict[Use, None] = {}
    for one in openers(wanted):
        if one.pid == but:
            continue
        served = served_by(one.pid)
        if not stat.S_ISBLK(one.file.mode):
            use = Use(numbers[one.file.device], "files", str(one))
        elif served and name not in served:
            use = Use(numbers[one.file.special], "served", ", ".join(f"/dev/{n}" for n in served))
        else:
            how: Literal["written", "open"] = "written" if one.writes else "open"
            use = Use(numbers[one.file.special], how, str(one))
        found[use] = None
    return list(found)


def _parts(name: str, sys: Path) -> list[tuple[str, str]]:
    """The disk and its partitions, each with its "major:minor"."""
    disk = sys / "class/block" / name
    places = [disk, *sorted(p.parent for p in disk.glob(f"{name}*/partition"))]
    found = []
    for place in places:
        try:
            found.append((place.name, (place / "dev").read_text().strip()))
        except FileNotFoundError:
            continue  # gone meanwhile
    return found


def _mounted(numbers: dict[str, str], proc: Path, sys: Path) -> Iterator[tuple[str, str]]:
    """The disk's parts that are mounted, and where: in this mount namespace, else in others."""
    found = list(_mounted_there(numbers, proc, sys))
    yield from found
    elsewhere = numbers.keys() - {number for number, part in numbers.items() if part in dict(found)}
    if not elsewhere:
        return
    known = {_namespace(proc)}
    for process in proc.parent.glob("[0-9]*"):
        namespace = _namespace(process)
        if namespace in known:
            continue
        known.add(namespace)
        pid = int(process.name)
        who = f"in the mount namespace of {command_name(pid) or '?'} (process {pid})"
        left = {number: numbers[number] for number in elsewhere}
        for part, place in _mounted_there(left, process, sys):
            yield part, f"{place} {who}"


def _mounted_there(numbers: dict[str, str], proc: Path, sys: Path) -> Iterator[tuple[str, str]]:
    try:
        table = list(mounts(proc / "mountinfo"))
    except OSError:  # of a process that has ended, or is not ours to look at
        return
    for mount in table:
        # btrfs and others show a made-up number, but name a device as their source.
        sources = {found for source in mount.sources if (found := number_of(source))}
        for source in list(sources):
            sources |= members(source, sys)
        for number in {mount.number, *sources} & numbers.keys():
            yield numbers[number], mount.place


def _namespace(process: Path) -> str | None:
    try:
        return os.readlink(process / "ns/mnt")
    except OSError:
        return None


def mounts(mountinfo: Path) -> Iterator[Mount]:
    """Every mount of a table; the devices of one are its source (of some, several), and those that
    its options name (an external log, for one)."""
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        _, source, options = fields[fields.index("-", 6) + 1 :][:3]
        named = re.findall(r"=(/dev/[^,]+)", options)
        sources = [_unescaped(one) for one in (*re.split(r":(?=/dev/)", source), *named)]
        yield Mount(fields[2], tuple(sources), _unescaped(fields[4]))


def members(number: str, sys: Path = Path("/sys")) -> set[str]:
    """All devices of the mounted btrfs that a device belongs to."""
    place = _btrfs(number, sys)
    if place is None:
        return set()
    return {dev.read_text().strip() for dev in (place / "devices").glob("*/dev")}


def _btrfs(number: str, sys: Path) -> Path | None:
    name = (sys / "dev/block" / number).resolve().name
    for device in (sys / "fs/btrfs").glob(f"*/devices/{name}"):
        return device.parent.parent
    return None


def _swap_devices(swaps: Path) -> Iterator[str]:
    try:
        lines = swaps.read_text().splitlines()[1:]
    except FileNotFoundError:  # a kernel without swap
        return
    for line in lines:
        yield _unescaped(line.split()[0])


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def number_of(path: str) -> str:
    """The "major:minor" of a block device's node; "" if it is none."""
    if not path.startswith("/dev/"):  # elsewhere, a dead network mount could hang us
        return ""
    try:
        found = about(path)
    except OSError:
        return ""
    return found.special if stat.S_ISBLK(found.mode) else ""
