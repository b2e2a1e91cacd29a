# SPDX-License-Identifier: MIT
"""Targets over targets: a layer passes requests on, and changes some of them."""

import inspect
import re

from pyublk.layers.base import Below, Layer, first_that_forgets, keeps_data, own_status, stack
from pyublk.named import Registry
from pyublk.named import build as build_class
from pyublk.target import Target

__all__ = [
    "Below",
    "Layer",
    "build",
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
    made = resolve(name)
    try:
        inspect.signature(made).bind_partial(below)
    except TypeError:
        raise ValueError(f"{made.__name__} takes no target below it: it is not a layer") from None
    return build_class(made, options, first=(below,))
