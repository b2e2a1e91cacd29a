# SPDX-License-Identifier: MIT
"""Every error's class, message and notes."""

import errno
import os
import pickle
import re
from pathlib import Path

import pytest

from pyublk import causes, errors
from pyublk.uapi import ControlCommand

C = ControlCommand

#: Every command and errno that has a cause of its own: part of the cause, whose doing, remedy.
CAUSES: dict[tuple[ControlCommand, int], tuple[str, str, str]] = {
    (C.GET_FEATURES, errno.ENODEV): ("older than Linux 6.5", "driver", "Linux 6.8 or newer"),
    (C.GET_FEATURES, errno.EINVAL): ("mask of features", "driver", "newer pyublk"),
    (C.ADD_DEV, errno.EPERM): ("CAP_SYS_ADMIN", "caller", "run as root, or ask for UNPRIVILEGED"),
    (C.ADD_DEV, errno.EEXIST): ("the id is in use", "caller", "choose another id, or none"),
    (C.ADD_DEV, errno.EINVAL): ("queues, depth, or a combination", "caller", "1 to 4096"),
    (C.ADD_DEV, errno.EACCES): ("as many unprivileged devices", "set-up", "ublks_max"),
    (C.ADD_DEV, errno.EINTR): ("killed while it waited", "another process", "pyublk doctor"),
    (C.ADD_DEV, errno.ETIMEDOUT): (
        "another device to be deleted",
        "another process",
        "kill the server of the device that is being deleted",
    ),
    (C.DEL_DEV, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.DEL_DEV, errno.EINTR): ("the deletion goes on", "caller", "no longer shows the device"),
    (C.DEL_DEV, errno.ETIMEDOUT): ("nodes open or mapped", "server", "close the char device"),
    (C.DEL_DEV_ASYNC, errno.EINVAL): ("without waiting", "driver", "wait=True"),
    (C.DEL_DEV_ASYNC, errno.ETIMEDOUT): ("the server holds", "server", "or kill it"),
    (C.START_DEV, errno.EINVAL): ("parameters were never set", "caller", "process that serves"),
    (C.START_DEV, errno.EEXIST): ("live already", "caller", "a device starts once"),
    (C.START_DEV, errno.EBUSY): ("stopped since", "caller", "a device starts once"),
    (C.START_DEV, errno.EOPNOTSUPP): ("without zoned", "set-up", "CONFIG_BLK_DEV_ZONED"),
    (C.START_DEV, errno.EINTR): ("was interrupted", "caller", "start all its queues"),
    (C.START_DEV, errno.ETIMEDOUT): ("every tag of every queue", "server", "that the kernel gran"),
    (C.STOP_DEV, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.STOP_DEV, errno.ETIMEDOUT): ("the server holds", "server", "or kill it"),
    (C.TRY_STOP_DEV, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.TRY_STOP_DEV, errno.ENODEV): ("not started", "caller", "pyublk list"),
    (C.TRY_STOP_DEV, errno.EBUSY): ("has the block device open", "another process", "unmount it"),
    (C.TRY_STOP_DEV, errno.EOPNOTSUPP): ("older than Linux 7.0", "driver", "by STOP_DEV"),
    (C.TRY_STOP_DEV, errno.ETIMEDOUT): ("the server holds", "server", "or kill it"),
    (C.SET_PARAMS, errno.EACCES): ("started already", "caller", "between adding and starting"),
    (C.SET_PARAMS, errno.EINVAL): ("passed our checks", "driver", "compare block sizes"),
    (C.SET_PARAMS, errno.EOPNOTSUPP): ("without zoned", "set-up", "CONFIG_BLK_DEV_ZONED"),
    (C.GET_PARAMS, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.GET_DEV_INFO, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.GET_DEV_INFO2, errno.EPERM): ("not that of the device's node", "caller", "run as root"),
    (C.GET_DEV_INFO2, errno.EINVAL): ("node is missing", "caller", "pass its path"),
    (C.GET_DEV_INFO2, errno.ENOENT): ("node is not there", "set-up", "mount devtmpfs"),
    (C.GET_QUEUE_AFFINITY, errno.EINVAL): ("no such queue", "caller", "number of queues"),
    (C.START_USER_RECOVERY, errno.EINVAL): ("without USER_RECOVERY", "caller", "with that flag"),
    (C.START_USER_RECOVERY, errno.EBUSY): ("old server still", "server", "QUIESCED or FAIL_IO"),
    (C.END_USER_RECOVERY, errno.EINVAL): ("the pid is not", "caller", "pass its pid"),
    (C.END_USER_RECOVERY, errno.EBUSY): ("not in recovery", "caller", "start the recovery first"),
    (C.END_USER_RECOVERY, errno.EINTR): ("was interrupted", "caller", "start the recovery again"),
    (C.END_USER_RECOVERY, errno.ETIMEDOUT): ("new server has fetched", "server", "same depth"),
    (C.UPDATE_SIZE, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.UPDATE_SIZE, errno.ENODEV): ("not started", "caller", "pyublk list"),
    (C.UPDATE_SIZE, errno.EOPNOTSUPP): ("older than Linux 6.16", "driver", "with the new size"),
    (C.QUIESCE_DEV, errno.EINVAL): ("unprivileged user", "caller", "and yours to open"),
    (C.QUIESCE_DEV, errno.ENODEV): ("not started", "caller", "pyublk list"),
    (C.QUIESCE_DEV, errno.EOPNOTSUPP): ("without QUIESCE", "caller", "USER_RECOVERY and QUIESCE"),
    (C.QUIESCE_DEV, errno.EBUSY): ("still had requests", "server", "has answered them"),
    (C.QUIESCE_DEV, errno.EINTR): ("idle moment", "caller", "then try again"),
    (C.REG_BUF, errno.EINVAL): ("multiples of the page size", "caller", "whole pages"),
    (C.REG_BUF, errno.EEXIST): ("registered already", "caller", "unregister the other"),
    (C.REG_BUF, errno.EFAULT): ("cannot be pinned", "caller", "a memfd"),
    (C.REG_BUF, errno.ENOMEM): ("cannot be locked", "set-up", "RLIMIT_MEMLOCK"),
    (C.REG_BUF, errno.ENOSPC): ("table of buffers is full", "caller", "unregister a buffer"),
    (C.REG_BUF, errno.EOPNOTSUPP): ("without SHMEM_ZC", "caller", "add the device with SHMEM_ZC"),
    (C.REG_BUF, errno.ETIMEDOUT): ("the server holds", "server", "or kill it"),
    (C.UNREG_BUF, errno.EINVAL): ("out of range", "caller", "registering returned"),
    (C.UNREG_BUF, errno.ENOENT): ("no buffer is registered", "caller", "registering returned"),
    (C.UNREG_BUF, errno.EOPNOTSUPP): ("without SHMEM_ZC", "caller", "add the device with SHMEM_ZC"),
    (C.UNREG_BUF, errno.ETIMEDOUT): ("the server holds", "server", "or kill it"),
}

