# SPDX-License-Identifier: MIT
"""Whether the methods of a target can be called as they will be: told at its start, in a sentence,
instead of by a failing request, or never."""

import inspect
from collections.abc import Callable, Iterable, Mapping

from pyublk.errors import InvalidTarget

#: The methods a kernel request can call, with what they are given; their presence announces the
#: operation.
ARGUMENTS = {
    "read": ("offset", "buffer"),
    "write": ("offset", "data"),
    "write_fua": ("offset", "data"),
    "flush": (),
    "discard": ("offset", "length"),
    "write_zeroes": ("offset", "length", "unmap"),
    "handle": ("io",),
    "map": ("op", "offset", "length"),
}


def check_handlers(owner: str, methods: Mapping[str, Callable[..., object]]) -> None:
    """Raises InvalidTarget for a method that does not take what it will be given, or that only
    makes a generator."""
    for method, function in methods.items():
        _check_arguments(f"{owner}.{method}", function, ARGUMENTS[method])
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidTarget(
                f"{owner}.{method} is a generator, so a call of it runs nothing: it must not "
                "contain yield"
            )


def _check_arguments(what: str, function: Callable[..., object], given: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(function)
        signature.bind(*given)
    except ValueError:  # it does not tell: it is written in C, or lacks self
        if not inspect.ismethod(function):
            return
        signature = inspect.signature(function.__func__)
    except TypeError:
        pass
    else:
        return
    name = what.rpartition(".")[2]
    raise InvalidTarget(
        f"{what}{signature} does not take what it is given: define "
        f"{name}({', '.join(('self', *given))})"
    )


def check_plain(owner: object, methods: Iterable[str], reason: str) -> None:
    """Raises InvalidTarget for one of these that is a coroutine: nobody would await it."""
    for method in methods:
        if inspect.iscoroutinefunction(getattr(owner, method, None)):
            name = type(owner).__name__
            raise InvalidTarget(
                f"{name}.{method} is async, and nobody would await it: {reason}, so make it a "
                "plain method"
            )


def call_plain(step: Callable[[], object]) -> None:
    """Calls `open` or `close` of a target that is served without an event loop."""
    outcome = step()
    if inspect.isawaitable(outcome):
        if inspect.iscoroutine(outcome):
            outcome.close()
        raise InvalidTarget(
            f"{getattr(step, '__qualname__', step)} returned something to await, and no event loop "
            "serves this target: make it a plain method"
        )
