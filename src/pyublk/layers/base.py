# SPDX-License-Identifier: MIT
"""The base class of layers: targets that pass on to the target below what they do not define."""

import inspect
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from pyublk._native import Layout
from pyublk.engines import engine_for
from pyublk.profile import Profile
from pyublk.target import METHODS, Target, kind_of


class Below:
    """The target below a layer: of any kind, but called by the methods of a plain target.

    ``below.read(offset, buffer)``, and so on, are the methods of `Target` that it supports. They
    call its own methods, a `NativeTarget`'s function, or read and write a `MappedTarget`'s files.
    Those of a target with coroutines must be awaited; if `blocking` is set they are plain too, and
    wait for the coroutine, which runs on an event loop of a thread of its own. Zoned disks, and
    other targets that are served by `handle`, have ``below.handle(io)`` only.
    """

    def __init__(self, target: Target, *, blocking: bool = False) -> None:
        self.target = target
        self._engine = engine_for(target)
        engine = self._engine
        #: The methods by name.
        self.methods = engine.blocking_methods() if blocking else engine.methods()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.methods[name]
        except KeyError:
            raise AttributeError(
                f"{type(self.target).__name__} takes no {name!r}: it takes "
                f"{', '.join(self.methods)}"
            ) from None

    def open(self) -> Awaitable[None] | None:
        """Opens the target; to be awaited, if it gives something to await."""
        return self._engine.open_below()

    def close(self) -> Awaitable[None] | None:
        """Closes the target, and gives back what calling it took. As `open`."""
        return self._engine.close_below()

    def end_calls(self) -> None:
        """Gives back what calling the methods took, and leaves the target open."""
        self._engine.end_calls()

    def as_files(self) -> tuple[Layout, list[tuple[int, bool, bool]]] | None:
        """As of `MappedTarget`, while it is open; None for other kinds."""
        return self._engine.as_files()


class Layer(Target):
    """A target over another one, of any kind. Requests that it does not define pass through.

    Subclass it, define the methods that are to be different, and call those of `below` in them::

        class Counting(pyublk.Layer):
            reads = 0

            def read(self, offset, buffer):
                self.reads += 1
                self.below.read(offset, buffer)

    Over a target with coroutines the methods may be coroutines, which await those below, and run on
    the same event loop. If they are plain, those below wait, and their coroutines run on a loop of
    a thread of its own. `open` and `close` are those of the target below; a layer that has its own
    calls `super().open()` first and `super().close()` last, and awaits them if it has coroutines.

    A layer that defines `write`, but not `write_fua` or `write_zeroes`, has neither, whatever lies
    below: they would go past it. Clients' requests then come as writes and flushes. Otherwise the
    layer supports the operations of the target below, and those that it defines itself. Its
    `profile` and its attributes are those of the target below, unless the layer changes them. It is
    `recoverable` when it says so itself and the target below is: a layer may hold back what was
    written.

    Args:
        below: the target to lie over, which is opened and closed with the layer.
    """

    dispatch = None
    recoverable = False

    #: Whether it has itself what those below may lose, so that it is `recoverable` without them.
    outlives_below: bool = False

    def __init__(self, below: Target) -> None:
        # Not that of Target: whatever attribute is missing here is the one below.
        own = [found for name in METHODS if (found := getattr(type(self), name, None)) is not None]
        plain = any(not inspect.iscoroutinefunction(method) for method in own)
        self.below = Below(below, blocking=plain)

    def __getattr__(self, name: str) -> Any:
        if name == "below" or name.startswith("_"):
            raise AttributeError(name)
        if name not in METHODS:
            return getattr(self.below.target, name)
        if name in ("write_fua", "write_zeroes") and callable(getattr(type(self), "write", None)):
            raise AttributeError(name)  # what it does to writes must not be gone around
        if name in self.below.methods and not callable(getattr(type(self), "handle", None)):
            return self.below.methods[name]
        raise AttributeError(name)

    def open(self) -> Awaitable[None] | None:
        return self._finished(self.below.open())

    def close(self) -> Awaitable[None] | None:
        return self._finished(self.below.close())

    def _finished(self, outcome: Awaitable[None] | None) -> Awaitable[None] | None:
        """A layer with coroutines can await what a target with plain methods has done already."""
        return _await(outcome) if kind_of(self) == "async" else outcome

    def announces(self, method: str) -> bool:
        if callable(getattr(self, "handle", None)):
            return self.below.target.announces(method)
        return super().announces(method)

    def profile(self) -> Profile:
        below = self.below.target.profile()
        return replace(
            below,
            kind=kind_of(self),
            concurrency=self.concurrency,
            operations=frozenset(one for one in METHODS if self.announces(one)),
            # Methods are given bytes: nothing can stay where it is.
            paths=tuple(path for path in below.paths if path in Target.paths) or Target.paths,
            dma_alignment=None,
            recoverable=self.recoverable and (self.outlives_below or below.recoverable),
        )


async def _await(outcome: Awaitable[None] | None) -> None:
    if outcome is not None:
        await outcome


def stack(target: Target) -> list[Target]:
    """The target and those that it lies over, the uppermost first: each has the one below it as its
    attribute `below`, or a `Below` of it."""
    found = [target]
    while True:
        below: Any = getattr(found[-1], "below", None)
        if isinstance(below, Below):
            below = below.target
        if not callable(getattr(below, "profile", None)):  # none, or something else of this name
            return found
        found.append(below)


def own_status(target: Target) -> dict[str, Any] | None:
    """What a target says of itself; None for a layer that passes on what is said below."""
    if isinstance(inspect.getattr_static(type(target), "status"), _Passed):
        return None
    return target.status()


def keeps_data(target: Target) -> bool:
    """Whether another server has what was written to such a target, and to those below it."""
    return first_that_forgets(target) is None


def first_that_forgets(target: Target) -> Target | None:
    """The uppermost of a stack that is not recoverable. One that `outlives_below` is on its own: it
    has itself whatever those below may lose."""
    for one in stack(target):
        if not one.recoverable:
            return one
        if getattr(one, "outlives_below", False):
            return None
    return None


class _Passed:
    """What a layer does not define, of all that a target may: that of the target below."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        return getattr(Target if layer is None else layer.below.target, self._name)


for _name in vars(Target).keys() - vars(Layer).keys():
    if not _name.startswith("_"):
        setattr(Layer, _name, _Passed(_name))
