# SPDX-License-Identifier: MIT
"""Stopping and deleting disks of whatever server, with their data safe and their users asked."""

import errno
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pyublk import errors
from pyublk.control import Controller, DeviceInfo, has_node
from pyublk.files import about, inode_at
from pyublk.openers import start_time
from pyublk.service.channel import ChannelError, ask
from pyublk.service.claim import patiently, refuse_if_used, take
from pyublk.service.processes import Process
from pyublk.service.records import Record, record_trouble
from pyublk.uapi import DeviceStatus, Feature

log = logging.getLogger("pyublk.service")

#: Seconds that a helper, or a server that has ended, gets to delete the device.
_DELETION = 10.0
#: Seconds for a server of several disks to forget one.
_FORGOTTEN = 5.0
#: Seconds, from when it is first looked at, in which a device that is DEAD may just be starting.
_STARTING = 3.0


def stop(
    controller: Controller,
    device: DeviceInfo,
    *,
    timeout: float = 30.0,
    force: bool = False,
    safe: bool = False,
) -> None:
    """Flushes a disk and stops it; a disk whose server is ours is deleted as well.

    `timeout` is in seconds without progress. A server started by `pyublk add` is asked to end, and
    killed after `timeout`; then, and when it ended with an error, the error raised says so: the
    disk is gone all the same. The disk of any other server is stopped through the driver.

    Unless `force`, raises DeviceBusy for a disk in use or one that waits for a new server, and
    OSError or TimeoutError for one that cannot be flushed: the disk is left as it is. `safe`: it is
    stopped only if nobody has it open at all (TRY_STOP_DEV; FeatureMissing where there is none).
    """
    if safe:
        controller.features().require(Feature.SAFE_STOP_DEV)
    device = _once_started(controller, device)
    if force:
        _keep_from_restart(device)
    else:
        device = _once_served(controller, device, timeout)
        _refuse_what_may_lose(device)
    if trouble := record_trouble(device.id):
        log.warning("the server of %s is not known: %s", device.path, trouble)
    record = Record.of(device)
    server = record.server.open() if record is not None else None
    tolerated: tuple[type[Exception], ...] = (OSError,) if force and not safe else ()
    stopped = handed_over = False
    with ExitStack() as held:
        if server is not None:
            held.enter_context(server)
            if not safe:  # that it hangs is dealt with at its end, and it tells where
                tolerated += (TimeoutError,)
        with suppress(*tolerated):
            stopped = take(controller, device, held, timeout, force=force, safe=safe)
        if record is not None and server is not None and record.server_name is not None:
            _end_one_of_several(controller, device, record, timeout)
        elif record is not None and server is not None:
            handed_over = not _end_server(
                controller, device, record, server, timeout, asked=stopped
            )
        elif has_server(device) or not device.ours:
            if device.status is not DeviceStatus.DEAD and not stopped:
                with unless_gone():
                    controller.stop(device.id, deadline=timeout)
        else:
            _delete(controller, device, timeout)
            if record is not None:
                record.remove()
                if record.log is not None:  # of a server that is gone
                    record.log.unlink(missing_ok=True)
    if handed_over:
        stop(controller, controller.info(device.id), timeout=timeout, force=force, safe=safe)


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
    """Whether its server may be about to send START_DEV. The kernel does not say when it was made,
    and a node's time is the wall clock's: it counts from when this process first looked."""
    if device.status is not DeviceStatus.DEAD or Record.of(device) is not None:
        return False  # what has a record was started
    try:
        node = about(device.char_path).inode
    except OSError:
        return False
    first = _looked_at.setdefault((device.id, device.cookie, node), time.monotonic())
    return time.monotonic() - first < _STARTING


_looked_at: dict[tuple[int, int, int], float] = {}


def _once_started(controller: Controller, device: DeviceInfo) -> DeviceInfo:
    """The device when it is not just starting: to stop it then would crash kernels, since
    START_DEV would come after STOP_DEV."""
    while may_be_starting(device):
        time.sleep(0.05)
        device = controller.info(device.id)
    return device


def _once_served(controller: Controller, device: DeviceInfo, timeout: float) -> DeviceInfo:
    """The device with its next server, if one is on its way: nothing that was written is lost
    then. After `timeout` seconds it is as it is. Raises OSError ENODEV when it was deleted."""
    until = time.monotonic() + timeout
    while _gets_server(device):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
        device = controller.info(device.id)
    return device


