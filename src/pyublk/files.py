# SPDX-License-Identifier: MIT
"""What the kernel says of a file, and small files that are read as what they are or not at all."""

import ctypes
import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_BASIC_STATS = 0x7FF
_DIOALIGN = 0x2000
#: fallocate(2).
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02

_libc = ctypes.CDLL(None, use_errno=True)

#: Bytes of the largest file that `read_record` reads.
_LARGEST = 1 << 20


class _Statx(ctypes.Structure):
    """struct statx (linux/stat.h), as far as it is looked at."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("_to_mode", ctypes.c_uint8 * 24),
        ("mode", ctypes.c_uint16),
        ("_to_inode", ctypes.c_uint8 * 2),
        ("inode", ctypes.c_uint64),
        ("_to_numbers", ctypes.c_uint8 * 88),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("_to_direct", ctypes.c_uint8 * 8),
        ("dio_mem_align", ctypes.c_uint32),
        ("dio_offset_align", ctypes.c_uint32),
        ("_rest", ctypes.c_uint8 * 96),
    )


#: Of a file, the same by each of its names; of a device, by each of its nodes.
Identity = tuple[str, int]


@dataclass(frozen=True, slots=True)
class About:
    """A file by its numbers: `device` is the file system's, `special` a device node's own, both
    "major:minor"."""

    mode: int
    device: str
    inode: int
    special: str

    @property
    def identity(self) -> Identity:
        """Which file it is, whatever its names."""
        return (self.special, 0) if stat.S_ISBLK(self.mode) else (self.device, self.inode)


def _statx(file: Path | str | int, mask: int) -> _Statx:
    found = _Statx()
    descriptor, path, flags = file, b"", _AT_EMPTY_PATH
    if not isinstance(file, int):
        descriptor, path, flags = _AT_FDCWD, os.fsencode(file), 0
    flags |= _AT_STATX_DONT_SYNC
    if _libc.statx(descriptor, path, flags, mask, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if isinstance(file, int) else str(file))
    return found


def about(file: Path | str | int) -> About:
    """As stat(2) of a path or descriptor, but no server of a network file system is asked, which
    could hang. Raises OSError."""
    found = _statx(file, _BASIC_STATS)
    return About(
        found.mode,
        f"{found.dev_major}:{found.dev_minor}",
        found.inode,
        f"{found.rdev_major}:{found.rdev_minor}",
    )


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """What direct I/O demands, in bytes: of the place in memory, and of offset and length. Zeros
    where there is none; None where the file system does not say (before Linux 6.1, or some)."""
    try:
        found = _statx(fd, _DIOALIGN)
    except OSError:  # forbidden by a filter of system calls, perhaps
        return None
    if not found.mask & _DIOALIGN:
        return None
    return found.dio_mem_align, found.dio_offset_align


class StrangeFile(ValueError):
    """What lies in a record's place is no such file of ours; the message says what it is."""


def read_record(path: Path) -> str:
    """The text of a small regular file that is ours or root's, reached by no link.

    Raises StrangeFile for anything else, FileNotFoundError for nothing, and other OSErrors.
    """
    try:
        # Without O_NONBLOCK, a FIFO would wait for somebody who writes.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StrangeFile(f"{path} is a symbolic link") from None
        if error.errno == errno.ENXIO:
            raise StrangeFile(f"{path} is a socket") from None
        raise
    try:
        _check_kind(path, os.fstat(fd))
        content = b""
        while len(content) <= _LARGEST and (more := os.read(fd, _LARGEST)):
            content += more
    finally:
        os.close(fd)
    if len(content) > _LARGEST:
        raise StrangeFile(f"{path} has more than {_LARGEST} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise StrangeFile(f"{path} is not text") from None


def _check_kind(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StrangeFile(f"{path} is {_kind(found.st_mode)}")
    if found.st_uid not in trusted_owners():
        raise StrangeFile(f"{path} belongs to another user, {found.st_uid}")


def inode_at(path: Path | None) -> tuple[int, int] | None:
    """The device and the number of the inode that has this name, None when nothing has. A link is
    not followed."""
    try:
        found = path.lstat() if path is not None else None
    except FileNotFoundError:
        return None
    return found and (found.st_dev, found.st_ino)


def trusted_owners() -> Collection[int]:
    """Whose records are believed: ours, and those of root."""
    return {0, os.geteuid()}


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(mode), "a device node")


def draft_of(path: Path) -> Path:
    """Where a file is made that then takes the place of this one: nobody else has that name."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}")


def write_record(path: Path, text: str, *, mode: int = 0o600, durable: bool = False) -> None:
    """Puts a file in its place, whole or not at all; what lies there is replaced, not followed."""
    draft = draft_of(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(draft, flags, mode)
    try:
        with open(fd, "w") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(fd)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes what was renamed or made in it durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite(2), until all is written. Raises OSError."""
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def read_into(fd: int, buffer: bytearray | memoryview, offset: int) -> int:
    """pread(2), until the buffer is full or the file ends: how many bytes there were."""
    view, there = memoryview(buffer), 0
    while there < len(view) and (done := os.preadv(fd, [view[there:]], offset + there)):
        there += done
    return there


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Makes a hole in a file, which keeps its size; False: its file system cannot."""
    call = _libc.fallocate64
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return bool(call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0)


@contextmanager
def file_at(address: int, length: int, *, read_only: bool) -> Iterator[tuple[int, int] | None]:
    """The file that is mapped there for others to see, opened, and the offset in it; None: none."""
    fd = -1
    found = None
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, rights, offset, *_ = line.split()
            start, end = (int(edge, 16) for edge in span.split("-"))
            if start <= address and address + length <= end and rights.endswith("s"):
                flags = os.O_RDONLY if read_only else os.O_RDWR
                fd = os.open(f"/proc/self/map_files/{start:x}-{end:x}", flags | os.O_CLOEXEC)
                found = fd, int(offset, 16) + address - start
    try:
        yield found
    finally:
        if fd >= 0:
            os.close(fd)
