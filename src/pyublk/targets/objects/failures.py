# SPDX-License-Identifier: MIT
"""What obstore raises, as OSErrors with one sentence each; and whether trying again may help."""

import errno
import re
from urllib.parse import urlsplit

#: Answers after which the same request may succeed: too early, too many, the server's trouble.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_STATUS = re.compile(r"status code: (\d{3}) ?([^:\n]*)")

#: What stands in the report of a request that never had an answer, and what it means.
_UNANSWERED = (
    (re.compile(r"dns ?error", re.IGNORECASE), "its name cannot be resolved", True),
    (re.compile(r"InvalidCertificate|UnknownIssuer|invalid peer cert", re.IGNORECASE),
     "its certificate is not valid, or signed by nobody who is trusted here", False),
    (re.compile(r"InvalidContentType|InvalidMessage|AlertReceived|CorruptMessage"),
     "it does not speak TLS there", False),
    (re.compile(r"No CA certificates were loaded"),
     "this system has no certificates: install ca-certificates, or name a file of some in "
     "SSL_CERT_FILE", False),
    (re.compile(r"ConnectionRefused"), "the connection is refused", True),
    (re.compile(r"NetworkUnreachable|HostUnreachable"), "there is no route to it", True),
    (re.compile(r"ConnectionReset|kind: Interrupted|IncompleteMessage|BrokenPipe"),
     "the connection was cut", True),
    (re.compile(r"kind: Timeout|TimedOut"), "it does not answer in time", True),
    (re.compile(r"TooManyRedirects|too many redirects", re.IGNORECASE),
     "it redirects in circles", False),
    (re.compile(r"Content-?Range|unexpected range|UnexpectedRange", re.IGNORECASE),
     "it answered with another range than was asked for", True),
    (re.compile(r"kind: Connect\b"), "no connection can be made", True),
)  # fmt: skip


class Failure(OSError):
    """A request that failed; `why` says it without the place, `passing` whether to try again."""

    def __init__(self, number: int, why: str, *, passing: bool = False) -> None:
        super().__init__(number, why)
        self.why = why
        self.passing = passing


class Missing(Failure, FileNotFoundError):
    """There is no such object."""


class Changed(Failure):
    """The object is not what a condition of the request demanded."""


class Exists(Failure, FileExistsError):
    """The object is there already."""


class Denied(Failure, PermissionError):
    """The server does not allow it."""


def explain(error: Exception) -> Failure:
    """The failure that obstore means."""
    if isinstance(error, Failure):
        return error
    text = str(error)
    status = _STATUS.search(text)
    match type(error).__name__:
        case "NotFoundError" | "FileNotFoundError":
            return Missing(errno.ENOENT, "there is no such file (404)")
        case "PreconditionError" | "NotModifiedError":
            return Changed(errno.ESTALE, "it has changed")
        case "AlreadyExistsError":
            return Exists(errno.EEXIST, "it exists already")
        case "PermissionDeniedError":
            return Denied(errno.EACCES, "the server forbids it (403): it wants other credentials")
        case "UnauthenticatedError":
            return Denied(errno.EACCES, "the server wants credentials (401)")
        case "NotSupportedError" if "Range" in text:
            return Failure(errno.EOPNOTSUPP, "the server answers without ranges")
        case "NotSupportedError" | "NotImplementedError":
            return Failure(errno.EOPNOTSUPP, "the store cannot do this: " + _first_line(text))
    if status is not None:
        number, phrase = int(status[1]), status[2].strip()
        if number == 404:  # of a list, which obstore takes for no object
            return Missing(errno.ENOENT, "there is no such place (404)")
        why = f"the server answers {number}{f' ({phrase})' if phrase else ''}"
        return Failure(errno.EIO, why, passing=number in _PASSING)
    for pattern, why, passing in _UNANSWERED:
        if pattern.search(text):
            number = errno.ETIMEDOUT if "in time" in why else errno.EIO
            return Failure(number, why, passing=passing)
    return Failure(errno.EIO, _first_line(text))


def _first_line(text: str) -> str:
    """Without what addresses may hold: names, passwords and signatures."""
    line = text.strip().partition("\n")[0]
    return re.sub(r"\w+://\S+", lambda found: shown(found[0]), line)


def shown(url: str) -> str:
    """A URL as it may stand in logs: without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("?")[0]
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
