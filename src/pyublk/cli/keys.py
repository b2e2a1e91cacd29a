# SPDX-License-Identifier: MIT
"""Single keys from a terminal, which is left as it was."""

import os
import re
import select
import signal
import sys
import termios
import tty
from contextlib import suppress
from types import FrameType
from typing import NoReturn, Self

#: What terminals send for keys without a character, whether for "normal" or "application" keys.
_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
}
_KEY = re.compile(rb"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Za-z])|.", re.DOTALL)
#: Ctrl-Z, which is a key like others in here: whoever reads it calls `suspend`.
SUSPEND = "\x1a"
#: Nobody is at the terminal any more.
GONE = ""


class Keys:
    """Reads keys from standard input as they are pressed; use `with`.

    The terminal is as before at the end, also after SIGTERM, which ends the program by SystemExit,
    and Ctrl-C, which raises KeyboardInterrupt as ever. If standard input is no terminal, no key
    ever comes.
    """

    def __init__(self) -> None:
        self._input = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[object] = []
        self._pressed = b""

    def __enter__(self) -> Self:
        self._handler = signal.signal(signal.SIGTERM, _end)
        self._take()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._give_back()
        signal.signal(signal.SIGTERM, self._handler)

    def _take(self) -> None:
        if self._input is not None:
            self._before = termios.tcgetattr(self._input)
            tty.setcbreak(self._input)
            now = termios.tcgetattr(self._input)
            now[6][termios.VSUSP] = b"\0"
            termios.tcsetattr(self._input, termios.TCSADRAIN, now)

    def _give_back(self) -> None:
        if self._input is not None:
            # Not TCSADRAIN: output to a terminal that is stopped or gone would never drain.
            termios.tcsetattr(self._input, termios.TCSANOW, self._before)  # type: ignore[arg-type]

    def read(self, timeout: float) -> str | None:
        """The next key within so many seconds, its character or name; or GONE, or None."""
        if self._input is None:
            select.select([], [], [], timeout)
            return None
        if not self._pressed:
            if not select.select([self._input], [], [], timeout)[0]:
                return None
            with suppress(OSError):  # EIO: it was hung up
                self._pressed = os.read(self._input, 64)
        match = _KEY.match(self._pressed)
        if match is None:
            return GONE
        self._pressed = self._pressed[match.end() :]
        return _SEQUENCES.get(match[0], match[0].decode(errors="replace"))

    def suspend(self) -> None:
        """As Ctrl-Z: gives the terminal back, and stops this job until it is continued."""
        self._give_back()
        os.kill(0, signal.SIGTSTP)
        self._take()


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
