# SPDX-License-Identifier: MIT
"""Copy-on-write: writes go to a file of the overlay's own, and the target below is only read."""

import os
from pathlib import Path
from typing import Any

from pyublk.layers.base import Below
from pyublk.layers.bases import open_base
from pyublk.layers.identity import Identity, settle
from pyublk.layers.mapfile import MapFile
from pyublk.layers.overlay_record import OverlayRecord
from pyublk.layers.presence import PresenceLayer
from pyublk.target import Target


class Overlay(PresenceLayer):
    """A disk that reads as the target below it does, until something is written.

    What is written goes to `file`, each block at its own place; the file `FILE.map` beside it says
    which blocks are there. Both are made when neither exists. The target below is opened to be
    read, and no one may write it meanwhile; when it is not what it was the last time, the overlay
    is refused.

    Args:
        below: the base. Several overlays of a process may lie over one target, which is opened
            with the first of them and closed with the last.
        file: the overlay.
        size: bytes of the disk when the overlay is made; at least, and by default, those of the
            base. What is beyond the base reads as zeroes.
        granularity: bytes of a block when the overlay is made, a power of two: a write to a part
            of one copies the rest up first.
        read_only: open both files for reading, and make the disk read-only; others may read it too.
        block_size: the disk's logical block size in bytes.
    """

    def __init__(
        self,
        below: Target | None,
        file: Path,
        *,
        size: int | None = None,
        granularity: int | None = None,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        super().__init__(
            below,
            Path(file),
            size=size,
            granularity=granularity,
            read_only=read_only,
            block_size=block_size,
            metadata=OverlayRecord().metadata(),
        )
        self._base = below

    def open(self) -> None:
        if self._base is not None:
            self._base.read_only = True
        super().open()
        try:
            if self.read_only:
                return
            if self.layout.in_memory:
                os.utime(self.upper_fd)  # writes to mapped memory of tmpfs do not do that
            record = OverlayRecord.of(self.metadata, self.file)
            if record.identity is None:
                settle(self.below)
                self.set_metadata(record.over(self._identity_below()).metadata())
        except BaseException:
            self.close()
            raise

    def open_below(self, record: dict[str, Any]) -> Below:
        return super().open_below(record) if self._base is None else open_base(self._base)

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        record = OverlayRecord.of(metadata, self.file)
        record.check_whole(self.file)
        record.check(self._identity_below(), self.file)

    def _identity_below(self) -> Identity:
        # By the calls that there are: others of its own would end those of overlays beside it.
        return Identity.of(self.below, below=self._served(self._below))

    def why_of_this_size(self) -> str:
        return (
            f"an overlay is of one size: to have a larger disk, stop this one, and lay an overlay "
            f"of that size over it (pyublk overlay create NEW --base overlay:{self.file} --size "
            "SIZE)"
        )

    def identity(self) -> str | None:
        """When its files were written last: enough for an overlay over this one, which it has to
        itself while it is served."""
        return overlay_identity(self.file)

    def status(self) -> dict[str, Any]:
        """Its files, its base if that is on record, and the counters of a `PresenceLayer`."""
        base = OverlayRecord.of(self.metadata, self.file).base
        return {"file": str(self.file), "base": base, **(super().status() or {})}


def overlay_identity(file: Path) -> str:
    """What an overlay says of itself as somebody's base."""
    upper, found = os.stat(file), os.stat(MapFile.path_of(file))
    return f"written {upper.st_mtime_ns}, map {found.st_mtime_ns}"
