# SPDX-License-Identifier: MIT
"""What is known to be wrong with the ublk drivers of some kernels, and who says so.

Only a kernel's name is looked at: a distribution may have repaired its kernel, or broken it.
Nothing is refused for what stands here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

Version = tuple[int, int, int]

ENDLESS: Version = (1 << 30, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A defect of the kernels from `first` to before `fixed`, but for those of `repaired`: ranges
    in which a stable kernel has the fix; or of those whose release `named` matches, if it is given.

    `source` says who found it: an issue, a commit, or that it was seen here. `of_recovery`: only a
    disk made with recovery is concerned.
    """

    what: str
    remedy: str
    source: str
    first: Version = (0, 0, 0)
    fixed: Version = ENDLESS
    repaired: tuple[tuple[Version, Version], ...] = ()
    named: str = ""
    only_in_pid_namespace: bool = False
    of_recovery: bool = False

    def concerns(self, release: str, *, in_pid_namespace: bool) -> bool:
        """Whether the kernel called `release` has it, for a caller in that namespace."""
        if self.only_in_pid_namespace and not in_pid_namespace:
            return False
        if self.named:
            return re.match(self.named, release) is not None
        if (version := _version(release)) is None:
            return False
        in_range = self.first <= version < self.fixed
        return in_range and not any(first <= version < end for first, end in self.repaired)


DEFECTS = (
    Defect(
        what="it is older than Linux 6.8, the oldest that pyublk is made for",
        remedy="use a newer kernel, or `pyublk vm`",
        source="pyublk's tests begin there",
        fixed=(6, 8, 0),
    ),
    Defect(
        what="the first ADD_DEV crashes the kernel: queues are made before their tags",
        remedy="use Linux 6.18.6 or newer, or one without commit 529d4d632788",
        source="zabbly/linux#52, kvcache-ai/AgentENV#20; fixed by commit 011af85ccd87",
        first=(6, 18, 4),
        fixed=(6, 18, 6),
    ),
    Defect(
        what="ADD_DEV crashes some of Ubuntu's 6.17.0 kernels for clouds (1015, 1017 and 1018 do)",
        remedy="use Linux 6.18.6 or newer before you make a disk",
        source="actions/runner-images#14175, longhorn/longhorn#13509, Launchpad 2154635",
        named=r"6\.17\.0-1\d{3}-(azure|aws)",
    ),
    Defect(
        what="in a pid namespace no disk starts on those without a repair of January 2026",
        remedy="run the server in the machine's own pid namespace, or use a newer kernel",
        source="longhorn/longhorn#11977, and read in the driver's source",
        first=(6, 17, 0),
        fixed=(6, 19, 0),
        only_in_pid_namespace=True,
    ),
    Defect(
        what="a killed server that held requests on every tag is noticed only after 30 seconds",
        remedy="wait, or use Linux 6.16 or newer",
        source="seen in 6.12.107",
        first=(6, 8, 0),
        fixed=(6, 16, 0),
    ),
    Defect(
        what="a recovery that sends requests again (USER_RECOVERY_REISSUE) may lose some",
        remedy="use Linux 6.12.24, 6.15 or newer; a recovery that fails them is not concerned",
        source="the log of Linux 6.12.24: recovery and reissue fixed in ublk_abort_queue",
        first=(6, 8, 0),
        fixed=(6, 15, 0),
        repaired=(((6, 12, 24), (6, 13, 0)),),
        of_recovery=True,
    ),
    Defect(
        what="requests may be lost when a server ends, or is stopped, in the middle of a recovery",
        remedy="use Linux 7.3.4 or newer",
        source="the log of Linux 7.3.4: seven fixes of cancelled fetches",
        first=(7, 3, 0),
        fixed=(7, 3, 4),
        of_recovery=True,
    ),
    Defect(
        what="UPDATE_SIZE on a device that is not live crashes some of these kernels",
        remedy="nothing for pyublk's disks: it refuses to send it; other programs must not send it",
        source="seen in 6.18.15",
        first=(6, 16, 0),
        fixed=(7, 0, 0),
    ),
    Defect(
        what="START_DEV after STOP_DEV hangs or crashes the kernel",
        remedy="nothing for pyublk's disks: it never sends it; other programs must not send it",
        source="seen in 6.12.107 (hangs), 6.18.15 and 7.2.13 (crash)",
        first=(6, 8, 0),
        fixed=(7, 3, 0),
    ),
)


def defects_of(release: str, *, in_pid_namespace: bool = False) -> Iterator[Defect]:
    """The known defects of the kernel that `uname -r` calls `release`."""
    for defect in DEFECTS:
        if defect.concerns(release, in_pid_namespace=in_pid_namespace):
            yield defect


def _version(release: str) -> Version | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
