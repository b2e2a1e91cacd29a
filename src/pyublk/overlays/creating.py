# SPDX-License-Identifier: MIT
"""A new overlay, or a clone where the file system makes one."""

import errno
import fcntl
import os
from pathlib import Path

from pyublk.backing import Backing
from pyublk.files import write_all
from pyublk.layers.mapfile import MapFile, check_granularity, put_map
from pyublk.layers.overlay_record import OverlayRecord
from pyublk.overlays.held import base_of, read_map
from pyublk.overlays.placing import placed, refuse_existing
from pyublk.sizes import format_size
from pyublk.targets.sources import absolute

#: ioctl_ficlone(2).
FICLONE = 0x40049409
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV)

#: Bytes that every disk is a multiple of.
SECTOR = 512
#: Bytes of a block, unless told otherwise.
GRANULARITY = 4096


def create(
    file: Path, base: str, *, size: int | None = None, granularity: int = GRANULARITY
) -> MapFile:
    """Makes an overlay over a base, which is only read; returns its map.

    Args:
        file: the overlay, of which there may be nothing yet.
        base: a source as text.
        size: bytes of the disk: at least those of the base, and by default as many.
        granularity: bytes of a block, which is copied up as a whole: a power of two.

    Raises OSError or ValueError, and leaves nothing.
    """
    _refuse_existing(file)
    check_granularity(granularity)
    base = absolute(base)
    with base_of(base, settled=True) as opened:
        below = opened.size
        made = MapFile.new(
            size=_size_over(base, below, size),
            granularity=granularity,
            below_size=below,
            record=OverlayRecord(base, opened.identity).metadata(),
        )
        tail = below % granularity if made.size > below else 0
        _make(file, made, opened.read(below - tail, tail))
    return made


def _make(file: Path, made: MapFile, tail: bytes) -> None:
    """Makes both files. `tail`: what the base has of its last block, if that is the overlay's."""
    try:
        # The map first: alone, it says what is missing, and this command makes it good.
        os.close(put_map(MapFile.path_of(file), made.header, made.bits, mode=0o600))
        with placed(file) as fd:
            os.ftruncate(fd, made.size)
            write_all(fd, tail, made.header.below_size - len(tail))
    except BaseException:
        MapFile.path_of(file).unlink(missing_ok=True)
        raise


def _refuse_existing(file: Path) -> None:
    refuse_existing(file)
    if os.path.lexists(MapFile.path_of(file)):
        try:
            read_map(file)
        except (OSError, ValueError):
            refuse_existing(MapFile.path_of(file))
        # An overlay's map alone, without the blocks, is of no use: a create was cut.


def _size_over(base: str, least: int, wanted: int | None) -> int:
    if wanted is None:
        return least
    if wanted % SECTOR:
        raise ValueError(f"size {wanted} is not a multiple of {SECTOR} bytes")
    if wanted < least:
        raise ValueError(
            f"size {format_size(wanted)} is less than {base} has, {format_size(least)}: an overlay "
            "is at least as large as its base"
        )
    return wanted


def clone(file: Path, base: str) -> None:
    """Makes a file that shares its blocks with the base until one of them is written, as the file
    system does it (FICLONE). It is no overlay, but a disk image like any other.

    Raises OSError EOPNOTSUPP where the file system cannot, and leaves nothing.
    """
    refuse_existing(file)
    source = Backing.open(Path(base), read_only=True)
    try:
        source.keep([(0, max(source.size, 1))], read_only=True)
        with placed(file) as fd:
            try:
                fcntl.ioctl(fd, FICLONE, source.fd)
            except OSError as error:
                if error.errno not in _CANNOT_CLONE:
                    raise
                raise OSError(
                    errno.EOPNOTSUPP,
                    f"{base} cannot be cloned as {file}: that takes two files on one file system "
                    "such as xfs or btrfs; leave out --clone for an overlay",
                ) from None
    finally:
        source.close()
