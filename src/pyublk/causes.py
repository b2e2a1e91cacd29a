# SPDX-License-Identifier: MIT
"""Why the kernel refuses a control command: the likely cause, where it lies, what to do."""

import errno

from pyublk.uapi import ControlCommand

DRIVER = "the driver"
CALLER = "the caller"
ADMIN = "this machine's set-up"
OTHER = "another process"
SERVER = "the device's server"

#: Likely cause, where it lies, what to do.
Cause = tuple[str, str, str]

_NOT_NAMED: Cause = (
    "the device belongs to an unprivileged user, and then each command must name its node",
    CALLER,
    "look whether its node is there, and yours to open",
)
_NOT_STARTED: Cause = (
    "there is no such device, or it is not started",
    CALLER,
    "see `pyublk list` for the devices there are, and their states",
)
_NO_ZONES: Cause = (
    "this kernel was built without zoned block devices",
    ADMIN,
    "serve the target without zones, or use a kernel with CONFIG_BLK_DEV_ZONED",
)
_NO_SHARED_MEMORY: Cause = (
    "the device was added without SHMEM_ZC, or this kernel is older than Linux 7.1",
    CALLER,
    "add the device with SHMEM_ZC; see `pyublk features`",
)
_HELD_REQUESTS: Cause = (
    "it waits for requests that the server holds",
    SERVER,
    "let the server answer, or kill it: that releases the device",
)
_STARTS_ONCE = "delete the device and add it again: a device starts once"

#: By errno, for the commands without an entry of their own.
_GENERAL: dict[int, Cause] = {
    errno.EPERM: (
        "it needs CAP_SYS_ADMIN, unless the device is an unprivileged one of yours",
        CALLER,
        "run as root",
    ),
    errno.EACCES: (
        "the device's node is closed to you",
        ADMIN,
        "run as root, or have the node's owner set by a udev rule",
    ),
    errno.ENODEV: (
        "there is no such device",
        CALLER,
        "see `pyublk list` for the devices there are",
    ),
    errno.EOPNOTSUPP: (
        "this kernel's driver does not know the command",
        DRIVER,
        "see `pyublk features`; a newer kernel has it (`pyublk vm` runs one)",
    ),
    errno.EINTR: (
        "the wait was interrupted",
        CALLER,
        "look at the device's state, then try again",
    ),
    errno.ETIMEDOUT: (
        "the kernel did not answer in time",
        SERVER,
        "see whether the server still answers its requests; killing it releases the device",
    ),
    errno.ENOMEM: (
        "the kernel has no memory for it",
        ADMIN,
        "ask for fewer queues, a smaller depth, or smaller requests",
    ),
    errno.EFAULT: (
        "the kernel cannot reach the memory that was passed",
        CALLER,
        "pass memory that stays mapped until the command ends",
    ),
    errno.EINVAL: ("an argument was refused", CALLER, "check the arguments"),
    errno.EBUSY: ("the device is in use", OTHER, "wait for it, or stop its users"),
}

