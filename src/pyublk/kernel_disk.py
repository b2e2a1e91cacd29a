# SPDX-License-Identifier: MIT
"""The kernel's side of a disk, from ADD_DEV to DEL_DEV: knows no target, and nobody who serves."""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress

from pyublk import errors
from pyublk._native import CharDevice, open_private
from pyublk.control import Controller, DeviceInfo, has_node, new_cookie
from pyublk.descriptors import make_room
from pyublk.features import Features
from pyublk.openers import command_name, start_time
from pyublk.params import Params
from pyublk.recovery import NOTICED, Recovery, recovery_of
from pyublk.scheduling import PATIENCE, SchedulerRemoval, choose_io_scheduler
from pyublk.uapi import DeviceStatus, Feature

log = logging.getLogger("pyublk.device")

#: Seconds for the id of a deleted device to become free; it does soon when nobody has it open.
ID_FREED = 2.0

#: Seconds for the char device's node, and our right to open it, to come after the device.
NODE_OPENS = 5.0

#: Seconds for udev to give a node to its owner, which it asks a program about.
NODE_GIVEN = 30.0

#: Seconds between two looks at whether a device awaits its next server.
_LOOK = 0.01


class KernelDisk:
    """A device of the kernel's: who serves it comes and goes.

    `deadline`: seconds for each control command. `waits`: a start and a stop also wait for what the
    kernel finishes by itself, the removal of the I/O scheduler and the end of all that the device
    had. The controller's helper deletes the device when this process ends without having done so.
    """

    def __init__(self, *, deadline: float, waits: bool) -> None:
        self._waits = waits
        self.controller = Controller(deadline=deadline)
        self.char_device: CharDevice | None = None
        #: It stays until this process ends: the helper deletes it then.
        self.kept = False
        #: It stays for other servers when this one ends: it is not ours yet, or not any more.
        self.spared = False
        self._info: DeviceInfo | None = None
        self._params: Params | None = None
        self._scheduler_removal: SchedulerRemoval | None = None

    # ---- looking at it ----

    @property
    def exists(self) -> bool:
        """Whether it was added."""
        return self._info is not None

    @property
    def info(self) -> DeviceInfo:
        """What the kernel said of it last."""
        if self._info is None:
            raise errors.DeviceClosed("the device does not exist before it is started")
        return self._info

    @property
    def params(self) -> Params:
        """The parameters as the kernel took them."""
        if self._params is None:
            raise errors.DeviceClosed("the device has no parameters before it is started")
        return self._params

    @property
    def recovery(self) -> Recovery:
        """What becomes of it without a server."""
        return recovery_of(self.info.flags)

    def features(self) -> Features:
        """What this kernel can do."""
        return self.controller.features()

    def look(self) -> DeviceInfo:
        """What the kernel says of it now."""
        return self.controller.info(self.info.id)

    # ---- beginning ----

    def add(
        self, *, queues: int, depth: int, max_io_size: int, id: int | None, flags: Feature
    ) -> DeviceInfo:
        """ADD_DEV, guarded: from here on it is there, and deleted with this process."""
        cookie = new_cookie()
        try:
            self._info = self.controller.add(
                queues=queues,
                depth=depth,
                max_io_size=max_io_size,
                id=id,
                flags=flags,
                cookie=cookie,
                guarded=True,
            )
        except BaseException:
            self._delete_added(cookie)
            raise
        if self._unprivileged:
            self._await_rights(self._info.char_path)
        return self._info

    @property
    def _unprivileged(self) -> bool:
        return self._info is not None and Feature.UNPRIVILEGED_DEV in self._info.flags

    def _await_rights(self, path: str) -> None:
        """Until the node is its owner's; the kernel looks at the char device's in every command."""
        until = time.monotonic() + NODE_GIVEN
        while not os.access(path, os.R_OK | os.W_OK):
            if time.monotonic() > until:
                raise errors.not_given_error(path)
            time.sleep(0.005)

    def _delete_added(self, cookie: int) -> None:
        """What interrupts ADD_DEV, or ends our patience, may leave the device that it made."""
        with suppress(OSError):
            for device in self.controller.devices():
                if device.cookie == cookie:
                    self.controller.delete(device.id, wait=False)

    def set_params(self, params: Params) -> None:
        """SET_PARAMS. Raises OSError for what the kernel dropped or changed without a word."""
        info = self.info
        params.check_granted(max_io_size=info.max_io_size, flags=info.flags)
        self.controller.set_params(info.id, params)
        self._params = self.controller.get_params(info.id)
        if dropped := params.difference(self._params):
            raise errors.negotiation_error(
                f"parameters of device {info.id}",
                "what the target announces",
                "; ".join(dropped),
                "announce less, or use a newer kernel",
            )

    def open_char_device(self) -> CharDevice:
        """Opens the server's node; it and the rights on it come a moment after the device."""
        path = self.info.char_path
        until = time.monotonic() + NODE_OPENS
        while True:
            try:
                number = open_private(path, os.O_RDWR)
                make_room(number)
                self.char_device = CharDevice(number)
                return self.char_device
            except OSError as error:
                transient = error.errno in (errno.ENOENT, errno.EACCES, errno.EBUSY)
                if not transient:
                    raise
                if time.monotonic() > until:
                    if error.errno == errno.ENOENT:
                        raise errors.node_missing_error(path) from None
                    if error.errno == errno.EBUSY and self.spared:
                        raise errors.DeviceBusy(
                            f"device {self.info.id} is taken over by another process"
                        ) from None
                    raise
            time.sleep(0.005)

    def adopt(
        self, id: int, deadline: float, *, served: bool = False, foreign: bool = False
    ) -> None:
        """In place of `add` and `set_params`: a device whose server is gone, once the kernel has
        noticed, or that is `served`, and will be handed over. It is pyublk's, or may be `foreign`,
        and is left as it is. Raises what says why it cannot be adopted.

        Linux before 6.16 may take longer to notice than a command may take."""
        info = self.controller.info(id)
        if not has_node(id):
            raise errors.device_not_found(id)
        if not info.ours and not foreign:
            raise ValueError(
                f"device {id} was not made by pyublk: its own server must recover it, or name the "
                f"target that is to serve it (foreign=True, or `pyublk recover {id} TARGET`)"
            )
        if recovery_of(info.flags) is Recovery.NONE:
            raise ValueError(
                f"device {id} cannot be taken over: it was made without recovery (see "
                "Device(recovery=...))"
            )
        if not self.features().has(Feature.QUIESCE):
            deadline = max(deadline, NOTICED)
        until = time.monotonic() + deadline
        while info.status is DeviceStatus.LIVE and not served:
            pid = info.server_pid
            if pid is not None and start_time(pid) is not None:
                raise errors.DeviceBusy(
                    f"device {id} is served by process {pid} ({command_name(pid)}): only one whose "
                    "server is gone can be taken over"
                )
            if time.monotonic() > until:
                raise errors.DeviceBusy(_still_open(id, deadline))
            time.sleep(_LOOK)
            info = self.controller.info(id)
        if info.status is DeviceStatus.DEAD:
            raise errors.DeviceLost(
                f"device {id} is stopped, or was never started: nobody can take it over; delete it"
            )
        self.spared = True
        self._info = info
        self._params = self.controller.get_params(id)

    def is_served_elsewhere(self) -> bool:
        """Whether another process that is there serves it now."""
        info = self.look()
        pid = info.server_pid
        live = info.status is DeviceStatus.LIVE
        return live and pid not in (None, os.getpid()) and start_time(pid) is not None

    def await_end_of_server(self, deadline: float) -> None:
        """Waits until the kernel has noticed that nobody has the char device any more."""
        until = time.monotonic() + deadline
        while not (status := self.look().status).awaits_server:
            if status is DeviceStatus.DEAD:
                raise errors.DeviceLost(f"device {self.info.id} was stopped meanwhile")
            if time.monotonic() > until:
                raise errors.DeviceBusy(_still_open(self.info.id, deadline))
            time.sleep(_LOOK)

    def start_recovery(self, deadline: float) -> None:
        """START_USER_RECOVERY, once nobody has the char device any more."""
        device = self.info.id
        until = time.monotonic() + deadline
        while True:
            try:
                if self.look().status.awaits_server:
                    self.controller.start_recovery(device)
                    return
            except OSError as error:
                # So says Linux 6.12 of a device that somebody has sent it to already, and left.
                if error.errno == errno.EINVAL and self.recovery is not Recovery.NONE:
                    return
                if error.errno != errno.EBUSY:
                    raise
            if time.monotonic() > until:
                raise errors.DeviceBusy(_still_open(device, deadline))
            time.sleep(_LOOK)

    def end_recovery(self) -> None:
        """END_USER_RECOVERY, once every tag is fetched: requests come from here on."""
        self.controller.end_recovery(self.info.id, os.getpid())

    def quiesce(self, patience: float) -> None:
        """QUIESCE_DEV: requests wait from here on, and idle tags come back. Waits at most
        `patience` seconds for those that the server has to be answered."""
        try:
            self.controller.quiesce(self.info.id, timeout=patience)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise

    def guard(self, guarded: bool) -> None:
        """Whether the helper deletes it when this process ends without having done so."""
        if guarded:
            self.controller.guard(self.info.id)
        else:
            self.controller.unguard(self.info.id)

    def queue_cpus(self, queues: list[int]) -> frozenset[int]:
        """The CPUs whose requests come to these queues."""
        device, ask = self.info.id, self.controller.queue_affinity
        return frozenset[int]().union(*(ask(device, queue) for queue in queues))

    def start(self) -> None:
        """START_DEV, once every tag is fetched; the partition scan in it is served already."""
        self.controller.start(self.info.id, os.getpid())

    def await_node(self, until: float, check: Callable[[], None]) -> None:
        """Waits until `path` is this disk, and calls `check` meanwhile. Another file of that name
        would take what clients write: programs that create what they write to leave one where a
        disk was gone before them."""
        path = self.info.path
        devt = self.controller.get_params(self.info.id).devt
        assert devt is not None
        ours = os.makedev(devt.disk_major, devt.disk_minor)
        while True:
            with suppress(FileNotFoundError):
                node = os.stat(path)
                if node.st_rdev == ours and stat.S_ISBLK(node.st_mode):
                    break
                if not stat.S_ISBLK(node.st_mode):
                    raise errors.DeviceLost(
                        f"{path} is not the disk, but a file that hides it: remove that "
                        "file (a program wrote to this path while there was no disk)"
                    )
            check()
            if time.monotonic() > until:
                raise errors.node_missing_error(path)
            time.sleep(0.005)
        if self._unprivileged:
            self._await_rights(path)

    def choose_scheduler(self, name: str | None, deadline: float) -> None:
        """Gives it that I/O scheduler; "auto": none, but for a zoned disk; None: leaves it the
        kernel's choice."""
        if name == "auto":
            if Feature.ZONED not in self.info.flags:
                self._scheduler_removal = SchedulerRemoval(self.info.path)
                if self._waits:
                    self._end_scheduler_removal(PATIENCE)
        elif name is not None:
            choose_io_scheduler(self.info.path, name, deadline)

    def refresh(self) -> None:
        """Takes note of what the kernel says of it now."""
        self._info = self.look()

    # ---- while it lives ----

    def resize(self, size: int) -> None:
        """UPDATE_SIZE: the live disk has `size` bytes from now on."""
        self.controller.update_size(self.info.id, size)
        self._params = self.controller.get_params(self.info.id)

    # ---- ending ----

    def stop(self, deadline: float) -> None:
        """STOP_DEV: ends when every request was answered. Whoever serves must not call it."""
        self.controller.stop(self.info.id, deadline=deadline)

    def give_up_queue(self) -> None:
        """A thread that hangs holds every request of a queue, and was cut off from it.

        Kernels before 6.16 learn of a server's end by a FETCH that it takes along, or, half a
        minute later, by the end of the thread itself.
        """
        self.kept = not self.features().has(Feature.UPDATE_SIZE)

    def close_char_device(self, *, in_use: bool = False) -> None:
        """Closes it; `in_use`: the number stays theirs who were cut off from it, and may yet come
        to use it."""
        if self.char_device is not None and not in_use:
            self.char_device.close()
        self.char_device = None

    def delete(self) -> None:
        """DEL_DEV, unless the kernel keeps it; its id is free soon, once nobody has it open."""
        # The kernel waited for it when it took the disk away, and gives nobody the disk's name
        # before it is deleted.
        self._end_scheduler_removal()
        if self.kept or self.spared or self._info is None:
            return
        try:
            # Not DEL_DEV, which waits until everybody has closed the disk; that of a user without
            # rights is deleted by nothing else.
            self.controller.delete(self._info.id, wait=self._unprivileged)
            until = time.monotonic() + ID_FREED
            while self._waits and time.monotonic() < until:
                self.controller.info(self._info.id)
                time.sleep(0.005)
        except OSError as error:
            if error.errno != errno.ENODEV:  # else: it is gone, or somebody else deleted it
                raise
        else:
            if self._waits:
                path = self._info.path
                log.warning("%s is deleted, but its id is taken until its users close it", path)

    def _end_scheduler_removal(self, deadline: float = 0.0) -> None:
        removal, self._scheduler_removal = self._scheduler_removal, None
        if removal is not None:
            removal.finish(deadline)

    def close(self) -> None:
        """Lets go of the helper and the control node."""
        self.controller.close()


def _still_open(device: int, deadline: float) -> str:
    return (
        f"device {device} still has a server after {deadline:g} s: a process that has "
        f"/dev/ublkc{device} open, inherited or mapped keeps it from being taken over"
    )
