# SPDX-License-Identifier: MIT
"""Who owns a device of ublk's: what udev's rule (60-pyublk.rules) asks, as root.

`python -m pyublk.service.owner ublkc0` prints the owner's uid and gid, as they are stored in the
device, and fails for one that belongs to root.
"""

import re
import sys

from pyublk.control import Controller
from pyublk.uapi import Feature


def owner_of(node: str) -> tuple[int, int] | None:
    """The user and the group for whom an unprivileged device was made, by the name of one of its
    nodes; None for any other. Raises OSError."""
    match = re.fullmatch(r"(?:/dev/)?ublk[bc](\d+)", node)
    if match is None:
        return None
    with Controller() as controller:
        device = controller.info(int(match[1]))
    if Feature.UNPRIVILEGED_DEV not in device.flags:
        return None
    return device.owner_uid, device.owner_gid


if __name__ == "__main__":
    owner = owner_of(sys.argv[1])
    if owner is None:
        sys.exit(1)
    print(*owner)
