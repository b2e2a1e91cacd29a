# SPDX-License-Identifier: MIT
"""An overlay as a disk of its own: its base is the one that it has on record."""

from functools import partial
from pathlib import Path
from typing import Any

from pyublk.layers.base import Below
from pyublk.layers.bases import open_named_base
from pyublk.layers.overlay import Overlay
from pyublk.layers.overlay_record import OverlayRecord
from pyublk.targets.sources import from_text


class OverlayFile(Overlay):
    """Serves an overlay that `pyublk overlay create` made, over the base that is on record in it.

    A process that serves several overlays over one base has that open once.

    Args:
        file: the overlay.
        read_only: open it for reading, and make the disk read-only; others may read it too.
        block_size: the disk's logical block size in bytes.
    """

    def __init__(self, file: Path, *, read_only: bool = False, block_size: int = 512) -> None:
        super().__init__(None, file, read_only=read_only, block_size=block_size)

    def open_below(self, record: dict[str, Any]) -> Below:
        known = OverlayRecord.of(record, self.file)
        if known.base is None:
            raise ValueError(
                f"{self.file} has no base on record: it is a layer (`--layer overlay:file="
                f"{self.file}`); `pyublk overlay rebase --unsafe` gives it a base"
            )
        make = partial(from_text, known.base, read_only=True)
        return open_named_base(known.base, make, known.identity)
