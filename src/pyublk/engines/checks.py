# SPDX-License-Identifier: MIT
"""Whether a target can be served, told from its class and its methods."""

import inspect
from collections.abc import Callable

from pyublk.errors import InvalidTarget
from pyublk.features import why_not_needed
from pyublk.methods import check_handlers, check_plain
from pyublk.profile import Dispatch
from pyublk.target import METHODS, Target, kind_of

#: What a target says of itself: asked for by threads without an event loop.
_SAID = ("profile", "status", "announces")
_SCOPE = ("open", "close")

#: What Target.__init__ gives every target.
_OWN = frozenset(vars(Target(size=0)))


def dispatch_of(target: object) -> Dispatch:
    """How a target is served; raises InvalidTarget for one that cannot be."""
    name = type(target).__name__
    if isinstance(target, type):
        raise InvalidTarget(
            f"a disk needs an object, and {target.__name__} is a class: call it, as in "
            f"{target.__name__}(...)"
        )
    if not isinstance(target, Target):
        raise InvalidTarget(f"{name} is not a pyublk.Target: subclass it and define read and write")
    if missing := sorted(_OWN - {one for one in _OWN if hasattr(target, one)}):
        raise InvalidTarget(
            f"{name} lacks {', '.join(missing)}: its __init__ must call super().__init__(size=...)"
        )
    if why := why_not_needed(target.needs):
        raise InvalidTarget(f"{name}.needs has {why}")
    check_plain(target, _SAID, "it is asked for outside of any event loop")
    if target.concurrency not in ("serial", "per_queue", "parallel"):
        raise InvalidTarget(
            f"{name}.concurrency is {target.concurrency!r}: use 'serial', 'per_queue' or 'parallel'"
        )
    if callable(getattr(target, "params", None)):
        raise InvalidTarget(
            f"{name} defines params, which nobody calls: define profile(self), and change what "
            "super().profile() says of the disk"
        )
    kind = kind_of(target)
    if target.dispatch is not None:
        check_plain(target, (*_SCOPE, "map"), "no event loop serves this target")
        if callable(mapper := getattr(target, "map", None)):
            check_handlers(name, {"map": mapper})
        return kind
    _check_methods(target)
    if kind == "sync":
        check_plain(target, _SCOPE, "no event loop serves a target with plain handlers")
    return kind


def _check_methods(target: Target) -> None:
    """Raises InvalidTarget unless its methods are those of a disk, and of one kind."""
    name = type(target).__name__
    methods: dict[str, Callable[..., object]] = {
        m: f for m in METHODS if (f := getattr(target, m, None)) is not None
    }
    for method, function in methods.items():
        if not callable(function):
            raise InvalidTarget(f"{name}.{method} is {function!r}, not a method: rename it")
    if "handle" in methods:
        if extra := sorted(methods.keys() - {"handle"}):
            raise InvalidTarget(
                f"{name} defines handle and {', '.join(extra)}: handle gets every request, "
                "define either it or the others"
            )
    elif "read" not in methods:
        raise InvalidTarget(f"{name} has no read method: define read(self, offset, buffer)")
    elif not ({"write", "write_fua"} & methods.keys()) and not target.read_only:
        raise InvalidTarget(
            f"{name} has no write method: define write(self, offset, data), or pass read_only=True"
        )
    check_handlers(name, methods)
    coroutines = {m for m, f in methods.items() if inspect.iscoroutinefunction(f)}
    if coroutines and coroutines != methods.keys():
        plain = ", ".join(sorted(methods.keys() - coroutines))
        raise InvalidTarget(
            f"{name} mixes async methods ({', '.join(sorted(coroutines))}) with plain ones "
            f"({plain}): make all of them async, or none"
        )
