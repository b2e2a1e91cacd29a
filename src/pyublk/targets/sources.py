# SPDX-License-Identifier: MIT
"""Targets as one text, as layers and other targets are given what they read from."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyublk.options import near
from pyublk.target import Target
from pyublk.targets import REGISTRY, build, names, resolve
from pyublk.texts import hints_of


def from_text(
    text: str,
    *,
    read_only: bool = False,
    size: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Target:
    """The target that a text stands for: a path, or ``NAME:ARGUMENT``.

    A path is a `File` (`disk.img`, `/dev/sdb`). ``NAME:ARGUMENT`` is the target of that short name
    with this first argument (`ram:`, `url:https://host/disk.img`), and so are
    ``package.module:Class:ARGUMENT`` and ``file.py:Class:ARGUMENT``; `split_argument` tells how
    they are read. A path that looks like one of these is written with `./` before it. `options` are
    further parameters of the class, as texts. A `size` is for a class that takes one.

    Raises ValueError in one sentence for a text that means nothing, and what `pyublk.targets.build`
    and the class raise. Nothing is opened.
    """
    if not _names_target(text):
        return make("file", [text], options or {}, size=size, read_only=read_only or None)
    return make(text, [], options or {}, size=size, read_only=read_only or None)


def _names_target(text: str) -> bool:
    """Raises ValueError for a text that is neither a path nor a target."""
    if not text:
        raise ValueError("a source is a path, or NAME:ARGUMENT, not an empty text")
    if text.startswith(("/", "./", "../")) and ".py:" not in text:
        return False
    first, colon, _ = text.partition(":")
    if not colon:
        if REGISTRY.has(text) and not Path(text).exists():
            raise ValueError(
                f"{text!r} is a path, and there is no such file: write '{text}:' for the target"
            )
        return False
    if REGISTRY.has(first) or REGISTRY.split(text)[0] != text or _is_class(text):
        return True
    if Path(text).exists():
        return False
    raise ValueError(
        f"there is no target {first!r}{near(first, names())}; a source is a path (./{text} for a "
        f"file of this name), or NAME:ARGUMENT with one of {', '.join(names())}"
    )


def _is_class(text: str) -> bool:
    """Whether it has the form of package.module:Class or file.py:Class."""
    module, _, name = text.rpartition(":")
    return name.isidentifier() and (
        module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    )


def split_argument(text: str) -> tuple[type[Target], tuple[str, ...]]:
    """The class that a text names, and the first argument that follows after it, if one does.

    ``NAME:ARGUMENT``: the short name, and what follows after the colon; all of the text when that
    is an address of its own, ``NAME://…``. No argument after the last colon is none.
    Raises what `pyublk.targets.resolve` raises.
    """
    name, argument = REGISTRY.split(text)
    found = resolve(name)
    if not argument:
        return found, ()
    return found, (text if argument.startswith("//") and ":" not in name else argument,)


def make(
    text: str,
    arguments: Sequence[str],
    options: Mapping[str, str],
    *,
    size: int | None = None,
    block_size: int | None = None,
    read_only: bool | None = None,
) -> Target:
    """The target that a text names, made with the arguments and options that are texts too.

    A class need not know of `block_size` and `read_only` to be served so. Raises what
    `split_argument`, `pyublk.targets.build` and the class raise.
    """
    made, first = split_argument(text)
    parameters = inspect.signature(made).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wishes = {"block_size": block_size, "read_only": read_only}
    given: dict[str, Any] = {n: v for n, v in wishes.items() if n in parameters or open_ended}
    called, _ = REGISTRY.split(text)
    target = build(made, options, [*first, *arguments], called=called, size=size, **given)
    for name, wish in wishes.items():
        if name not in given and wish is not None:
            setattr(target, name, wish)
    return target


def absolute(text: str) -> str:
    """The same source from wherever it is looked at: a relative path made absolute, also one that
    is the argument of a target (`image:disk.qcow2`). For texts that are kept in files.

    Raises what `from_text` raises for a text that means nothing.
    """
    if not _names_target(text):
        return os.path.abspath(text)
    made, arguments = split_argument(text)
    first = next(iter(inspect.signature(made).parameters), "")
    if not arguments or hints_of(made).get(first) is not Path:
        return text
    name = text.removesuffix(arguments[0])
    return f"{name}{os.path.abspath(arguments[0])}"
