# SPDX-License-Identifier: MIT
"""Bases that several overlays of this process lie over: each is open once, for all of them.

A thousand disks over one image then take one descriptor for it, or one pool of connections. Only
bases that are read are shared, so nobody sees what another does to them.
"""

import os
import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

from pyublk.files import about
from pyublk.layers.base import Below
from pyublk.layers.identity import Identity
from pyublk.target import Target


class SharedBase(Below):
    """A base, as each of its overlays sees it. The first one that opens it opens the target, and
    the last one that closes it closes that."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, blocking=True)
        self._users = 0
        self._opening = False
        self._turn = threading.RLock()  # to open or close it; held for as long as that takes

    def open(self) -> None:
        self.join(lambda _target: True)

    def join(self, fits: Callable[[Target], bool]) -> bool:
        """Opens it, if nobody has. False: somebody has, and it does not fit."""
        with self._turn:
            if self._opening:
                raise ValueError("an overlay cannot lie over itself: one of its bases is its own")
            if not self._users:
                self._opening = True
                try:
                    super().open()
                finally:
                    self._opening = False
            elif not fits(self.target):
                return False
            self._users += 1
            return True

    def close(self) -> None:
        with self._turn:
            self._users -= 1
            if not self._users:
                super().close()


#: Those that somebody has, by process (a child that is forked has none) and by name: a text, or the
#: id of a target, which lives as long as the base does.
_bases: WeakValueDictionary[tuple[int, str | int], SharedBase] = WeakValueDictionary()
_lock = threading.Lock()


def open_base(target: Target) -> SharedBase:
    """The base that is this target, opened unless another overlay has done so."""
    return _opened(id(target), lambda: target, lambda _target: True)


def open_named_base(text: str, make: Callable[[], Target], identity: Identity | None) -> SharedBase:
    """The base of this name, as overlays have it on record with this `identity`: the open one, if
    opening it anew would find the same; else one that `make` makes."""
    return _opened(text, make, lambda target: _would_be(target, identity))


def _opened(
    name: str | int, make: Callable[[], Target], fits: Callable[[Target], bool]
) -> SharedBase:
    key = (os.getpid(), name)
    with _lock:
        found = _bases.get(key)
        if found is None:
            found = _bases[key] = SharedBase(make())
    if not found.join(fits):
        found = SharedBase(make())
        found.open()
        with _lock:
            _bases[key] = found  # who has the one before keeps it
    return found


def _would_be(target: Target, identity: Identity | None) -> bool:
    """Whether a target that is open would be the same if it was opened now."""
    if (said := target.identity()) is not None:
        # What a server has now is not asked, only what is wanted of it.
        return identity is not None and identity.said == said
    try:
        return all(
            about(one.path).identity == one.identity and one.measured().size == one.size
            for one in getattr(target, "backing", ())
        )
    except OSError:  # it is gone, which opening it will tell
        return False
