# SPDX-License-Identifier: MIT
"""The run directory: a record, a log and a channel for each disk that a command of ours serves.

`N.json`, `N.log` and `N.sock` in `/run/pyublk` (of users: `$XDG_RUNTIME_DIR/pyublk`) belong to
`/dev/ublkbN`; PYUBLK_RUN_DIR names another directory. A record is believed only while the kernel's
device carries the same cookie, and only when it is a regular file of ours or root's: nobody else
names processes for us to end.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from pyublk.control import DeviceInfo, has_node
from pyublk.files import StrangeFile, read_record, write_record
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
from pyublk.service.restarts import Restarts


def run_directory() -> Path:
    """Where records and logs are; need not exist yet. A user has his own, unless he is root."""
    if named := os.environ.get("PYUBLK_RUN_DIR"):
        return Path(named).absolute()
    own = os.environ.get("XDG_RUNTIME_DIR") if os.geteuid() != 0 else None
    return Path(own or "/run").absolute() / "pyublk"


def make_run_directory() -> Path:
    """As `run_directory`, made if need be; raises the OSError that prevented it."""
    directory = run_directory()
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        error.add_note("set PYUBLK_RUN_DIR to a directory for the records and logs of servers")
        raise
    return directory


class GarbledRecord(StrangeFile):
    """A file of ours that is no record, not even one of another version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A served disk: what the kernel does not know of it.

    `cookie` is the device's own; `log` is None for a server that writes to its terminal;
    `data_path` is how the data travels, and why, in words; `server_name` names a server of several
    disks; `directory` is where relative paths of the plan start; `recovery` is what becomes of the
    disk without its server, `restarts` whether another one is started, and how often it was: None
    in records of older versions.
    """

    id: int
    cookie: int
    server: ProcessId
    plan: DiskSpec
    log: Path | None
    data_path: str | None = None
    server_name: str | None = None
    directory: str | None = None
    recovery: str | None = None
    restarts: Restarts | None = None

    @property
    def path(self) -> str:
        """The block device."""
        return f"/dev/ublkb{self.id}"

    @property
    def may_be_recovered(self) -> bool:
        """Whether the disk may outlive its server, and is there."""
        mode = self.recovery or self.plan.disk.get("recovery", "none")
        return mode != "none" and has_node(self.id)

    @property
    def is_restarted(self) -> bool:
        """Whether another server is started when this one ends by itself."""
        return self.restarts is not None and self.restarts.on

    def not_restarted(self) -> None:
        """Keeps whoever restarts servers from this one, which is to end for good."""
        if self.is_restarted and type(self).read(self.id) is not None:
            replace(self, restarts=Restarts(why_not="it was to be stopped")).write()

    def write(self) -> None:
        """Keeps it, readable for its owner only: a target's options may be secret."""
        written = asdict(self) | {"log": None if self.log is None else str(self.log)}
        write_record(place(self.id), json.dumps(written))

    @classmethod
    def load(cls, device: int) -> Self | None:
        """The record of a device id; None if there is none.

        What a newer version has in it besides is left out. Raises StrangeFile for what cannot be
        believed or understood, and OSError for what cannot be read.
        """
        path = place(device)
        try:
            text = read_record(path)
        except FileNotFoundError:
            return None
        found = json_object(text)
        if found is None:
            raise GarbledRecord(f"{path} is no record: it was cut off, or overwritten")
        try:
            return cls(**_understood(cls, found, device))
        except (ValueError, TypeError, KeyError):
            raise StrangeFile(
                f"{path} is a record that this version of pyublk cannot read"
            ) from None

    @classmethod
    def read(cls, device: int) -> Self | None:
        """The record of a device id; None if there is none, or none that can be understood."""
        try:
            return cls.load(device)
        except (StrangeFile, OSError):  # `record_trouble` tells
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
            socket_place(self.id).unlink(missing_ok=True)
            memory_place(self.id).unlink(missing_ok=True)


def _understood(kind: type[Any], found: dict[str, Any], device: int) -> dict[str, Any]:
    """What a record's text says, but for what a newer version has in it besides. Raises ValueError,
    TypeError or KeyError when it is not what this version writes."""
    known = _known(kind, found)
    server = ProcessId(**_known(ProcessId, found["server"]))
    plan = DiskSpec.from_fields(_known(DiskSpec, found["plan"]))
    numbers = (known["id"], known["cookie"], server.pid, server.started)
    texts = (
        plan.target,
        *plan.arguments,
        *plan.layers,
        known["log"] or "",
        known.get("data_path") or "",
    )
    texts += (known.get("server_name") or "", known.get("directory") or "")
    texts += (plan.name or "", plan.file or "", known.get("recovery") or "")
    restarts = known.get("restarts")
    if restarts is not None:
        restarts = Restarts.from_fields(restarts)
    if (
        not all(type(number) is int for number in numbers)
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(plan.options, dict)
        or known["id"] != device
        or server.pid <= 0
    ):
        raise ValueError("not what this version writes")
    log = None if known["log"] is None else Path(known["log"])
    return known | {"plan": plan, "server": server, "log": log, "restarts": restarts}


def _known(kind: type[Any], found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TypeError(found)
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in found.items() if name in names}


def record_trouble(device: int) -> str | None:
    """What keeps the record of a device id from being believed, in a sentence; None: nothing."""
    try:
        Record.load(device)
    except StrangeFile as strange:
        return str(strange)
    except OSError as error:
        return f"{place(device)} cannot be read: {error.strerror}"
    return None


def log_place(device: int) -> Path:
    """The log of the server of a device id."""
    return run_directory() / f"{device}.log"


def server_log_place(name: str) -> Path:
    """The log of a server of several disks; each of these has another name for it."""
    return run_directory() / f"{name}.server.log"


def remove_log(descriptor: int) -> None:
    """Removes the log that the descriptor writes to, wherever it is by now: the name that it had
    may be that of the next disk's."""
    for path in run_directory().glob("*.log"):
        with suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                path.unlink()


def socket_place(device: int) -> Path:
    """The channel to the server of a device id."""
    return run_directory() / f"{device}.sock"


def memory_place(device: int) -> Path:
    """A link to the memory that the server of a device id shares with clients, if it does."""
    return run_directory() / f"{device}.memory"


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """What a text says that should be a JSON object; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def recorded_ids() -> list[int]:
    """The ids of all records, whether the devices still exist or not."""
    names = [path.stem for path in run_directory().glob("*.json")]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,6}", name))


def place(device: int) -> Path:
    """The record of a device id."""
    return run_directory() / f"{device}.json"
