# SPDX-License-Identifier: MIT
"""What an overlay has goes into its base.

Until the end, the overlay has everything that the base gets: with it on top, the base reads the
same before, while and after it is written. So a commit that was cut is begun again. What must not
be lost is that one was begun, since the base is no longer the one on record: the map says so first.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pyublk.files import punch_hole
from pyublk.layers.identity import Identity, settle
from pyublk.layers.mapfile import MapFile
from pyublk.layers.overlay_record import BaseChanged
from pyublk.overlays.held import Base, Held, base_of, held, read_map
from pyublk.overlays.runs import common


def commit(file: Path, *, force: bool = False) -> int:
    """Writes what an overlay has into its base, durably, and empties the overlay; returns the bytes
    that were written.

    When it fails or is killed, the overlay still has everything: run it again. `force`: also when
    other overlays are seen to lie over the base, which are of no use then.

    Raises OSError (EBUSY: the overlay, or the base, is in use), BaseChanged, or ValueError.
    """
    with held(file) as overlay:
        text = overlay.base()
        if not force:
            _refuse_others(overlay, text)
        with base_of(text, read_only=False) as base:
            _check_base(overlay, base)
            if not overlay.record.committing:
                overlay.replace_map(replace(overlay.record, committing=True), overlay.map)
            written = _write(overlay, base)
            settle(base.disk.target)
            now = Identity.of(base.disk.target)
            empty = MapFile.new(size=overlay.size, granularity=overlay.granularity)
            overlay.replace_map(overlay.record.over(now), empty, below=now.size)
        # What the map no longer has gives back its room. The file keeps its size throughout, since
        # one that is shorter is taken for damaged.
        punch_hole(overlay.upper, 0, overlay.size)
    return written


def _write(overlay: Held, base: Base) -> int:
    disk, written = base.disk, 0
    if overlay.size > disk.size:
        disk.resize(overlay.size)
    for offset, length, is_data in overlay.extents():
        if is_data:
            disk.pwrite(overlay.read(offset, length), offset)
        else:
            disk.write_zeroes(offset, length)
        written += length
    disk.flush()
    return written


def _check_base(overlay: Held, base: Base) -> None:
    record, size = overlay.record, base.size
    if base.disk.target.read_only:
        raise ValueError(f"{record.name} can only be read: nothing can be committed to it")
    if size > overlay.size:
        raise ValueError(f"{record.name} has {size} bytes, more than {overlay.file}")
    if not record.committing:
        record.check(base.identity, overlay.file)
        return
    before = record.identity
    assert before is not None
    own = [*overlay.runs()]

    def untouched(offset: int) -> bool:
        return not any(common(own, [(offset, 1)]))

    # It may have grown already, and sources that speak for themselves say something else now.
    found = Identity.of(base.disk.target, size=min(before.size, size))
    found = replace(found, said=before.said)
    if (why := before.content_difference(found, untouched)) is not None:
        raise BaseChanged(
            f"{record.name} was changed since a commit of {overlay.file} into it was begun: {why}"
        )


def _refuse_others(overlay: Held, text: str) -> None:
    own = overlay.file.resolve()
    others = [str(one) for one in overlays_over(text, own.parent) if one.resolve() != own]
    if others:
        raise ValueError(
            f"{' and '.join(others)} also {'lie' if len(others) > 1 else 'lies'} over {text}, and "
            "would be of no use after a commit into it: commit with --force if that does not matter"
        )


def overlays_over(text: str, *directories: Path) -> Iterator[Path]:
    """The overlays over a source that lie in these directories, or beside the source."""
    beside = Path(text).parent if Path(text).exists() else None
    places = {place.resolve() for place in (*directories, beside) if place is not None}
    for place in sorted(places):
        for found in sorted(place.glob("*.map")):
            file = found.with_suffix("")
            try:
                _, record = read_map(file)
            except (OSError, ValueError):
                continue  # another program's
            if record.base == text:
                yield file
