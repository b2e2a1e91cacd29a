# SPDX-License-Identifier: MIT
"""Memory that a disk shares with its clients: their requests from it are never copied."""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from weakref import WeakMethod

from pyublk._native import SharedTable, process
from pyublk.control import Controller
from pyublk.errors import DeviceClosed

#: The most that one buffer can have (bytes).
MAX_SIZE = 4 << 30

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class SharedMemory:
    """Memory that a disk shares with its clients; from `Device.share`.

    If a client maps the same file (`fd`) and does direct I/O in that memory, its requests are
    served without a copy.
    """

    def __init__(self, sharing: "Sharing", fd: int, mapping: mmap.mmap, index: int) -> None:
        self._sharing: Sharing | None = sharing
        self._fd = fd
        self._process = process()
        self.index = index
        #: The bytes, for NumPy and anything else that takes a buffer.
        self.buffer = memoryview(mapping)

    @property
    def fd(self) -> int:
        """Its descriptor, to pass to clients (SCM_RIGHTS, inheritance, /proc/PID/fd)."""
        if self._fd < 0:
            raise DeviceClosed("this shared memory is closed")
        return self._fd

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Ends the sharing; clients' requests are copied again. Waits for those in flight.

        The memory itself is freed with the last reference to it.
        """
        sharing, self._sharing = self._sharing, None
        if sharing is None or self._process != process():  # the sharing is the parent's
            return
        try:
            sharing.end(self.index)
        except BaseException:
            self._sharing = sharing
            raise
        os.close(self._fd)
        self._fd = -1

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
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)  # what is registered stays so until the device ends

    def __repr__(self) -> str:
        return f"<SharedMemory {self.index}{'' if self._fd >= 0 else ' (closed)'}>"


class Sharing:
    """The shared memory of one device; `by_handler` leads to what tells whether the caller is a
    handler of it."""

    def __init__(
        self, controller: Controller, device: int, by_handler: "WeakMethod[Callable[[], bool]]"
    ) -> None:
        self.table = SharedTable()
        self._by_handler = by_handler
        self._controller = controller
        self._device = device
        self._lock = threading.Lock()
        self._over = False

    def begin(self, size: int | None, fd: int | None, *, read_only: bool) -> SharedMemory:
        """Shares a new file of `size` bytes, or the one behind `fd`."""
        own = _new_file(size) if fd is None else os.dup(fd)
        try:
            mapping, length = _map(own, read_only)
            with self._changing():
                index = self._controller.register_file(
                    self._device, own, length, read_only=read_only
                )
                self.table.put(index, mapping)
        except BaseException:
            os.close(own)
            raise
        return SharedMemory(self, own, mapping, index)

    def end(self, index: int) -> None:
        """Unregisters a buffer, unless it went with the device."""
        if self._over:
            return
        with self._changing():
            try:
                if self._over:
                    return
                self._controller.unregister_buffer(self._device, index)
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.ENOENT):  # else: gone with the device
                    raise
            self.table.drop(index)

    def over(self, *, unused: bool) -> None:
        """The device is gone, and every registration with it; `unused`: no handler hangs that may
        still look at the memory."""
        with self._lock:
            self._over = True
            if unused:
                self.table.clear()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        called_by_handler = self._by_handler()
        if called_by_handler is not None and called_by_handler():
            raise RuntimeError(
                "memory cannot be shared or unshared in a handler: the kernel waits for every "
                "request in flight, also for this one; do it on another thread"
            )
        with self._lock:
            self.table.changing(True)
            try:
                yield
            finally:
                self.table.changing(False)


def check_share(size: int | None, fd: int | None) -> None:
    """Raises ValueError unless exactly one is given, and the size is whole pages."""
    if (size is None) == (fd is None):
        raise ValueError("give either the size of new memory or the fd of a memfd to share")
    if size is not None and (size % mmap.PAGESIZE or not 0 < size <= MAX_SIZE):
        raise ValueError(
            f"size must be a multiple of {mmap.PAGESIZE} from {mmap.PAGESIZE} to {MAX_SIZE} bytes, "
            f"not {size}"
        )


def _new_file(size: int | None) -> int:
    assert size is not None
    fd = os.memfd_create("pyublk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # a client must not cut it short below us
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, read_only: bool) -> tuple[mmap.mmap, int]:
    length = os.fstat(fd).st_size
    if length % mmap.PAGESIZE or not 0 < length <= MAX_SIZE:
        raise ValueError(
            f"the shared file must have a multiple of {mmap.PAGESIZE} bytes up to {MAX_SIZE}, "
            f"not {length}"
        )
    protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=protection), length
