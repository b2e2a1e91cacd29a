# SPDX-License-Identifier: MIT
"""A layer that fails on command, over a target that works."""

import difflib
import errno
import inspect
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from pyublk.arguments import seconds as check_seconds
from pyublk.arguments import whole
from pyublk.layers.base import Layer
from pyublk.target import Target

#: What is called before a method: it raises, or returns the seconds to wait.
Fault = Callable[[], float]


class Faulty(Layer):
    """Serves `target`, and makes requests fail, take longer, or hang, as you choose.

    Args:
        target: a target of any kind.

    `fail`, `delay` and `hang` set a fault for a method by its name ("read", "write", "flush", ...).
    Each counts calls from the time when it is set. A fault that could never happen is a ValueError:
    for a method that no request of this target calls, an unknown errno, an invalid time or count.
    """

    recoverable = True

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._faults: dict[str, Fault] = {}
        self._released: Future[None] = Future()
        for method, inner in self.below.methods.items():
            wrapped = _awaiting if inspect.iscoroutinefunction(inner) else _calling
            setattr(self, method, wrapped(self, method, inner))

    def close(self) -> Any:
        self.release()
        return super().close()

    def fail(
        self, method: str, error: int = errno.EIO, *, nth: int = 1, every: bool = False
    ) -> None:
        """The `nth` call of `method` from now on raises OSError(error); `every`: each `nth`."""
        if not isinstance(error, int) or error is True or error not in errno.errorcode:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error!r}")
        whole("nth", nth, least=1)
        calls = 0

        def fault() -> float:
            nonlocal calls
            calls += 1
            if calls == nth or (every and calls % nth == 0):
                raise OSError(error, f"injected into {method}")
            return 0.0

        self._set(method, fault)

    def delay(self, method: str, seconds: float) -> None:
        """From now on, each call of `method` takes this much longer."""
        check_seconds("seconds", seconds, zero=True)
        self._set(method, lambda: seconds)

    def hang(self, method: str) -> None:
        """From now on, calls of `method` do not return before `release`."""
        if self._released.done():
            self._released = Future()
        self._set(method, lambda: math.inf)

    def _set(self, method: str, fault: Fault) -> None:
        target = self.below.target
        called = list(self.below.methods)
        if target.read_only:
            called = [one for one in called if one in ("read", "flush", "handle")]
        if method not in called:
            close = difflib.get_close_matches(str(method), called, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            kind = "a read-only " if target.read_only else ""
            raise ValueError(
                f"no request calls {method!r} of {kind}{type(target).__name__}{hint}: its methods "
                f"are {', '.join(called)}"
            )
        self._faults[method] = fault

    def release(self) -> None:
        """Lets the calls that hang go on."""
        with suppress(InvalidStateError):  # it was released already
            self._released.set_result(None)

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self.release()


def _calling(layer: Faulty, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """A plain method with its faults."""

    def call(*args: object) -> object:
        if (fault := layer._faults.get(method)) is not None:
            pause = fault()
            if pause == math.inf:
                layer._released.result()
            else:
                time.sleep(pause)
        return inner(*args)

    return call


def _awaiting(layer: Faulty, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """The same of a coroutine: others go on meanwhile."""
    import asyncio

    async def call(*args: object) -> object:
        if (fault := layer._faults.get(method)) is not None:
            pause = fault()
            if pause == math.inf:
                await asyncio.shield(asyncio.wrap_future(layer._released))
            elif pause:
                await asyncio.sleep(pause)
        return await inner(*args)

    return call
