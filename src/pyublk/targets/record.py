# SPDX-License-Identifier: MIT
"""A mirror's record: which legs are in step, in a file that is whole whatever happens."""

import json
import os
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from pyublk.files import StrangeFile, read_record, sync_directory, trusted_owners, write_record


class LegState(IntEnum):
    """A leg of a mirror: SYNCED is read and written, RESYNC is written but not yet read, FAILED is
    left alone."""

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
class MirrorState:
    """`active`: the mirror was not stopped when this was written."""

    active: bool = False
    legs: list[LegRecord] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "MirrorState":
        """An empty one when there is no such file. Raises ValueError for a file that is none."""
        try:
            found = json.loads(read_record(path))
            legs = [
                LegRecord(leg["path"], LegState[leg["state"].upper()], leg["since"])
                for leg in found["legs"]
            ]
            if not isinstance(found["active"], bool):
                raise ValueError(found["active"])
            return cls(found["active"], legs)
        except FileNotFoundError:
            return cls()
        except StrangeFile as strange:
            raise ValueError(f"{strange}, and not a mirror's record") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is not a mirror's record") from None

    def write(self, path: Path) -> None:
        """Durably, whole or not at all."""
        legs = [
            {"path": leg.path, "state": str(leg.state), "since": leg.since} for leg in self.legs
        ]
        text = json.dumps({"active": self.active, "legs": legs}, indent=1)
        write_record(path, text, mode=0o666, durable=True)


def find_record(path: Path) -> Path:
    """Where the record is that `path` may only point to. Raises ValueError when it is not there, or
    when another user points there."""
    found = Path(os.path.realpath(path))  # which bears a link that leads to itself
    if path.is_symlink():
        if path.lstat().st_uid not in trusted_owners():
            raise ValueError(f"{path} is another user's link, and is not followed")
        if not found.exists():
            raise ValueError(
                f"{path} points to the mirror's record, {found}, which is not there: bring it "
                f"back, or remove {path}, and the first leg will be copied to the others"
            )
    return found


def point_to_record(place: Path, record: Path) -> None:
    """Makes `place` a symbolic link to a record, durably, unless it leads there already."""
    if place.resolve() != record:
        place.symlink_to(record)
        sync_directory(place.parent)
