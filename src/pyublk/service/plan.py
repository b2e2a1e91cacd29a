# SPDX-License-Identifier: MIT
"""What to serve and how, in a form that can be written down and given to another process."""

import inspect
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from pyublk import targets
from pyublk.device import Device
from pyublk.options import DEVICE, DISK, DeviceOptions, DiskOptions, near
from pyublk.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """A disk that is yet to be made.

    `target` is a name that `pyublk.targets.resolve` knows; `arguments` and `options` are the texts
    for its class's parameters. `disk` is what else is asked for (`pyublk.options.DiskOptions`):
    `size`, `block_size` and `read_only` go to the class as well, `shared_memory_size` is for the
    server, the rest goes to `Device`. What it does not have is left to them.
    """

    target: str
    arguments: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    disk: DiskOptions = field(default_factory=DiskOptions)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        fields["arguments"] = tuple(fields["arguments"])
        disk = fields.get("disk", {})  # a newer version may have more
        fields["disk"] = {name: value for name, value in disk.items() if name in DISK}
        return cls(**fields)

    @classmethod
    def from_toml(cls, source: str | Path) -> Self:
        """Reads a table that describes a disk, from a file (a Path) or from a text.

        ::

            target = "file"
            arguments = ["disk.img"]
            size = "1G"
            queues = 2

            [options]
            direct = true

        Raises ValueError that names the key that is wrong, and OSError for a file that cannot be
        read.
        """
        where = f"{source}: " if isinstance(source, Path) else ""
        try:
            text = source.read_text() if isinstance(source, Path) else source
            return cls._of_table(tomllib.loads(text))
        except UnicodeDecodeError:
            raise ValueError(f"{where}this is not text in UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{where}this is not TOML: {error}") from None
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None

    @classmethod
    def _of_table(cls, table: Mapping[str, object]) -> Self:
        named = ("target", "arguments", "options")
        disk: dict[str, Any] = {}
        for name, value in table.items():
            if name in DISK:
                disk[name] = DISK[name].load(value)
            elif name not in named:
                hint = near(name, [*named, *DISK])
                raise ValueError(
                    f"there is no key {name!r}{hint}; parameters of the target's class go into "
                    "the table [options]"
                )
        target, arguments, options = (table.get(name) for name in named)
        if not isinstance(target, str):
            found = "is missing" if target is None else f"is {target!r}"
            raise ValueError(f"target {found}: it must be a text such as 'ram' or 'disk.py:Class'")
        if not isinstance(arguments, list | None):
            raise ValueError(f"arguments must be a list, not {arguments!r}")
        if not isinstance(options, dict | None):
            raise ValueError(f"options must be a table, not {options!r}")
        return cls(
            target=target,
            arguments=tuple(_text("arguments", one) for one in arguments or ()),
            options={name: _text(name, value) for name, value in (options or {}).items()},
            disk=cast(DiskOptions, disk),
        )

    def device(self) -> Device:
        """Loads the target's class, makes a target and a Device for it, not started yet.

        Raises what `pyublk.targets`, the class and `Device` raise.
        """
        asked = {name: value for name, value in self.disk.items() if name in DEVICE}
        return Device(self._target(), **cast(DeviceOptions, asked))

    def _target(self) -> Target:
        made = targets.resolve(self.target)
        parameters = inspect.signature(made).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # A class need not know of these two to be served so.
        wishes = {
            "block_size": self.disk.get("block_size"),
            "read_only": self.disk.get("read_only"),
        }
        given = {n: v for n, v in wishes.items() if n in parameters or open_ended}
        target = targets.build(
            made, self.options, self.arguments, size=self.disk.get("size"), **given
        )
        for name, wish in wishes.items():
            if name not in given and wish is not None:
                setattr(target, name, wish)
        return target


def _text(name: str, value: object) -> str:
    """A value of TOML as the text that `pyublk.targets.build` reads."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list):
        parts = [_text(name, part) for part in value]
        if not any("," in part for part in parts):
            return ",".join(parts)
        raise ValueError(f"a value of {name} has a comma in it, which lists do not allow")
    raise ValueError(f"{name} must be a text, a number, true or false, or a list, not {value!r}")


#: As it is called in the records, and in programs that were written for earlier versions.
Plan = DiskSpec
