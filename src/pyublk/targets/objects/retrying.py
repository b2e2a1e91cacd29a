# SPDX-License-Identifier: MIT
"""Requests that are tried again for a while, with pauses that grow and are drawn by lot.

obstore would do so by itself; but not for a body that is cut or short, nor could it say so, count
it, or be told that the disk is to end. And who repeats a conditional PUT must know that it did.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pyublk.pauses import drawn, longer
from pyublk.targets.objects.failures import Changed, Exists, Failure, Missing, explain

T = TypeVar("T")


class Retrying:
    """Calls steps that ask a server, and repeats them while that may help.

    Args:
        place: what is asked, for messages.
        budget: seconds after which no further attempt begins.
        log: where the beginning and the end of trouble is told, once each.
    """

    def __init__(self, place: str, budget: float, log: logging.Logger) -> None:
        self.place = place
        self.budget = budget
        self._log = log
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._trouble: str | None = None
        self._gave_up = False
        self.requests = 0
        self.retries = 0
        self.failures = 0

    def call(self, step: Callable[[], T], what: str = "", *, budget: float | None = None) -> T:
        """What `step` returns. Raises the Failure that lasts, with the place and `what` of it in
        its sentence: one that passes becomes ETIMEDOUT when the budget is spent."""
        budget = self.budget if budget is None else budget
        deadline = time.monotonic() + budget
        pause = longer(0)
        while True:
            with self._lock:
                self.requests += 1
            try:
                outcome = step()
            except Exception as error:
                failure = explain(error)
            else:
                if self._trouble is not None:
                    self._recovered()
                return outcome
            left = deadline - time.monotonic()
            if not failure.passing or left <= 0 or self._ended.is_set():
                raise self._given_up(failure, what, budget) from None
            self._failed(failure, budget)
            if self._ended.wait(min(left, drawn(pause))):
                raise self._given_up(failure, what, budget)
            pause = longer(pause)

    def end(self) -> None:
        """No attempt follows any more."""
        self._ended.set()

    def _failed(self, failure: Failure, budget: float) -> None:
        with self._lock:
            self.retries += 1
            new, self._trouble = self._trouble is None, failure.why
        if new:
            self._log.warning(
                "%s: %s: trying again for %g seconds", self.place, failure.why, budget
            )

    def _recovered(self) -> None:
        with self._lock:
            was, self._trouble, self._gave_up = self._trouble, None, False
        if was is not None:
            self._log.warning("%s answers again", self.place)

    def _given_up(self, failure: Failure, what: str, budget: float) -> Failure:
        """The failure, with the place; what is new in it is logged."""
        place = f"{self.place}: {what}" if what else self.place
        sentence = f"{place}: {failure.why}"
        number = failure.errno or errno.EIO
        if failure.passing:
            number = errno.ETIMEDOUT
            sentence += f", for {budget:g} seconds: given up"
        with self._lock:
            # Of the others, whoever asks knows whether that is a failure.
            self.failures += not isinstance(failure, Missing | Changed | Exists)
            said, self._gave_up = self._gave_up and failure.passing, True
            self._trouble = failure.why if failure.passing else self._trouble
        if failure.passing and not said and not self._ended.is_set():
            self._log.error("%s (retry_for says how long to try)", sentence)
        if failure.passing:
            return Failure(number, sentence, passing=True)
        return type(failure)(number, sentence)

    def status(self) -> dict[str, int | str | None]:
        """Counters, and what is wrong now."""
        return {
            "requests": self.requests,
            "retries": self.retries,
            "failures": self.failures,
            "trouble": self._trouble,
        }
