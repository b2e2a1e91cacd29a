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
    """`since`: seconds since 1970 when it went out of step; None: it is in step."""

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
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
