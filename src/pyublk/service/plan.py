# SPDX-License-Identifier: MIT
"""What to serve and how, in a form that can be written down and given to another process."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from pyublk.device import Device
from pyublk.errors import InvalidTarget
from pyublk.faults import texts
from pyublk.layers import build as build_layer
from pyublk.layers import first_that_forgets
from pyublk.options import DEVICE, DISK, DeviceOptions, DiskOptions, near
from pyublk.recovery import Recovery
from pyublk.service.toml import WrongKey, reading
from pyublk.target import Target
from pyublk.targets.sources import make


@dataclass(frozen=True, slots=True)
class TakeOver:
    """The disk of the id `device`, which waits for a server; `empty`: the caller has named its
    target, which need not have kept its data, and the disk may be other software's. `memory` is the
    path of a file in memory that has the data (`targets.Ram.keep`). `served`: the disk has a
    server, which hands it over."""

    device: int
    empty: bool = False
    memory: str | None = None
    served: bool = False

    @property
    def may_be_kept(self) -> bool:
        """Whether a target in memory is to have a file for its data."""
        return self.empty or self.memory is not None


def to_request(spec: "DiskSpec", take_over: TakeOver | None) -> dict[str, Any]:
    """What a server is to serve, and as which disk, unless it is a new one; for JSON."""
    told = None if take_over is None else asdict(take_over)
    fields = asdict(spec)
    # What servers of older versions do not know; they refuse what they do not know.
    for name in ("memory", "served"):
        if told is not None and not told[name]:
            del told[name]
    if not spec.layers:
        del fields["layers"]
    return {"spec": fields, "take_over": told}


def of_request(fields: Mapping[str, Any]) -> tuple["DiskSpec", TakeOver | None]:
    """What `to_request` was given; programs that ask for a new disk may leave `take_over` out."""
    take_over = fields.get("take_over")
    return DiskSpec.from_fields(fields["spec"]), take_over and TakeOver(**take_over)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """A disk that is yet to be made.

    `target` is what `pyublk.targets.sources.split_argument` knows; `arguments` and `options` are
    the texts for its class's parameters. `layers` lie over it, from the target up, each as
    `pyublk.layers.build` takes it. `disk` is what else is asked for
    (`pyublk.options.DiskOptions`): `size`, `block_size` and `read_only` go to the class as well,
    `shared_memory_size`, `restart`, `root_storage` and `hang_timeout` are for the server, `fault`
    and `limit` are rules for the Device, to which the rest goes. What it does not have is left to
    them. `name` and `file` are those of its definition, if it has one (`pyublk up`).
    """

    target: str
    arguments: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    disk: DiskOptions = field(default_factory=DiskOptions)
    layers: tuple[str, ...] = ()
    name: str | None = None
    file: str | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Of what `dataclasses.asdict` made of one, also by way of JSON. Raises TypeError or
        KeyError for what it cannot have made."""
        disk = fields.get("disk", {})  # a newer version may have more
        if not isinstance(disk, dict):
            raise TypeError(f"the options of a disk are an object, not {disk!r}")
        kept = {name: value for name, value in disk.items() if name in DISK}
        several = {
            "arguments": tuple(fields["arguments"]),
            "layers": tuple(fields.get("layers", ())),
        }
        return cls(**{**fields, **several, "disk": kept})

    @classmethod
    def from_toml(cls, source: str | Path) -> Self:
        """Reads a table that describes a disk, from a file (a Path) or from a text.

        ::

            target = "file"
            arguments = ["disk.img"]
            layers = ["checks.py:Checked:log=/var/log/checks"]
            size = "1G"
            queues = 2

            [options]
            direct = true

        Raises ValueError that names the key that is wrong and its line, and OSError for a file that
        cannot be read.
        """
        with reading(source) as table:
            return cls.of_table(table)

    @classmethod
    def of_table(cls, table: Mapping[str, object], *others: str) -> Self:
        """What a table describes, whose keys `others` are for the caller. Raises WrongKey."""
        named = ("target", "arguments", "options", "layers")
        disk: dict[str, Any] = {}
        for name, value in table.items():
            if name in DISK:
                try:
                    disk[name] = DISK[name].load(value)
                except ValueError as error:
                    raise WrongKey(str(error), name) from None
                check_rules(name, disk[name])
            elif name not in named and name not in others:
                hint = near(name, [*named, *others, *DISK])
                raise WrongKey(
                    f"there is no key {name!r}{hint}; parameters of the target's class go into "
                    "the table [options]",
                    name,
                )
        target, arguments, options, layers = (table.get(name) for name in named)
        if not isinstance(target, str):
            found = "is missing" if target is None else f"is {target!r}"
            raise WrongKey(
                f"target {found}: it must be a text such as 'ram' or 'disk.py:Class'", "target"
            )
        if not isinstance(arguments, list | None):
            raise WrongKey(f"arguments must be a list, not {arguments!r}", "arguments")
        if not isinstance(layers, list | None) or not all(isinstance(o, str) for o in layers or ()):
            raise WrongKey(
                f"layers must be a list of texts such as 'cache:file=disk.cache', not {layers!r}",
                "layers",
            )
        if not isinstance(options, dict | None):
            raise WrongKey(f"options must be a table, not {options!r}", "options")
        return cls(
            target=target,
            arguments=tuple(_text(one, "arguments") for one in arguments or ()),
            options={name: _text(one, "options", name) for name, one in (options or {}).items()},
            layers=tuple(layers or ()),
            disk=cast(DiskOptions, disk),
        )

    def device(
        self,
        take_over: TakeOver | None = None,
        *,
        target: Target | None = None,
        recovery: Recovery | None = None,
        ask: Callable[[], None] | None = None,
    ) -> Device:
        """A Device, not started yet, for a new disk, or for one that is there and keeps what is the
        kernel's. `target` is what `make_target` made; `recovery` that of a disk which was asked for
        without; `ask` as for `Device.take_over`.

        Raises what `make_target` and `Device` raise.
        """
        asked = {name: value for name, value in self.disk.items() if name in DEVICE}
        if target is None:
            target = self.make_target()
        if take_over is None:
            if recovery is not None:
                asked.setdefault("recovery", recovery)
            return self._with_rules(Device(target, **cast(DeviceOptions, asked)))
        forgets = first_that_forgets(target)
        if not take_over.empty and forgets is not None:
            remedy = (
                "another process would serve an empty disk"
                if take_over.served
                else "name it as the target to serve the disk by it all the same"
            ) + "; a class whose data outlives its process says `recoverable = True`"
            name = type(forgets).__name__ if self.layers else self.target
            raise InvalidTarget(
                f"{name} does not say that it keeps what was written when its server ends "
                f"(Target.recoverable): {remedy}"
            )
        own = {name: value for name, value in asked.items() if not DEVICE[name].lasting}
        foreign = take_over.empty or take_over.served
        return self._with_rules(
            Device.take_over(
                take_over.device, target, foreign=foreign, ask=ask, **cast(DeviceOptions, own)
            )
        )

    def _with_rules(self, device: Device) -> Device:
        if (rules := self.disk.get("fault")) is not None:
            device.faults.extend(rules)
        if (limit := self.disk.get("limit")) is not None:
            device.limit(**texts.parse_limit(limit))
        return device

    def make_target(self) -> Target:
        """Loads the classes of the target and of its layers, and makes them. Raises what
        `pyublk.targets`, `pyublk.layers` and they raise."""
        target = make(
            self.target,
            self.arguments,
            self.options,
            size=self.disk.get("size"),
            block_size=self.disk.get("block_size"),
            read_only=self.disk.get("read_only"),
        )
        for text in self.layers:
            target = build_layer(text, target)
        return target


def check_rules(name: str, value: object) -> None:
    """Raises WrongKey for rules, or a limit, that are written wrongly."""
    try:
        if name == "fault" and value is not None:
            for text in texts.split(str(value)):
                texts.parse(text)
        if name == "limit" and value is not None:
            texts.parse_limit(str(value))
    except ValueError as error:
        raise WrongKey(str(error), name) from None


def check_shareable(spec: DiskSpec) -> None:
    """Raises ValueError for a disk that a server of several disks cannot serve."""
    for name in ("user", "root_storage"):
        if spec.disk.get(name):
            raise ValueError(f"{name} is for a disk with a server of its own: leave out the server")


def _text(value: object, *keys: str) -> str:
    """A value of TOML as the text that `pyublk.targets.build` reads."""
    name = keys[-1]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list):
        parts = [_text(part, *keys) for part in value]
        if not any("," in part for part in parts):
            return ",".join(parts)
        raise WrongKey(f"a value of {name} has a comma in it, which lists do not allow", *keys)
    raise WrongKey(
        f"{name} must be a text, a number, true or false, or a list, not {value!r}", *keys
    )


#: As it is called in the records, and in programs that were written for earlier versions.
Plan = DiskSpec
