# SPDX-License-Identifier: MIT
"""Stopping and deleting disks of whatever server, with their data safe and their users asked."""

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyublk import errors
from pyublk.control import Controller, DeviceInfo
from pyublk.service.processes import Process, start_time
from pyublk.service.records import Record
from pyublk.service.usage import partitions, uses
from pyublk.uapi import DeviceStatus

#: linux/fs.h: writes back the page cache of a block device and syncs the file system on it.
BLKFLSBUF = 0x1261

#: Seconds that a guardian, or a server that has ended, gets to delete the device.
_DELETION = 10.0
#: Seconds after its making in which a device that is DEAD may just be starting.
_STARTING = 3.0


def refuse_if_used(device: DeviceInfo) -> None:
    """Raises DeviceBusy that names every use of the disk."""
    if found := uses(f"ublkb{device.id}"):
        raise errors.DeviceBusy("; ".join(str(use) for use in found))


def stop(
    controller: Controller, device: DeviceInfo, *, timeout: float = 30.0, force: bool = False
) -> None:
    """Flushes a disk and stops it; a disk whose server is ours is deleted as well.

    `timeout` is in seconds without progress. A server started by `pyublk add` is asked to end, and
    killed after `timeout`; then, and when it ended with an error, the error raised says so: the
    disk is gone all the same. The disk of any other server is stopped through the driver.

    Unless `force`, raises DeviceBusy for a disk in use or one that waits for a new server, and
    OSError or TimeoutError for one that cannot be flushed: the disk is left as it is.
    """
    device = _once_started(controller, device)
    if not force:
        refuse_if_used(device)
        if device.status in (DeviceStatus.QUIESCED, DeviceStatus.FAIL_IO):
            # Nobody would answer a flush.
            raise errors.DeviceBusy(
                f"{device.path} waits for a new server: stopping it now loses what was not written"
            )
    tolerated = (OSError,) if force else ()
    record = Record.of(device)
    server = record.server.open() if record is not None else None
    if record is not None and server is not None:
        # That this server hangs is dealt with at its end, and it tells where.
        with server:
            with suppress(TimeoutError, *tolerated):
                _flush(device, timeout)
            _end_server(controller, device, record, server, timeout)
        return
    with suppress(*tolerated):
        _flush(device, timeout)
    if has_server(device) or not device.ours:
        if device.status is not DeviceStatus.DEAD:  # else there is nothing to stop
            with unless_gone():
                controller.stop(device.id, deadline=timeout)
        return
    _delete(controller, device, timeout)
    if record is not None:
        record.remove()
        if record.log is not None:  # of a server that is gone
            record.log.unlink(missing_ok=True)


def delete(
    controller: Controller, device: DeviceInfo, *, timeout: float = 30.0, force: bool = False
) -> None:
    """Stops a disk as `stop` does, then deletes it whoever made it; an orphan too."""
    stop(controller, device, timeout=timeout, force=force)
    _delete(controller, device, timeout)


