# SPDX-License-Identifier: MIT
"""What every layer is: a target that passes on to the one below what it does not do itself."""

import weakref
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from pyublk.engines import engine_for
from pyublk.profile import Profile
from pyublk.target import METHODS, Target, kind_of


class Below:
    """What a layer lies over: a target of any kind, called by the methods of a plain one.

    ``below.read(offset, buffer)``, and so on, are the methods of `Target` that it takes: its own,
    those of a `NativeTarget`'s function, or of a `MappedTarget`'s files. Those of a target with
    coroutines are to be awaited. Zoned disks, and others that are served by `handle`, have that.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._engine = engine_for(target)
        #: The methods by name.
        self.methods = self._engine.methods()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.methods[name]
        except KeyError:
            raise AttributeError(
                f"{type(self.target).__name__} takes no {name!r}: it takes "
                f"{', '.join(self.methods)}"
            ) from None

    def end_calls(self) -> None:
        """The target is about to be closed: gives back what calling it took."""
        self._engine.end_calls()


class Layer(Target):
    """A target over another one, of whatever kind. What it does not define passes through.

    Subclass it, define the methods that do something else, and call those of `below` there::

        class Counting(pyublk.Layer):
            reads = 0

            def read(self, offset, buffer):
                self.reads += 1
                self.below.read(offset, buffer)

    Over a target with coroutines the methods are coroutines too, which await those below. The
    layer takes what the target below takes, and what it defines itself; its `profile` is that of
    the target below, with changes, and so are its attributes.

    Args:
        below: the target to lie over, which is opened and closed with the layer.
    """

    dispatch = None

    def __init__(self, below: Target) -> None:
        # Not that of Target: whatever attribute is missing here is the one below.
        self.below = Below(below)
        self.status_changed = lambda: None
        above = weakref.ref(self)  # a layer that nobody has goes at once, with what is below

        def tell() -> None:
            if (layer := above()) is not None:
                layer.status_changed()

        below.status_changed = tell

    def __getattr__(self, name: str) -> Any:
        if name == "below" or name.startswith("_"):
            raise AttributeError(name)
        if name not in METHODS:
            return getattr(self.below.target, name)
        if name in self.below.methods and not callable(getattr(type(self), "handle", None)):
            return self.below.methods[name]
        raise AttributeError(name)

    def close(self) -> Awaitable[None] | None:
        self.below.end_calls()
        return self.below.target.close()

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
        )


class _Passed:
    """What a layer does not define, of all that a target may: that of the target below."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        return getattr(Target if layer is None else layer.below.target, self._name)


for _name in vars(Target).keys() - vars(Layer).keys():
    if not _name.startswith("_"):
        setattr(Layer, _name, _Passed(_name))
