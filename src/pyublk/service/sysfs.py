# SPDX-License-Identifier: MIT
"""The devices of this machine where nobody may ask the driver: what sysfs and the records tell."""

import errno
from pathlib import Path

from pyublk import errors
from pyublk._native import Ring
from pyublk.control import Controller, DeviceInfo, node_id
from pyublk.params import Params
from pyublk.service.records import Record
from pyublk.uapi import ControlCommand, DeviceStatus, Feature


class Sysfs:
    """Stands in for a Controller that only looks. Not known are flags, parameters, the cookie and
    the server of a device without a record, and whether one that has a disk still has a server."""

    def __init__(self, sys: Path = Path("/sys")) -> None:
        self._char = sys / "class/ublk-char"
        self._block = sys / "class/block"

    def devices(self) -> list[DeviceInfo]:
        """Every device, by id."""
        found = []
        for number in sorted(map(node_id, self._char.glob("ublkc*"))):
            try:
                found.append(self.info(number))
            except OSError as error:
                if error.errno != errno.ENODEV:  # else: deleted since
                    raise
        return found

    def info(self, device: int) -> DeviceInfo:
        """As of a Controller, with 0 for what is not known."""
        char, block = self._char / f"ublkc{device}", self._block / f"ublkb{device}"
        try:
            owner = char.stat()
        except FileNotFoundError:
            raise errors.command_error(
                ControlCommand.GET_DEV_INFO, errno.ENODEV, device=device
            ) from None
        record = Record.read(device)
        return DeviceInfo(
            id=device,
            queues=len(list((block / "mq").glob("[0-9]*"))),
            depth=_number(block / "mq/0/nr_tags"),
            status=DeviceStatus.LIVE if block.exists() else DeviceStatus.DEAD,
            max_io_size=_number(block / "queue/max_hw_sectors_kb") * 1024,
            flags=Feature(0),
            server_pid=None if record is None else record.server.pid,
            cookie=0 if record is None else record.cookie,
            owner_uid=owner.st_uid,
            owner_gid=owner.st_gid,
        )

    def get_params(self, device: int) -> Params:
        """None are known, as of a device that has none yet."""
        raise ValueError(f"only the driver knows the parameters of device {device}")


def whom_to_ask(controller: Controller) -> Controller | Sysfs:
    """The driver, or sysfs where io_uring is forbidden, by which alone the driver can be asked."""
    try:
        Ring(1).close()
    except PermissionError:
        return Sysfs()
    return controller


def _number(place: Path) -> int:
    try:
        return int(place.read_text())
    except (OSError, ValueError):  # no disk, or going
        return 0
