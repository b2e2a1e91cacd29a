# SPDX-License-Identifier: MIT
"""What is done to overlays that no disk uses: the commands `pyublk overlay`.

held        an overlay that nobody else can have meanwhile: its map, its record, its base
runs        which blocks the map has
placing     new files, which appear whole or not at all
creating    a new overlay; a clone in its place
committing  what an overlay has goes into its base
rebasing    another base; a chain made shorter; an image without a base
telling     what an overlay is, and where it differs from its base

An overlay is two files: its blocks, and the map of them. Whatever changes it ends with a new map,
which replaces the old one as a whole: what was written to the blocks before counts for nothing
until then, and for good from then on.
"""

from pyublk.overlays.committing import commit
from pyublk.overlays.creating import GRANULARITY, clone, create
from pyublk.overlays.rebasing import Trust, extract, rebase, squash
from pyublk.overlays.telling import OverlayInfo, diff, info

__all__ = [
    "GRANULARITY",
    "OverlayInfo",
    "Trust",
    "clone",
    "commit",
    "create",
    "diff",
    "extract",
    "info",
    "rebase",
    "squash",
]
