"""Run a command in a machine as a command line does: joined to the caller's own terminal."""

import os
import re
import sys
import termios
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from pyublk.vm.errors import GuestFailed, GuestTimeout, Interrupted, VMError, WrongUsage
from pyublk.vm.machine import Machine

EXIT_USAGE = 2
"""Exit code when an argument was wrong; nothing was begun."""
EXIT_TIMEOUT = 124
"""Exit code when the command took longer than allowed."""
EXIT_MACHINE = 125
"""Exit code when the machine failed: not prepared, not booted, panicked, hung."""

_PASSED = ("PATH", "HOME", "TERM", "COLORTERM", "LANG", "LANGUAGE", "TZ", "USER", "LOGNAME",
           "SHELL", "NO_COLOR", "FORCE_COLOR", "VIRTUAL_ENV")  # fmt: skip
_PASSED_PREFIXES = ("LC_", "PYTHON")


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def memory_size(text: str) -> int:
    """Return the bytes a size such as `512M` or `4GiB` stands for.

    Raises:
        WrongUsage: it is none.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise WrongUsage(f"{text!r} is not a size of memory: write 512M or 4GiB, for example")
    return int(match[1]) * _UNITS[match[2].upper()]


def environment(
    extra: Sequence[str] = (), source: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the part of an environment that makes sense in a machine.

    Args:
        extra: `NAME` to pass a variable on too, or `NAME=VALUE` to set one.
        source: the caller's environment.

    Raises:
        WrongUsage: a name is empty, or a variable to be passed on is not set.
    """
    chosen = {
        name: value
        for name, value in source.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    for item in extra:
        name, equals, value = item.partition("=")
        if not name or (not equals and name not in source):
            raise WrongUsage(f"the variable {item!r} cannot be passed on: it is not set here")
        chosen[name] = value if equals else source[name]
    return chosen


@contextmanager
def _raw_terminal() -> Iterator[None]:
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def run(
    machine: Machine, argv: Sequence[str], *, env: Mapping[str, str], timeout: float | None = None
) -> int:
    """Run a command on the caller's standard streams; without one, the caller's shell.

    A terminal on all three streams becomes a terminal in the guest; otherwise they are pipes.

    Returns:
        The exit code to end with: the command's, or 128 + n when signal n ended the machine.

    Raises:
        VMError: the machine failed, or the command took too long; see `report`.
    """
    command = list(argv) or [env.get("SHELL", "/bin/sh")]
    terminal = all(os.isatty(descriptor) for descriptor in (0, 1, 2))
    try:
        with _raw_terminal() if terminal else nullcontext():
            done = machine.run(
                command, env=env, timeout=timeout, terminal=terminal, forward_signals=True
            )
    except Interrupted as interruption:
        return 128 + interruption.signal
    return done.returncode


def report(error: VMError) -> int:
    """Say on standard error what went wrong, the kernel's log first; returns the exit code."""
    if isinstance(error, GuestFailed) and error.console.strip():
        print(
            "--- the guest kernel's log", error.console.rstrip(), "---", sep="\n", file=sys.stderr
        )
    print(f"pyublk vm: {error}", file=sys.stderr)
    if isinstance(error, WrongUsage):
        return EXIT_USAGE
    return EXIT_TIMEOUT if isinstance(error, GuestTimeout) else EXIT_MACHINE
