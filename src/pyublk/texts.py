# SPDX-License-Identifier: MIT
"""Texts as values of a class's parameters: what the signature says, or the default's type."""

import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path

from pyublk.sizes import parse_size

#: Types of several values, written with commas between them, and what makes them of a list.
_SEVERAL: dict[object, Callable[[list[object]], object]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    Sequence: tuple,
    Collection: tuple,
}


def hints_of(cls: type) -> dict[str, object]:
    """The type of each parameter: by its annotation, else by its default, else by the annotation
    that a base class gives the same name (`size` of a target); none for others."""
    hints = _annotations(cls)
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        if name in hints:
            continue
        if default is not None and default is not parameter.empty:
            hints[name] = type(default)
        elif (base := next((b for b in cls.__mro__ if name in _annotations(b)), None)) is not None:
            hints[name] = _annotations(base)[name]
    return hints


def _annotations(cls: type) -> dict[str, object]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # names that only a type checker imports
        return {}


def convert(name: str, text: str, hint: object) -> object:
    """`text` as a value of that type. Raises ValueError that says what is allowed."""
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return convert(name, text, arguments[0])
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return convert(name, text, next(one for one in arguments if one is not type(None)))
    if origin is typing.Literal:
        return _choose(name, text, {str(one): one for one in arguments if one is not None})
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return _choose(name, text, {member.name.lower(): member for member in hint})
    if (made := _SEVERAL.get(origin or hint)) is not None:
        kind = arguments[0] if arguments else str
        return made([convert(name, part, kind) for part in text.split(",") if text])
    if (origin or hint) not in _KINDS:
        if hint not in (typing.Any, object) and not isinstance(hint, typing.TypeVar):
            word = hint.__name__ if inspect.isclass(hint) else str(hint)
            raise ValueError(
                f"option {name} has the type {word}, which cannot be given as text: it can only be "
                "given in Python"
            )
        return text
    read, allowed = _KINDS[origin or hint]
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"option {name} is {text!r}: it must be {allowed}") from None


def _whole(text: str) -> int:
    return int(text) if re.fullmatch(r"\s*-\d+\s*", text) else parse_size(text)


def _boolean(text: str) -> bool:
    words = {"yes": True, "true": True, "on": True, "1": True}
    words |= {"no": False, "false": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError("yes or no")
    return words[text.lower()]


_KINDS: dict[object, tuple[Callable[[str], object], str]] = {
    int: (_whole, "a whole number, or a size such as 512MiB or 1G"),
    float: (float, "a number"),
    bool: (_boolean, "yes or no"),
    str: (str, "text"),
    bytes: (os.fsencode, "text"),
    Path: (Path, "a path"),
    os.PathLike: (Path, "a path"),
}


def _choose(name: str, text: str, allowed: Mapping[str, object]) -> object:
    if text in allowed:
        return allowed[text]
    if text.lower() in allowed:
        return allowed[text.lower()]
    raise ValueError(f"option {name} is {text!r}: it must be one of {', '.join(allowed)}")
