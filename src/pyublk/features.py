# SPDX-License-Identifier: MIT
"""What this kernel and these rights allow, with the reason for what is missing.

The driver silently clears flags that it does not know, and those that do not go together. So its
features are read once (GET_FEATURES), and wanted flags are checked against them. Releases are only
named in explanations, and never compared: distributions move features between them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pyublk.errors import FeatureMissing
from pyublk.uapi import Feature

_CAP_SYS_ADMIN = 21
#: Inode of the first user namespace (include/uapi/linux/nsfs.h, USER_NS_INIT_INO).
_FIRST_USER_NAMESPACE = 0xEFFFFFFD

#: The Linux release that brought a feature, and what it buys.
_ABOUT: dict[Feature, tuple[str, str]] = {
    Feature.SUPPORT_ZERO_COPY: ("6.15", "requests' memory as io_uring buffers, never copied"),
    Feature.URING_CMD_COMP_IN_TASK: ("6.0", "nothing any more; always on"),
    Feature.NEED_GET_DATA: ("6.0", "a write's data is copied only when the server asks for it"),
    Feature.USER_RECOVERY: ("6.1", "the disk outlives its server; new requests wait"),
    Feature.USER_RECOVERY_REISSUE: ("6.1", "with recovery: the dead server's requests come again"),
    Feature.UNPRIVILEGED_DEV: ("6.3", "devices for users without CAP_SYS_ADMIN"),
    Feature.CMD_IOCTL_ENCODE: ("6.4", "the command numbers that are used here; always on"),
    Feature.USER_COPY: ("6.5", "only the bytes that are looked at are copied, by pread and pwrite"),
    Feature.ZONED: ("6.6", "zoned disks"),
    Feature.USER_RECOVERY_FAIL_IO: ("6.13", "with recovery: new requests fail instead of waiting"),
    Feature.UPDATE_SIZE: ("6.16", "live disks can be resized"),
    Feature.AUTO_BUF_REG: ("6.16", "zero copy without a command to register each request's memory"),
    Feature.QUIESCE: ("6.16", "with recovery: the server is replaced without a failed request"),
    Feature.PER_IO_DAEMON: ("6.16", "each tag may have its own thread; always on"),
    Feature.BUF_REG_OFF_DAEMON: ("6.17", "any thread registers requests' memory; always on"),
    Feature.BATCH_IO: ("7.0", "many tags in one command, committed by any thread"),
    Feature.INTEGRITY: ("7.0", "metadata and protection information for the data"),
    Feature.SAFE_STOP_DEV: ("7.0", "a stop that refuses while the disk is open; always on"),
    Feature.NO_AUTO_PART_SCAN: ("7.0", "no partition scan at the start"),
    Feature.SHMEM_ZC: ("7.1", "no copy for clients that share memory with the server"),
    Feature.IO_DESC_SIZE: ("7.3", "larger descriptors, with room for future fields"),
}

#: Features that rest on others: any of the right-hand side will do.
_NEEDS: dict[Feature, Feature] = {
    Feature.USER_RECOVERY_REISSUE: Feature.USER_RECOVERY,
    Feature.USER_RECOVERY_FAIL_IO: Feature.USER_RECOVERY,
    Feature.QUIESCE: Feature.USER_RECOVERY,
    Feature.INTEGRITY: Feature.USER_COPY,
    Feature.ZONED: Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY,
}

#: Features that exclude others: the kernel refuses the pair, or clears one of them silently.
_EXCLUDES: dict[Feature, Feature] = {
    Feature.USER_RECOVERY_REISSUE: Feature.USER_RECOVERY_FAIL_IO,
    Feature.UNPRIVILEGED_DEV: (
        Feature.USER_COPY
        | Feature.SUPPORT_ZERO_COPY
        | Feature.AUTO_BUF_REG
        | Feature.USER_RECOVERY
        | Feature.USER_RECOVERY_REISSUE
        | Feature.USER_RECOVERY_FAIL_IO
    ),
    Feature.NEED_GET_DATA: (
        Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG | Feature.BATCH_IO
    ),
    Feature.BATCH_IO: Feature.PER_IO_DAEMON,
}

#: What devices of users without CAP_SYS_ADMIN cannot have, directly or because of what it needs.
_PRIVILEGED = (
    _EXCLUDES[Feature.UNPRIVILEGED_DEV] | Feature.QUIESCE | Feature.INTEGRITY | Feature.ZONED
)


_RECOVERY = (
    Feature.USER_RECOVERY
    | Feature.USER_RECOVERY_REISSUE
    | Feature.USER_RECOVERY_FAIL_IO
    | Feature.QUIESCE
)
_DATA_PATHS = (
    Feature.NEED_GET_DATA
    | Feature.USER_COPY
    | Feature.SUPPORT_ZERO_COPY
    | Feature.AUTO_BUF_REG
    | Feature.BATCH_IO
)
#: Flags that are not a target's to ask for: why, and what to do.
_NOT_A_TARGETS: dict[Feature, str] = {
    _RECOVERY: (
        "what becomes of a disk without its server is the user's choice: pass Device(recovery=...)"
    ),
    Feature.UNPRIVILEGED_DEV: (
        "who owns the device depends on who makes it: leave it out, or serve by hand "
        "(Controller.add, docs/by-hand.md)"
    ),
    _DATA_PATHS: "the data path is the user's choice: list those that you support in `paths`",
    Feature.NO_AUTO_PART_SCAN: "it is the user's choice: pass Device(partition_scan=False)",
    Feature.SHMEM_ZC: "it is the user's choice: pass Device(shared_memory=True)",
}


def why_not_needed(needs: Feature) -> str | None:
    """Why a target cannot need one of these features, in a sentence; None: it can need them all."""
    for flags, reason in _NOT_A_TARGETS.items():
        if wrong := flags & needs:
            return f"{_names(wrong, 'and')}: {reason}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureInfo:
    """One feature, as a row of a table.

    `since` is the Linux release that brought it, `buys` what it is good for, `reason` why it is
    missing (None when it is there).
    """

    feature: Feature
    name: str
    bit: int
    available: bool
    since: str
    buys: str
    reason: str | None


#: Features that a kernel of the right release can be built without.
_BUILT_WITH = {
    Feature.INTEGRITY: "CONFIG_BLK_DEV_INTEGRITY",
    Feature.ZONED: "CONFIG_BLK_DEV_ZONED",
}

_KNOWN = Feature(sum(_ABOUT))


def _names(features: Feature, conjunction: str) -> str:
    *others, last = [one.name or "" for one in features]
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def is_privileged() -> bool:
    """Whether the kernel's capable(CAP_SYS_ADMIN) says yes: the first user namespace counts."""
    if os.stat("/proc/self/ns/user").st_ino != _FIRST_USER_NAMESPACE:
        return False
    with open("/proc/self/status") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_ADMIN & 1)


