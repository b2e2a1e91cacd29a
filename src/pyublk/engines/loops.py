# SPDX-License-Identifier: MIT
"""Event loops for handlers; one of a thread of its own, for who calls coroutines and waits."""

import asyncio
import inspect
import logging
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyublk._native import become_io_flusher, name_thread
from pyublk.scheduling import NamedThread

log = logging.getLogger("pyublk.loops")


def _begin_executor_thread() -> None:
    become_io_flusher()
    name_thread("ublk-executor")  # or it would have the name of the queue's thread


def serving_loop(selector: selectors.BaseSelector | None = None) -> asyncio.AbstractEventLoop:
    """A new event loop for handlers: what one gives to threads serves requests too."""
    loop = asyncio.SelectorEventLoop(selector)
    loop.set_default_executor(
        ThreadPoolExecutor(thread_name_prefix="asyncio", initializer=_begin_executor_thread)
    )
    return loop


async def end_other_tasks() -> None:
    """Cancels every other task of the running loop, and waits for their ends."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            log.error(
                "a task on a target's event loop failed as it was cancelled", exc_info=outcome
            )


async def _end_all(loop: asyncio.AbstractEventLoop) -> None:
    await end_other_tasks()
    await loop.shutdown_default_executor()


class LoopThread:
    """An event loop on a thread of its own, for a target's methods: from `open` until after
    `close`, which are awaited there too.

    Args:
        name: of the thread; the kernel keeps 15 bytes of it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Starts the thread."""
        self._loop = serving_loop()
        self._thread = NamedThread(
            target=self._run, args=(self._loop,), name=self._name, daemon=True
        )
        self._thread.start()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        become_io_flusher()
        asyncio.set_event_loop(loop)
        loop.run_forever()

    def run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Calls it there, and waits for what it gives to await. From any thread but that one."""
        if self._loop is None:
            raise RuntimeError("the target below is not open: call Below.open first")
        return self._wait(self._loop, _awaited(step, *arguments))

    def _wait(self, loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, loop).result()

    def end(self) -> None:
        """Cancels what still runs, and ends the thread."""
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        try:
            self._wait(loop, _end_all(loop))
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def blocking(self, method: Callable[..., Any]) -> Callable[..., None]:
        """The method as a plain one, which returns None or raises."""

        def call(*arguments: Any) -> None:
            if (outcome := self.run(method, *arguments)) is not None:
                raise TypeError(f"{method.__qualname__} returned {outcome!r}, not None")

        return call


async def _awaited(step: Callable[..., Any], *arguments: Any) -> Any:
    outcome = step(*arguments)
    return await outcome if inspect.isawaitable(outcome) else outcome
