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


#: Seconds for the kernel to notice a server's end: Linux before 6.16 takes half a minute when the
#: server had every tag.
NOTICED = 60.0

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


def resends(flags: Feature) -> bool:
    """Whether the next server gets each request that the one before has not answered."""
    return _FLAGS[Recovery.RESEND] in flags


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


def shortcomings(wished: Params, disk: Params) -> list[str]:
    """What clients of a disk that other software made were told, and a target does not do, one
    string each. That it can do more does not matter, nor do hints, which that software chose."""
    own, basic = wished.basic, disk.basic
    found = [
        f"basic.{name} {getattr(basic, name)}, and the target has {getattr(own, name)}"
        for name in ("size", "logical_block_size", "read_only", "chunk_size")
        if getattr(basic, name) != getattr(own, name)
    ]
    if own.volatile_cache and not basic.volatile_cache:
        found.append("no volatile cache: nobody asks for the flushes that the target needs")
    if basic.fua and not own.fua:
        found.append("basic.fua True, and the target has no write_fua")
    if disk.discard is not None:
        for name in ("max_discard_size", "max_write_zeroes_size"):
            asked = getattr(disk.discard, name)
            if asked and not (wished.discard and getattr(wished.discard, name)):
                found.append(f"discard.{name} {asked}, and the target has none")
    for name in ("zoned", "integrity"):
        if getattr(wished, name) != getattr(disk, name):
            found.append(f"another {name} than the target")
    aligned = 1 if disk.dma_align is None else disk.dma_align.alignment
    if wished.dma_align is not None and wished.dma_align.alignment > aligned:
        found.append(f"dma_align {aligned}, and the target needs {wished.dma_align.alignment}")
    return found
