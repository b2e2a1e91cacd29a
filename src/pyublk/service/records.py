# SPDX-License-Identifier: MIT
"""The run directory: a record and a log for each disk that a command of ours serves.

`/run/pyublk/N.json` and `/run/pyublk/N.log` belong to `/dev/ublkbN`; PYUBLK_RUN_DIR names another
directory. A record is believed only while the kernel's device carries the same cookie.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pyublk.control import DeviceInfo
from pyublk.service.plan import Plan
from pyublk.service.processes import ProcessId

#: In a status, beside what the target says: how many requests have failed, if any has.
FAILED = "failed_requests"


def run_directory() -> Path:
    """Where records and logs are; need not exist yet."""
    return Path(os.environ.get("PYUBLK_RUN_DIR") or "/run/pyublk").absolute()


def make_run_directory() -> Path:
    """As `run_directory`, made if need be; raises the OSError that prevented it."""
    directory = run_directory()
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        error.add_note("set PYUBLK_RUN_DIR to a directory for the records and logs of servers")
        raise
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A served disk: what the kernel does not know of it.

    `cookie` is the device's own; `log` is None for a server that writes to its terminal;
    `data_path` is how the data travels, and why, in words.
    """

    id: int
    cookie: int
    server: ProcessId
    plan: Plan
    log: Path | None
    data_path: str | None = None

    @property
    def path(self) -> str:
        """The block device."""
        return f"/dev/ublkb{self.id}"

    def write(self) -> None:
        """Keeps it, readable for its owner only: a target's options may be secret."""
        fields = asdict(self) | {"log": None if self.log is None else str(self.log)}
        final = place(self.id)
        draft = final.with_suffix(".new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(fields, file)
        draft.replace(final)

    @classmethod
    def read(cls, device: int) -> Self | None:
        """The record of a device id; None if there is none, or none that can be understood."""
        try:
            fields = json.loads(place(device).read_text())
            fields["plan"] = Plan.from_json(json.dumps(fields["plan"]))
            fields["server"] = ProcessId(**fields["server"])
            fields["log"] = None if fields["log"] is None else Path(fields["log"])
            return cls(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            return None

    @classmethod
    def of(cls, device: DeviceInfo) -> Self | None:
        """The record of exactly this device."""
        record = cls.read(device.id)
        return record if record is not None and record.cookie == device.cookie else None

    def remove(self) -> None:
        """Forgets the disk, unless its id already has the record of another."""
        current = type(self).read(self.id)
        if current is not None and current.cookie == self.cookie:
            place(self.id).unlink(missing_ok=True)
            status_place(self.id).unlink(missing_ok=True)

    def write_status(self, status: dict[str, Any]) -> None:
        """Keeps what the target says of itself now."""
        draft = status_place(self.id).with_suffix(".new")
        draft.write_text(json.dumps(status))
        draft.replace(status_place(self.id))

    def read_status(self) -> dict[str, Any] | None:
        """What the target said of itself last; None for one that says nothing."""
        try:
            status = json.loads(status_place(self.id).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return status if isinstance(status, dict) else None


def log_place(device: int) -> Path:
    """The log of the server of a device id."""
    return run_directory() / f"{device}.log"


def remove_log(descriptor: int) -> None:
    """Removes the log that the descriptor writes to, wherever it is by now: the name that it had
    may be that of the next disk's."""
    for path in run_directory().glob("*.log"):
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                path.unlink()


def status_place(device: int) -> Path:
    """What the target of a device id says of itself."""
    return run_directory() / f"{device}.status"


def recorded_ids() -> list[int]:
    """The ids of all records, whether the devices still exist or not."""
    return sorted(int(p.stem) for p in run_directory().glob("*.json") if p.stem.isdecimal())


def place(device: int) -> Path:
    """The record of a device id."""
    return run_directory() / f"{device}.json"