#: By command and errno; rests on drivers/block/ublk_drv.c of Linux 6.12 to 7.3.
_CAUSES: dict[ControlCommand, dict[int, Cause]] = {
    ControlCommand.GET_FEATURES: {
        errno.ENODEV: (
            "this kernel is older than Linux 6.5 and cannot tell its features",
            DRIVER,
            "use Linux 6.8 or newer (`pyublk vm` runs one)",
        ),
        errno.EINVAL: (
            "this driver's mask of features is not 8 bytes long",
            DRIVER,
            "use a newer pyublk",
        ),
    },
    ControlCommand.ADD_DEV: {
        errno.EPERM: (
            "it needs CAP_SYS_ADMIN, unless the device is to be an unprivileged one",
            CALLER,
            "run as root, or ask for UNPRIVILEGED_DEV",
        ),
        errno.EEXIST: (
            "the id is in use",
            CALLER,
            "choose another id, or none to get the lowest free; `pyublk list` shows who has it",
        ),
        errno.EINVAL: (
            "the kernel refused queues, depth, or a combination of flags",
            CALLER,
            "queues and depth are 1 to 4096; see `pyublk features` for what may go together",
        ),
        errno.EACCES: (
            "there are as many unprivileged devices as the driver allows",
            ADMIN,
            "delete one, or raise the module parameter ublks_max",
        ),
        errno.EINTR: (
            "it was killed while it waited for another device to be added or deleted",
            OTHER,
            "see `pyublk doctor` for a deletion that hangs",
        ),
        errno.ETIMEDOUT: (
            "it waits for another device to be deleted, and while that hangs none can be added",
            OTHER,
            "kill the server of the device that is being deleted; see `pyublk doctor`",
        ),
    },
    ControlCommand.DEL_DEV: {
        errno.EINVAL: _NOT_NAMED,
        errno.EINTR: (
            "the wait was interrupted; the deletion goes on without it",
            CALLER,
            "wait until `pyublk list` no longer shows the device",
        ),
        errno.ETIMEDOUT: (
            "it waits for requests that the server holds, or until nobody has the device's nodes "
            "open or mapped",
            SERVER,
            "close the char device and its mappings, or kill the server",
        ),
    },
    ControlCommand.DEL_DEV_ASYNC: {
        errno.EINVAL: (
            "an unprivileged device cannot be deleted without waiting",
            DRIVER,
            "delete it with wait=True",
        ),
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
    ControlCommand.START_DEV: {
        errno.EINVAL: (
            "the parameters were never set, or the pid is not that of the process that opened the "
            "char device",
            CALLER,
            "set the parameters first, and open the char device in the process that serves",
        ),
        errno.EEXIST: ("the device is live already", CALLER, _STARTS_ONCE),
        errno.EBUSY: (
            "the device was stopped since its char device was opened",
            CALLER,
            _STARTS_ONCE,
        ),
        errno.EOPNOTSUPP: _NO_ZONES,
        errno.EINTR: (
            "it was interrupted while it waited for the server's queues",
            CALLER,
            "delete the device, and start all its queues the next time",
        ),
        errno.ETIMEDOUT: (
            "it waits until every tag of every queue was fetched",
            SERVER,
            "start all the queues that the kernel granted, and serve them during the start",
        ),
    },
    ControlCommand.STOP_DEV: {errno.EINVAL: _NOT_NAMED, errno.ETIMEDOUT: _HELD_REQUESTS},
    ControlCommand.TRY_STOP_DEV: {
        errno.EINVAL: _NOT_NAMED,
        errno.ENODEV: _NOT_STARTED,
        errno.EBUSY: (
            "somebody has the block device open (udev does so for a moment)",
            OTHER,
            "unmount it, or wait and try again",
        ),
        errno.EOPNOTSUPP: (
            "this kernel is older than Linux 7.0, which introduced it",
            DRIVER,
            "make sure that nobody uses the device, then stop it by STOP_DEV",
        ),
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
    ControlCommand.SET_PARAMS: {
        errno.EACCES: (
            "the device is started already",
            CALLER,
            "set parameters between adding and starting",
        ),
        errno.EINVAL: (
            "the kernel refused a parameter that passed our checks",
            DRIVER,
            "compare block sizes, request size and device size with what this kernel allows",
        ),
        errno.EOPNOTSUPP: _NO_ZONES,
    },
    ControlCommand.GET_PARAMS: {errno.EINVAL: _NOT_NAMED},
    ControlCommand.GET_DEV_INFO: {errno.EINVAL: _NOT_NAMED},
    ControlCommand.GET_DEV_INFO2: {
        errno.EPERM: (
            "the path is not that of the device's node, or you lack CAP_SYS_ADMIN",
            CALLER,
            "run as root, where /dev is the kernel's own",
        ),
        errno.EINVAL: ("the path of the device's node is missing", CALLER, "pass its path"),
        errno.ENOENT: (
            "the device's node is not there",
            ADMIN,
            "mount devtmpfs on /dev, or wait a moment after adding the device",
        ),
    },
    ControlCommand.GET_QUEUE_AFFINITY: {
        errno.EINVAL: (
            "the device has no such queue, or the machine has more than 1024 CPUs",
            CALLER,
            "use the number of queues that the device was granted",
        ),
    },
    ControlCommand.START_USER_RECOVERY: {
        errno.EINVAL: (
            "the device was added without USER_RECOVERY",
            CALLER,
            "delete it and add it again with that flag",
        ),
        errno.EBUSY: (
            "the old server still has the char device open, or the device is not quiesced yet",
            SERVER,
            "wait for the state QUIESCED or FAIL_IO, then try again",
        ),
    },
    ControlCommand.END_USER_RECOVERY: {
        errno.EINVAL: (
            "the pid is not that of the process that opened the char device, or the device has no "
            "recovery",
            CALLER,
            "open the char device in the new server and pass its pid",
        ),
        errno.EBUSY: ("the device is not in recovery", CALLER, "start the recovery first"),
        errno.EINTR: (
            "it was interrupted while it waited for the new server's queues",
            CALLER,
            "start the recovery again",
        ),
        errno.ETIMEDOUT: (
            "it waits until the new server has fetched every tag of every queue",
            SERVER,
            "start as many queues, of the same depth, as the old server had",
        ),
    },
    ControlCommand.UPDATE_SIZE: {
        errno.EINVAL: _NOT_NAMED,
        errno.ENODEV: _NOT_STARTED,
        errno.EOPNOTSUPP: (
            "this kernel is older than Linux 6.16, which introduced it",
            DRIVER,
            "delete the device and add it with the new size (`pyublk vm` runs a newer kernel)",
        ),
    },
    ControlCommand.QUIESCE_DEV: {
        errno.EINVAL: _NOT_NAMED,
        errno.ENODEV: _NOT_STARTED,
        errno.EOPNOTSUPP: (
            "the device was added without QUIESCE, or this kernel is older than Linux 6.16",
            CALLER,
            "add the device with USER_RECOVERY and QUIESCE",
        ),
        errno.EBUSY: (
            "the server still had requests when the time was over",
            SERVER,
            "quiesce again when it has answered them: until then new requests wait",
        ),
        errno.EINTR: (
            "the wait for an idle moment was interrupted",
            CALLER,
            "look at the device's state, then try again",
        ),
    },
    ControlCommand.REG_BUF: {
        errno.EINVAL: (
            "address and length must be multiples of the page size, and the length at most 4 GiB",
            CALLER,
            "map the memory in whole pages",
        ),
        errno.EEXIST: (
            "a page of it is registered already",
            CALLER,
            "unregister the other buffer first",
        ),
        errno.EFAULT: (
            "its pages cannot be pinned",
            CALLER,
            "use shared memory, a memfd or hugetlbfs",
        ),
        errno.ENOMEM: (
            "the pages cannot be locked in memory",
            ADMIN,
            "register less, or raise RLIMIT_MEMLOCK (ulimit -l)",
        ),
        errno.ENOSPC: (
            "the device's table of buffers is full",
            CALLER,
            "unregister a buffer first",
        ),
        errno.EOPNOTSUPP: _NO_SHARED_MEMORY,
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
    ControlCommand.UNREG_BUF: {
        errno.EINVAL: (
            "the index is out of range",
            CALLER,
            "use the index that registering returned",
        ),
        errno.ENOENT: (
            "no buffer is registered under that index",
            CALLER,
            "use the index that registering returned",
        ),
        errno.EOPNOTSUPP: _NO_SHARED_MEMORY,
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
}

_UNKNOWN: Cause = ("no usual cause is known", DRIVER, "see the kernel's log (dmesg)")


def usual_cause(command: ControlCommand | None, error: int) -> Cause:
    """Why the kernel answers this command so, or, for None, any command."""
    own = {} if command is None else _CAUSES.get(command, {})
    return own.get(error) or _GENERAL.get(error, _UNKNOWN)
