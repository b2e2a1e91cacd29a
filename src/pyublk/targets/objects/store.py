# SPDX-License-Identifier: MIT
"""A place in an object store, by obstore: get, put, put if nothing has changed, list, delete."""

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pyublk.errors import ExtraMissing
from pyublk.targets.objects.failures import Changed, Exists, Failure, Missing, explain
from pyublk.targets.objects.retrying import Retrying

if TYPE_CHECKING:
    from obstore.store import ObjectStore

log = logging.getLogger("pyublk.s3")

#: What identifies an object's version in a condition: obstore's `e_tag` and `version`.
Version = dict[str, str]

#: Bytes of an answer that are waited for at a time. All in one would be put together first: that is
#: a copy more, into memory that has to be made.
PIECE = 64 << 10

SCHEMES = ("s3", "gs", "az", "file")
#: Objects that are deleted by one request.
_DELETED = 500
#: A version that nothing has.
_NOBODYS: Version = {"e_tag": '"00000000000000000000000000000000"', "version": "1"}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a disk is: in which store, under which name; and which of its snapshots."""

    store: str
    name: str
    snapshot: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Location":
        """From `bucket/name`, or `s3://bucket/name`, `gs://...`, `az://...`, `file:///path`; each
        may end with `@snapshot`. Raises ValueError."""
        place, at, snapshot = text.partition("@")
        scheme, there, rest = place.partition("://")
        if not there:
            scheme, rest = "s3", place
        root, _, name = rest.partition("/")
        if scheme == "file":
            root, _, name = rest.rpartition("/")
        parts = name.split("/")
        if scheme not in SCHEMES or not root or not all(_is_plain(part) for part in parts):
            raise ValueError(
                f"{text!r} is not a disk in a store: write bucket/name, or a URL of "
                f"{', '.join(SCHEMES)} such as gs://bucket/name, of letters, digits and -_."
            )
        if at and not _is_plain(snapshot):
            raise ValueError(f"{snapshot!r} is not a snapshot's name: use letters, digits and -_.")
        return cls(f"{scheme}://{root}", name, snapshot or None)

    def __str__(self) -> str:
        snapshot = f"@{self.snapshot}" if self.snapshot else ""
        return f"{self.store.removeprefix('s3://')}/{self.name}{snapshot}"


def _is_plain(part: str) -> bool:
    """Whether it needs no quoting anywhere, and is no step in a path."""
    return bool(part) and part.strip(".") != "" and all(c.isalnum() or c in "-_." for c in part)


def _version_of(found: Mapping[str, Any]) -> Version:
    """Of an answer, what there is: obstore takes no None back."""
    return {key: found[key] for key in ("e_tag", "version") if found.get(key) is not None}


def connect(
    store: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    anonymous: bool = False,
    timeout: float = 30.0,
) -> "ObjectStore":
    """The store of a Location. What is not said here is taken from the environment, as by obstore.

    Raises ExtraMissing, and ValueError for a store that cannot be.
    """
    try:
        from obstore.store import LocalStore, from_url
    except ImportError:
        raise ExtraMissing("obstore", "s3") from None
    scheme, _, root = store.partition("://")
    silence = timedelta(seconds=timeout)
    client: dict[str, Any] = {"read_timeout": silence, "timeout": 4 * silence}
    settings: dict[str, Any] = {"client_options": client}
    settings["retry_config"] = {"max_retries": 0, "retry_timeout": timedelta(0)}
    if scheme == "s3":
        there = endpoint or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
        client["allow_http"] = there is not None and urlsplit(there).scheme == "http"
        given = {"endpoint": endpoint, "region": region, "skip_signature": anonymous or None}
        settings |= {name: value for name, value in given.items() if value is not None}
    elif endpoint is not None or region is not None or anonymous:
        raise ValueError(f"endpoint, region and anonymous are of S3, and not of {scheme}")
    try:
        return LocalStore(root) if scheme == "file" else from_url(store, **settings)
    except Exception as error:  # obstore's own, of many kinds
        raise ValueError(f"{store}: {explain(error).why}") from None


class Objects:
    """The objects of a store, each by its path. Every method tries again for `retry_for` seconds.

    Raises Failure; Missing, Changed, Exists and Denied are kinds of it.
    """

    def __init__(self, store: "ObjectStore", place: str, *, retry_for: float = 60.0) -> None:
        self._store = store
        self.retrying = Retrying(place, retry_for, log)

    def get(self, path: str, start: int = 0, end: int | None = None) -> memoryview:
        """An object's bytes, or those from `start` to `end`."""
        import obstore

        def step() -> memoryview:
            if end is None:
                return memoryview(obstore.get(self._store, path).bytes())
            data = memoryview(obstore.get_range(self._store, path, start=start, end=end))
            if len(data) != end - start:
                why = f"{len(data)} bytes came of {end - start}"
                raise Failure(errno.EIO, why, passing=True)
            return data

        return self.retrying.call(step, path)

    def pieces(self, path: str, size: int, arrived: Callable[[int, memoryview], None]) -> None:
        """Tells `arrived` of all of an object, which must have that size: where each piece begins,
        and its bytes. When it is tried again, pieces come again from the beginning."""
        import obstore

        def step() -> None:
            answer = obstore.get(self._store, path)
            if (there := answer.meta["size"]) != size:
                raise Failure(errno.EIO, f"it has {there} bytes in place of {size}")
            came = 0
            for piece in answer.stream(min_chunk_size=PIECE):
                arrived(came, memoryview(piece))
                came += len(piece)
            if came != size:
                raise Failure(errno.EIO, f"{came} bytes came of {size}", passing=True)

        self.retrying.call(step, path)

    def get_version(self, path: str) -> tuple[bytes, Version]:
        """An object's bytes, and its version for `swap`."""
        import obstore

        def step() -> tuple[bytes, Version]:
            found = obstore.get(self._store, path)
            meta = found.meta
            return bytes(found.bytes()), _version_of(meta)

        return self.retrying.call(step, path)

    def put(self, path: str, data: bytes) -> None:
        """Writes an object whose path nobody else uses."""
        try:
            self.retrying.call(lambda: self._put(path, data, "overwrite"), path)
        except Missing:
            raise self._no_bucket() from None

    def _no_bucket(self) -> Missing:
        """What it means that nothing can be written, or listed, there."""
        return Missing(errno.ENOENT, f"{self.retrying.place}: there is no such bucket")

    def put_new(self, path: str, data: bytes) -> Version:
        """Writes an object that is not there. Raises Exists; perhaps only because the answer of an
        attempt that succeeded was lost: the caller compares what is there."""
        return self.retrying.call(lambda: self._put(path, data, "create"), path)

    def swap(self, path: str, data: bytes, version: Version) -> Version:
        """Replaces that version of an object. Raises Changed; perhaps as `put_new` raises."""
        return self.retrying.call(lambda: self._put(path, data, version), path)

    def _put(self, path: str, data: bytes, mode: Any) -> Version:
        """All that is ever written goes through here."""
        import obstore

        # A PUT in parts would not be the atomic, conditional one.
        put = obstore.put(self._store, path, data, mode=mode, use_multipart=False)
        return _version_of(put)

    def paths(self, prefix: str) -> Iterator[str]:
        """The paths below `prefix`, which ends at a slash."""
        import obstore

        def step() -> list[str]:
            return [meta["path"] for some in obstore.list(self._store, prefix) for meta in some]

        yield from self.retrying.call(step, prefix)

    def folders(self, prefix: str | None) -> list[str]:
        """The next parts of the paths below `prefix`, each with `prefix` before it."""
        import obstore

        def step() -> list[str]:
            return list(obstore.list_with_delimiter(self._store, prefix)["common_prefixes"])

        try:
            return self.retrying.call(step, prefix or "")
        except Missing:
            raise self._no_bucket() from None

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes objects; those that are gone already are fine."""
        left = list(paths)
        while left:
            some, left = left[:_DELETED], left[_DELETED:]
            try:
                self.retrying.call(partial(self._delete, some))
            except Missing:  # from stores that delete one by one, and stop there
                for path in some:
                    with suppress(Missing):
                        self.retrying.call(partial(self._delete, [path]), path)

    def _delete(self, paths: list[str]) -> None:
        import obstore

        obstore.delete(self._store, paths)

    def check_conditions(self, path: str) -> None:
        """Raises Failure for a store that writes although a condition is not met: two writers could
        not be told apart. Finds out by writing a small object."""
        self.put(path, b"pyublk writes this to find out whether conditions are heeded\n")
        conditions: dict[str, Callable[[], Version]] = {
            "If-Match": lambda: self.swap(path, b"If-Match was ignored\n", _NOBODYS),
            "If-None-Match": lambda: self.put_new(path, b"If-None-Match was ignored\n"),
        }
        for condition, step in conditions.items():
            try:
                step()
            except (Changed, Exists):
                continue
            except Failure as failure:
                if failure.errno != errno.EOPNOTSUPP:
                    raise
            raise Failure(
                errno.EOPNOTSUPP,
                f"{self.retrying.place}: this store ignores conditions ({condition}), so a second "
                "writer could not be kept out: it can be read, but not written",
            )
