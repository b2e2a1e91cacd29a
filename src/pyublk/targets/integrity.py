# SPDX-License-Identifier: MIT
"""A file as a disk, with the metadata of its blocks in a second file."""

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from pyublk._native import IO, ShardedLock
from pyublk.arguments import whole
from pyublk.backing import Backing
from pyublk.files import read_into, write_all
from pyublk.params import Integrity
from pyublk.paths import DataPath
from pyublk.profile import Concurrency
from pyublk.target import Target
from pyublk.uapi import Checksum, Feature, IOFlag, Op

#: Bytes of a block's protection information.
_PI_BYTES = {Checksum.NONE: 0, Checksum.IP: 8, Checksum.T10DIF: 8, Checksum.NVME: 16}
#: A hole in the metadata's file is metadata of all ones, which the kernel does not check.
_INVERTED = bytes(range(255, -1, -1))


class IntegrityFile(Target):
    """Serves `path`, with the metadata of each interval of data in the file `metadata`.

    The kernel generates the protection information of writes, and checks it on reads: a client gets
    EILSEQ instead of wrong data (Linux 7.0). Blocks that were never written are not checked.

    Args:
        path: a regular file, or a block device, which is opened exclusively.
        metadata: another one for the metadata; created if it does not exist. Every bit of it is
            inverted, so that it is sparse where nothing was written.
        size: creates the file with this size, or extends it; by default, the size of the file.
        checksum: of the protection information: T10DIF or IP (8 bytes), NVME (16), or NONE.
        metadata_size: bytes for each interval; by default, those of the protection information,
            which is at their end.
        interval: bytes of data that one piece of metadata covers, from 512 to the block size.
        ref_tag: whether the protection information includes a block's position.
        read_only: open both for reading, and make the disk read-only.
        block_size: the disk's logical block size in bytes.
    """

    needs = Feature.INTEGRITY
    paths = (DataPath.USER_COPY,)  # metadata travels no other way
    concurrency: ClassVar[Concurrency] = "parallel"
    flushes = True
    recoverable = True
    takes_fua = True

    def __init__(
        self,
        path: Path,
        metadata: Path,
        *,
        size: int | None = None,
        checksum: Checksum = Checksum.T10DIF,
        metadata_size: int | None = None,
        interval: int = 512,
        ref_tag: bool = True,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        super().__init__(size=size or 0, block_size=block_size, read_only=read_only)
        pi_bytes = _PI_BYTES[checksum]
        per_interval = pi_bytes if metadata_size is None else whole("metadata_size", metadata_size)
        if not per_interval:
            raise ValueError("metadata without a checksum needs a metadata_size of 1 to 255 bytes")
        self.integrity = Integrity(
            metadata_size=per_interval,
            interval=interval,
            pi_offset=max(per_interval - pi_bytes, 0),
            checksum=checksum,
            ref_tag=ref_tag and checksum is not Checksum.NONE,
        )
        self.path, self.metadata = Path(path), Path(metadata)
        self._wanted_size = size
        self._per_interval = per_interval
        self._interval = interval
        # A block and its metadata change together, as on a disk that has them side by side.
        self._lock = ShardedLock(granule=64 * 1024)
        self._files: tuple[Backing, ...] = ()

    def open(self) -> None:
        with ExitStack() as undo:
            data = self._open_file(undo, self.path, self._wanted_size)
            self.size = data.size if self._wanted_size is None else self._wanted_size
            if self.size <= 0 or self.size % self.block_size:
                raise ValueError(
                    f"{self.path} has {self.size} bytes: a disk needs a positive multiple of its "
                    f"block size, {self.block_size}; give a size, or another block size"
                )
            needed = self.size // self._interval * self._per_interval
            beside = self._open_file(undo, self.metadata, needed)
            if beside.size < needed:
                raise ValueError(
                    f"{self.metadata} has {beside.size} bytes, and the metadata of {self.path} "
                    f"takes {needed}"
                )
            data.keep([(0, self.size)], read_only=self.read_only)
            beside.keep([(0, needed)], read_only=self.read_only)
            self._files = (data, beside)
            undo.pop_all()

    def _open_file(self, undo: ExitStack, path: Path, size: int | None) -> Backing:
        backing = Backing.open(path, size=size, read_only=self.read_only)
        undo.callback(backing.close)
        if backing.made:
            undo.callback(path.unlink)
        return backing

    def close(self) -> None:
        for backing in self._files:
            backing.close()
        self._files = ()

    def handle(self, io: IO) -> None:
        """A request of the kernel's, on any thread."""
        data, beside = (backing.fd for backing in self._files)
        if io.op is Op.FLUSH:
            _sync(data, beside)
        elif io.op is Op.READ:
            self._read(io, data, beside)
        elif io.op is Op.WRITE:
            self._write(io, data, beside)
            if io.flags & IOFlag.FUA:
                _sync(data, beside)
        else:
            raise OSError(errno.EOPNOTSUPP, f"{io.op.name} is not announced")

    def _place(self, io: IO) -> tuple[int, int]:
        """Where the metadata of a request is, and how many bytes it has."""
        first = io.offset // self._interval * self._per_interval
        return first, io.length // self._interval * self._per_interval

    def _read(self, io: IO, data: int, beside: int) -> None:
        place, length = self._place(io)
        with self._lock.reading(io.offset, io.length):
            found = _read_all(data, io.length, io.offset)
            metadata = _read_all(beside, length, place) if io.metadata else b""
        io.write_from(found)
        if io.metadata:
            io.write_from(metadata.translate(_INVERTED), metadata=True)

    def _write(self, io: IO, data: int, beside: int) -> None:
        place, length = self._place(io)
        written, metadata = bytearray(io.length), bytearray(length)
        io.read_into(written)
        if io.metadata:
            io.read_into(metadata, metadata=True)
            metadata = metadata.translate(_INVERTED)
        # Without metadata, what there was belongs to other data: from now on it is not checked.
        with self._lock.writing(io.offset, io.length):
            write_all(data, written, io.offset)
            write_all(beside, metadata, place)


def _sync(*files: int) -> None:
    for file in files:
        os.fdatasync(file)


def _read_all(file: int, length: int, offset: int) -> bytearray:
    found = bytearray(length)
    if read_into(file, found, offset) < length:
        raise OSError(errno.EIO, "the file was cut short")
    return found
