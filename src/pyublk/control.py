# SPDX-License-Identifier: MIT
"""Control commands: one method each.

Each command is issued by this process's helper, a small program beside it (`_core/control.h` says
why). So every call keeps its deadline, and a caller can always be killed, even one that waits for
the stop of its own device while one of its handlers hangs.
"""

import ctypes
import errno
import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from pyublk import errors, uapi
from pyublk._native import Helper
from pyublk.arguments import DEFAULT_DEPTH, DEFAULT_MAX_IO_SIZE, whole
from pyublk.features import Features, is_privileged
from pyublk.files import file_at
from pyublk.occupants import who_has
from pyublk.options import DEVICE
from pyublk.params import Params
from pyublk.uapi import ControlCommand, DeviceStatus, Feature

CONTROL_NODE = "/dev/ublk-control"

NO_FLAGS = Feature(0)

#: Here they are a number: "max" is resolved by `Device`.
_QUEUES = replace(DEVICE["queues"], literals=())
#: Seconds that ADD_DEV is tried again for an id that is just becoming free: the kernel takes some
#: grace periods of RCU for it, once nobody has the deleted device open.
RETRY_ADD = 1.0

#: The high half of a device's cookie (ublksrv_flags) when pyublk made it: "pyub".
COOKIE_MAGIC = 0x70797562


def new_cookie() -> int:
    """A number that tells this device from every other of the same id."""
    return COOKIE_MAGIC << 32 | int.from_bytes(os.urandom(4))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What the kernel knows of a device (struct ublksrv_ctrl_dev_info).

    `queues` and `depth` as granted, `max_io_size` in bytes, `flags` as negotiated; `server_pid` is
    None when no server is there; `cookie` is the number its creator stored (ublksrv_flags).
    """

    id: int
    queues: int
    depth: int
    status: DeviceStatus
    max_io_size: int
    flags: Feature
    server_pid: int | None
    cookie: int
    owner_uid: int
    owner_gid: int

    @property
    def path(self) -> str:
        """The block device's node."""
        return f"/dev/ublkb{self.id}"

    @property
    def char_path(self) -> str:
        """The node that the server opens."""
        return f"/dev/ublkc{self.id}"

    @property
    def ours(self) -> bool:
        """Whether pyublk made this device."""
        return self.cookie >> 32 == COOKIE_MAGIC


def has_node(device: int) -> bool:
    """Whether there is such a device: the id of one that was deleted may be taken still."""
    return os.path.exists(f"/sys/class/ublk-char/ublkc{device}")


def _check_id(device: int | None) -> None:
    if device is not None and not 0 <= whole("device id", device) < uapi.MAX_DEVICES:
        raise ValueError(f"device id must be 0 to {uapi.MAX_DEVICES - 1}, not {device}")


def _check_granted(info: DeviceInfo, *, queues: int, flags: Feature) -> None:
    if info.queues < queues:
        raise errors.negotiation_error(
            f"queues of device {info.id}",
            str(queues),
            str(info.queues),
            f"ask for at most {info.queues}: one for each CPU of this machine",
        )
    if dropped := flags & ~info.flags:
        names = ", ".join(flag.name or hex(flag) for flag in dropped)
        raise errors.negotiation_error(
            f"flags of device {info.id}",
            names,
            "none of them" if dropped == flags else "only the others",
            "see `pyublk features` for what this kernel has, and what excludes what",
        )


def _device_info(raw: bytes | bytearray) -> DeviceInfo:
    info = uapi.ublksrv_ctrl_dev_info.from_buffer_copy(raw)
    return DeviceInfo(
        id=info.dev_id,
        queues=info.nr_hw_queues,
        depth=info.queue_depth,
        status=DeviceStatus(info.state),
        max_io_size=info.max_io_buf_bytes,
        flags=Feature(info.flags),
        server_pid=info.ublksrv_pid if info.ublksrv_pid > 0 else None,
        cookie=info.ublksrv_flags,
        owner_uid=info.owner_uid,
        owner_gid=info.owner_gid,
    )


