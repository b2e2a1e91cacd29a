# SPDX-License-Identifier: MIT
"""How the programs of this package begin: the command, `python -m pyublk...`, a disk's server.

A library leaves signals alone. So what is done here when the package is imported is done only where
it is imported as a program of its own, before anything that takes time.
"""

# `signal` itself brings enum along, which takes a while.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys

#: What a shell tells of a program that SIGINT ended.
INTERRUPTED = 130


def _end(_number: int, _frame: object) -> None:
    os._exit(INTERRUPTED)  # KeyboardInterrupt would be a traceback of whatever is imported now


def ctrl_c_ends() -> None:
    """From now on Ctrl-C ends the program, if it is ours, at once and without a word: it has begun
    nothing yet, or has done everything."""
    # Ignored, as in a shell script's background: it stays so.
    if _PROGRAM and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ctrl_c_interrupts() -> None:
    """From now on Ctrl-C is KeyboardInterrupt again: what was begun can be undone."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fill_descriptors() -> None:
    """Gives the standard descriptors that are closed to /dev/null: a file opened later would get
    their number, and with it what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, True)


def fill_streams() -> None:
    """As `fill_descriptors`, and Python's streams on them, which it leaves out when they are
    closed at the start."""
    fill_descriptors()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def settle_streams() -> None:
    """Lets go of what could not be printed: it was told of, and would be once more at the exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _is_program() -> bool:
    if os.path.basename(next(iter(getattr(sys, "argv", ())), "")) == "pyublk":
        return True
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return bool(module) and module[0].partition(".")[0] == "pyublk"


_PROGRAM = _is_program()
ctrl_c_ends()
if _PROGRAM:
    fill_descriptors()  # the next import may open files: ctypes does, where libffi needs its own
