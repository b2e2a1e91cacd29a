# SPDX-License-Identifier: MIT
"""What pyublk raises.

::

    Exception
    ├── OSError                 the kernel refused; of the subclass that fits the errno
    └── UblkError
        ├── DeviceClosed        you: it was not started yet, or stopped already
        ├── DeviceBusy          somebody else uses it
        ├── DeviceLost          the world: the device or its node went away
        ├── DeviceNotFound      there is no such device (also an OSError, ENODEV)
        ├── FeatureMissing      this kernel, or these rights, lack it
        ├── HandlerTimeout      a target's handler never returned (also a TimeoutError)
        ├── InvalidTarget       this class cannot be served (also a TypeError)
        ├── StaleIO             a request was used after its completion (also a ValueError)
        └── InternalError       our bug: please report it

A wrong argument is a ValueError that names argument, value and what is allowed. An OSError names
the command, the device and the likely cause; its notes say whose doing it was and what to do.
"""

import errno
import os
from pathlib import Path
from typing import Self

from pyublk.uapi import ControlCommand


class UblkError(Exception):
    """The root of what is not an OSError."""


class DeviceClosed(UblkError):
    """The object is not open: not started yet, or stopped. Make a new one."""


class DeviceBusy(UblkError):
    """Somebody uses the device, so it was left as it is."""


class DeviceLost(UblkError):
    """The device went away under its server."""


class DeviceNotFound(UblkError, OSError):
    """There is no such device, or not any more; `errno` is ENODEV."""


class FeatureMissing(UblkError):
    """Something that this kernel, or the caller's rights, do not offer.

    `feature` names it, `needed` says what would offer it, `found` what is here.
    """

    def __init__(self, feature: str, needed: str, found: str) -> None:
        super().__init__(f"{feature} is not available: it needs {needed}, here is {found}")
        self.feature = feature
        self.needed = needed
        self.found = found

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        return type(self), (self.feature, self.needed, self.found)


class HandlerTimeout(UblkError, TimeoutError):
    """Handlers never returned; their stacks are in the notes.

    The device is gone all the same, unless every request of a queue is in their hands on Linux
    before 6.16, which keeps it until the process ends.
    """


class InvalidTarget(UblkError, TypeError):
    """A target class that cannot be served as it is."""


class StaleIO(UblkError, ValueError):
    """An `IO` was used after its request had been completed."""


class InternalError(UblkError):
    """A bug in pyublk."""


_DRIVER = "the driver"
_CALLER = "the caller"
_ADMIN = "this machine's set-up"
_OTHER = "another process"
_SERVER = "the device's server"

#: Likely cause, whose doing, what to do.
_Cause = tuple[str, str, str]

_NOT_NAMED: _Cause = (
    "the device belongs to an unprivileged user, and then each command must name its node",
    _CALLER,
    "look whether its node is there, and yours to open",
)
_NOT_STARTED: _Cause = (
    "there is no such device, or it is not started",
    _CALLER,
    "see `pyublk list` for the devices there are, and their states",
)
_NO_ZONES: _Cause = (
    "this kernel was built without zoned block devices",
    _ADMIN,
    "serve the target without zones, or use a kernel with CONFIG_BLK_DEV_ZONED",
)
_NO_SHARED_MEMORY: _Cause = (
    "the device was added without SHMEM_ZC, or this kernel is older than Linux 7.1",
    _CALLER,
    "add the device with SHMEM_ZC; see `pyublk features`",
)
_HELD_REQUESTS: _Cause = (
    "it waits for requests that the server holds",
    _SERVER,
    "let the server answer, or kill it: that releases the device",
)
_STARTS_ONCE = "delete the device and add it again: a device starts once"