#: What holds for every command without a cause of its own.
GENERAL: dict[int, tuple[str, str, str]] = {
    errno.EPERM: ("CAP_SYS_ADMIN, unless the device is", "caller", "run as root"),
    errno.EACCES: ("node is closed to you", "set-up", "run as root"),
    errno.ENODEV: ("no such device", "caller", "pyublk list"),
    errno.EOPNOTSUPP: ("does not know the command", "driver", "pyublk features"),
    errno.EINTR: ("interrupted", "caller", "try again"),
    errno.ETIMEDOUT: ("did not answer in time", "server", "killing it releases"),
    errno.ENOMEM: ("no memory", "set-up", "fewer queues"),
    errno.EFAULT: ("cannot reach the memory", "caller", "stays mapped"),
    errno.EINVAL: ("an argument was refused", "caller", "check the arguments"),
    errno.EBUSY: ("in use", "another process", "stop its users"),
    errno.EIO: ("no usual cause is known", "driver", "dmesg"),
}

#: The class that an `except` clause names.
CLASSES = {
    errno.EPERM: PermissionError,
    errno.EACCES: PermissionError,
    errno.EEXIST: FileExistsError,
    errno.ENOENT: FileNotFoundError,
    errno.EINTR: InterruptedError,
    errno.ETIMEDOUT: TimeoutError,
}


