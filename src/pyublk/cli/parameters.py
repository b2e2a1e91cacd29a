# SPDX-License-Identifier: MIT
"""The kinds of arguments that several commands take, each with its completion."""

import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from pyublk.files import about
from pyublk.options import DISK, DiskOptions, Option
from pyublk.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])


def _node_name(path: str) -> str:
    """The kernel's name of a device whose node, or a link to it, has another one; "" of none."""
    try:
        found = about(path)
    except (OSError, ValueError):
        return ""
    kind = {stat.S_IFBLK: "block", stat.S_IFCHR: "char"}.get(stat.S_IFMT(found.mode))
    if kind is None:
        return ""
    return (Path("/sys/dev") / kind / found.special).resolve().name


def json_option(command: F) -> F:
    """`--json`, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


class Size(click.ParamType[int]):
    """A number of bytes, such as 1G or 512MiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Whole(click.IntRange):
    """A whole number within bounds."""

    name = "whole number"


class Seconds(click.FloatRange):
    """A time that a clock can have: neither infinite nor no number at all."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not seconds <= 1e9:
            self.fail(f"{value} is no number of seconds that can be waited for", param, ctx)
        return seconds


class _DiskOption(click.ParamType[Any]):
    """The value of an option that a disk has."""

    def __init__(self, option: Option) -> None:
        self.name = option.metavar.lower()
        self._option = option

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not isinstance(value, str):  # converted already
            return value
        try:
            return self._option.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(one) for one in self._option.texts() if one.startswith(incomplete)]


def disk_options(command: F) -> F:
    """Everything a disk can be asked for (`pyublk.options`), as parameters of the same names."""
    for option in reversed(DISK.values()):
        about = option.about_value()
        text = f"{option.help}  [{about}]" if about else option.help
        if option.kind is bool:
            flags = f"{option.flag}/--no-{option.flag[2:]}"
            made = click.option(flags, option.name, default=None, help=text)
        else:
            made = click.option(
                option.flag,
                option.name,
                type=_DiskOption(option),
                metavar=option.metavar,
                help=text,
            )
        command = made(command)
    return command


def disk_options_given(ctx: click.Context) -> DiskOptions:
    """Those that stand on the command line."""
    given = {
        name: ctx.params[name]
        for name in DISK
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    return cast(DiskOptions, given)


class DeviceId(click.ParamType[int | str]):
    """A device by its id, `0`, or by a node, `/dev/ublkb0` or `ublkc0`, or a link to one. If
    `nbd_allowed`, also one of the nbd driver, `nbd0` or `/dev/nbd0`, which stays a text."""

    name = "device"

    def __init__(self, *, all_allowed: bool = False, nbd_allowed: bool = False) -> None:
        self._all_allowed = all_allowed
        self._nbd_allowed = nbd_allowed

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        text = str(value)
        if self._all_allowed and text == "all":
            return text
        nbd = re.fullmatch(r"(?:/dev/)?(nbd[0-9]{1,5})", text)
        if self._nbd_allowed and nbd is not None:
            return nbd[1]
        form = r"(?:(?:/dev/)?ublk[bc])?([0-9]{1,7})"
        match = re.fullmatch(form, text) or re.fullmatch(form, _node_name(text))
        if match is None:
            others = " or `all`" if self._all_allowed else ""
            self.fail(f"{text!r} is no device: give an id, /dev/ublkbN{others}", param, ctx)
        return int(match[1])

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        nodes = Path("/sys/class/ublk-char").glob("ublkc*")
        ids = sorted((node.name.removeprefix("ublkc") for node in nodes), key=int)
        wanted = [*ids, *(f"/dev/ublkb{number}" for number in ids), *(["all"] * self._all_allowed)]
        return [CompletionItem(name) for name in wanted if name.startswith(incomplete)]