#: By errno, for the commands without an entry of their own.
_GENERAL: dict[int, _Cause] = {
    errno.EPERM: (
        "it needs CAP_SYS_ADMIN, unless the device is an unprivileged one of yours",
        _CALLER,
        "run as root",
    ),
    errno.EACCES: (
        "the device's node is closed to you",
        _ADMIN,
        "run as root, or have the node's owner set by a udev rule",
    ),
    errno.ENODEV: (
        "there is no such device",
        _CALLER,
        "see `pyublk list` for the devices there are",
    ),
    errno.EOPNOTSUPP: (
        "this kernel's driver does not know the command",
        _DRIVER,
        "see `pyublk features`; a newer kernel has it (`pyublk vm` runs one)",
    ),
    errno.EINTR: (
        "the wait was interrupted",
        _CALLER,
        "look at the device's state, then try again",
    ),
    errno.ETIMEDOUT: (
        "the kernel did not answer in time",
        _SERVER,
        "see whether the server still answers its requests; killing it releases the device",
    ),
    errno.ENOMEM: (
        "the kernel has no memory for it",
        _ADMIN,
        "ask for fewer queues, a smaller depth, or smaller requests",
    ),
    errno.EFAULT: (
        "the kernel cannot reach the memory that was passed",
        _CALLER,
        "pass memory that stays mapped until the command ends",
    ),
    errno.EINVAL: ("an argument was refused", _CALLER, "check the arguments"),
    errno.EBUSY: ("the device is in use", _OTHER, "wait for it, or stop its users"),
}

