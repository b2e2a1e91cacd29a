# SPDX-License-Identifier: MIT
"""What a disk's users wanted first, in order: recorded once, fetched before they ask the next time.

The file is text: a line that says of which disk it is, then a line for each run of blocks.
"""

import logging
import os
import threading
from pathlib import Path

from pyublk.files import sync_directory

log = logging.getLogger("pyublk.cache")

#: Runs of blocks that are recorded at most.
LONGEST = 1 << 16


class BootTrace:
    """Runs of blocks in the order in which they were first missed."""

    def __init__(self, path: Path, *, size: int, block_size: int) -> None:
        self.path = path
        self._title = f"pyublk boot 1 size={size} block_size={block_size}"
        self._blocks = -(-size // block_size)
        self._lock = threading.Lock()
        self._runs: list[tuple[int, int]] = []
        self._saved = 0

    def read(self) -> list[tuple[int, int]] | None:
        """The runs that were recorded; None when there is no file, or it is of another disk, which
        is logged: a trace only makes things faster."""
        try:
            title, *lines = self.path.read_text().splitlines()
            if title != self._title:
                raise ValueError(f"it begins with {title!r}, not with {self._title!r}")
            runs = [(int(first), int(count)) for first, count in map(str.split, lines)]
            for first, count in runs:
                if first < 0 or count < 1 or first + count > self._blocks:
                    raise ValueError(f"the disk has no {count} blocks from block {first} on")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("the boot trace %s cannot be used: %s", self.path, error)
            return None
        return runs

    def missed(self, first: int, count: int) -> None:
        """These blocks were wanted, and were not there."""
        with self._lock:
            if len(self._runs) >= LONGEST:
                return
            if self._runs and sum(self._runs[-1]) == first and len(self._runs) > self._saved:
                first, count = self._runs[-1][0], self._runs[-1][1] + count
                self._runs.pop()
            self._runs.append((first, count))

    def save(self) -> None:
        """Writes what is new; the file is there whole or not at all. Raises OSError."""
        with self._lock:
            runs = list(self._runs)
            if len(runs) == self._saved:
                return
        draft = self.path.with_name(f".{self.path.name}.draft")
        lines = [self._title, *(f"{first} {count}" for first, count in runs)]
        draft.write_text("\n".join(lines) + "\n")
        os.rename(draft, self.path)
        sync_directory(self.path.parent)
        with self._lock:
            self._saved = len(runs)
