# SPDX-License-Identifier: MIT
"""A target that fails on command, around one that works."""

import difflib
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

from pyublk.arguments import seconds as check_seconds
from pyublk.arguments import whole
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
    calls from when it is set. A fault that could never happen is a ValueError: of a method that no
    request of this target calls, an errno that there is not, a time or a count that is none.
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
        if not isinstance(error, int) or error is True or error not in errno.errorcode:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error!r}")
        whole("nth", nth, least=1)
        calls = 0

        def fault() -> None:
            nonlocal calls
            calls += 1
            if calls == nth or (every and calls % nth == 0):
                raise OSError(error, f"injected into {method}")

        self._set(method, fault)

    def delay(self, method: str, seconds: float) -> None:
        """From now on, each call of `method` takes this much longer."""
        check_seconds("seconds", seconds, zero=True)
        self._set(method, lambda: time.sleep(seconds))

    def hang(self, method: str) -> None:
        """From now on, calls of `method` do not return before `release`."""
        self._set(method, self._wait)
        self._released.clear()

    def _set(self, method: str, fault: Callable[[], None]) -> None:
        name = type(self._target).__name__
        called = [one for one in METHODS if callable(getattr(self._target, one, None))]
        if self._target.read_only:
            called = [one for one in called if one in ("read", "flush", "handle")]
        if method not in called:
            close = difflib.get_close_matches(str(method), called, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            kind = "a read-only " if self._target.read_only else ""
            raise ValueError(
                f"no request calls {method!r} of {kind}{name}{hint}: its methods are "
                f"{', '.join(called)}"
            )
        self._faults[method] = fault

    def _wait(self) -> None:
        self._released.wait()

    def release(self) -> None:
        """Lets go of what hangs."""
        self._released.set()

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self.release()
