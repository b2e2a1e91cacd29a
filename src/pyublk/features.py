# SPDX-License-Identifier: MIT
"""What this kernel and these rights allow, and why not where they do not.

What counts is the kernel's own mask (GET_FEATURES); versions are only named to explain.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyublk.errors import FeatureMissing
from pyublk.uapi import Feature

CAP_SYS_ADMIN = 21

#: Feature -> (the Linux release that brought it, what it buys).
_KNOWN: dict[Feature, tuple[str, str]] = {
    Feature.SUPPORT_ZERO_COPY: ("6.15", "requests' memory as fixed buffers of the server's ring"),
    Feature.URING_CMD_COMP_IN_TASK: ("6.0", "nothing today; always reported"),
    Feature.NEED_GET_DATA: ("6.0", "a buffer chosen after a write is known"),
    Feature.USER_RECOVERY: ("6.1", "the disk outlives its server: new requests wait"),
    Feature.USER_RECOVERY_REISSUE: ("6.1", "and requests in flight are sent again"),
    Feature.UNPRIVILEGED_DEV: ("6.3", "disks without root"),
    Feature.CMD_IOCTL_ENCODE: ("6.4", "today's command numbers; always reported"),
    Feature.USER_COPY: ("6.5", "the server copies what it needs, by pread and pwrite"),
    Feature.ZONED: ("6.6", "zoned disks"),
    Feature.USER_RECOVERY_FAIL_IO: ("6.13", "with recovery: new requests fail instead of waiting"),
    Feature.UPDATE_SIZE: ("6.16", "resizing a live disk"),
    Feature.AUTO_BUF_REG: ("6.16", "zero copy without a command for each request"),
    Feature.QUIESCE: ("6.16", "replacing a server on purpose"),
    Feature.PER_IO_DAEMON: ("6.16", "several threads serving one queue"),
    Feature.BUF_REG_OFF_DAEMON: ("6.17", "registering buffers from any thread"),
    Feature.BATCH_IO: ("7.0", "many tags per command, committed from any thread"),
    Feature.INTEGRITY: ("7.0", "metadata beside the data"),
    Feature.SAFE_STOP_DEV: ("7.0", "a stop that refuses while the disk is open"),
    Feature.NO_AUTO_PART_SCAN: ("7.0", "no partition scan at the start"),
    Feature.SHMEM_ZC: ("7.1", "zero copy of memory that clients share"),
    Feature.IO_DESC_SIZE: ("7.3", "larger descriptors, for fields to come"),
}

_RECOVERY = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.USER_RECOVERY_FAIL_IO
_RECOVERY_SETS = (
    Feature(0),
    Feature.USER_RECOVERY,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
)

#: One of the left needs one of the right.
_NEEDS = (
    (Feature.QUIESCE, Feature.USER_RECOVERY),
    (Feature.INTEGRITY, Feature.USER_COPY),
    (Feature.ZONED, Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY),
)
#: The left excludes any of the right (the kernel refuses, or drops the left without a word).
_EXCLUDES = (
    (
        Feature.UNPRIVILEGED_DEV,
        Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG | _RECOVERY,
    ),
    (
        Feature.NEED_GET_DATA,
        Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG | Feature.BATCH_IO,
    ),
)


def _names(flags: Feature) -> str:
    return ", ".join(flag.name or hex(flag) for flag in flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRow:
    """One line of a table of features."""

    feature: Feature
    available: bool
    since: str
    buys: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The driver's features, as of `mask` (None: older than Linux 6.5, which cannot say)."""

    mask: int | None
    kernel_release: str
    privileged: bool

    @classmethod
    def of_this_machine(cls, mask: int | None) -> Self:
        """With this kernel's name and this process's rights."""
        return cls(mask=mask, kernel_release=os.uname().release, privileged=_has_sys_admin())

    @property
    def available(self) -> Feature:
        """Every feature the driver has, also bits without a name here."""
        return Feature(self.mask or 0)

    def has(self, feature: Feature) -> bool:
        """Whether it can be used here, with these rights."""
        return self.reason(feature) is None

    def reason(self, feature: Feature) -> str | None:
        """Why `feature` cannot be used, in a sentence; None if it can."""
        since, _ = _KNOWN[feature]
        if self.mask is None:
            return f"needs Linux {since}; this kernel ({self.kernel_release}) cannot list features"
        if not self.mask & feature:
            return f"needs Linux {since}; this kernel ({self.kernel_release}) lacks it"
        if feature is Feature.UNPRIVILEGED_DEV and self.privileged:
            return "a caller with CAP_SYS_ADMIN always gets a privileged device"
        if feature is not Feature.UNPRIVILEGED_DEV and not self.privileged:
            forbidden = dict(_EXCLUDES)[Feature.UNPRIVILEGED_DEV]
            if feature & forbidden:
                return "needs CAP_SYS_ADMIN: unprivileged devices do without it"
        return None

    def require(self, feature: Feature) -> None:
        """Raises FeatureMissing unless `feature` can be used."""
        if (reason := self.reason(feature)) is not None:
            needed, _, found = reason.partition("; ")
            raise FeatureMissing(
                _names(feature), needed.removeprefix("needs "), found or "a caller that differs"
            )

    def check(self, flags: Feature) -> None:
        """Refuses a combination of device flags that the kernel would refuse or silently change.

        Raises ValueError for a contradiction, FeatureMissing for what this kernel lacks.
        """
        if flags & _RECOVERY not in _RECOVERY_SETS:
            raise ValueError(
                f"{_names(flags & _RECOVERY)} do not go together: recovery is USER_RECOVERY alone, "
                "or with either USER_RECOVERY_REISSUE or USER_RECOVERY_FAIL_IO"
            )
        for feature, needed in _NEEDS:
            if feature in flags and not flags & needed:
                choices = _names(needed).replace(", ", " or ")
                raise ValueError(f"{_names(feature)} needs {choices} as well")
        for feature, excluded in _EXCLUDES:
            if feature in flags and flags & excluded:
                raise ValueError(
                    f"{_names(feature)} does not go together with {_names(flags & excluded)}"
                )
        for feature in flags:
            if feature in _KNOWN:
                self.require(feature)

    def __iter__(self) -> Iterator[FeatureRow]:
        for feature, (since, buys) in _KNOWN.items():
            reason = self.reason(feature)
            yield FeatureRow(
                feature=feature, available=reason is None, since=since, buys=buys, reason=reason
            )

    def __str__(self) -> str:
        if self.mask is None:
            return "unknown (before Linux 6.5)"
        return f"{self.mask:#x} ({_names(self.available)})"


def _has_sys_admin() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0
