# SPDX-License-Identifier: MIT
"""A mirror's record: which legs are in step, in a file that is whole whatever happens."""

import json
import os
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path


class LegState(IntEnum):
    """A leg of a mirror: read and written; written but not yet read; left alone."""

    SYNCED = 0
    RESYNC = 1
    FAILED = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class LegRecord:
    """`since`: seconds since 1970 when it went out of step; None: it is in step, or never was."""

    path: str
    state: LegState
    since: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """`active`: the mirror was not stopped when this was written."""

    active: bool = False
    legs: list[LegRecord] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """An empty one when there is no such file. Raises ValueError for a file that is none."""
        try:
            found = json.loads(path.read_text())
            legs = [
                LegRecord(leg["path"], LegState[leg["state"].upper()], leg["since"])
                for leg in found["legs"]
            ]
            return cls(found["active"], legs)
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not a mirror's record") from None

    def write(self, path: Path) -> None:
        """Durably, whole or not at all."""
        legs = [
            {"path": leg.path, "state": str(leg.state), "since": leg.since} for leg in self.legs
        ]
        fresh = path.with_name(path.name + ".new")
        with open(fresh, "w") as file:
            json.dump({"active": self.active, "legs": legs}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        _sync_folder(path)


def find_record(path: Path) -> Path:
    """Where the record is that `path` may only point to. Raises ValueError when it is not there."""
    found = path.resolve()
    if path.is_symlink() and not found.exists():
        raise ValueError(
            f"{path} points to the mirror's record, {found}, which is not there: bring it back, or "
            f"remove {path}, and the first leg will be copied to the others"
        )
    return found


def point_to_record(place: Path, record: Path) -> None:
    """Makes `place` a symbolic link to a record, durably, unless it leads there already."""
    if place.resolve() != record:
        place.symlink_to(record)
        _sync_folder(place)


def _sync_folder(path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
