# SPDX-License-Identifier: MIT
"""Disks that lie on other disks: which are to be stopped first."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyublk.control import DeviceInfo
from pyublk.files import about
from pyublk.openers import opened_by
from pyublk.service.usage import members, mounts, number_of


def top_first(devices: Sequence[DeviceInfo]) -> list[DeviceInfo]:
    """The devices in an order in which none comes before what lies on it."""
    below = {device.id: _below(device) for device in devices}
    left, ordered = list(devices), []
    while left:
        covered = {lower for device in left for lower in below[device.id]}
        # Disks of one process seem to lie on each other; the later ones are likely to be on top.
        top = [device for device in left if device.id not in covered] or left[-1:]
        ordered += top
        left = [device for device in left if device not in top]
    return ordered


def _below(device: DeviceInfo) -> set[int]:
    """The ublk disks under what the server has open, itself apart."""
    if device.server_pid is None:
        return set()
    numbers = {
        number
        for one in opened_by(device.server_pid, lambda _: True)
        for number in (one.file.special, one.file.device)
    }
    found: set[int] = set()
    for number in numbers:
        found |= _ublk_disks(number, set())
    return found - {device.id}


def _ublk_disks(number: str, seen: set[str], sys: Path = Path("/sys")) -> set[int]:
    """The ublk disks that a block device, "major:minor", lies on, or is."""
    if number in seen:
        return set()
    seen.add(number)
    place = sys / "dev/block" / number
    if not place.exists():
        return {one for below in _of_file_system(number) for one in _ublk_disks(below, seen)}
    place = place.resolve()
    if (place / "partition").exists():
        place = place.parent
    if match := re.fullmatch(r"ublkb(\d+)", place.name):
        return {int(match[1])}
    return {one for below in _layers(place) for one in _ublk_disks(below, seen)}


def _of_file_system(number: str) -> Iterator[str]:
    """The devices of a mounted file system that has no number of a device, such as btrfs."""
    for mount in mounts(Path("/proc/self/mountinfo")):
        if mount.number == number:
            for source in mount.sources:
                if found := number_of(source):
                    yield from (found, *members(found))


def _layers(device: Path) -> Iterator[str]:
    for lower in (device / "slaves").glob("*/dev"):
        yield lower.read_text().strip()
    try:
        file = about((device / "loop/backing_file").read_text().strip())
    except OSError:  # no loop device, or of a file that was removed
        return
    yield from (file.special, file.device)
