"""Signals to this process while a command runs in a machine."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pyublk.interruptions import handled
from pyublk.vm.errors import Interrupted
from pyublk.vm.session import Session

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def forwarded(session: Session, *, terminal: bool) -> Iterator[None]:
    """Pass SIGINT on to the command; end the machine on SIGTERM, SIGHUP and a second SIGINT.

    Args:
        session: the command's run.
        terminal: also pass on changes of the terminal's size.

    Raises:
        Interrupted: inside the context, when the machine is to be ended.
    """

    def handle(number: int, _frame: FrameType | None) -> None:
        try:
            if number != signal.SIGINT:
                raise Interrupted(number)
            session.interrupt()
        except Interrupted:
            # What is under way is the end; another signal must not break it off.
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_IGN)
            raise

    def resize(_number: int, _frame: FrameType | None) -> None:
        size = os.get_terminal_size(0)
        session.tell(f"size {size.lines} {size.columns}")

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
    handlers = dict.fromkeys(_SIGNALS, handle)
    if terminal:
        handlers[signal.SIGWINCH] = resize
    with handled(handlers):
        yield
