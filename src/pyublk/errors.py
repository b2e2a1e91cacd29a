# SPDX-License-Identifier: MIT
"""What pyublk raises.

::

    Exception
    ├── OSError                 the kernel refused; of the subclass that fits the errno
    └── UblkError
        ├── DeviceClosed        it was not started yet, or was stopped already
        ├── DeviceBusy          another program or device uses it
        ├── DeviceLost          the device or its node went away
        ├── DeviceNotFound      there is no such device (also an OSError, ENODEV)
        ├── ExtraMissing        a package of an extra is not installed (also an ImportError)
        ├── FeatureMissing      the kernel, or the caller's rights, do not offer it
        ├── HandlerTimeout      a target's handler never returned (also a TimeoutError)
        ├── InvalidTarget       this class cannot be served (also a TypeError)
        ├── StaleIO             a request was used after its completion (also a ValueError)
        └── InternalError       a bug in pyublk: please report it

A wrong argument is a ValueError that names argument, value and what is allowed. An OSError names
the command, the device and the likely cause; its notes say where the cause lies and what to do.
"""

import errno
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Self

from pyublk.causes import ADMIN, CALLER, DRIVER, OTHER, usual_cause
from pyublk.uapi import ControlCommand


class UblkError(Exception):
    """The base class of what pyublk raises and is not an OSError."""


class DeviceClosed(UblkError):
    """The object is not open: not started yet, or stopped. Make a new one."""


class DeviceBusy(UblkError):
    """The device is in use, so it was left as it is."""


class DeviceLost(UblkError):
    """The device went away under its server."""


class DeviceNotFound(UblkError, OSError):
    """There is no such device, or not any more; `errno` is ENODEV."""


class ExtraMissing(UblkError, ImportError):
    """A package that only one extra of pyublk needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'pyublk[{extra}]'")


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

    The device is deleted even so. One exception: if they hold every request of a queue, Linux
    before 6.16 keeps it until the process ends.
    """


class InvalidTarget(UblkError, TypeError):
    """A target class that cannot be served as it is."""


class StaleIO(UblkError, ValueError):
    """An `IO` was used after its request had been completed."""


class InternalError(UblkError):
    """A bug in pyublk."""


def described(error: int) -> str:
    """An errno, in words and by its name."""
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
    cause, whose, remedy = usual_cause(None if missing else command, error)
    if detail:
        cause = f"{detail}; {cause}" if error == errno.ETIMEDOUT else detail
    message = f"{_subject(command, device)}: {described(error)}: {cause}"
    kind = DeviceNotFound if cause == usual_cause(None, errno.ENODEV)[0] else OSError
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
        return _refusal(error, f"{_CONTROL_NODE} does not exist: {cause}", ADMIN, remedy)
    if error == errno.EACCES:
        return _refusal(
            error,
            f"{_CONTROL_NODE} is closed to user {os.geteuid()}",
            CALLER,
            "run as root, or have the node's rights changed",
        )
    if error == errno.EPERM:
        return _refusal(
            error,
            f"{_CONTROL_NODE} is forbidden, most likely by the device rules of a container",
            ADMIN,
            "run outside the container, or allow it the device",
        )
    return _refusal(error, f"{_CONTROL_NODE}: {described(error)}", ADMIN, "see `pyublk doctor`")


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
        errno.ENOENT: ("it is missing", ADMIN, "install pyublk anew"),
        errno.EACCES: (
            "it may not be executed here",
            ADMIN,
            "install pyublk where programs may run: not on a file system mounted noexec",
        ),
        errno.ENOEXEC: (
            "it was built for another kind of machine",
            ADMIN,
            "install pyublk anew, on this machine",
        ),
        errno.EPERM: (
            "a filter forbids new processes, most likely that of a container or a service",
            ADMIN,
            "allow clone and execve, or make the first Device or Controller before the filter",
        ),
        errno.EMFILE: (
            "no descriptor is left for it",
            CALLER,
            "close files, or raise RLIMIT_NOFILE (ulimit -n)",
        ),
        errno.EAGAIN: (
            "there are as many processes as this user, or this service, may have",
            ADMIN,
            "raise the limit (RLIMIT_NPROC, pids.max)",
        ),
    }.get(error, (os.strerror(error), ADMIN, "see `pyublk doctor`"))
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
            OTHER,
            "see the kernel's log (dmesg), and `pyublk list`",
            DeviceNotFound,
        )
    if kind == "devtmpfs":
        cause, whose = "/dev is a devtmpfs, and the kernel has made the device", OTHER
        remedy = "see who removes nodes from /dev"
    else:
        whose = ADMIN
        cause = (
            f"the kernel has made the device, but /dev is {kind}, as in a container, and nothing "
            "creates nodes there"
        )
        remedy = OWN_DEV
    return _refusal(errno.ENOENT, f"{path} did not appear: {cause}", whose, remedy)


