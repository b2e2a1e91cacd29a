# SPDX-License-Identifier: MIT
"""An overlay as a disk of its own: its base is the one that it has on record."""

from pathlib import Path
from typing import Any

from pyublk.layers.overlay import Overlay
from pyublk.layers.overlay_record import OverlayRecord
from pyublk.target import Target
from pyublk.targets.sources import from_text


class OverlayFile(Overlay):
    """Serves an overlay that `pyublk overlay create` made, over the base that is on record in it.

    Args:
        file: the overlay.
        read_only: open it for reading, and make the disk read-only; others may read it too.
        block_size: the disk's logical block size in bytes.
    """

    def __init__(self, file: Path, *, read_only: bool = False, block_size: int = 512) -> None:
        super().__init__(None, file, read_only=read_only, block_size=block_size)

    def make_below(self, record: dict[str, Any]) -> Target:
        base = OverlayRecord.of(record, self.file).base
        if base is None:
            raise ValueError(
                f"{self.file} has no base on record: it is a layer (`--layer overlay:file="
                f"{self.file}`); `pyublk overlay rebase --unsafe` gives it a base"
            )
        return from_text(base, read_only=True)
