# SPDX-License-Identifier: MIT
"""A regular file, or another block device, as a disk."""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from pyublk.target import Target

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_ZEROES = memoryview(mmap.mmap(-1, 1 << 20))  # page-aligned, as direct I/O wants it
#: Errno values by which a file system, or a device, says that it cannot do a thing at all.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EREMOTEIO)


class File(Target):
    """Serves `path`: reads and writes at the same offset, flush as fdatasync.

    Discard punches holes (BLKDISCARD on a block device), write-zeroes zeroes the range in the file
    system (BLKZEROOUT), or writes zeroes where that cannot be done.

    Args:
        path: a regular file, or a block device, which is opened exclusively.
        size: makes the file with this size, or extends it; without, the size is the file's.
        direct: bypass the page cache (O_DIRECT), where the file allows it; the block size is then
            at least what its device demands.
        read_only: open it for reading, and make the disk read-only.
        block_size: the disk's logical block size in bytes.
    """

    concurrency = "parallel"

    def __init__(
        self,
        path: Path,
        *,
        size: int | None = None,
        direct: bool = False,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        super().__init__(size=size or 0, block_size=block_size, read_only=read_only)
        self.path = Path(path)
        self._wanted_size = size
        self._direct = direct
        self._fd = -1
        self._is_device = False
        self._can_discard = True
        self._can_zero = True

    def open(self) -> None:
        create = self._wanted_size is not None and not self.read_only
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC
        made = create and not self.path.exists()
        try:
            kind = self.path.stat().st_mode if not made else stat.S_IFREG
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise ValueError(f"{self.path} is neither a regular file nor a block device")
            self._is_device = stat.S_ISBLK(kind)
            if self._is_device and not self.read_only:
                flags |= os.O_EXCL  # refuses a device that is mounted or otherwise claimed
            self._fd = os.open(self.path, flags | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, f"{self.path} does not exist: give a size to make it"
            ) from None
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise OSError(errno.EBUSY, f"{self.path} is in use (mounted?)") from None
            raise
        try:
            self._measure()
            if self._direct:
                self._go_direct()
        except BaseException:
            self.close()
            if made:
                self.path.unlink()
            raise

    def _measure(self) -> None:
        if self._is_device:
            actual = int.from_bytes(fcntl.ioctl(self._fd, BLKGETSIZE64, bytes(8)), "little")
        else:
            actual = os.fstat(self._fd).st_size
            if self._wanted_size is not None and self._wanted_size > actual and not self.read_only:
                os.ftruncate(self._fd, self._wanted_size)
                actual = self._wanted_size
        if self._wanted_size is not None and self._wanted_size > actual:
            raise ValueError(
                f"size {self._wanted_size} is more than {self.path} has, {actual} bytes"
            )
        self.size = self._wanted_size or actual
        if self.size == 0 or self.size % self.block_size:
            raise ValueError(
                f"{self.path} has {self.size} bytes: a disk needs a positive multiple of its block "
                f"size, {self.block_size}; give a size, or another block size"
            )

    def _go_direct(self) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise OSError(
                errno.EINVAL,
                f"{self.path} does not allow direct I/O on its file system: leave out direct",
            ) from None
        self.block_size = max(self.block_size, self._direct_block_size())
        if self.size % self.block_size:
            raise ValueError(
                f"{self.path} has {self.size} bytes, direct I/O needs a multiple of "
                f"{self.block_size}: leave out direct, or give a size"
            )

    def _direct_block_size(self) -> int:
        if self._is_device:
            return int.from_bytes(fcntl.ioctl(self._fd, BLKSSZGET, bytes(4)), "little")
        # The smallest transfer that works is what the file's device demands. A memory file system
        # takes any.
        buffer = _page_aligned(4096)
        for size in (512, 1024, 2048, 4096):
            try:
                os.preadv(self._fd, [buffer[:size]], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return size
        raise OSError(errno.EINVAL, f"{self.path} refuses direct reads of up to 4096 bytes")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, buffer: memoryview) -> None:
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:  # the file was cut short behind our back
                raise OSError(errno.EIO, f"{self.path} ends at {offset}")
            buffer = buffer[count:]
            offset += count

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwritev(self._fd, [data], offset)
            data = data[count:]
            offset += count

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        # Discard is a hint: where it cannot be done, the bytes stay.
        if self._can_discard:
            self._can_discard = self._give_back(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if unmap and not self._is_device and self._can_discard:
            self._can_discard = self._give_back(offset, length)
            if self._can_discard:
                return
        if self._can_zero:
            self._can_zero = self._zero_range(offset, length)
            if self._can_zero:
                return
        for at in range(offset, offset + length, len(_ZEROES)):
            self.write(at, _ZEROES[: min(len(_ZEROES), offset + length - at)])

    def _give_back(self, offset: int, length: int) -> bool:
        if self._is_device:
            return self._ioctl(BLKDISCARD, offset, length)
        return self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _zero_range(self, offset: int, length: int) -> bool:
        if self._is_device:
            return self._ioctl(BLKZEROOUT, offset, length)
        return self._fallocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _ioctl(self, request: int, offset: int, length: int) -> bool:
        """False: this device cannot."""
        span = offset.to_bytes(8, "little") + length.to_bytes(8, "little")
        try:
            fcntl.ioctl(self._fd, request, span)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return False
        return True

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False: this file system cannot."""
        if _libc.fallocate(self._fd, mode, offset, length) == 0:
            return True
        error = ctypes.get_errno()
        if error not in _CANNOT:
            raise OSError(error, f"fallocate: {os.strerror(error)}")
        return False


def _page_aligned(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size))
