"""Exceptions on their way from one process to another."""

import errno
import json

import pytest

from pyublk import errors
from pyublk.service.reports import RemoteTracebackError, TargetFailed, describe, revive


def there_and_back(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return revive(json.loads(json.dumps(describe(caught))))


class OddError(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("size is 5"), ValueError, "size is 5"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a"),
            FileNotFoundError,
            "No such file: 'a'",
        ),
        (OSError(errno.EACCES, "closed to you"), PermissionError, "closed to you"),
        (errors.InvalidTarget("X has no read"), errors.InvalidTarget, "X has no read"),
        (errors.device_not_found(7), errors.DeviceNotFound, "there is no device 7"),
        (errors.HandlerTimeout("it hangs"), TimeoutError, "it hangs"),
        (
            errors.FeatureMissing("QUIESCE", "Linux 6.16", "Linux 6.12"),
            errors.FeatureMissing,
            "QUIESCE is not available: it needs Linux 6.16, here is Linux 6.12",
        ),
        (ZeroDivisionError("by zero"), TargetFailed, "ZeroDivisionError: by zero (test_reports.py"),
        (OddError("odd"), TargetFailed, "OddError: odd (test_reports.py, line"),
    ],
)
def test_kind_and_words_arrive(error: Exception, kind: type[Exception], text: str) -> None:
    revived = there_and_back(error)
    assert isinstance(revived, kind)
    assert text in str(revived)


def test_errno_and_notes_arrive() -> None:
    error = OSError(errno.EEXIST, "the id is in use")
    error.add_note("What to do: choose another id.")
    revived = there_and_back(error)
    assert isinstance(revived, FileExistsError)
    assert revived.errno == errno.EEXIST
    assert revived.__notes__ == ["What to do: choose another id."]


def test_the_traceback_arrives_as_the_cause() -> None:
    cause = there_and_back(KeyError("x")).__cause__
    assert isinstance(cause, RemoteTracebackError)
    assert "in there_and_back" in str(cause)
