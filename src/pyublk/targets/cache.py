# SPDX-License-Identifier: MIT
"""A cache as a target of its own: of a file, and of the text of what it caches."""

from pathlib import Path

from pyublk.layers.cache import Cache, Mode, OnChange
from pyublk.targets.sources import from_text


class CachedSource(Cache):
    """A `Cache` over the source of that text (`pyublk.targets.sources.from_text`).

    Args:
        file: the local file.
        source: what it caches, such as ``url:https://host/disk.img``.
        read_only: serve a disk that cannot be written to.
        mode, limit, granularity, readahead, record, fetchers, changed, patience, drain_after,
            drain_within: as of `Cache`.
    """

    def __init__(
        self,
        file: Path,
        source: str,
        *,
        read_only: bool = False,
        mode: Mode = "write-through",
        limit: int | None = None,
        granularity: int | None = None,
        readahead: int = 8 << 20,
        record: bool = False,
        fetchers: int | None = None,
        changed: OnChange = "refuse",
        patience: float = 10.0,
        drain_after: float = 5.0,
        drain_within: float = 30.0,
    ) -> None:
        super().__init__(
            from_text(source, read_only=read_only),
            file,
            mode=mode,
            limit=limit,
            granularity=granularity,
            readahead=readahead,
            record=record,
            fetchers=fetchers,
            changed=changed,
            patience=patience,
            drain_after=drain_after,
            drain_within=drain_within,
        )
