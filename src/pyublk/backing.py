# SPDX-License-Identifier: MIT
"""A file or block device that holds a disk's bytes: opened, measured, told apart, and kept."""

import errno
import fcntl
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from pyublk.files import Identity, about, direct_alignment
from pyublk.keeping import Ranges, keep, let_go, may_make

BLKROGET = 0x125E
BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
#: What direct I/O is given where nobody says what it takes: no device in use takes more.
_CAUTIOUS = 4096


@dataclass(frozen=True, slots=True)
class Backing:
    """An open file or block device.

    `size` is in bytes; `block_size` is a device's logical block size, which its discards are
    multiples of even where the page cache takes any read and write, and of a file the smallest
    transfer that it takes (512 unless direct I/O demands more); `memory_alignment` is what direct
    I/O demands of a transfer's place in memory; `in_memory` tells that its file system keeps it
    there, so that no call on it waits; `made` that opening it made the file.
    """

    path: Path
    fd: int
    size: int
    block_size: int
    memory_alignment: int
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
            size: makes the file, unless it is that of a disk which is there already; `keep` extends
                it to as many bytes, if it has less.
            direct: bypass the page cache (O_DIRECT).
            read_only: open it for reading.

        Raises:
            OSError: it does not exist, is in use, can only be read, or does not allow direct I/O.
            ValueError: it is neither, or a device smaller than `size`.
        """
        fd, is_device, made = _open(path, create=size is not None, read_only=read_only)
        try:
            actual = _measure(fd, is_device)
            if size is not None and size > actual and not is_device and not read_only:
                actual = size
            if size is not None and size > actual:
                raise ValueError(f"size {size} is more than {path} has, {actual} bytes")
            if direct:
                _go_direct(path, fd)
            memory_alignment, block_size = _direct_alignment(path, fd) if direct else (1, 512)
            if is_device:
                block_size = int.from_bytes(fcntl.ioctl(fd, BLKSSZGET, bytes(4)), "little")
        except BaseException:
            os.close(fd)
            if made:
                path.unlink()
            raise
        in_memory = not is_device and _is_in_memory(fd)
        return cls(path, fd, actual, block_size, memory_alignment, is_device, in_memory, made)

    @property
    def identity(self) -> Identity:
        """Which file it is, whatever its names."""
        return about(self.fd).identity

    def keep(self, ranges: Ranges, *, read_only: bool, succeeds: bool = False) -> None:
        """Keeps these ranges (first byte and end) from everybody else, and gives a regular file its
        size. `succeeds`: but not from the target that this one is to replace. Raises OSError EBUSY
        when somebody has one of them."""
        # Also of a device: that it is opened exclusively is not seen by those who only read it.
        keep(self.fd, self.path, ranges, read_only=read_only, succeeds=succeeds)
        if self.is_device:
            return
        if os.fstat(self.fd).st_size < self.size:
            os.ftruncate(self.fd, self.size)

    def measured(self) -> "Backing":
        """The same, with the size that the file or device has now."""
        return replace(self, size=_measure(self.fd, self.is_device))

    def let_go(self, *, written_late: bool = False) -> None:
        """Others may have it; where a request is still under way, once that has ended."""
        let_go(self.fd, written_late=written_late)

    def close(self, *, written_late: bool = False) -> None:
        self.let_go(written_late=written_late)
        os.close(self.fd)


def _open(path: Path, *, create: bool, read_only: bool) -> tuple[int, bool, bool]:
    create = create and not read_only and may_make()
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        made = create and not path.exists()
        kind = stat.S_IFREG if made else path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise ValueError(f"{path} is neither a regular file nor a block device")
        is_device = stat.S_ISBLK(kind)
        if is_device and not read_only:
            flags |= os.O_EXCL  # refuses a device that is mounted or otherwise claimed
        fd = os.open(path, flags | (os.O_CREAT | os.O_EXCL if made else 0), 0o600)
    except FileNotFoundError:
        missing = f"{path}"
        if create and not path.parent.exists():
            missing = f"{path.parent}, where {path.name} is to be made,"
        raise FileNotFoundError(errno.ENOENT, f"{missing} does not exist") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OSError(errno.EBUSY, f"{path} is in use (mounted?)") from None
        if error.errno == errno.EROFS:
            raise _can_only_be_read(path) from None
        raise
    # Some kernels open a device for writing that cannot be written, and fail every write.
    if is_device and not read_only and any(fcntl.ioctl(fd, BLKROGET, bytes(4))):
        os.close(fd)
        raise _can_only_be_read(path)
    return fd, is_device, made


def _can_only_be_read(path: Path) -> OSError:
    return OSError(
        errno.EROFS, f"{path} can only be read: make the disk read-only, or choose another"
    )


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
        raise _not_direct(path) from None


def _not_direct(path: Path) -> OSError:
    return OSError(
        errno.EINVAL, f"{path} does not allow direct I/O on its file system: leave out direct"
    )


def _direct_alignment(path: Path, fd: int) -> tuple[int, int]:
    """What direct I/O demands of the place in memory, and of offset and length. The file system is
    asked, else the device below it: a read tells nothing where the file has a hole."""
    told = direct_alignment(fd)
    if told is None:
        block = 512 if _is_in_memory(fd) else _block_size_below(about(fd).device)
        return block, block
    memory, block = told
    if not block:
        raise _not_direct(path)
    return memory, max(block, 512)


def _block_size_below(number: str, sys: Path = Path("/sys")) -> int:
    """The logical block size of a file system's device, "major:minor"; where it has none of its
    own, or several devices, what every device takes."""
    device = (sys / "dev/block" / number).resolve()
    for place in (device, device.parent):  # a partition has its disk's
        try:
            return int((place / "queue/logical_block_size").read_text())
        except OSError:
            continue
    return _CAUTIOUS


def _is_in_memory(fd: int) -> bool:
    number = about(fd).device
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if place.split()[2] == number:
            return kind.split()[0] in _IN_MEMORY
    return False
