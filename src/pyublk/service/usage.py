# SPDX-License-Identifier: MIT
"""Who uses a block device: mounts, swap, other devices on top of it.

Only files of /proc and /sys are read: a disk whose server hangs can be asked about as well. Mounts
in other mount namespaces are not seen; a claim by them shows when the device is opened exclusively.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a disk.

    `device` is the disk or partition (``ublkb0p1``); `how` and `by` say what has it: "mounted" at
    a directory, as "swap", "held" by a device such as ``dm-0``, or behind a "loop" device.
    """

    device: str
    how: Literal["mounted", "swap", "held", "loop"]
    by: str

    def __str__(self) -> str:
        where = {
            "mounted": f"mounted at {self.by}",
            "swap": "used as swap",
            "held": f"held by {self.by}",
            "loop": f"behind {self.by}",
        }
        return f"/dev/{self.device} is {where[self.how]}"


def uses(
    name: str,
    *,
    proc: Path = Path("/proc/self"),
    swaps: Path = Path("/proc/swaps"),
    sys: Path = Path("/sys"),
) -> list[Use]:
    """The uses of disk `name` (``ublkb0``) and of its partitions; empty if it does not exist.

    `proc`, `swaps` and `sys` are where the kernel's files are (proc(5), sysfs-block).
    """
    numbers = {number: part for part, number in _parts(name, sys)}
    found: list[Use] = []
    for number, source, place in _mounts(proc / "mountinfo"):
        # btrfs and others show a made-up number, but name the device as their source.
        part = numbers.get(number) or numbers.get(_number_of(source))
        if part is not None:
            found.append(Use(part, "mounted", place))
    for source in _swap_devices(swaps):
        if (part := numbers.get(_number_of(source))) is not None:
            found.append(Use(part, "swap", source))
    for part in numbers.values():
        holders = sys / "class/block" / part / "holders"
        found += [Use(part, "held", holder.name) for holder in sorted(holders.glob("*"))]
    for loop in sorted((sys / "class/block").glob("loop*/loop/backing_file")):
        if (part := numbers.get(_number_of(loop.read_text().strip()))) is not None:
            found.append(Use(part, "loop", loop.parent.parent.name))
    return found


def partitions(name: str, *, sys: Path = Path("/sys")) -> list[str]:
    """The names of a disk's partitions."""
    return [part for part, _ in _parts(name, sys) if part != name]


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


def _mounts(mountinfo: Path) -> Iterator[tuple[str, str, str]]:
    """Device number, source and place of every mount (proc(5), mountinfo)."""
    for line in mountinfo.read_text().splitlines():
        fields = line.split(" ")
        source = fields[fields.index("-", 6) + 2]
        yield fields[2], _unescaped(source), _unescaped(fields[4])


def _swap_devices(swaps: Path) -> Iterator[str]:
    try:
        lines = swaps.read_text().splitlines()[1:]
    except FileNotFoundError:  # a kernel without swap
        return
    for line in lines:
        yield _unescaped(line.split()[0])


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _number_of(path: str) -> str:
    """The "major:minor" of a block device's node; "" if it is none."""
    if not path.startswith("/dev/"):  # elsewhere, a dead network mount could hang us
        return ""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISBLK(status.st_mode):
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