def check_together(combination: Feature) -> None:
    """Raises ValueError for flags that do not go together on any kernel."""
    for feature, needed in _NEEDS.items():
        if feature in combination and not needed & combination:
            raise ValueError(f"{feature.name} needs {_names(needed, 'or')} as well")
    for feature, excluded in _EXCLUDES.items():
        if feature in combination and (both := excluded & combination):
            raise ValueError(f"{feature.name} does not go together with {_names(both, 'and')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What can be asked of ADD_DEV here. Iterating gives a FeatureInfo for each known feature.

    Args:
        mask: what GET_FEATURES answered; None for a kernel without that command (before 6.5).
        kernel_release: as `uname -r` says it, for the explanations.
        privileged: whether the caller has CAP_SYS_ADMIN in the first user namespace.
    """

    mask: int | None
    kernel_release: str
    privileged: bool

    @classmethod
    def of_this_machine(cls, mask: int | None) -> Self:
        """For this process on this kernel, whose GET_FEATURES answered `mask`."""
        return cls(mask=mask, kernel_release=os.uname().release, privileged=is_privileged())

    def has(self, feature: Feature) -> bool:
        """Whether all bits of `feature` are there, for this caller."""
        return self._missing(feature) is None

    def reason(self, feature: Feature) -> str | None:
        """Why `feature` is missing: what it needs and what is here; None if it is there."""
        missing = self._missing(feature)
        return None if missing is None else f"needs {missing.needed}, here is {missing.found}"

    def require(self, feature: Feature) -> None:
        """Raises FeatureMissing unless all bits of `feature` are there."""
        if missing := self._missing(feature):
            raise missing

    def check(self, combination: Feature) -> None:
        """Checks the flags of a device to be added: what each needs, and what excludes what.

        Raises ValueError for flags that do not go together on any kernel, FeatureMissing for those
        that this kernel or these rights lack. Otherwise the kernel would answer EINVAL, or clear
        them without a word.
        """
        check_together(combination)
        self.require(combination)
        if not self.privileged and Feature.UNPRIVILEGED_DEV not in combination:
            raise FeatureMissing(
                "a device without UNPRIVILEGED_DEV", "CAP_SYS_ADMIN", "a caller without it"
            )

    def __iter__(self) -> Iterator[FeatureInfo]:
        for feature, (since, buys) in _ABOUT.items():
            reason = self.reason(feature)
            yield FeatureInfo(
                feature=feature,
                name=_names(feature, "and"),
                bit=feature.bit_length() - 1,
                available=reason is None,
                since=since,
                buys=buys,
                reason=reason,
            )

    @property
    def unknown(self) -> int:
        """The bits of the kernel's answer that this pyublk has no name for."""
        return (self.mask or 0) & ~_KNOWN.value

    def _missing(self, features: Feature) -> FeatureMissing | None:
        if unknown := features.value & ~_KNOWN.value:
            return FeatureMissing(
                f"the feature {unknown:#x}", "a newer pyublk", "one that has no name for it"
            )
        for feature in features:
            if missing := self._one_missing(feature):
                return missing
        return None

    def _one_missing(self, feature: Feature) -> FeatureMissing | None:
        name = _names(feature, "and")
        needed = f"Linux {_ABOUT[feature][0]}"
        if option := _BUILT_WITH.get(feature):
            needed += f" with {option}"
        here = f"Linux {self.kernel_release}"
        if self.mask is None:
            return FeatureMissing(
                name, needed, f"{here}, which cannot tell its features (6.5 and newer can)"
            )
        if not self.mask & feature:
            return FeatureMissing(
                name, needed, f"{here}, whose driver offers {self.mask:#x} without it"
            )
        if not self.privileged and feature in _PRIVILEGED:
            return FeatureMissing(name, "CAP_SYS_ADMIN", "a caller without it")
        if self.privileged and feature is Feature.UNPRIVILEGED_DEV:
            return FeatureMissing(
                name,
                "a caller without CAP_SYS_ADMIN",
                "one with it, for whom the kernel drops the flag",
            )
        return None