def not_given_error(path: str) -> OSError:
    """The OSError for a device that was made for a user without rights, to whom nobody gave its
    node."""
    return _refusal(
        errno.EACCES,
        f"the kernel has made the device, but {path} does not belong to user {os.geteuid()}",
        ADMIN,
        "have root run `pyublk service install --users GROUP`, whose rule for udev gives nodes to "
        "their owners, and `pyublk del` for this device",
    )


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
            ADMIN,
            "use Linux 6.8 or newer",
        ),
        errno.ENOMEM: (
            "no memory for an io_uring, or the limit of locked memory is too low",
            ADMIN,
            "raise RLIMIT_MEMLOCK (ulimit -l), or use smaller rings",
        ),
        errno.EINVAL: (
            "this kernel lacks a required io_uring set-up flag, or the sizes are out of range",
            CALLER,
            "pass the flag as `wanted` instead of `required`",
        ),
        errno.EMFILE: (
            "no descriptor is left for an io_uring",
            CALLER,
            "close files, or raise RLIMIT_NOFILE (ulimit -n)",
        ),
    }.get(error, (f"io_uring: {described(error)}", DRIVER, "see the kernel's log (dmesg)"))
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
            ADMIN,
            "run outside the container, or with a profile that allows io_uring_setup",
        )
    remedy = "set it to 0"
    if switch == "1":
        remedy += ", or run with CAP_SYS_ADMIN or in the group kernel.io_uring_group"
    return _refusal(
        errno.EPERM,
        f"io_uring is forbidden: the sysctl kernel.io_uring_disabled is {switch}",
        ADMIN,
        remedy,
    )


def queue_error(error: int, queue: int) -> OSError:
    """The OSError for a queue that could not be opened, fetched or served."""
    if error in (errno.EPERM, errno.ENOSYS):
        return io_uring_error(error)
    cause, whose, remedy = {
        errno.EINVAL: (
            "the kernel refused the queue's number, a tag, or the thread",
            CALLER,
            "use the depth and the queues that the device was granted, and serve a queue on the "
            "thread that made it",
        ),
        errno.EBUSY: (
            "its tags were fetched already",
            CALLER,
            "a queue is fetched once: delete the device and add it again",
        ),
        errno.ENODEV: (
            "the device is gone, or the file is no ublk char device",
            CALLER,
            "open /dev/ublkcN of a device that exists",
        ),
        errno.ENOMEM: (
            "no memory for its ring, descriptors and buffers",
            ADMIN,
            "use a smaller depth or smaller requests",
        ),
        errno.EOPNOTSUPP: (
            "the device wants another data path (batch I/O)",
            CALLER,
            "pass the device's flags to the queue, or add the device without BATCH_IO",
        ),
    }.get(error, ("the kernel ended it", DRIVER, "see the kernel's log (dmesg)"))
    return _refusal(error, f"queue {queue}: {described(error)}: {cause}", whose, remedy)


def negotiation_error(what: str, wished: str, got: str, remedy: str) -> OSError:
    """The OSError for what the kernel silently dropped or lowered."""
    return _refusal(
        errno.EOPNOTSUPP,
        f"{what}: asked for {wished}, the kernel granted {got} without saying so",
        DRIVER,
        remedy,
    )


def caller() -> str:
    """The place outside this package that has called it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pyublk."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown place"
