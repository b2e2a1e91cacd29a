# SPDX-License-Identifier: MIT
"""Files that name disks: what is to be served, and what must change for it to be so.

A disk is known by its name and its file, which its record has as well (`DiskSpec.name`, `.file`).
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pyublk import errors
from pyublk.control import Controller, DeviceInfo
from pyublk.options import near
from pyublk.service import daemon
from pyublk.service.channel import CHANGE, ask, check_server_name
from pyublk.service.plan import DiskSpec
from pyublk.service.records import Record
from pyublk.service.recovering import recover
from pyublk.service.stopping import stop
from pyublk.service.toml import WrongKey, reading
from pyublk.sizes import format_size

#: Where definitions are looked for when no file is named.
DIRECTORY = Path("/etc/pyublk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A disk as a file names it: its spec, the server that it shares with others, and the disks
    that are started before it."""

    spec: DiskSpec
    server: str | None = None
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        assert self.spec.name is not None
        return self.spec.name


class Action(StrEnum):
    """What makes a disk as its definition says."""

    KEEP = "keep"
    START = "start"
    RESIZE = "resize"
    RECREATE = "recreate"
    RECOVER = "recover"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One disk: what is to be done, and in words what differs. `record` is that of the disk which
    is there; `definition` is None for one that no file names any more."""

    name: str
    action: Action
    definition: Definition | None
    record: Record | None
    differences: tuple[str, ...] = ()


def files_of(places: Iterable[Path]) -> list[Path]:
    """The files themselves, and those that directories have (`*.toml`), as absolute paths."""
    found: list[Path] = []
    for place in places:
        place = place.resolve()
        found += sorted(place.glob("*.toml")) if place.is_dir() else [place]
    return list(dict.fromkeys(found))


def read(files: Iterable[Path]) -> list[Definition]:
    """What the files define, in an order in which each disk comes after those that it names.

    Raises ValueError, which names the file and the line, and OSError.
    """
    found: dict[str, Definition] = {}
    for file in files:
        with reading(file) as tables:
            for one in _definitions(tables, file):
                if (other := found.get(one.name)) is not None:
                    raise WrongKey(
                        f"{one.name} is defined in {other.spec.file} too: a name is for one disk",
                        *("disk", one.name),
                    )
                _refuse_same_id(one, found.values())
                found[one.name] = one
    return _in_order(found)


def _definitions(tables: Mapping[str, Any], file: Path) -> Iterable[Definition]:
    for key in tables:
        if key != "disk":
            hint = near(key, ["disk"])
            raise WrongKey(
                f"there is no table {key!r}{hint}; a disk is a table such as [disk.images]", key
            )
    disks = tables.get("disk", {})
    if not isinstance(disks, dict):
        raise WrongKey("disk must have a table for each disk, such as [disk.images]", "disk")
    for name, table in disks.items():
        if not isinstance(table, dict):
            raise WrongKey(f"disk.{name} must be a table: [disk.{name}]", "disk", name)
        try:
            yield _definition(name, table, file)
        except WrongKey as error:
            raise error.within("disk", name) from None


def _definition(name: str, table: Mapping[str, Any], file: Path) -> Definition:
    try:
        check_server_name(name)
    except ValueError as error:
        raise WrongKey(str(error).replace("a server's name", "a disk's name")) from None
    spec = DiskSpec.of_table(table, "server", "after")
    server, after = table.get("server"), table.get("after", [])
    if not isinstance(server, str | None):
        raise WrongKey(f"server must be a text, not {server!r}", "server")
    if server is not None:
        try:
            check_server_name(server)
        except ValueError as error:
            raise WrongKey(str(error), "server") from None
    if not isinstance(after, list) or not all(isinstance(one, str) for one in after):
        raise WrongKey(f"after must be a list of disks' names, not {after!r}", "after")
    return Definition(
        spec=replace(spec, name=name, file=str(file)), server=server, after=tuple(after)
    )


def _refuse_same_id(one: Definition, others: Iterable[Definition]) -> None:
    wanted = one.spec.disk.get("id")
    for other in others:
        if wanted is not None and other.spec.disk.get("id") == wanted:
            raise WrongKey(f"{other.name} has the id {wanted} already", "disk", one.name, "id")


def _in_order(found: Mapping[str, Definition]) -> list[Definition]:
    for one in found.values():
        for name in one.after:
            if name not in found:
                assert one.spec.file is not None
                with reading(Path(one.spec.file)):  # for the line
                    raise WrongKey(
                        f"{one.name} comes after {name!r}, which no file defines"
                        f"{near(name, found)}",
                        *("disk", one.name, "after"),
                    )
    try:
        names = list(TopologicalSorter({n: one.after for n, one in found.items()}).static_order())
    except CycleError as error:
        cycle = " after ".join(reversed(error.args[1]))
        raise ValueError(f"the disks wait for each other: {cycle}") from None
    return [found[name] for name in names]


# ---- what is there, and what must change ----


def defined(controller: Controller) -> list[tuple[DeviceInfo, Record]]:
    """The disks that definitions named, the one with the youngest server first."""
    found = [
        (device, record)
        for device in controller.devices()
        if (record := Record.of(device)) is not None and record.plan.name is not None
    ]
    return sorted(found, key=lambda one: (-one[1].server.started, -one[1].id))


def steps(
    definitions: Sequence[Definition],
    files: Sequence[Path],
    records: Sequence[Record],
    waiting: Container[int] = (),
) -> list[Step]:
    """What makes the disks of `records` as the files define them, in order: first what no file
    names any more, then each definition. `waiting`: the ids of those that wait for a server.

    Raises DeviceBusy for a name that another file uses.
    """
    by_name = {record.plan.name: record for record in records}
    names = {one.name for one in definitions}
    ours = {str(file) for file in files}
    left = [
        Step(name=record.plan.name, action=Action.STOP, definition=None, record=record)
        for record in records
        if record.plan.name is not None
        and record.plan.file in ours
        and record.plan.name not in names
    ]
    return left + [_step(one, by_name.get(one.name), waiting) for one in definitions]


def _step(definition: Definition, record: Record | None, waiting: Container[int]) -> Step:
    name = definition.name
    if record is None:
        return Step(name=name, action=Action.START, definition=definition, record=None)
    if record.plan.file != definition.spec.file:
        raise errors.DeviceBusy(
            f"{name} is {record.path} already, which {record.plan.file} defines: use another name, "
            f"or stop that disk first"
        )
    old = _flat(record.plan) | {"server": record.server_name}
    new = _flat(definition.spec) | {"server": definition.server}
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    action = Action.RECREATE if differing else Action.KEEP
    if differing == ["size"] and "size" in old and old["size"] < new.get("size", 0):
        action = Action.RESIZE
    if record.id in waiting:
        action = Action.RECOVER
    return Step(
        name=name,
        action=action,
        definition=definition,
        record=record,
        differences=tuple(
            f"{key} from {_shown(key, old.get(key))} to {_shown(key, new.get(key))}"
            for key in differing
        ),
    )


def _flat(spec: DiskSpec) -> dict[str, Any]:
    """What a record keeps of it, by the keys of a definition."""
    fields = json.loads(json.dumps(asdict(spec)))  # a record has lists where there are tuples
    options = {f"options.{name}": value for name, value in fields["options"].items()}
    return {
        "target": fields["target"],
        "arguments": fields["arguments"] or None,
        "layers": fields["layers"] or None,
        **options,
        **fields["disk"],
    }


def _shown(key: str, value: object) -> str:
    if value is None:
        return "the default"
    return format_size(value) if key == "size" and isinstance(value, int) else json.dumps(value)


# ---- doing it ----


def carry_out(controller: Controller, step: Step, *, timeout: float = 30.0) -> Record | None:
    """Does one step; returns the record of the disk that is there then.

    Raises what `daemon.start`, `stopping.stop` and the channel raise; a disk in use is not stopped.
    `timeout` is that of `stop`.
    """
    definition, record = step.definition, step.record
    if record is not None and step.action in (Action.STOP, Action.RECREATE):
        stop(controller, controller.info(record.id), timeout=timeout)
        record = None
    if definition is not None and step.action in (Action.START, Action.RECREATE):
        assert definition.spec.file is not None
        with chdir(Path(definition.spec.file).parent):  # what it names is beside it
            return daemon.start(definition.spec, server=definition.server)
    if record is not None and step.action is Action.RECOVER:
        return recover(controller, controller.info(record.id))
    if record is not None and definition is not None and step.action is Action.RESIZE:
        ask(record, "resize", timeout=CHANGE, size=definition.spec.disk["size"], shrink=False)
    return record