def assert_says(error: OSError, cause: str, whose: str, remedy: str) -> None:
    assert cause in str(error)
    cause, what_to_do = error.__notes__
    assert re.fullmatch(r"Cause: [^.]+\.", cause)
    assert whose in cause
    assert re.fullmatch(r"What to do: .+[^.]\.", what_to_do)
    assert remedy in what_to_do


@pytest.mark.parametrize(
    ("command", "number"), CAUSES, ids=[f"{c.name}-{errno.errorcode[e]}" for c, e in CAUSES]
)
def test_a_refusal_with_a_cause_of_its_own(command: ControlCommand, number: int) -> None:
    error = errors.command_error(command, number, device=3)
    assert not isinstance(error, errors.DeviceNotFound)
    where = "" if command is C.GET_FEATURES else " on device 3"
    name = errno.errorcode[number]
    assert str(error).startswith(
        f"[Errno {number}] {command.name}{where}: {os.strerror(number)} ({name}): "
    )
    assert error.errno == number
    assert type(error) is CLASSES.get(number, OSError)
    assert_says(error, *CAUSES[command, number])


def test_every_cause_is_read_by_a_test() -> None:
    written = {
        (command, number) for command, numbers in causes._CAUSES.items() for number in numbers
    }
    assert written == set(CAUSES)
    assert set(causes._GENERAL) == set(GENERAL) - {errno.EIO}


@pytest.mark.parametrize("command", C)
def test_a_refusal_of_any_command_has_a_cause(command: ControlCommand) -> None:
    for number, general in GENERAL.items():
        error = errors.command_error(command, number, device=3)
        assert error.errno == number
        assert f"({errno.errorcode[number]}): " in str(error)
        if (command, number) not in CAUSES:
            assert_says(error, *general)


def test_the_whole_of_one_refusal() -> None:
    error = errors.command_error(C.START_DEV, errno.EINVAL, device=3)
    assert str(error) == (
        "[Errno 22] START_DEV on device 3: Invalid argument (EINVAL): the parameters were never "
        "set, or the pid is not that of the process that opened the char device"
    )
    assert error.__notes__ == [
        "Cause: the caller.",
        "What to do: set the parameters first, and open the char device in the process that "
        "serves.",
    ]


def test_a_device_that_is_not_there() -> None:
    error = errors.command_error(C.STOP_DEV, errno.ENODEV, device=3)
    assert isinstance(error, errors.DeviceNotFound)
    assert error.errno == errno.ENODEV
    error = errors.command_error(C.QUIESCE_DEV, errno.ENODEV, device=3)
    assert type(error) is OSError
    error = errors.command_error(C.QUIESCE_DEV, errno.ENODEV, device=3, missing=True)
    assert isinstance(error, errors.DeviceNotFound)
    assert "QUIESCE_DEV on device 3: No such device (ENODEV): there is no such device" in str(error)


def test_a_device_that_is_still_to_be_made() -> None:
    error = errors.command_error(C.ADD_DEV, errno.EPERM, device=None)
    assert str(error).startswith("[Errno 1] ADD_DEV on a new device: Operation not permitted")


def test_a_caller_that_knows_better_gives_the_cause() -> None:
    error = errors.command_error(C.UPDATE_SIZE, errno.ENODEV, device=3, detail="it is DEAD")
    assert str(error) == "[Errno 19] UPDATE_SIZE on device 3: No such device (ENODEV): it is DEAD"


@pytest.mark.parametrize("number", [errno.ETIME, errno.ETIMEDOUT])
def test_a_passed_deadline_is_a_timeout_error(number: int) -> None:
    error = errors.command_error(C.STOP_DEV, number, device=3, detail="not answered within 2 s")
    assert isinstance(error, TimeoutError)
    assert error.errno == errno.ETIMEDOUT
    assert str(error).endswith(
        "(ETIMEDOUT): not answered within 2 s; it waits for requests that the server holds"
    )


