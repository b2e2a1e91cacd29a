# SPDX-License-Identifier: MIT
"""Targets over targets: a layer passes requests on, and changes some of them."""

import inspect
import re
from collections.abc import Iterable

from pyublk.layers.base import Below, Layer, first_that_forgets, keeps_data, own_status, stack
from pyublk.named import Registry
from pyublk.named import build as build_class
from pyublk.target import Target

__all__ = [
    "Below",
    "Layer",
    "build",
    "changed",
    "first_that_forgets",
    "keeps_data",
    "names",
    "own_status",
    "resolve",
    "stack",
]

#: Classes by short name, or their places, "module:Class", which are imported when they are asked
#: for. The first parameter of each is the target below.
BUILT_IN: dict[str, type[Target] | str] = {
    "overlay": "pyublk.layers.overlay:Overlay",
    "cache": "pyublk.layers.cache:Cache",
}

REGISTRY = Registry("layer", Target, "pyublk.layers", BUILT_IN)
names = REGISTRY.names
resolve = REGISTRY.resolve


def build(text: str, below: Target) -> Target:
    """A layer over `below`, of ``NAME[:key=value,...]``.

    NAME is a short name, ``package.module:Class``, or ``file.py:Class``. The options are converted
    as the class's signature says. A comma in a value is written twice.

    Raises ValueError, naming what is wrong and what is allowed, and what `resolve` raises.
    """
    name, options = _parsed(text)
    made = resolve(name)
    try:
        inspect.signature(made).bind_partial(below)
    except TypeError:
        raise ValueError(f"{name} takes no target below it: it is not a layer") from None
    return build_class(made, options, first=(below,), called=name)


def changed(texts: Iterable[str], changes: Iterable[str]) -> tuple[str, ...]:
    """The layers of these texts, with other options: each change is of one of them, by its name,
    and as `build` takes it. Options that it does not name stay as they are.

    Raises ValueError when there is no such layer, or more than one.
    """
    found = [_parsed(text) for text in texts]
    for change in changes:
        name, options = _parsed(change)
        if not options:
            raise ValueError(f"the layer {change!r} has no option to change: write NAME:KEY=VALUE")
        those = [own for other, own in found if other == name]
        if len(those) != 1:
            there = ", ".join(other for other, _ in found) or "none"
            how_many = f"{len(those)} layers" if those else "no layer"
            raise ValueError(
                f"the disk has {how_many} {name!r}, and options are changed of one: its layers are "
                f"{there}"
            )
        those[0].update(options)
    return tuple(_as_text(name, options) for name, options in found)


def _as_text(name: str, options: dict[str, str]) -> str:
    words = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    return f"{name}:{words}" if words else name


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """The name of a layer's class, and its options."""
    name, rest = REGISTRY.split(text)
    options: dict[str, str] = {}
    # A single comma ends an option; pairs of them do not, which regular expressions see at once.
    for part in re.findall(r"(?:[^,]|,,)+", rest or ""):
        key, equals, value = part.replace(",,", ",").partition("=")
        if not equals or not key:
            raise ValueError(
                f"{part!r} in the layer {text!r} is not KEY=VALUE: write NAME[:KEY=VALUE,...], and "
                "twice what is a comma in a value"
            )
        if key in options:
            raise ValueError(f"{key} is given twice in the layer {text!r}")
        options[key] = value
    return name, options
