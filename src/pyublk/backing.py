# SPDX-License-Identifier: MIT
"""A file or block device that holds a disk's bytes: opened, measured, and told apart."""

import errno
import fcntl
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True, slots=True)
class Backing:
    """An open file or block device.

    `size` is in bytes; `block_size` is a device's logical block size, which its discards are
    multiples of even where the page cache takes any read and write, and of a file the smallest
    transfer that it takes (512 unless direct I/O demands more); `in_memory` tells that its file
    system keeps it there, so that no call on it waits; `made` that opening it made the file.
    """

    path: Path
    fd: int
    size: int
    block_size: int
    is_device: bool
    in_memory: bool
    made: bool

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        size: int | None = None,
        direct: bool = False,
        read_only: bool = False,
    ) -> "Backing":
        """Opens `path`: a regular file, or a block device, which is opened exclusively.

        Args:
            size: makes the file with this many bytes, or extends it.
            direct: bypass the page cache (O_DIRECT).
            read_only: open it for reading.

        Raises:
            OSError: it does not exist, is in use, or does not allow direct I/O.
            ValueError: it is neither, or a device smaller than `size`.
        """
        fd, is_device, made = _open(path, create=size is not None, read_only=read_only)
        try:
            actual = _measure(fd, is_device)
            if size is not None and size > actual and not is_device and not read_only:
                os.ftruncate(fd, size)
                actual = size
            if size is not None and size > actual:
                raise ValueError(f"size {size} is more than {path} has, {actual} bytes")
            if direct:
                _go_direct(path, fd)
            if is_device:
                block_size = int.from_bytes(fcntl.ioctl(fd, BLKSSZGET, bytes(4)), "little")
            else:
                block_size = _smallest_transfer(path, fd) if direct else 512
        except BaseException:
            os.close(fd)
            if made:
                path.unlink()
            raise
        in_memory = not is_device and _is_in_memory(fd)
        return cls(path, fd, actual, block_size, is_device, in_memory, made)

    def close(self) -> None:
        os.close(self.fd)


def _open(path: Path, *, create: bool, read_only: bool) -> tuple[int, bool, bool]:
    create = create and not read_only
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        made = create and not path.exists()
        kind = stat.S_IFREG if made else path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise ValueError(f"{path} is neither a regular file nor a block device")
        is_device = stat.S_ISBLK(kind)
        if is_device and not read_only:
            flags |= os.O_EXCL  # refuses a device that is mounted or otherwise claimed
        return os.open(path, flags | (os.O_CREAT if made else 0), 0o600), is_device, made
    except FileNotFoundError:
        missing = f"{path}"
        if create and not path.parent.exists():
            missing = f"{path.parent}, where {path.name} is to be made,"
        raise FileNotFoundError(errno.ENOENT, f"{missing} does not exist") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OSError(errno.EBUSY, f"{path} is in use (mounted?)") from None
        raise


def _measure(fd: int, is_device: bool) -> int:
    if is_device:
        return int.from_bytes(fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)), "little")
    return os.fstat(fd).st_size


def _go_direct(path: Path, fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise OSError(
            errno.EINVAL,
            f"{path} does not allow direct I/O on its file system: leave out direct",
        ) from None


def _smallest_transfer(path: Path, fd: int) -> int:
    """What the device under a file demands of direct I/O; a memory file system takes any."""
    buffer = memoryview(mmap.mmap(-1, 4096))
    for size in (512, 1024, 2048, 4096):
        try:
            os.preadv(fd, [buffer[:size]], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return size
    raise OSError(errno.EINVAL, f"{path} refuses direct reads of up to 4096 bytes")


def _is_in_memory(fd: int) -> bool:
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if place.split()[2] == number:
            return kind.split()[0] in _IN_MEMORY
    return False
