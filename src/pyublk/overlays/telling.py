# SPDX-License-Identifier: MIT
"""What an overlay is, and where it differs from its base."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyublk.errors import UblkError
from pyublk.layers.mapfile import MapFile
from pyublk.overlays.held import PIECE, Held, base_of, held, own_base, read_map
from pyublk.overlays.runs import Run, pieces, runs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayInfo:
    """An overlay: sizes in bytes, `present` of them its own, and `allocated` of them on its file
    system. `state` of the base is "unchanged", "changed", "missing" or "none", and `why` says
    more."""

    file: str
    size: int
    granularity: int
    present: int
    allocated: int
    base: str | None
    state: str
    why: str
    committing: bool


def info(file: Path) -> OverlayInfo:
    """Of an overlay, also of one that a disk uses: what it wrote last may be missing.

    Raises OSError or ValueError when it is none.
    """
    found, record = read_map(file)
    state, why = "none", ""
    if record.base is not None and not record.committing:
        try:
            with base_of(record.base) as base:
                assert record.identity is not None
                why = record.identity.difference(base.identity) or ""
                state = "changed" if why else "unchanged"
        except (OSError, ValueError, UblkError) as error:
            state, why = "missing", str(getattr(error, "strerror", None) or error)
    elif record.committing:
        state, why = "changed", "a commit into it has not ended"
    blocks = sum(one.stat().st_blocks for one in (file, MapFile.path_of(file)))
    return OverlayInfo(
        file=str(file),
        size=found.size,
        granularity=found.granularity,
        present=sum(length for _, length in runs_of(found.bits, found.granularity, found.size)),
        allocated=512 * blocks,
        base=record.base,
        state=state,
        why=why,
        committing=record.committing,
    )


def diff(file: Path, *, content: bool = False) -> list[Run]:
    """What an overlay has itself, as (offset, length) in bytes. `content`: only what differs from
    the base, which is read for that."""
    with held(file, read_only=True) as overlay:
        if not content:
            return [*overlay.runs()]
        overlay.record.check_whole(file)
        return [*_joined(_different(overlay))]


def _different(overlay: Held) -> Iterator[Run]:
    block = overlay.granularity
    with own_base(overlay) as base:
        for offset, length in pieces(overlay.runs(), max(PIECE, block)):
            own, theirs = overlay.read(offset, length), base.read(offset, length)
            for at in range(0, length, block) if own != theirs else ():
                if own[at : at + block] != theirs[at : at + block]:
                    yield offset + at, min(block, length - at)


def _joined(runs: Iterator[Run]) -> Iterator[Run]:
    before: Run | None = None
    for offset, length in runs:
        if before is not None and sum(before) == offset:
            before = before[0], before[1] + length
            continue
        if before is not None:
            yield before
        before = offset, length
    if before is not None:
        yield before