class Controller:
    """The driver's control node. Safe to share between threads; close it or use `with`.

    `deadline` (seconds) holds for every command that is not given its own. Refusals are OSError, of
    the subclass that fits the errno: the message names command, device and likely cause, the notes
    say where the cause lies and what to do. A device with UNPRIVILEGED_DEV can be commanded by any
    user who may open its char device.

    Raises FileNotFoundError when the control node is missing, PermissionError if access is denied.
    """

    def __init__(self, *, deadline: float = 30.0) -> None:
        self.deadline = deadline
        self._stopped: set[int] = set()  # by this one, and not deleted since
        self._helper: Helper | None = None
        try:
            node = os.open(CONTROL_NODE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise errors.control_missing_error(error.errno or errno.ENOENT) from None
        try:
            self._helper = Helper(node)  # which has a descriptor of its own, for all Controllers
        finally:
            os.close(node)

    def close(self) -> None:
        """Ends its use; closing twice is allowed."""
        self._helper = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def helper(self) -> Helper:
        """The process that issues the commands, and deletes our disks when this one is killed."""
        if self._helper is None:
            raise errors.DeviceClosed("this Controller is closed")
        return self._helper

    def _run(
        self,
        command: ControlCommand,
        device: int | None,
        *,
        queue: int = 0xFFFF,
        data: int = 0,
        payload: bytearray | None = None,
        path_length: int = 0,
        guarded: bool = False,
        memory: tuple[int, int, int, bool] | None = None,
        deadline: float | None = None,
    ) -> int:
        _check_id(device)
        limit = self.deadline if deadline is None else deadline
        stage, result = self.helper.control(
            command,
            0xFFFFFFFF if device is None else device,
            queue=queue,
            data=data,
            payload=payload,
            path_length=path_length,
            guarded=guarded,
            memory=memory,
            deadline=limit,
        )
        if stage == "deadline":
            detail = f"not answered within {limit:g} s"
            if result:
                detail += "; the kernel still works on it, in a process that was left behind"
            raise errors.command_error(command, errno.ETIMEDOUT, device=device, detail=detail)
        if stage != "command":
            raise errors.io_uring_error(-result)
        if result < 0:
            raise errors.command_error(command, -result, device=device)
        return result

    def _command(
        self,
        command: ControlCommand,
        device: int,
        *,
        queue: int = 0xFFFF,
        data: int = 0,
        payload: bytearray | None = None,
        memory: tuple[int, int, int, bool] | None = None,
        deadline: float | None = None,
    ) -> int:
        """A command to a device. One to an unprivileged user's device must name the device's node;
        one to another device must not: its payload would be taken from where the name is."""
        run = partial(
            self._run, command, device, queue=queue, data=data, memory=memory, deadline=deadline
        )
        try:
            return run(payload=payload)
        except OSError as error:
            if error.errno == errno.ENODEV and not self._exists(device):
                raise errors.command_error(
                    command, errno.ENODEV, device=device, missing=True
                ) from None
            if error.errno != errno.EINVAL or not self._wants_its_name(device):
                raise
        path = _named(device)
        whole = path + (payload or b"")
        result = run(payload=whole, path_length=len(path))
        if payload is not None:
            payload[:] = whole[len(path) :]
        return result

    def _exists(self, device: int) -> bool:
        """Some commands answer ENODEV also for a device that is not started."""
        try:
            self._run(ControlCommand.GET_DEV_INFO, device, payload=bytearray(64))
        except OSError as error:
            return not isinstance(error, errors.DeviceNotFound)
        return True

    def _wants_its_name(self, device: int) -> bool:
        try:
            return Feature.UNPRIVILEGED_DEV in self.info2(device).flags
        except PermissionError:  # told by nobody else
            return True
        except OSError:
            return False

    def add(
        self,
        *,
        queues: int = 1,
        depth: int = DEFAULT_DEPTH,
        max_io_size: int = DEFAULT_MAX_IO_SIZE,
        flags: Feature = NO_FLAGS,
        id: int | None = None,
        cookie: int = 0,
        guarded: bool = False,
        clamp_queues: bool = False,
        deadline: float | None = None,
    ) -> DeviceInfo:
        """ADD_DEV: makes the char device; the answer is what the kernel granted.

        `max_io_size` is in bytes, `id` None lets the kernel choose. The kernel silently lowers
        `queues` to the number of CPUs, and clears flags that it does not know. If it does, the
        device is deleted again, and OSError (EOPNOTSUPP) says what was dropped. With IO_DESC_SIZE
        descriptors are asked for as large as `Queue` reads them: 24 bytes, all that has a meaning.
        A `guarded` device is deleted when this process ends, however it ends (see `guard`).
        `clamp_queues`: fewer queues than were asked for, one for each CPU, are taken as granted.
        """
        _check_id(id)
        _QUEUES.check(queues)
        DEVICE["depth"].check(depth)
        wish = uapi.ublksrv_ctrl_dev_info(
            nr_hw_queues=queues,
            queue_depth=depth,
            max_io_buf_bytes=max_io_size,
            dev_id=0xFFFFFFFF if id is None else id,
            flags=flags,
            ublksrv_flags=cookie,
            io_desc_size=uapi.DESCRIPTOR_SIZE if Feature.IO_DESC_SIZE in flags else 0,
        )
        payload = bytearray(wish)
        self._add(id, payload, guarded=guarded, deadline=deadline)
        granted = _device_info(payload)
        self._stopped.discard(granted.id)
        try:
            least = min(queues, granted.queues) if clamp_queues else queues
            _check_granted(granted, queues=least, flags=flags)
        except OSError:
            self.delete(granted.id, deadline=deadline)
            raise
        return granted

    def _add(
        self, id: int | None, payload: bytearray, *, guarded: bool, deadline: float | None
    ) -> None:
        until = time.monotonic() + RETRY_ADD
        while True:
            try:
                self._run(
                    ControlCommand.ADD_DEV, id, payload=payload, guarded=guarded, deadline=deadline
                )
                return
            except FileExistsError as error:
                if id is None or error.errno != errno.EEXIST:
                    raise
                if has_node(id) or time.monotonic() > until:
                    raise errors.command_error(
                        ControlCommand.ADD_DEV,
                        errno.EEXIST,
                        device=id,
                        detail=f"the id is in use: {self._who_has(id)}",
                    ) from None
            time.sleep(0.005)

    def guard(self, device: int, *, deadline: float | None = None) -> None:
        """From now on the helper process deletes the device when this process ends, however it
        ends; its server may be another process."""
        self._guard(device, True, deadline)

    def unguard(self, device: int, *, deadline: float | None = None) -> None:
        """From now on the helper process does not delete the device when this process ends, even if
        `Device` made it."""
        self._guard(device, False, deadline)

    def _guard(self, device: int, guarded: bool, deadline: float | None) -> None:
        info = self.info(device, deadline=deadline)
        limit = self.deadline if deadline is None else deadline
        result = self.helper.guard(device, info.cookie, guarded, deadline=limit)
        if result < 0:
            raise OSError(
                -result,
                f"the helper process could not be told whether to guard device {device}: "
                f"{os.strerror(-result)}; try again",
            )

    def _who_has(self, id: int) -> str:
        with suppress(OSError):
            info = self.info(id)  # the kernel answers for a while when it has deleted the device
            if has_node(id):
                return who_has(id, info.status, info.server_pid)
        return who_has(id, None, None)

    def delete(self, device: int, *, wait: bool = True, deadline: float | None = None) -> None:
        """DEL_DEV: stops the device if need be and frees its id.

        With `wait` false (DEL_DEV_ASYNC) the id may stay taken until the last user of the nodes
        has gone.
        """
        command = ControlCommand.DEL_DEV if wait else ControlCommand.DEL_DEV_ASYNC
        self._command(command, device, deadline=deadline)
        self._stopped.discard(device)

    def start(self, device: int, pid: int, *, deadline: float | None = None) -> None:
        """START_DEV: makes the block device; ends when `pid`, the server, has fetched every tag.

        Raises DeviceClosed for a device that was stopped here: Linux 6.18 and 7.2 would crash.
        """
        if device in self._stopped:
            raise errors.DeviceClosed(
                f"device {device} was stopped, and kernels crash when such a device is started "
                "again: delete it, and add a new one"
            )
        self._command(ControlCommand.START_DEV, device, data=pid, deadline=deadline)

    def stop(self, device: int, *, deadline: float | None = None) -> None:
        """STOP_DEV: removes the block device, having written back what its page cache holds.

        A recovery-enabled device loses that page cache instead: flush first. Ends when every
        request in flight was answered.
        """
        self._stopped.add(device)  # whatever comes of it
        self._command(ControlCommand.STOP_DEV, device, deadline=deadline)

    def safe_stop(self, device: int, *, deadline: float | None = None) -> None:
        """TRY_STOP_DEV (Linux 7.0): stops only if nobody has the block device open."""
        self._command(ControlCommand.TRY_STOP_DEV, device, deadline=deadline)
        self._stopped.add(device)

    def set_params(self, device: int, params: Params, *, deadline: float | None = None) -> None:
        """SET_PARAMS: replaces all parameters; only before the device is started."""
        payload = bytearray(params.pack())
        self._command(ControlCommand.SET_PARAMS, device, payload=payload, deadline=deadline)

    def get_params(self, device: int, *, deadline: float | None = None) -> Params:
        """GET_PARAMS: what the kernel stored, which may be less than was set."""
        payload = bytearray(uapi.ublk_params(len=ctypes.sizeof(uapi.ublk_params)))
        self._command(ControlCommand.GET_PARAMS, device, payload=payload, deadline=deadline)
        return Params.unpack(bytes(payload))

    def info(self, device: int, *, deadline: float | None = None) -> DeviceInfo:
        """GET_DEV_INFO."""
        payload = bytearray(64)
        self._command(ControlCommand.GET_DEV_INFO, device, payload=payload, deadline=deadline)
        return _device_info(payload)

    def info2(self, device: int, *, deadline: float | None = None) -> DeviceInfo:
        """GET_DEV_INFO2: as `info`, but checked against our rights on the char device's node."""
        path = _named(device)
        payload = path + bytes(64)
        self._run(
            ControlCommand.GET_DEV_INFO2,
            device,
            payload=payload,
            path_length=len(path),
            deadline=deadline,
        )
        return _device_info(payload[len(path) :])

    def features(self, *, deadline: float | None = None) -> Features:
        """GET_FEATURES: what this driver can do."""
        payload = bytearray(8)
        mask: int | None
        try:
            self._run(ControlCommand.GET_FEATURES, 0, payload=payload, deadline=deadline)
            mask = int.from_bytes(payload, "little")
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EOPNOTSUPP):
                raise
            mask = None  # Linux before 6.5 does not know the command
        return Features.of_this_machine(mask)

    def queue_affinity(
        self, device: int, queue: int, *, deadline: float | None = None
    ) -> frozenset[int]:
        """GET_QUEUE_AFFINITY: the CPUs whose requests come to this queue."""
        payload = bytearray(128)
        self._command(
            ControlCommand.GET_QUEUE_AFFINITY,
            device,
            queue=queue,
            data=queue,
            payload=payload,
            deadline=deadline,
        )
        mask = int.from_bytes(payload, "little")
        return frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)

    def start_recovery(self, device: int, *, deadline: float | None = None) -> None:
        """START_USER_RECOVERY: a new server may now open the char device and fetch."""
        self._command(ControlCommand.START_USER_RECOVERY, device, deadline=deadline)

    def end_recovery(self, device: int, pid: int, *, deadline: float | None = None) -> None:
        """END_USER_RECOVERY: the device is live again, served by `pid`."""
        self._command(ControlCommand.END_USER_RECOVERY, device, data=pid, deadline=deadline)

    def update_size(self, device: int, size: int, *, deadline: float | None = None) -> None:
        """UPDATE_SIZE (Linux 6.16): gives a live device a new `size` in bytes.

        Refused here when the device is not live: some kernels crash on it.
        """
        if size <= 0 or size % 512:
            raise ValueError(f"size must be a positive multiple of 512 bytes, not {size}")
        status = self.info(device, deadline=deadline).status
        if status is not DeviceStatus.LIVE:
            raise errors.command_error(
                ControlCommand.UPDATE_SIZE,
                errno.ENODEV,
                device=device,
                detail=f"the device is {status.name}, and only a LIVE one can be resized",
            )
        self._command(ControlCommand.UPDATE_SIZE, device, data=size // 512, deadline=deadline)

    def quiesce(self, device: int, *, timeout: float = 0.0, deadline: float | None = None) -> None:
        """QUIESCE_DEV (Linux 6.16): new requests wait, so that the server can be replaced.

        Ends when the server has answered every request that it had, and its queues have begun to
        end; so call it from another thread than the one that serves. When they are closed the
        device is QUIESCED. Raises OSError (EBUSY) when the server still has requests after
        `timeout` seconds (0: the deadline): new ones wait all the same, so quiesce again.
        """
        limit = self.deadline if deadline is None else deadline
        until = time.monotonic() + (timeout or limit)
        ask = partial(self._command, ControlCommand.QUIESCE_DEV, device, deadline=deadline)
        ask(data=int(timeout * 1000))
        while _in_flight(device):
            if time.monotonic() > until:
                raise errors.command_error(ControlCommand.QUIESCE_DEV, errno.EBUSY, device=device)
            time.sleep(0.005)
        # Only idle tags were taken back: a queue that had none of them has been told nothing.
        ask(data=int(timeout * 1000))

    def register_buffer(
        self,
        device: int,
        address: int,
        length: int,
        *,
        read_only: bool = False,
        deadline: float | None = None,
    ) -> int:
        """REG_BUF (Linux 7.1): shares `length` bytes of shared memory at `address` with the device.

        Both are multiples of the page size. Returns the buffer's index.
        """
        with file_at(address, length, read_only=read_only) as found:
            if found is not None:
                fd, offset = found
                return self.register_file(
                    device, fd, length, offset=offset, read_only=read_only, deadline=deadline
                )
        # No memory of ours that others could have too: the kernel says what is wrong with it.
        wish = uapi.ublk_shmem_buf_reg(addr=address % mmap.PAGESIZE, len=length)
        return self._command(
            ControlCommand.REG_BUF, device, payload=bytearray(wish), deadline=deadline
        )

    def register_file(
        self,
        device: int,
        fd: int,
        length: int,
        *,
        offset: int = 0,
        read_only: bool = False,
        deadline: float | None = None,
    ) -> int:
        """As `register_buffer`, of the memory that a memfd or a file of hugetlbfs is.

        The helper maps it for as long as the command takes, since the kernel registers memory of
        the process that asks.
        """
        wish = uapi.ublk_shmem_buf_reg(
            len=length, flags=uapi.SHMEM_BUF_READ_ONLY if read_only else 0
        )
        return self._command(
            ControlCommand.REG_BUF,
            device,
            payload=bytearray(wish),
            memory=(fd, offset, length, read_only),
            deadline=deadline,
        )

    def unregister_buffer(self, device: int, index: int, *, deadline: float | None = None) -> None:
        """UNREG_BUF (Linux 7.1)."""
        self._command(ControlCommand.UNREG_BUF, device, data=index, deadline=deadline)

    def devices(self, *, deadline: float | None = None) -> list[DeviceInfo]:
        """Every device of this machine, by id; for a user without rights, his own."""
        found = []  # by sysfs: the kernel has no call for it
        for node in sorted(Path("/sys/class/ublk-char").glob("ublkc*"), key=node_id):
            try:
                found.append(self.info(node_id(node), deadline=deadline))
            except OSError as error:
                closed = isinstance(error, PermissionError) and not is_privileged()
                if has_node(node_id(node)) and error.errno != errno.ENODEV and not closed:
                    raise
        return found

    def wait_for_status(
        self, device: int, *wanted: DeviceStatus, timeout: float = 10.0
    ) -> DeviceInfo:
        """Waits until the device is in one of the `wanted` states (a server's end takes a moment).

        Raises TimeoutError after `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while (info := self.info(device)).status not in wanted:
            if time.monotonic() > until:
                names = " or ".join(status.name for status in wanted)
                raise TimeoutError(
                    f"device {device} is {info.status.name}, not {names}, after {timeout:g} s"
                )
            time.sleep(0.02)
        return info


def _in_flight(device: int) -> int:
    """The requests that its server was given and has not answered, without flushes."""
    try:
        counts = Path(f"/sys/block/ublkb{device}/inflight").read_text()
    except OSError:  # the disk is gone
        return 0
    return sum(map(int, counts.split()))


def _named(device: int) -> bytearray:
    """The path of its char device, as commands to an unprivileged user's device begin with."""
    path = f"/dev/ublkc{device}".encode()
    return bytearray(path + bytes(16 - len(path) % 16))


def node_id(node: Path) -> int:
    """The N of a node such as ublkcN."""
    return int(node.name.removeprefix("ublkc"))