def test_an_errno_without_a_name() -> None:
    error = errors.command_error(C.STOP_DEV, 4321, device=3)
    assert "Unknown error 4321 (4321): no usual cause is known" in str(error)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in place of those that tell what is missing; by default there are none."""
    monkeypatch.setattr(errors, "_DRIVER_LOADED", tmp_path / "ublk-control")
    monkeypatch.setattr(errors, "_MODULES", tmp_path)
    monkeypatch.setattr(errors, "_IO_URING_DISABLED", tmp_path / "io_uring_disabled")
    return tmp_path


def install_modules(machine: Path, text: str) -> None:
    folder = machine / os.uname().release
    folder.mkdir()
    (folder / "modules.dep").write_text(text)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_no_control_node_and_no_telling_why(machine: Path, number: int) -> None:
    error = errors.control_missing_error(number)
    assert error.errno == number
    assert_says(
        error,
        f"/dev/ublk-control does not exist: the ublk driver is not loaded, or this kernel "
        f"({os.uname().release}) has none",
        "set-up",
        "try `modprobe ublk_drv`; on a kernel without it, `pyublk vm` runs one",
    )


def test_the_driver_is_there_but_not_loaded(machine: Path) -> None:
    install_modules(machine, "kernel/drivers/block/ublk_drv.ko.xz:\n")
    error = errors.control_missing_error(errno.ENOENT)
    assert isinstance(error, FileNotFoundError)
    assert_says(error, "the ublk driver is not loaded", "set-up", "run `modprobe ublk_drv` as root")


def test_the_kernel_was_built_without_the_driver(machine: Path) -> None:
    install_modules(machine, "kernel/drivers/block/loop.ko.xz:\n")
    error = errors.control_missing_error(errno.ENOENT)
    assert_says(
        error,
        f"this kernel ({os.uname().release}) was built without ublk, or its module is not "
        "installed (Debian 12's own kernel has none)",
        "set-up",
        "boot a kernel with CONFIG_BLK_DEV_UBLK, or let `pyublk vm` run one",
    )


def test_the_driver_is_loaded_but_the_node_is_elsewhere(machine: Path) -> None:
    (machine / "ublk-control").mkdir()
    error = errors.control_missing_error(errno.ENOENT)
    assert_says(error, "the node is not in this /dev", "set-up", "pass the node into it")


@pytest.mark.parametrize(
    ("number", "cause", "whose", "remedy"),
    [
        (errno.EACCES, f"is closed to user {os.geteuid()}", "caller", "run as root"),
        (errno.EPERM, "forbidden, most likely by the device rules", "set-up", "outside the cont"),
        (errno.EMFILE, "Too many open files (EMFILE)", "set-up", "pyublk doctor"),
    ],
)
def test_a_control_node_that_cannot_be_opened(
    number: int, cause: str, whose: str, remedy: str
) -> None:
    error = errors.control_missing_error(number)
    assert error.errno == number
    assert_says(error, cause, whose, remedy)
    assert "/dev/ublk-control" in str(error)


@pytest.mark.parametrize(
    ("switch", "cause", "remedy"),
    [
        ("2\n", "the sysctl kernel.io_uring_disabled is 2", "set it to 0."),
        ("1\n", "the sysctl kernel.io_uring_disabled is 1", "or in the group kernel.io_uring_gr"),
        ("0\n", "seccomp filter of a container", "a profile that allows io_uring_setup"),
        (None, "seccomp filter of a container", "run outside the container"),
    ],
)
def test_io_uring_is_forbidden(machine: Path, switch: str | None, cause: str, remedy: str) -> None:
    if switch is not None:
        (machine / "io_uring_disabled").write_text(switch)
    error = errors.io_uring_error(errno.EPERM)
    assert isinstance(error, PermissionError)
    assert str(error).startswith("[Errno 1] io_uring is forbidden")
    assert_says(error, cause, "set-up", remedy)


@pytest.mark.parametrize(
    ("number", "cause", "whose", "remedy"),
    [
        (errno.ENOSYS, f"({os.uname().release}) has no io_uring", "set-up", "Linux 6.8"),
        (errno.ENOMEM, "the limit of locked memory is too low", "set-up", "ulimit -l"),
        (errno.EINVAL, "lacks a required io_uring set-up flag", "caller", "`wanted`"),
        (errno.EMFILE, "no descriptor is left", "caller", "ulimit -n"),
        (errno.EIO, "io_uring: Input/output error (EIO)", "driver", "dmesg"),
    ],
)
def test_io_uring_that_cannot_be_set_up(number: int, cause: str, whose: str, remedy: str) -> None:
    error = errors.io_uring_error(number)
    assert error.errno == number
    assert_says(error, cause, whose, remedy)


@pytest.mark.parametrize(
    ("number", "cause", "whose", "remedy"),
    [
        (errno.EINVAL, "the queue's number, a tag, or the thread", "caller", "the thread that"),
        (errno.EBUSY, "fetched already", "caller", "delete the device and add it again"),
        (errno.ENODEV, "no ublk char device", "caller", "open /dev/ublkcN"),
        (errno.ENOMEM, "ring, descriptors and buffers", "set-up", "a smaller depth"),
        (errno.EOPNOTSUPP, "another data path (batch I/O)", "caller", "without BATCH_IO"),
        (errno.EIO, "the kernel ended it", "driver", "dmesg"),
    ],
)
def test_a_queue_that_fails(number: int, cause: str, whose: str, remedy: str) -> None:
    error = errors.queue_error(number, 2)
    assert error.errno == number
    assert str(error).startswith(
        f"[Errno {number}] queue 2: {os.strerror(number)} ({errno.errorcode[number]}): "
    )
    assert_says(error, cause, whose, remedy)


def test_a_queue_without_io_uring() -> None:
    assert "has no io_uring" in str(errors.queue_error(errno.ENOSYS, 2))
    assert "io_uring is forbidden" in str(errors.queue_error(errno.EPERM, 2))


def test_what_the_kernel_dropped_silently() -> None:
    error = errors.negotiation_error("queues of device 3", "8", "2", "ask for at most 2")
    assert error.errno == errno.EOPNOTSUPP
    assert_says(
        error,
        "queues of device 3: asked for 8, the kernel granted 2 without saying so",
        "driver",
        "ask for at most 2",
    )


def test_the_tree() -> None:
    own = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.UblkError)
    }
    assert set(own) == {
        "UblkError",
        "DeviceClosed",
        "DeviceBusy",
        "DeviceLost",
        "DeviceNotFound",
        "ExtraMissing",
        "FeatureMissing",
        "HandlerTimeout",
        "InvalidTarget",
        "StaleIO",
        "InternalError",
    }
    assert all(f"── {name}" in (errors.__doc__ or "") for name in own)
    assert all(value.__doc__ for value in own.values())
    assert issubclass(errors.HandlerTimeout, TimeoutError)
    assert issubclass(errors.InvalidTarget, TypeError)
    assert issubclass(errors.StaleIO, ValueError)
    kernel_like = [name for name, value in own.items() if issubclass(value, OSError)]
    assert kernel_like == ["DeviceNotFound", "HandlerTimeout"]


def test_a_missing_feature_keeps_its_parts() -> None:
    error = errors.FeatureMissing("min_wait", "Linux 6.12", "an older kernel")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "min_wait is not available: it needs Linux 6.12, here is an older kernel"
    assert (again.feature, again.needed, again.found) == ("min_wait", "Linux 6.12", error.found)


@pytest.mark.parametrize(
    ("dev", "known", "words", "remedy"),
    [
        ("tmpfs", True, "/dev is a tmpfs, as in a container", "--volume /dev:/dev"),
        (None, True, "/dev is part of the root file system, as in a container", "--volume"),
        ("devtmpfs", True, "/dev is a devtmpfs", "who removes nodes"),
        ("tmpfs", False, "the kernel knows no such device any more", "dmesg"),
    ],
)
@pytest.mark.parametrize("node", ["ublkc3", "ublkb3"])
def test_a_node_that_does_not_appear(
    tmp_path: Path, node: str, dev: str | None, known: bool, words: str, remedy: str
) -> None:
    (tmp_path / "self").mkdir()
    mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    mounts += f"23 22 0:5 / /dev rw - {dev} none rw\n" if dev else ""
    (tmp_path / "self/mountinfo").write_text(mounts)
    place = tmp_path / "class" / ("ublk-char" if "c" in node else "block") / node
    if known:
        place.mkdir(parents=True)
    error = errors.node_missing_error(f"/dev/{node}", tmp_path, tmp_path)
    assert isinstance(error, FileNotFoundError if known else errors.DeviceNotFound)
    assert str(error.strerror).startswith(f"/dev/{node} did not appear: ")
    assert words in str(error)
    assert remedy in error.__notes__[1]