#: By command and errno; rests on drivers/block/ublk_drv.c of Linux 6.12 to 7.3.
_CAUSES: dict[ControlCommand, dict[int, _Cause]] = {
    ControlCommand.GET_FEATURES: {
        errno.ENODEV: (
            "this kernel is older than Linux 6.5 and cannot tell its features",
            _DRIVER,
            "use Linux 6.8 or newer (`pyublk vm` runs one)",
        ),
        errno.EINVAL: (
            "this driver's mask of features is not 8 bytes long",
            _DRIVER,
            "use a newer pyublk",
        ),
    },
    ControlCommand.ADD_DEV: {
        errno.EPERM: (
            "it needs CAP_SYS_ADMIN, unless the device is to be an unprivileged one",
            _CALLER,
            "run as root, or ask for UNPRIVILEGED_DEV",
        ),
        errno.EEXIST: (
            "the id is in use",
            _CALLER,
            "choose another id, or none to get the lowest free; `pyublk list` shows who has it",
        ),
        errno.EINVAL: (
            "the kernel refused queues, depth, or a combination of flags",
            _CALLER,
            "queues and depth are 1 to 4096; see `pyublk features` for what may go together",
        ),
        errno.EACCES: (
            "there are as many unprivileged devices as the driver allows",
            _ADMIN,
            "delete one, or raise the module parameter ublks_max",
        ),
        errno.EINTR: (
            "it was killed while it waited for another device to be added or deleted",
            _OTHER,
            "see `pyublk doctor` for a deletion that hangs",
        ),
        errno.ETIMEDOUT: (
            "it waits for another device to be deleted, and while that hangs none can be added",
            _OTHER,
            "kill the server of the device that is being deleted; see `pyublk doctor`",
        ),
    },
    ControlCommand.DEL_DEV: {
        errno.EINVAL: _NOT_NAMED,
        errno.EINTR: (
            "the wait was interrupted; the deletion goes on without it",
            _CALLER,
            "wait until `pyublk list` no longer shows the device",
        ),
        errno.ETIMEDOUT: (
            "it waits for requests that the server holds, or until nobody has the device's nodes "
            "open or mapped",
            _SERVER,
            "close the char device and its mappings, or kill the server",
        ),
    },
    ControlCommand.DEL_DEV_ASYNC: {
        errno.EINVAL: (
            "an unprivileged device cannot be deleted without waiting",
            _DRIVER,
            "delete it with wait=True",
        ),
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
    ControlCommand.START_DEV: {
        errno.EINVAL: (
            "the parameters were never set, or the pid is not that of the process that opened the "
            "char device",
            _CALLER,
            "set the parameters first, and open the char device in the process that serves",
        ),
        errno.EEXIST: ("the device is live already", _CALLER, _STARTS_ONCE),
        errno.EBUSY: (
            "the device was stopped since its char device was opened",
            _CALLER,
            _STARTS_ONCE,
        ),
        errno.EOPNOTSUPP: _NO_ZONES,
        errno.EINTR: (
            "it was called off while it waited for the server's queues",
            _CALLER,
            "delete the device, and start all its queues the next time",
        ),
        errno.ETIMEDOUT: (
            "it waits until every tag of every queue was fetched",
            _SERVER,
            "start all the queues that the kernel granted, and serve them during the start",
        ),
    },
    ControlCommand.STOP_DEV: {errno.EINVAL: _NOT_NAMED, errno.ETIMEDOUT: _HELD_REQUESTS},
    ControlCommand.TRY_STOP_DEV: {
        errno.EINVAL: _NOT_NAMED,
        errno.ENODEV: _NOT_STARTED,
        errno.EBUSY: (
            "somebody has the block device open (udev does so for a moment)",
            _OTHER,
            "unmount it, or wait and try again",
        ),
        errno.EOPNOTSUPP: (
            "this kernel is older than Linux 7.0, which brought it",
            _DRIVER,
            "make sure that nobody uses the device, then stop it by STOP_DEV",
        ),
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
    ControlCommand.SET_PARAMS: {
        errno.EACCES: (
            "the device is started already",
            _CALLER,
            "set parameters between adding and starting",
        ),
        errno.EINVAL: (
            "the kernel refused a parameter that passed our checks",
            _DRIVER,
            "compare block sizes, request size and device size with what this kernel allows",
        ),
        errno.EOPNOTSUPP: _NO_ZONES,
    },
    ControlCommand.GET_PARAMS: {errno.EINVAL: _NOT_NAMED},
    ControlCommand.GET_DEV_INFO: {errno.EINVAL: _NOT_NAMED},
    ControlCommand.GET_DEV_INFO2: {
        errno.EPERM: (
            "the path is not that of the device's node, or you lack CAP_SYS_ADMIN",
            _CALLER,
            "run as root, where /dev is the kernel's own",
        ),
        errno.EINVAL: ("the path of the device's node is missing", _CALLER, "pass its path"),
        errno.ENOENT: (
            "the device's node is not there",
            _ADMIN,
            "mount devtmpfs on /dev, or wait a moment after adding the device",
        ),
    },
    ControlCommand.GET_QUEUE_AFFINITY: {
        errno.EINVAL: (
            "the device has no such queue, or the machine has more than 1024 CPUs",
            _CALLER,
            "use the number of queues that the device was granted",
        ),
    },
    ControlCommand.START_USER_RECOVERY: {
        errno.EINVAL: (
            "the device was added without USER_RECOVERY",
            _CALLER,
            "delete it and add it again with that flag",
        ),
        errno.EBUSY: (
            "the old server still has the char device open, or the device is not quiesced yet",
            _SERVER,
            "wait for the state QUIESCED or FAIL_IO, then try again",
        ),
    },
    ControlCommand.END_USER_RECOVERY: {
        errno.EINVAL: (
            "the pid is not that of the process that opened the char device, or the device has no "
            "recovery",
            _CALLER,
            "open the char device in the new server and pass its pid",
        ),
        errno.EBUSY: ("the device is not in recovery", _CALLER, "start the recovery first"),
        errno.EINTR: (
            "it was called off while it waited for the new server's queues",
            _CALLER,
            "start the recovery again",
        ),
        errno.ETIMEDOUT: (
            "it waits until the new server has fetched every tag of every queue",
            _SERVER,
            "start as many queues, of the same depth, as the old server had",
        ),
    },
    ControlCommand.UPDATE_SIZE: {
        errno.EINVAL: _NOT_NAMED,
        errno.ENODEV: _NOT_STARTED,
        errno.EOPNOTSUPP: (
            "this kernel is older than Linux 6.16, which brought it",
            _DRIVER,
            "delete the device and add it with the new size (`pyublk vm` runs a newer kernel)",
        ),
    },
    ControlCommand.QUIESCE_DEV: {
        errno.EINVAL: _NOT_NAMED,
        errno.ENODEV: _NOT_STARTED,
        errno.EOPNOTSUPP: (
            "the device was added without QUIESCE, or this kernel is older than Linux 6.16",
            _CALLER,
            "add the device with USER_RECOVERY and QUIESCE",
        ),
        errno.EBUSY: (
            "the server held every tag for all of the timeout",
            _SERVER,
            "try again when it is less busy, or with a longer timeout",
        ),
        errno.EINTR: (
            "the wait for an idle moment was interrupted",
            _CALLER,
            "look at the device's state, then try again",
        ),
    },
    ControlCommand.REG_BUF: {
        errno.EINVAL: (
            "address and length must be multiples of the page size, and the length at most 4 GiB",
            _CALLER,
            "map the memory in whole pages",
        ),
        errno.EEXIST: (
            "a page of it is registered already",
            _CALLER,
            "unregister the other buffer first",
        ),
        errno.EFAULT: (
            "its pages cannot be pinned",
            _CALLER,
            "use shared memory, a memfd or hugetlbfs",
        ),
        errno.ENOMEM: (
            "the pages cannot be locked in memory",
            _ADMIN,
            "register less, or raise RLIMIT_MEMLOCK (ulimit -l)",
        ),
        errno.ENOSPC: (
            "the device's table of buffers is full",
            _CALLER,
            "unregister a buffer first",
        ),
        errno.EOPNOTSUPP: _NO_SHARED_MEMORY,
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
    ControlCommand.UNREG_BUF: {
        errno.EINVAL: (
            "the index is out of range",
            _CALLER,
            "use the index that registering returned",
        ),
        errno.ENOENT: (
            "no buffer is registered under that index",
            _CALLER,
            "use the index that registering returned",
        ),
        errno.EOPNOTSUPP: _NO_SHARED_MEMORY,
        errno.ETIMEDOUT: _HELD_REQUESTS,
    },
}

_UNKNOWN: _Cause = ("no usual cause is known", _DRIVER, "see the kernel's log (dmesg)")


def _described(error: int) -> str:
    return f"{os.strerror(error)} ({errno.errorcode.get(error, error)})"


def _refusal(
    error: int, message: str, whose: str, remedy: str, kind: type[OSError] = OSError
) -> OSError:
    refusal = kind(error, message)
    refusal.add_note(f"Cause: {whose}.")
    refusal.add_note(f"What to do: {remedy}.")
    return refusal


def command_error(
    command: ControlCommand,
    error: int,
    *,
    device: int | None,
    detail: str = "",
    missing: bool = False,
) -> OSError:
    """The OSError for a control command that failed with errno `error`.

    `device` None is a device still to be made. `detail`, where the caller knows better, takes the
    place of the usual cause; after a deadline it comes before it. A passed deadline is a
    TimeoutError, whether the errno says ETIME or ETIMEDOUT. ENODEV is a DeviceNotFound, unless it
    may have another cause, and the device is not known to be `missing`.
    """
    if error == errno.ETIME:
        error = errno.ETIMEDOUT
    own = {} if missing else _CAUSES.get(command, {})
    cause, whose, remedy = own.get(error) or _GENERAL.get(error, _UNKNOWN)
    if detail:
        cause = f"{detail}; {cause}" if error == errno.ETIMEDOUT else detail
    message = f"{_subject(command, device)}: {_described(error)}: {cause}"
    kind = DeviceNotFound if cause == _GENERAL[errno.ENODEV][0] else OSError
    return _refusal(error, message, whose, remedy, kind)


def device_not_found(device: int, others: str = "") -> DeviceNotFound:
    """For a device that is not there; `others` tells which ones are."""
    return DeviceNotFound(errno.ENODEV, f"there is no device {device}{others}")


def _subject(command: ControlCommand, device: int | None) -> str:
    if command is ControlCommand.GET_FEATURES:
        return command.name
    return f"{command.name} on " + ("a new device" if device is None else f"device {device}")


_CONTROL_NODE = "/dev/ublk-control"
_DRIVER_LOADED = Path("/sys/class/misc/ublk-control")
_MODULES = Path("/lib/modules")
_IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def control_missing_error(error: int) -> OSError:
    """The OSError for a control node that cannot be opened with errno `error`."""
    if error in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        cause, remedy = _why_no_driver()
        return _refusal(error, f"{_CONTROL_NODE} does not exist: {cause}", _ADMIN, remedy)
    if error == errno.EACCES:
        return _refusal(
            error,
            f"{_CONTROL_NODE} is closed to user {os.geteuid()}",
            _CALLER,
            "run as root, or have the node's rights changed",
        )
    if error == errno.EPERM:
        return _refusal(
            error,
            f"{_CONTROL_NODE} is forbidden, most likely by the device rules of a container",
            _ADMIN,
            "run outside the container, or allow it the device",
        )
    return _refusal(error, f"{_CONTROL_NODE}: {_described(error)}", _ADMIN, "see `pyublk doctor`")


def _why_no_driver() -> tuple[str, str]:
    """What is missing below the control node, and what to do about it."""
    release = os.uname().release
    if _DRIVER_LOADED.exists():
        return (
            "the ublk driver is loaded, but the node is not in this /dev",
            "run outside the container, or pass the node into it",
        )
    try:
        has_driver = "/ublk_drv.ko" in (_MODULES / release / "modules.dep").read_text()
    except OSError:  # a container, or a kernel without modules
        return (
            f"the ublk driver is not loaded, or this kernel ({release}) has none",
            "try `modprobe ublk_drv`; on a kernel without it, `pyublk vm` runs one that has it",
        )
    if has_driver:
        return "the ublk driver is not loaded", "run `modprobe ublk_drv` as root"
    return (
        f"this kernel ({release}) was built without ublk, or its module is not installed "
        "(Debian 12's own kernel has none)",
        "boot a kernel with CONFIG_BLK_DEV_UBLK, or let `pyublk vm` run one",
    )


def helper_error(error: int, program: str) -> OSError:
    """The OSError for a helper process that could not be started, or asked, with errno `error`."""
    cause, whose, remedy = {
        errno.ENOENT: ("it is missing", _ADMIN, "install pyublk anew"),
        errno.EACCES: (
            "it may not be executed here",
            _ADMIN,
            "install pyublk where programs may run: not on a file system mounted noexec",
        ),
        errno.ENOEXEC: (
            "it is not for this machine",
            _ADMIN,
            "install pyublk anew, on this machine",
        ),
        errno.EPERM: (
            "a filter forbids new processes, most likely that of a container or a service",
            _ADMIN,
            "allow clone and execve, or make the first Device or Controller before the filter",
        ),
        errno.EMFILE: (
            "no descriptor is left for it",
            _CALLER,
            "close files, or raise RLIMIT_NOFILE (ulimit -n)",
        ),
        errno.EAGAIN: (
            "there are as many processes as this user, or this service, may have",
            _ADMIN,
            "raise the limit (RLIMIT_NPROC, pids.max)",
        ),
    }.get(error, (os.strerror(error), _ADMIN, "see `pyublk doctor`"))
    return _refusal(
        error, f"the helper program {program} cannot be started: {cause}", whose, remedy
    )


def forked_error(pid: int) -> DeviceClosed:
    """For what was made in another process, `pid`, from which this one was forked."""
    return DeviceClosed(
        f"this was made in process {pid}, from which this one ({os.getpid()}) was forked: make a "
        "new one here"
    )


def node_missing_error(path: str, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> OSError:
    """The OSError for a node of a device that did not appear."""
    place = "class/ublk-char" if "ublkc" in path else "class/block"
    kind = kind_of_dev(proc)
    if not (sys / place / os.path.basename(path)).exists():
        return _refusal(
            errno.ENODEV,
            f"{path} did not appear: the kernel knows no such device any more",
            _OTHER,
            "see the kernel's log (dmesg), and `pyublk list`",
            DeviceNotFound,
        )
    if kind == "devtmpfs":
        cause, whose = "/dev is a devtmpfs, and the kernel has made the device", _OTHER
        remedy = "see who removes nodes from /dev"
    else:
        whose = _ADMIN
        cause = (
            f"the kernel has made the device, but /dev is {kind}, as in a container, and nobody "
            "puts nodes there"
        )
        remedy = OWN_DEV
    return _refusal(errno.ENOENT, f"{path} did not appear: {cause}", whose, remedy)


#: What to do where /dev is not the kernel's own.
OWN_DEV = "run outside the container, or with the machine's own /dev (`--volume /dev:/dev`)"


def kind_of_dev(proc: Path = Path("/proc")) -> str:
    """What is mounted on /dev: "devtmpfs", or in words what is there instead."""
    found = "part of the root file system"
    for line in (proc / "self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if place.split(" ")[4] == "/dev":  # the last one hides the others
            kind = kind.split(" ")[0]
            found = kind if kind == "devtmpfs" else f"a {kind}"
    return found


def io_uring_error(error: int) -> OSError:
    """The OSError for an io_uring that could not be set up with errno `error`."""
    if error == errno.EPERM:
        return _io_uring_forbidden()
    cause, whose, remedy = {
        errno.ENOSYS: (
            f"this kernel ({os.uname().release}) has no io_uring that is new enough",
            _ADMIN,
            "use Linux 6.8 or newer",
        ),
        errno.ENOMEM: (
            "no memory for an io_uring, or the limit of locked memory is too low",
            _ADMIN,
            "raise RLIMIT_MEMLOCK (ulimit -l), or use smaller rings",
        ),
        errno.EINVAL: (
            "this kernel lacks a required io_uring set-up flag, or the sizes are out of range",
            _CALLER,
            "pass the flag as `wanted` instead of `required`",
        ),
        errno.EMFILE: (
            "no descriptor is left for an io_uring",
            _CALLER,
            "close files, or raise RLIMIT_NOFILE (ulimit -n)",
        ),
    }.get(error, (f"io_uring: {_described(error)}", _DRIVER, "see the kernel's log (dmesg)"))
    return _refusal(error, cause, whose, remedy)


def _io_uring_forbidden() -> OSError:
    try:
        switch = _IO_URING_DISABLED.read_text().strip()
    except OSError:  # Linux before 6.6 has no such switch
        switch = "0"
    if switch == "0":
        return _refusal(
            errno.EPERM,
            "io_uring is forbidden, most likely by the seccomp filter of a container",
            _ADMIN,
            "run outside the container, or with a profile that allows io_uring_setup",
        )
    remedy = "set it to 0"
    if switch == "1":
        remedy += ", or run with CAP_SYS_ADMIN or in the group kernel.io_uring_group"
    return _refusal(
        errno.EPERM,
        f"io_uring is forbidden: the sysctl kernel.io_uring_disabled is {switch}",
        _ADMIN,
        remedy,
    )


def queue_error(error: int, queue: int) -> OSError:
    """The OSError for a queue that could not be opened, fetched or served."""
    if error in (errno.EPERM, errno.ENOSYS):
        return io_uring_error(error)
    cause, whose, remedy = {
        errno.EINVAL: (
            "the kernel refused the queue's number, a tag, or the thread",
            _CALLER,
            "use the depth and the queues that the device was granted, and serve a queue on the "
            "thread that made it",
        ),
        errno.EBUSY: (
            "its tags were fetched already",
            _CALLER,
            "a queue is fetched once: delete the device and add it again",
        ),
        errno.ENODEV: (
            "the device is gone, or the file is no ublk char device",
            _CALLER,
            "open /dev/ublkcN of a device that exists",
        ),
        errno.ENOMEM: (
            "no memory for its ring, descriptors and buffers",
            _ADMIN,
            "use a smaller depth or smaller requests",
        ),
        errno.EOPNOTSUPP: (
            "the device wants another data path (batch I/O)",
            _CALLER,
            "pass the device's flags to the queue, or add the device without BATCH_IO",
        ),
    }.get(error, ("the kernel ended it", _DRIVER, "see the kernel's log (dmesg)"))
    return _refusal(error, f"queue {queue}: {_described(error)}: {cause}", whose, remedy)


def negotiation_error(what: str, wished: str, got: str, remedy: str) -> OSError:
    """The OSError for a wish that the kernel dropped or lowered without a word."""
    return _refusal(
        errno.EOPNOTSUPP,
        f"{what}: asked for {wished}, the kernel granted {got} without saying so",
        _DRIVER,
        remedy,
    )
