# SPDX-License-Identifier: MIT
"""What a handler raised, or returned instead of None: the errno for it, and a line in the log."""

import errno
import logging
import operator
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import CoroutineType, TracebackType
from typing import Any

from pyublk._native import IO
from pyublk.errors import StaleIO
from pyublk.target import Target

log = logging.getLogger("pyublk.target")

#: A class's name and an exception's traceback, whatever the class says they are.
_name_of: Callable[[type], str] = vars(type)["__name__"].__get__
_trace_of: Callable[[Any], TracebackType | None] = vars(BaseException)["__traceback__"].__get__


def _errno_of(outcome: object) -> int:
    """The errno that an OSError came with; 0 without one that a client can be given."""
    if not issubclass(type(outcome), OSError):  # isinstance would ask the object itself
        return 0
    try:
        number = outcome.errno  # type: ignore[attr-defined]
        number = 0 if type(number) is bool else operator.index(number)
    except BaseException:
        return 0
    return number if 0 < number < 4096 else 0


def _place_of(trace: TracebackType | None) -> tuple[str, int]:
    """The line that raised."""
    if trace is None:
        return "", 0
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno or 0


class FailureLog:
    """Turns what a handler raised into an errno, and tells of it once per place and minute.

    It is what stands between a handler and its answer, so it raises nothing, whatever the handler
    raised or returned, and whatever the program has the log do.
    """

    INTERVAL = 60.0  # seconds between two reports from the same line of code

    def __init__(self, target: Target) -> None:
        self._name = type(target).__name__
        self._lock = threading.Lock()
        self._last: dict[tuple[str, int], float] = {}
        self._silent: dict[tuple[str, int], int] = {}
        self._log_failed = False

    def __call__(self, outcome: object, io: IO) -> int:
        """The errno (positive) for an exception, or for a return value that is not None.

        None: the request was deferred, and nobody has it any more.
        """
        number = _errno_of(outcome)
        if number == 0:
            self.tell(outcome, io)
        return number or errno.EIO

    def tell(self, outcome: object, io: IO | None, method: str = "") -> None:
        """Logs it: what came of a request, or, without one, what `method` of the target raised."""
        try:
            self._tell(outcome, io, method)
        except BaseException as failure:  # of a handler, a filter or a factory of the program's
            if not self._log_failed:
                self._log_failed = True
                with suppress(BaseException):
                    print(
                        f"pyublk: {_name_of(type(outcome))} of {self._name} could not be logged: "
                        f"{_name_of(type(failure))}",
                        file=sys.stderr,
                    )

    def _tell(self, outcome: object, io: IO | None, method: str) -> None:
        kind = _name_of(type(outcome))
        who, result = f"{method}()", "no client gets an error"
        if io is not None:
            operation, result = _describe(io)
            who = f"the handler of a {operation}"
        if outcome is None:
            self._report(
                ("dropped", 0),
                f"{self._name}: {who} deferred it, and no reference to its IO is left; {result}",
            )
        elif not issubclass(type(outcome), BaseException):
            if type(outcome) is CoroutineType:
                outcome.close()
            self._report(
                (f"return {who}", 0),
                f"{self._name}: {who} returned {kind} instead of None (to read, fill the buffer); "
                f"{result}",
            )
        else:
            trace = _trace_of(outcome)
            shown: Any = (type(outcome), outcome, trace)
            message = f"{self._name}: {who} raised {kind}; {result}"
            try:
                traceback.format_exception(*shown)
            except BaseException:
                shown = None
                message += " (its traceback cannot be shown)"
            self._report(_place_of(trace), message, shown)

    def _report(self, place: tuple[str, int], message: str, exc_info: Any = None) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(place, -self.INTERVAL) < self.INTERVAL:
                self._silent[place] = self._silent.get(place, 0) + 1
                return
            self._last[place] = now
            silent = self._silent.pop(place, 0)
        if silent:
            message += f" ({silent} more since the last report)"
        log.error(message, exc_info=exc_info)


def _describe(io: IO) -> tuple[str, str]:
    """The operation of a request, and what its client gets."""
    try:
        return str(getattr(io.op, "name", io.op)), "the client gets EIO"
    except StaleIO:
        return "request", "which was answered already"
