# SPDX-License-Identifier: MIT
"""What is below a cache: opened when it is first needed, and called from any thread."""

import errno
import inspect
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyublk.errors import UblkError
from pyublk.layers.base import Below
from pyublk.layers.caching.identity import PROPERTIES
from pyublk.pauses import drawn, longer
from pyublk.target import Target, kind_of

if TYPE_CHECKING:
    from pyublk.engines.loops import LoopThread

log = logging.getLogger("pyublk.cache")


class Changed(ValueError):
    """The source is not the one whose bytes the cache has."""


class Source(Target):
    """A target of any kind, as one with plain methods that any thread may call at any time.

    It is opened by `reach`, or by the first call that needs it. While that fails, calls wait for
    another attempt, for at most `patience` seconds, and then fail with its errno. `check` looks at
    it when it is open; when that raises `Changed`, or it says that it cannot be served at all,
    every call fails with EIO from then on.

    Args:
        target: the one below.
        check: called with the target open, before the first byte is taken from it.
        patience: seconds.
    """

    concurrency = "parallel"

    def __init__(
        self, target: Target, *, check: Callable[[Target], None], patience: float = 10.0
    ) -> None:
        super().__init__(size=0)
        _make_paths_absolute(target)
        self.target = target
        #: It is asked for before anything is open.
        self.recoverable = target.recoverable
        self.workers = target.workers
        self._check = check
        self._patience = patience
        self._lock = threading.Lock()  # for who opens it, or closes it
        self._below: Below | None = None
        self._loop: LoopThread | None = None
        self._one_at_a_time: Any = nullcontext()
        self._refused: Exception | None = None
        self._delay = 0.0
        self._next_attempt = 0.0
        self._failure: OSError | None = None
        self._closing = threading.Event()

    # ---- opening ----

    def open(self) -> None:
        """It may be used again. What is below is not opened yet."""
        self._closing.clear()
        self._refused = self._failure = None
        self._delay = self._next_attempt = 0.0

    @property
    def below(self) -> Target:
        """The target itself, in a disk's stack."""
        return self.target

    def be(self, properties: Mapping[str, Any]) -> None:
        """Has these properties (`described`), whether it is open or not."""
        for name in PROPERTIES:
            setattr(self, name, properties[name])

    @property
    def is_reached(self) -> bool:
        """Whether it is open."""
        return self._below is not None

    def trouble(self) -> str | None:
        """Why it cannot be reached, as of the last attempt."""
        found = self._refused or self._failure
        return None if found is None else str(found)

    def reach(self, *, patience: float | None = None) -> Below:
        """Opens it unless it is open. Raises OSError when that fails for so long; at once, and from
        then on, Changed, and ValueError or UblkError of the target."""
        until = time.monotonic() + (self._patience if patience is None else patience)
        while True:
            if (below := self._below) is not None:
                return below
            with self._lock:
                if (below := self._below) is not None:
                    return below
                if self._refused is not None:
                    raise self._refused
                due = time.monotonic() >= self._next_attempt
                if due and (below := self._attempt()) is not None:
                    return below
                failure, wait = self._failure, self._next_attempt - time.monotonic()
            assert failure is not None
            if time.monotonic() + wait > until or self._closing.wait(max(0.0, wait)):
                raise failure

    def _attempt(self) -> Below | None:
        try:
            self._below = self._opened()
        except OSError as error:
            self._failed(error)
            return None
        except (ValueError, UblkError) as error:  # another attempt would have the same end
            self._refused = error
            log.error("%s", error)
            raise
        except Exception as error:
            self._failed(OSError(errno.EIO, f"it cannot be opened: {error!r}"))
            return None
        if self._failure is not None:
            log.info("the source of the cache is reached again")
        self._failure, self._delay = None, 0.0
        return self._below

    def _failed(self, error: OSError) -> None:
        if self._failure is None or str(self._failure) != str(error):
            log.warning("the source of a cache cannot be reached: %s", error)
        self._failure = error
        self._delay = longer(self._delay)
        self._next_attempt = time.monotonic() + drawn(self._delay)

    def _opened(self) -> Below:
        if kind_of(self.target) == "async":
            self._begin_loop()
        self._call(self.target.open)
        try:
            self._check(self.target)
            concurrency = self.target.profile().concurrency
            parallel = concurrency == "parallel" or self._loop is not None
            self._one_at_a_time = nullcontext() if parallel else threading.Lock()
            return Below(self.target)
        except BaseException:
            with suppress(Exception):
                self._call(self.target.close)
            raise

    def close(self) -> None:
        """Calls that wait fail; what is below is closed."""
        self._closing.set()
        with self._lock:
            below, self._below = self._below, None
            try:
                if below is not None:
                    below.end_calls()
                    self._call(self.target.close)
            finally:
                if self._loop is not None:
                    self._loop.end()
                    self._loop = None

    # ---- calling ----

    def read(self, offset: int, buffer: memoryview) -> None:
        self._request("read", offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._request("write", offset, data)

    def write_zeroes(self, offset: int, length: int, unmap: bool = True) -> None:
        """Makes these bytes zero, by whatever the target has for that."""
        if "write_zeroes" in self.reached().methods:
            self._request("write_zeroes", offset, length, unmap)
        else:
            self._request("write", offset, memoryview(bytes(length)))

    def flush(self) -> None:
        """What was written is durable; a target that has no `flush` says that it is anyway."""
        if "flush" in self.reached().methods:
            self._request("flush")

    def reached(self) -> Below:
        """As `reach`, for a request: one that cannot be served at all is an OSError too."""
        try:
            return self.reach()
        except (ValueError, UblkError) as error:
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, str(error)) from None

    def _request(self, name: str, *arguments: Any) -> None:
        try:
            method = self.reached().methods[name]
        except KeyError:
            raise OSError(errno.EOPNOTSUPP, f"{type(self.target).__name__} has no {name}") from None
        try:
            with self._one_at_a_time:
                outcome = self._call(method, *arguments)
        except OSError:
            raise
        except Exception as error:
            log.exception("%s.%s failed", type(self.target).__name__, name)
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        if outcome is not None:
            raise OSError(
                errno.EIO,
                f"{type(self.target).__name__}.{name} returned {outcome!r}: it must do the whole "
                "request and return None",
            )

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Calls it; on the loop of this source if it is a coroutine."""
        if inspect.iscoroutinefunction(method):
            return self._begin_loop().run(method, *arguments)
        outcome = method(*arguments)
        if inspect.isawaitable(outcome):
            return self._begin_loop().run(lambda: outcome)
        return outcome

    def _begin_loop(self) -> "LoopThread":
        """The one that there is, or a new one: a plain target may have an `open` to be awaited."""
        if self._loop is None:
            # asyncio is half of what importing pyublk would cost.
            from pyublk.engines.loops import LoopThread

            self._loop = LoopThread("cache-loop")
            self._loop.begin()
        return self._loop


def _make_paths_absolute(target: Target) -> None:
    """When it is opened at last, its server may be in another directory."""
    for name, value in list(vars(target).items()):
        if isinstance(value, Path):
            setattr(target, name, value.absolute())
        elif isinstance(value, list) and value and all(isinstance(one, Path) for one in value):
            setattr(target, name, [one.absolute() for one in value])