@contextmanager
def unless_gone() -> Iterator[None]:
    """Takes it for done when there is no such device any more: somebody else was faster."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def may_be_starting(device: DeviceInfo) -> bool:
    """Whether its server may be about to send START_DEV."""
    if device.status is not DeviceStatus.DEAD:
        return False
    try:
        return time.time() - os.stat(device.char_path).st_ctime < _STARTING
    except FileNotFoundError:
        return False


def _once_started(controller: Controller, device: DeviceInfo) -> DeviceInfo:
    """The device when it is not just starting: to stop it then would crash kernels, since
    START_DEV would come after STOP_DEV."""
    while may_be_starting(device):
        time.sleep(0.02)
        device = controller.info(device.id)
    return device


def has_server(device: DeviceInfo) -> bool:
    """Whether the process that the kernel names as the server is there.

    Linux 6.12 goes on naming one that has died; a pid in use again is then taken for it.
    """
    return device.server_pid is not None and start_time(device.server_pid) is not None


def _exists(controller: Controller, device: DeviceInfo) -> bool:
    """Whether the device is still there; another one that got its id is not it.

    A deleted device whose disk somebody has open keeps its id until it is closed, but no nodes.
    """
    if not os.path.exists(f"/sys/class/ublk-char/ublkc{device.id}"):
        return False
    try:
        return controller.info(device.id).cookie == device.cookie
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        raise


def _delete(controller: Controller, device: DeviceInfo, deadline: float) -> None:
    if not _exists(controller, device):
        return
    with unless_gone():
        # Not waiting: a mounted disk is gone at once, but its id is taken until it is unmounted.
        controller.delete(device.id, wait=False, deadline=deadline)


def _flush(device: DeviceInfo, timeout: float) -> None:
    """Makes what was written to a live disk durable; `timeout` is in seconds without progress."""
    if device.status is not DeviceStatus.LIVE:
        return
    failures: list[OSError] = []

    def flush() -> None:
        try:
            for part in partitions(f"ublkb{device.id}"):
                _flush_node(f"/dev/{part}")
            _flush_node(device.path)
        except OSError as error:
            # Else somebody else is taking the disk down, and its page cache is written back so.
            if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                failures.append(error)

    # In a thread beside this one: with a server that hangs, nothing can interrupt these calls.
    flusher = threading.Thread(target=flush, daemon=True)
    flusher.start()

    def wait(seconds: float) -> bool:
        flusher.join(seconds)
        return not flusher.is_alive()

    if not _patiently(wait, device, timeout):
        raise TimeoutError(
            f"{device.path} could not be flushed: its server (process {device.server_pid}) "
            f"answered nothing for {timeout:g} s"
        )
    if failures:
        error = OSError(
            failures[0].errno,
            f"{device.path} could not be flushed: {failures[0].strerror}; it is left as it is",
        )
        error.add_note("--force stops it all the same: what was not written is lost")
        raise error


def _flush_node(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, BLKFLSBUF)
        os.fsync(descriptor)  # the disk's own cache, which BLKFLSBUF leaves alone
    finally:
        os.close(descriptor)


def _patiently(wait: Callable[[float], bool], device: DeviceInfo, timeout: float) -> bool:
    """Repeats `wait(seconds)` until it is true; false after `timeout` s without answered I/O."""
    last = -1
    until = 0.0
    while not wait(min(0.1, timeout)):
        if (now := _requests_answered(device)) != last:
            last, until = now, time.monotonic() + timeout
        elif time.monotonic() > until:
            return False
    return True


def _requests_answered(device: DeviceInfo) -> int:
    """Reads, writes, discards and flushes that have ended (Documentation/block/stat.rst)."""
    try:
        fields = Path(f"/sys/class/block/ublkb{device.id}/stat").read_text().split()
    except OSError:  # the disk is being taken down
        return 0
    # The other fields also change while requests merely wait.
    return sum(int(fields[place]) for place in (0, 4, 11, 15))


def _end_server(
    controller: Controller, device: DeviceInfo, record: Record, server: Process, timeout: float
) -> None:
    log = _identity(record.log)
    server.send(signal.SIGTERM)
    ended = _patiently(server.wait, device, timeout)
    if not ended:
        server.send(signal.SIGKILL)
        server.wait(_DELETION)
    if not _deleted(controller, device):
        _delete(controller, device, timeout)
    record.remove()
    if not ended:
        raise errors.HandlerTimeout(
            f"the server of {device.path} (process {server.pid}) did not end within {timeout:g} s "
            "and was killed: requests that it held were failed, and the disk is deleted"
        )
    # Another one may have got the disk's id, and its log that name.
    if log is not None and _identity(record.log) == log:
        raise errors.DeviceLost(
            f"{device.path} is gone, but its server ended with an error: see {record.log}"
        )


def _identity(log: Path | None) -> tuple[int, int] | None:
    """Which file is there, if any."""
    try:
        found = log.stat() if log is not None else None
    except FileNotFoundError:
        return None
    return found and (found.st_dev, found.st_ino)


def _deleted(controller: Controller, device: DeviceInfo) -> bool:
    """Whether the device goes away within a few seconds of its server's end."""
    until = time.monotonic() + _DELETION
    while _exists(controller, device):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
