# SPDX-License-Identifier: MIT
"""The limit of open files, which many disks in a process come to.

The soft limit is low (1,024) because select(2) cannot watch higher numbers; the hard one is what a
process may have. So it is raised when disks need it, not before, and a child that is forked gets
the old one back: it may be a program that uses select.
"""

import logging
import os
import resource

log = logging.getLogger("pyublk.device")

#: Descriptors that are left when the limit is raised: for a disk, and for whatever else opens some.
RESERVE = 64

#: Disks have numbers from here on (PU_FD_HIGH in `_core/ring.h`), while there are any.
HIGH = 768

_before: tuple[int, int] | None = None


def make_room(number: int) -> None:
    """Raises the soft limit of open files to the hard one, if a disk's descriptor has this number
    and there is little room above, or had to take a low one. Where that is not allowed, opening
    fails in its time."""
    global _before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if HIGH <= number < soft - RESERVE or soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.info("the limit of %d open files stays: %s", soft, error)
        return
    if _before is None:
        os.register_at_fork(after_in_child=_give_back)
    _before = soft, hard
    log.info("the limit of open files is %d from now on, for its disks; it was %d", hard, soft)


def _give_back() -> None:
    global _before
    if _before is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, _before)
        _before = None
