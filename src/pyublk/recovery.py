# SPDX-License-Identifier: MIT
"""What becomes of a disk whose server is gone, and what the next one must have in common with it.

The kernel has two flags beside USER_RECOVERY, of which a device has one at most. With neither, the
requests that the dead server held fail, and later ones wait: it is the worst of both, and no mode.
"""

from enum import StrEnum

from pyublk.features import Features
from pyublk.params import Params
from pyublk.uapi import Feature


class Recovery(StrEnum):
    """What becomes of a disk whose server is gone; `docs/recovery.md` compares them.

    - NONE: it is deleted.
    - RESEND: requests wait for the next server, which gets those again that the dead one held.
    - FAIL: requests fail until there is a next server (Linux 6.13).
    """

    NONE = "none"
    RESEND = "resend"
    FAIL = "fail"


#: What a kernel needs for RESEND.
RESEND_FLAGS = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE

_FLAGS = {
    Recovery.NONE: Feature(0),
    Recovery.RESEND: RESEND_FLAGS,
    Recovery.FAIL: Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
}


def recovery_flags(mode: Recovery, features: Features) -> Feature:
    """The device flags of a mode. Raises FeatureMissing where this kernel lacks one."""
    flags = _FLAGS[mode]
    features.require(flags)
    if mode is Recovery.RESEND and features.has(Feature.QUIESCE):
        flags |= Feature.QUIESCE
    return flags


def recovery_of(flags: Feature) -> Recovery:
    """The mode of a device with these flags."""
    if Feature.USER_RECOVERY not in flags:
        return Recovery.NONE
    return Recovery.FAIL if Feature.USER_RECOVERY_FAIL_IO in flags else Recovery.RESEND


def differences(wished: Params, disk: Params) -> list[str]:
    """In what a disk is another one than a target's, one string each. Hints, of which clients made
    what they could when the disk was new, count like everything else."""
    found = [
        f"{one.replace(' instead of ', ', and the target has ')}" for one in wished.difference(disk)
    ]
    for name in ("discard", "zoned", "integrity"):
        if getattr(wished, name) is None and getattr(disk, name) is not None:
            found.append(f"{name}, which the target has not")
    return found
