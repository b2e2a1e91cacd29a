# SPDX-License-Identifier: MIT
"""How a failure is told on the command line: a sentence, what to do, an exit code for its kind."""

import errno
import sys
import traceback as tracebacks
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import IO, Any

import click

from pyublk import errors, launch
from pyublk.control import CONTROL_NODE, Controller


class ExitCode(IntEnum):
    """What the command ends with. The comments are the table in docs/cli.md."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DRIVER = 3
    PERMISSION = 4
    NO_DEVICE = 5
    BUSY = 6
    TIMEOUT = 7
    CHANGES = 8
    INTERRUPTED = 130


class NoDriver(errors.UblkError):
    """There is no ublk driver."""


class NotTold(errors.UblkError):
    """What was done could not be printed, and was undone."""


def exit_code(error: BaseException) -> ExitCode:
    """The kind of failure that an exception stands for."""
    match error:
        case NoDriver():
            return ExitCode.NO_DRIVER
        case errors.DeviceBusy():
            return ExitCode.BUSY
        case TimeoutError():
            return ExitCode.TIMEOUT
        case PermissionError():
            return ExitCode.PERMISSION
        case OSError(errno=errno.ENODEV):
            return ExitCode.NO_DEVICE
        case OSError(errno=errno.EBUSY | errno.EEXIST):
            return ExitCode.BUSY
        case errors.InvalidTarget() | ValueError():
            return ExitCode.USAGE
        case _:
            return ExitCode.FAILED


def message(text: str, *notes: str) -> None:
    """Tells something that is not the result, if anybody listens."""
    with suppress(OSError):
        click.echo(f"pyublk: {text}", err=True)
        for note in notes:
            click.echo(f"  {note}", err=True)


class Failure(click.ClickException):
    """What click shows instead of a traceback; `of` names what has failed, if that is not clear."""

    def __init__(self, error: BaseException, *, of: str = "") -> None:
        super().__init__(f"{of}: {_sentence(error)}" if of else _sentence(error))
        self.notes: list[str] = list(getattr(error, "__notes__", ()))
        self.exit_code = exit_code(error)  # type: ignore[misc]  # made to be set by subclasses

    def show(self, file: IO[Any] | None = None) -> None:
        message(self.message, *self.notes)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {error.filename!r}"
        return f"{error.strerror}{place}"
    if isinstance(error, errors.UblkError | ValueError | TimeoutError):
        return str(error)
    return f"{type(error).__name__}: {error} (pyublk --traceback ... shows where)"


def raise_all(failures: Sequence[Failure]) -> None:
    """Shows them, and ends the command with the last one's exit code, if there are any."""
    for failure in failures[:-1]:
        failure.show()
    if failures:
        raise failures[-1]


@contextmanager
def reported(*, traceback: bool) -> Iterator[None]:
    """Turns every exception into a `Failure`, having shown its traceback if that is wanted."""
    try:
        launch.ctrl_c_interrupts()
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        launch.ctrl_c_ends()
        message("interrupted")
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if traceback:
            tracebacks.print_exception(error)
        raise Failure(error) from error
    finally:
        launch.ctrl_c_ends()


def open_controller() -> Controller:
    """The driver's control node, or the failure that says that there is no driver."""
    try:
        return Controller()
    except FileNotFoundError as error:
        missing = NoDriver(error.strerror or CONTROL_NODE)
        for note in getattr(error, "__notes__", ()):
            missing.add_note(note)
        raise missing from error
