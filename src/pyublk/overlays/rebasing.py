# SPDX-License-Identifier: MIT
"""Another base for an overlay; a chain of overlays made shorter; an image without a base.

What the overlay would no longer read is copied up before the map changes, so that the disk has the
same bytes throughout.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pyublk.files import write_all
from pyublk.layers.mapfile import MapFile
from pyublk.layers.overlay_record import BaseChanged, OverlayRecord
from pyublk.overlays.held import (
    PIECE,
    Base,
    Held,
    base_of,
    beyond,
    held,
    own_base,
    read_map,
)
from pyublk.overlays.placing import placed
from pyublk.overlays.runs import Run, common, pieces, rest_of, runs_of, whole_blocks
from pyublk.sizes import format_size
from pyublk.targets.overlay import OverlayFile
from pyublk.targets.sources import absolute
from pyublk.testing import Disk

#: What is taken on trust: nothing; that a base with the same sampled bytes is the same one; all.
Trust = Literal["nothing", "samples", "everything"]

_OVERLAY = "overlay:"


def rebase(file: Path, base: str, *, trust: Trust = "nothing") -> int:
    """Puts an overlay over another base; returns the bytes that were copied up for that.

    Args:
        trust: "nothing": the disk keeps its bytes, for which both bases are read. "samples": the
            new base is the old one, copied or moved; its size and some of its blocks are compared.
            "everything": only the record changes.

    Raises OSError, BaseChanged or ValueError; the overlay is as it was then.
    """
    base = absolute(base)
    with held(file) as overlay, base_of(base, settled=True) as new:
        if new.size > overlay.size:
            raise ValueError(
                f"{base} has {format_size(new.size)}, and {file} only {format_size(overlay.size)}: "
                "an overlay is at least as large as its base"
            )
        record, copied = OverlayRecord(base, new.identity), 0
        short = beyond(new.size, overlay.granularity, overlay.size)
        if trust == "nothing":
            overlay.record.check_whole(file)
            with own_base(overlay) as old:
                copied, blocks = _copy_up(overlay, old, _differing(overlay, old, new, short))
        else:
            if trust == "samples":
                overlay.record.check_whole(file)
                _check_samples(overlay.record, new, base)
            _, blocks = _copy_up(overlay, new, common(_absent(overlay), short))
        overlay.replace_map(record, blocks, below=new.size)
    return copied


def squash(file: Path) -> int:
    """Makes an overlay over an overlay one over the base of that, down to a base that is none;
    returns the bytes that were copied up. The overlays in between stay as they are.

    Raises OSError, BaseChanged or ValueError; the overlay is as it was then.
    """
    with held(file) as overlay:
        overlay.record.check_whole(file)
        between: list[Run] = []
        record = overlay.record
        if _below(record) is None:
            raise ValueError(
                f"{file} lies over {record.name}, which is not an overlay: there is nothing to "
                "squash; with --to IMAGE, it becomes an image without a base"
            )
        with own_base(overlay) as old:  # which checks, and keeps, the whole chain
            while (middle := _below(record)) is not None:
                found, record = read_map(middle)
                record.check_whole(middle)
                between += runs_of(found.bits, found.granularity, found.size)
            wanted = whole_blocks(sorted(between), overlay.granularity, overlay.size)
            copied, blocks = _copy_up(overlay, old, common(_absent(overlay), wanted))
        overlay.replace_map(record, blocks, below=found.header.below_size)
    return copied


def extract(file: Path, image: Path) -> int:
    """Writes the whole disk of an overlay into a new file, which needs no base; returns the bytes
    that are not zero, and take room. The overlay stays as it is."""
    with (
        Disk(OverlayFile(file, read_only=True), max_io_size=PIECE) as disk,
        placed(image) as fd,
    ):
        os.ftruncate(fd, disk.size)
        written = 0
        for offset, length in pieces([(0, disk.size)], PIECE):
            data = disk.pread(length, offset)
            if data.count(0) != length:
                write_all(fd, data, offset)
                written += length
    return written


def _below(record: OverlayRecord) -> Path | None:
    """The overlay that is the base."""
    if record.base is None or not record.base.startswith(_OVERLAY):
        return None
    return Path(record.base.removeprefix(_OVERLAY))


def _check_samples(record: OverlayRecord, new: Base, base: str) -> None:
    if record.identity is None:
        raise ValueError("nothing is known of the base before: use --unsafe")
    if (why := record.identity.content_difference(new.identity)) is not None:
        raise BaseChanged(f"{base} is not a copy of {record.name}: {why}")


def _absent(overlay: Held) -> Iterator[Run]:
    return rest_of(overlay.runs(), overlay.size)


def _differing(overlay: Held, old: Base, new: Base, short: list[Run]) -> Iterator[Run]:
    """What the overlay does not have itself, and would read otherwise from the new base, or not
    from it at all (`short`); in whole blocks of the overlay."""
    block = overlay.granularity
    inside = rest_of(short, overlay.size)
    for offset, length in pieces(common(_absent(overlay), inside), max(PIECE, block)):
        before, after = old.read(offset, length), new.read(offset, length)
        if before == after:
            continue
        for at in range(0, length, block):
            if before[at : at + block] != after[at : at + block]:
                yield offset + at, min(block, length - at)
    yield from common(_absent(overlay), short)


def _copy_up(overlay: Held, old: Base, runs: Iterable[Run]) -> tuple[int, MapFile]:
    """Copies whole blocks from the base; the bytes, and the map that has them too."""
    made, copied, block = replace(overlay.map, bits=overlay.map.bits[:]), 0, overlay.granularity
    for offset, length in pieces(runs, max(PIECE, block)):
        overlay.write(offset, old.read(offset, length))
        copied += length
        made.set_present(offset // block, -(-(offset + length) // block))
    return copied, made
