# SPDX-License-Identifier: MIT
"""A record in a file: a ZIP archive of `record.json` (the requests and marks), `data` (what the
writes wrote, one after the other) and `before` (the disk before the record)."""

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyublk.testing.power_cuts.record import PIECE, Flush, Mark, Record, Write

VERSION = 1
#: What of a write is in `record.json` as it is.
_FIELDS = (
    "number", "kind", "offset", "length", "fua", "arrived", "completed", "stable", "forgotten",
)  # fmt: skip


def save(path: Path | str, record: Record, about: dict[str, Any]) -> None:
    """Writes the file; `about` goes into `record.json`."""
    with record.lock, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        writes = [
            {name: getattr(write, name) for name in _FIELDS} | {"zeroes": write.data is None}
            for write in record.writes
        ]
        told = about | {
            "version": VERSION,
            "size": record.size,
            "now": record.now,
            "writes": writes,
            "flushes": [asdict(flush) for flush in record.flushes],
            "marks": [asdict(mark) for mark in record.marks],
        }
        archive.writestr("record.json", json.dumps(told, indent=1))
        archive.writestr("data", b"".join(write.data or b"" for write in record.writes))
        with archive.open("before", "w", force_zip64=True) as file:
            buffer = memoryview(bytearray(PIECE))
            for offset in range(0, record.size, PIECE):
                piece = buffer[: min(PIECE, record.size - offset)]
                record.read_before(offset, piece)
                file.write(piece)


class Saved:
    """The file of `save`, opened. Raises ValueError for another file."""

    def __init__(self, path: Path | str) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
            self.about = json.loads(self._archive.read("record.json"))
            version = self.about["version"]
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError):
            raise ValueError(f"{path} is not the record of a PowerCut") from None
        if version != VERSION:
            raise ValueError(f"{path} has version {version} of the format, not {VERSION}")

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()

    def pieces(self) -> "list[tuple[int, bytes]]":
        """(offset, bytes) of the disk before the record, where it was not zero."""
        found, offset, zeroes = [], 0, bytes(PIECE)
        with self._archive.open("before") as file:
            while piece := file.read(PIECE):
                if piece != zeroes[: len(piece)]:
                    found.append((offset, piece))
                offset += len(piece)
        return found

    def writes(self) -> list[Write]:
        """In the order of arrival."""
        data, at, found = self._archive.read("data"), 0, []
        for one in self.about["writes"]:
            write = Write(**{name: one[name] for name in _FIELDS}, data=None)
            if not one["zeroes"]:
                write.data = data[at : at + write.length]
                at += write.length
            found.append(write)
        return found

    def restore_rest(self, record: Record) -> None:
        """All but the writes."""
        record.now = self.about["now"]
        record.flushes = [Flush(**flush) for flush in self.about["flushes"]]
        record.marks = [Mark(**mark) for mark in self.about["marks"]]
