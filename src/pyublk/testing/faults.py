# SPDX-License-Identifier: MIT
"""A target that fails on command, around one that works."""

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

from pyublk.params import Params
from pyublk.target import METHODS, Target, dispatch_of

#: What a target says of itself beside its methods.
_SAID = (
    "concurrency",
    "flushes",
    "discards",
    "writes_zeroes",
    "takes_fua",
    "paths",
    "needs",
    "integrity",
    "size",
    "block_size",
    "physical_block_size",
    "read_only",
    "rotational",
)


class Faulty(Target):
    """Serves `target`, and fails, delays or holds the requests it is told to.

    Args:
        target: a target with plain methods (not async, not native).

    Then, for a method by name ("read", "write", "flush", ...): `fail`, `delay`, `hang`. Each counts
    calls from when it is set.
    """

    def __init__(self, target: Target) -> None:
        if dispatch_of(target) != "sync":
            raise ValueError(
                f"Faulty needs a target with plain methods, not {type(target).__name__}"
            )
        super().__init__(size=target.size)
        self._target = target
        self._repeat()
        self._faults: dict[str, Callable[[], None]] = {}
        self._released = threading.Event()
        for method in METHODS:
            inner = getattr(target, method, None)
            if callable(inner):
                setattr(self, method, self._wrapped(method, inner))

    def _repeat(self) -> None:
        for name in _SAID:
            setattr(self, name, getattr(self._target, name))

    def open(self) -> None:
        self._target.open()
        self._repeat()

    def close(self) -> None:
        self.release()
        self._target.close()

    def params(self, max_io_size: int) -> Params:
        return self._target.params(max_io_size)

    def status(self) -> dict[str, Any] | None:
        return self._target.status()

    def _wrapped(self, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object) -> object:
            fault = self._faults.get(method)
            if fault is not None:
                fault()
            return inner(*args)

        return call

    def fail(
        self, method: str, error: int = errno.EIO, *, nth: int = 1, every: bool = False
    ) -> None:
        """The `nth` call of `method` from now on raises OSError(error); `every`: each `nth`."""
        calls = 0

        def fault() -> None:
            nonlocal calls
            calls += 1
            if calls == nth or (every and calls % nth == 0):
                raise OSError(error, f"injected into {method}")

        self._faults[method] = fault

    def delay(self, method: str, seconds: float) -> None:
        """From now on, each call of `method` takes this much longer."""
        self._faults[method] = lambda: time.sleep(seconds)

    def hang(self, method: str) -> None:
        """From now on, calls of `method` do not return before `release`."""
        self._released.clear()
        self._faults[method] = self._wait

    def _wait(self) -> None:
        self._released.wait()

    def release(self) -> None:
        """Lets go of what hangs."""
        self._released.set()

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self.release()
