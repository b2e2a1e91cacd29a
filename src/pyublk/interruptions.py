# SPDX-License-Identifier: MIT
"""What signals and cancellations may interrupt, and what they may not."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds between two looks: a signal that comes as a thread is about to block in a lock does not
#: wake it, nor does one that the kernel gave to another thread.
LOOK_FOR_SIGNALS = 0.5


@contextmanager
def handled(
    handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Signals' handlers inside the context; those from before are back afterwards."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.getsignal(number)  # first: the signal may come at once
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP came while the main thread waited."""


@contextmanager
def signals_raised() -> Iterator[None]:
    """In the main thread, turns the first SIGINT, SIGTERM or SIGHUP into Signalled.

    Only where they still have Python's own behaviour: a program's handlers are its business. Not by
    setting an event: its lock may be held by the very wait that the signal interrupts.
    """
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,  # the terminal has gone
    }
    here = threading.current_thread() is threading.main_thread()
    came = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise Signalled

    plain = [number for number, default in defaults.items() if signal.getsignal(number) == default]
    with handled(dict.fromkeys(plain if here else [], interrupt)):
        try:
            yield
        finally:
            came = True


def run_shielded(step: Callable[[], T], interrupted: Callable[[], None]) -> T:
    """Runs it on a thread of its own, which no signal cuts short: what a signal's handler raises
    meanwhile, such as KeyboardInterrupt, is raised afterwards; `interrupted` is called at once.

    No threading.Event here: a signal in the middle of its methods can leave its lock taken.
    """
    over = False
    until_over = threading.Lock()
    until_over.acquire()
    unclaimed = threading.Lock()
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        nonlocal over
        if not unclaimed.acquire(blocking=False):
            return
        try:
            results.append(step())
        except BaseException as error:
            failures.append(error)
        finally:
            over = True
            until_over.release()

    def begin() -> None:
        try:
            threading.Thread(target=run, name="run_shielded", daemon=True).start()
        except RuntimeError:  # this process may have no more of them
            run()

    interrupt: BaseException | None = None
    while not over:
        try:
            try:
                if interrupt is not None:
                    interrupted()
                if not unclaimed.locked():  # a signal may come in the middle of the beginning
                    begin()
                until_over.acquire(timeout=LOOK_FOR_SIGNALS)
            except BaseException as raised:
                interrupt = raised
        except BaseException as raised:  # another one, while that was noted
            interrupt = raised
    if interrupt is not None:
        raise interrupt
    if failures:
        raise failures[0]
    return results[0]


async def run_shielded_async(
    step: Callable[[], None], interrupted: Callable[[], None] = lambda: None
) -> None:
    """Runs it on a thread. A cancellation is raised after its end: nothing may go on beside it;
    `interrupted` is called at once."""
    import asyncio

    work = asyncio.ensure_future(asyncio.to_thread(step))
    cancellation: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancellation = error
            interrupted()
    failure = work.exception()
    if cancellation is not None:
        raise cancellation
    if failure is not None:
        raise failure
