# SPDX-License-Identifier: MIT
"""A file of a web server as a read-only disk."""

import errno
import logging
import threading
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pyublk.arguments import seconds
from pyublk.errors import ExtraMissing
from pyublk.profile import Concurrency
from pyublk.target import Target
from pyublk.targets.objects.failures import Changed, Failure, explain, shown
from pyublk.targets.objects.retrying import Retrying
from pyublk.targets.objects.store import PIECE

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import HTTPStore

log = logging.getLogger("pyublk.url")

#: Seconds for which the start tries: who waits for it has mistyped more often than the server is
#: down, and what restarts disks does so again.
START = 5.0
#: Seconds that making a connection may take.
CONNECT = 5.0
#: The range that the start asks for. Not one byte: busybox's httpd takes `bytes=0-0` for all.
FIRST = (0, 512)
#: obstore's word for a Last-Modified that there is not.
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class Url(Target):
    """Serves a file of a web server, by requests for ranges of it.

    The version that is there at the start is pinned: each answer must be of that one, by its ETag,
    else by its Last-Modified. Reads of a file that has changed fail with EIO.

    A file that is no multiple of the block size is filled up with zeroes.

    Args:
        url: of http or https. A user and password in it are sent (basic authentication), a query
            too; neither is shown.
        etag: the version to serve, and no other; without it, the one that is there. A disk that is
            to be restarted by itself needs it.
        pin: `no` for a server that tells no version, neither ETag nor Last-Modified: then a file
            that changes while it is served becomes a corrupt disk.
        header: sent with each request, such as "Authorization: Bearer abc"; several with newlines
            between them. @FILE reads them from a file.
        retry_for: seconds for which a request that fails is tried again, with growing pauses.
        timeout: seconds that the server may be silent before a request counts as failed.
        ca: a file of certificates (PEM) to trust besides the system's.
        block_size: the disk's logical block size in bytes.
        read_only: always.
    """

    concurrency: Concurrency = "parallel"  # type: ignore[misc]
    workers = 16

    def __init__(
        self,
        url: str,
        *,
        etag: str | None = None,
        pin: bool = True,
        header: str | None = None,
        retry_for: float = 60.0,
        timeout: float = 10.0,
        ca: Path | None = None,
        block_size: int = 512,
        read_only: bool = True,
    ) -> None:
        if not read_only:
            raise ValueError("a file of a web server is read-only: lay an overlay over it to write")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{shown(url)!r} is not a URL such as https://host/disk.img")
        if etag is not None and not pin:
            raise ValueError("etag says which version to serve, and pin=no that any will do")
        super().__init__(size=0, block_size=block_size, read_only=True)
        self.url = url
        self.pin = pin
        self.recoverable = etag is not None
        self.retry_for = seconds("retry_for", retry_for, zero=True)
        self._timeout = seconds("timeout", timeout)
        self.max_stall = self.retry_for + self._timeout
        self._wanted = etag
        self._header = header
        self._ca = None if ca is None else Path(ca)
        self._store: HTTPStore | None = None
        self._etag: str | None = None
        self._modified: datetime | None = None
        self._length = 0
        self._retrying = Retrying(shown(url), self.retry_for, log)
        self._lock = threading.Lock()
        self._bytes = 0
        self._told_of_change = False

    # ---- open and close ----

    def open(self) -> None:
        self._store = self._make_store()
        self._options: dict[str, Any] = {}
        self._retrying = Retrying(shown(self.url), self.retry_for, log)
        found = self._retrying.call(self._look, budget=min(self.retry_for, START))
        self._length = found["size"]
        self._etag = found["e_tag"]
        self._modified = found["last_modified"] if found["last_modified"] > _NEVER else None
        self._check_version()
        if self._etag is not None and not self._etag.startswith("W/") and self.pin:
            # A weak one matches nothing (RFC 9110, 13.1.1): it is only compared.
            self._options = {"if_match": self._etag}
        block = self.block_size
        self.size = (self._length + block - 1) // block * block

    def _make_store(self) -> "HTTPStore":
        try:
            from obstore.store import HTTPStore
        except ImportError:
            raise ExtraMissing("obstore", "url") from None
        options: dict[str, Any] = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=min(CONNECT, self._timeout)),
            "read_timeout": timedelta(seconds=self._timeout),
            "timeout": timedelta(seconds=max(self.retry_for, self._timeout)),
        }
        url, headers = _without_user(self.url)
        if self._header is not None:
            headers |= _headers(self._header)
        if headers:
            options["default_headers"] = headers
        if self._ca is not None:
            options["root_certificate"] = self._ca.read_bytes()
        try:
            return HTTPStore(
                url,
                client_options=options,  # type: ignore[arg-type]
                retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
            )
        except Exception as error:  # obstore's own, of many kinds
            raise ValueError(f"{shown(self.url)}: {explain(error).why}") from None

    def _get(self, options: dict[str, Any]) -> "GetResult":
        import obstore

        if self._store is None:
            raise Failure(errno.ESHUTDOWN, "the disk is closed")
        return obstore.get(self._store, "", options=options)  # type: ignore[arg-type]

    def _look(self) -> Any:
        """Asks for a range: the answer tells size and version, and whether ranges work at all. HEAD
        would tell less, and signed URLs of object stores refuse it."""
        try:
            answer = self._get({"range": FIRST})
            answer.bytes()
        except Exception as error:
            failure = explain(error)
            if failure.errno == errno.EOPNOTSUPP:
                why = f"{failure.why}, so nothing but the whole file can be had: copy it first"
                raise Failure(errno.EOPNOTSUPP, why) from None
            if "416" in failure.why:
                raise Failure(errno.EINVAL, "the file is empty") from None
            raise failure from None
        return answer.meta

    def _check_version(self) -> None:
        place = shown(self.url)
        if self._wanted is not None and self._etag != self._wanted:
            raise OSError(
                errno.ESTALE,
                f"{place}: its ETag is {self._etag}, and {self._wanted} is asked for: it has "
                "changed",
            )
        if self.pin and self._etag is None and self._modified is None:
            raise OSError(
                errno.EINVAL,
                f"{place}: the server tells no version of the file (no ETag, no Last-Modified), so "
                "that a change would go unnoticed: pin=no serves it even so",
            )

    def close(self) -> None:
        self._retrying.end()
        self._store = None  # and with it its connections

    # ---- requests ----

    def read(self, offset: int, buffer: memoryview) -> None:
        length = min(len(buffer), self._length - offset)
        if length > 0:
            self._retrying.call(lambda: self._fetch(offset, buffer[:length]))
        if length < len(buffer):
            buffer[max(length, 0) :] = bytes(len(buffer) - max(length, 0))

    def _fetch(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        try:
            answer = self._get({**self._options, "range": (offset, offset + length)})
            self._check_answer(answer)
            came = 0
            # Piece by piece: all in one would be put together first, which is one more copy.
            for piece in answer.stream(min_chunk_size=PIECE):
                end = came + len(piece)
                if end <= length:
                    buffer[came:end] = piece
                came = end
        except Exception as error:
            raise self._judged(explain(error), offset, length) from None
        if came != length:
            why = f"it answered with {came} bytes of {length}"
            raise Failure(errno.EIO, why, passing=True)
        with self._lock:
            self._bytes += length

    def _check_answer(self, answer: "GetResult") -> None:
        """Whether it is of the version that is pinned: a server may ignore If-Match."""
        if not self.pin:
            return
        meta = answer.meta
        same = meta["e_tag"] == self._etag and meta["size"] == self._length
        if self._etag is None:
            same = same and meta["last_modified"] == self._modified
        if not same:
            raise Changed(errno.EIO, "it has changed")

    def _judged(self, failure: Failure, offset: int, length: int) -> Failure:
        """A failure that lasts is told once, as what it means for the disk."""
        if failure.passing:
            return failure
        if isinstance(failure, Changed) or "416" in failure.why:
            why = f"the file has changed since the disk was started ({self.identity()}): stop it"
        else:
            why = failure.why
        with self._lock:
            told, self._told_of_change = self._told_of_change, True
        if not told:
            log.error("%s: %s; reads of %d bytes at %d and others fail",
                      shown(self.url), why, length, offset)  # fmt: skip
        return Failure(errno.EIO, why)

    # ---- what it tells ----

    def identity(self) -> str | None:
        if self._etag is not None:
            return self._etag
        if self._modified is not None:
            return f"{self._modified.isoformat()} {self._length}"
        return None

    def status(self) -> dict[str, Any]:
        return {
            "url": shown(self.url),
            "version": self.identity() if self.pin else None,
            "bytes": self._bytes,
            **self._retrying.status(),
        }


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """The URL without user and password, and the header that has them: obstore drops them."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    word = b64encode(unquote(user).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {word}"}


def _headers(text: str) -> dict[str, str]:
    """The lines of a text, or of the file that it names. Raises ValueError."""
    place = "header"
    if text.startswith("@"):
        place = text[1:]
        text = Path(place).read_text()
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or " " in name.strip():
            raise ValueError(f"{place} must have lines such as 'Authorization: Bearer abc'")
        found[name.strip()] = value.strip()
    return found