def _refuse_what_may_lose(device: DeviceInfo) -> None:
    refuse_if_used(device)
    if device.status.awaits_server:
        # Nobody would answer a flush.
        raise errors.DeviceBusy(
            f"{device.path} waits for a new server: stopping it now loses what was not written"
        )


def _gets_server(device: DeviceInfo) -> bool:
    """Whether it is handed over to another server, or its server is restarted."""
    record = Record.of(device)
    if record is None:
        return False
    if (server := record.server.open()) is None:
        return record.is_restarted
    with server:
        return device.status.awaits_server


def _keep_from_restart(device: DeviceInfo) -> None:
    record = Record.of(device)
    if record is not None and device.status.awaits_server:
        record.not_restarted()


def has_server(device: DeviceInfo) -> bool:
    """Whether the process that the kernel names as the server is there.

    Linux 6.12 goes on naming one that has died; a pid in use again is then taken for it.
    """
    return device.server_pid is not None and start_time(device.server_pid) is not None


def _exists(controller: Controller, device: DeviceInfo) -> bool:
    """Whether the device is still there; another one that got its id is not it.

    A deleted device whose disk somebody has open keeps its id until it is closed, but no nodes.
    """
    if not has_node(device.id):
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
        # A disk of a user without rights is only deleted by who waits.
        unprivileged = Feature.UNPRIVILEGED_DEV in device.flags
        controller.delete(device.id, wait=unprivileged, deadline=deadline)


def _end_server(
    controller: Controller,
    device: DeviceInfo,
    record: Record,
    server: Process,
    timeout: float,
    *,
    asked: bool,
) -> bool:
    """`asked`: its disk is stopped, so that it ends by itself; a signal might meet it at its very
    end, and make that look like a failure. False: it has left the disk to another server."""
    log = inode_at(record.log)
    if not asked:
        server.send(signal.SIGTERM)
    ended = patiently(server.wait, device, timeout)
    if not ended:
        record.not_restarted()
        server.send(signal.SIGKILL)
        server.wait(_DELETION)
    now = Record.of(device)
    if now is not None and now.server != record.server:
        return False
    if not _deleted(controller, device):
        _delete(controller, device, timeout)
    record.remove()
    if not ended:
        raise errors.HandlerTimeout(
            f"the server of {device.path} (process {server.pid}) did not end within {timeout:g} s "
            "and was killed: requests that it held were failed, and the disk is deleted"
        )
    # Another one may have got the disk's id, and its log that name.
    if log is not None and inode_at(record.log) == log:
        raise errors.DeviceLost(
            f"{device.path} is gone, but its server ended with an error: see {record.log}"
        )
    return True


def _end_one_of_several(
    controller: Controller, device: DeviceInfo, record: Record, timeout: float
) -> None:
    """Its server goes on, unless it was the last disk; it gives up by itself what hangs."""
    log = inode_at(record.log)
    failures: list[Exception] = []

    def ask_for_it() -> None:
        try:
            ask(record, "stop", timeout=None)
        except Exception as error:
            failures.append(error)

    asking = threading.Thread(target=ask_for_it, daemon=True)
    asking.start()

    def answered(seconds: float) -> bool:
        asking.join(seconds)
        return not asking.is_alive()

    if not patiently(answered, device, timeout):
        raise TimeoutError(
            f"the server {record.server_name} (process {record.server.pid}) did not stop "
            f"{record.path} within {timeout:g} s; killing it would end all of its disks"
        )
    if not _deleted(controller, device):
        if failures:
            raise failures[0]
        _delete(controller, device, timeout)
    record.remove()
    if failures and not isinstance(failures[0], ChannelError):  # else: it was stopped already
        raise failures[0]
    if log is not None and _remains(record.log, log):
        raise errors.DeviceLost(
            f"{device.path} is gone, but it ended with an error: see {record.log}"
        )


def _remains(log: Path | None, identity: tuple[int, int]) -> bool:
    """Whether the log is still there when its disk has ended for a moment."""
    until = time.monotonic() + _FORGOTTEN
    while inode_at(log) == identity:
        if time.monotonic() > until:
            return True
        time.sleep(0.02)
    return False


def _deleted(controller: Controller, device: DeviceInfo) -> bool:
    """Whether the device goes away within a few seconds of its server's end."""
    until = time.monotonic() + _DELETION
    while _exists(controller, device):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
