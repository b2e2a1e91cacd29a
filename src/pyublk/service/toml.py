# SPDX-License-Identifier: MIT
"""TOML that describes disks: what is wrong in it is told with its line."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WrongKey(ValueError):
    """What a key says is not allowed, or it is not allowed itself, or missing.

    `keys` lead to it from the top: the names of the tables that it is in, then its own.
    """

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys

    def within(self, *tables: str) -> "WrongKey":
        """The same, of a table that is in others."""
        return WrongKey(str(self), *tables, *self.keys)


@contextmanager
def reading(source: str | Path) -> Iterator[dict[str, Any]]:
    """The tables of a file (a Path) or of a text. A ValueError that is raised meanwhile names the
    file, and the line of a WrongKey. Raises OSError for a file that cannot be read."""
    name = str(source) if isinstance(source, Path) else None
    text = ""
    try:
        text = source.read_text() if isinstance(source, Path) else source
        yield tomllib.loads(text)
    except UnicodeDecodeError:
        raise ValueError(_told("this is not text in UTF-8", name)) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(_told(f"this is not TOML: {error}", name)) from None
    except WrongKey as error:
        raise ValueError(_told(str(error), name, _line_of(text, error.keys))) from None
    except ValueError as error:
        raise ValueError(_told(str(error), name)) from None


def _told(sentence: str, name: str | None, line: int | None = None) -> str:
    if line is None:
        return sentence if name is None else f"{name}: {sentence}"
    return f"line {line}: {sentence}" if name is None else f"{name}:{line}: {sentence}"


def _line_of(text: str, keys: tuple[str, ...]) -> int | None:
    """Where a key stands, or else the table that lacks it; tomllib does not tell."""
    for path in (keys, keys[:-1]):
        table: tuple[str, ...] = ()
        for number, line in enumerate(text.splitlines(), 1):
            if header := re.match(r"\s*\[\[?([^\]]+)\]", line):
                found = table = _names(header[1])
            else:
                found = table + _names(line.partition("=")[0])
            if path and found[: len(path)] == path:
                return number
    return None


def _names(key: str) -> tuple[str, ...]:
    """The parts of a dotted key; none of what is no key."""
    names: list[str] = []
    try:
        inner: object = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    while isinstance(inner, dict) and inner:
        ((name, inner),) = inner.items()
        names.append(name)
    return tuple(names)
