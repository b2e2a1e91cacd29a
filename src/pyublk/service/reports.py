# SPDX-License-Identifier: MIT
"""Exceptions that cross from one process to another as JSON: what they say, and their kind."""

import builtins
import traceback
from pathlib import Path
from typing import Any

from pyublk import errors


class TargetFailed(errors.UblkError):
    """A target's own code raised something that is no OSError and no mistake in its options."""


class RemoteTracebackError(Exception):
    """The traceback, as text, of an exception that was raised in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def describe(error: BaseException) -> dict[str, Any]:
    """What `revive` needs, made of JSON's types."""
    return {
        "kind": type(error).__name__,
        "library": type(error).__module__.partition(".")[0],
        "errno": getattr(error, "errno", None),
        "text": _text(error),
        "notes": list(getattr(error, "__notes__", ())),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        places = [repr(place) for place in (error.filename, error.filename2) if place is not None]
        return ": ".join([str(error.strerror), " -> ".join(places)] if places else [error.strerror])
    if _known(type(error).__name__, type(error).__module__.partition(".")[0]) is not None:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _known(kind: str, library: str) -> type[Exception] | None:
    """The class that the caller of a library expects for this kind of failure."""
    found = None
    if library == "pyublk":
        found = getattr(errors, kind, None)
    elif library == "builtins" and kind in ("ValueError", "TimeoutError", "MemoryError"):
        found = getattr(builtins, kind)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def revive(report: dict[str, Any]) -> Exception:
    """The exception that was described: the same message, notes and class, as far as it is ours.

    OSErrors come back as such, ValueErrors and the library's own classes too; whatever else a
    target's code raised comes back as TargetFailed. Its cause is the other process's traceback.
    """
    error: Exception
    known = _known(report["kind"], report["library"])
    if report["errno"]:
        kind = known if known is not None and issubclass(known, OSError) else OSError
        error = kind(report["errno"], report["text"])
    else:
        known = known or TargetFailed
        error = known.__new__(known, report["text"])  # not __init__: its arguments are unknown
    for note in report["notes"]:
        error.add_note(note)
    error.__cause__ = RemoteTracebackError(report["traceback"])
    return error
