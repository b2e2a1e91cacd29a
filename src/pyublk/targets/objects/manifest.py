# SPDX-License-Identifier: MIT
"""What a disk in an object store consists of: a manifest, pages of a map, and chunks.

::

    NAME/manifest                     JSON, replaced only by a conditional PUT
    NAME/ID/map/PAGE.EPOCH.SEQ        1024 entries, each names the object of a chunk
    NAME/ID/chunks/INDEX.EPOCH.SEQ    a chunk's bytes
    NAME/snapshots/SNAPSHOT           a manifest as it was
    NAME/clones/ID                    likewise, kept for the clone with that ID

Pages and chunks are written once and never change: EPOCH is increased by each process that opens
the disk for writing, and SEQ by each object that it writes, so that no two ever write the same.
"""

import errno
import hashlib
import json
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from pyublk.sizes import format_size
from pyublk.targets.objects.failures import Failure
from pyublk.targets.objects.store import Objects

FORMAT = "pyublk objects 1"
#: Chunks that one page of the map is for.
PAGE = 1024
_ENTRY = struct.Struct("<IIQ")
_HEAD = struct.Struct("<8sI")
_MAGIC = b"pyublkM1"
EMPTY = bytes(PAGE * _ENTRY.size)
#: Bounds of a chunk's size, and what it is when nobody says.
LEAST_CHUNK, MOST_CHUNK, DEFAULT_CHUNK = 64 << 10, 64 << 20, 4 << 20


class Entry(NamedTuple):
    """The name of an object of a chunk or page: whose it is, and the writer's two numbers."""

    source: int
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A disk's state at a flush.

    Args:
        size, chunk_size: bytes.
        compression: "none" or "zstd".
        id: of this disk, which no other ever has.
        epoch: how often it was opened for writing.
        seq: what the last writer had written up to here is in this manifest, or in none.
        flushes: how many there were.
        session, attempt: nonces, of the writer and of this PUT: who gets no answer looks for them.
        writer: who has it open for writing, if not closed since.
        sources: the folders where objects are; its own is the last, after those of what it is a
            clone of, so that pages mean the same to both.
        pages: the map's pages by number; those that are not there are empty.
        parent: the name of what it is a clone of.
    """

    size: int
    chunk_size: int
    compression: str
    id: str
    sources: tuple[str, ...]
    epoch: int = 0
    seq: int = 0
    flushes: int = 0
    session: str = ""
    attempt: str = ""
    writer: str | None = None
    pages: Mapping[int, Entry] = field(default_factory=dict)
    parent: str | None = None

    @classmethod
    def new(cls, name: str, *, size: int, chunk_size: int, compression: str) -> "Manifest":
        """Of an empty disk. Raises ValueError for sizes that cannot be."""
        if size <= 0 or size % 512:
            raise ValueError(f"size must be a multiple of 512 bytes above 0, not {size}")
        if not LEAST_CHUNK <= chunk_size <= MOST_CHUNK or chunk_size & (chunk_size - 1):
            raise ValueError(
                f"chunk_size must be a power of two from {format_size(LEAST_CHUNK)} to "
                f"{format_size(MOST_CHUNK)}, not {chunk_size}"
            )
        unique = secrets.token_hex(8)
        return cls(
            size=size,
            chunk_size=chunk_size,
            compression=compression,
            id=unique,
            sources=(f"{name}/{unique}",),
            session=secrets.token_hex(8),
        )

    def opened_by(self, session: str) -> "Manifest":
        """For a new writer, with whom all others are fenced."""
        writer = f"{os.uname().nodename} process {os.getpid()}"
        return replace(self, epoch=self.epoch + 1, seq=0, session=session, writer=writer)

    @property
    def own(self) -> int:
        """The number of its own source."""
        return len(self.sources) - 1

    @property
    def content(self) -> str:
        """Tells these bytes from all others: no two flushes write pages of one name."""
        pages = repr((self.size, sorted(self.pages.items())))
        return f"{self.id} {hashlib.sha256(pages.encode()).hexdigest()[:32]}"

    def dump(self) -> bytes:
        fields = asdict(self) | {"format": FORMAT, "pages": {}}
        fields["pages"] = {str(number): list(entry) for number, entry in self.pages.items()}
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def load(cls, data: bytes, path: str) -> "Manifest":
        """Raises Failure for what is no manifest, or one of a newer version."""
        try:
            fields: dict[str, Any] = json.loads(data)
            found = fields.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise Failure(errno.EINVAL, f"{path} is not the manifest of a disk") from None
        if found != FORMAT:
            raise Failure(
                errno.EINVAL, f"{path} has the format {found!r}, and {FORMAT!r} is known here"
            )
        try:
            fields["sources"] = tuple(fields["sources"])
            fields["pages"] = {int(n): Entry(*entry) for n, entry in fields["pages"].items()}
            return cls(**fields)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Failure(errno.EINVAL, f"{path} is a damaged manifest: {error}") from None

    def chunk_path(self, index: int, entry: Entry) -> str:
        return f"{self._folder(entry)}/chunks/{index:08x}.{entry.epoch:x}.{entry.seq:x}"

    def page_path(self, number: int, entry: Entry) -> str:
        return f"{self._folder(entry)}/map/{number:06x}.{entry.epoch:x}.{entry.seq:x}"

    def _folder(self, entry: Entry) -> str:
        if entry.source >= len(self.sources):
            raise Failure(errno.EIO, f"the map names a source {entry.source} that there is not")
        return self.sources[entry.source]


def own_numbers(path: str) -> tuple[int, int]:
    """EPOCH and SEQ of a page's or chunk's path. Raises ValueError for other paths."""
    _, epoch, seq = path.rpartition("/")[2].split(".")
    return int(epoch, 16), int(seq, 16)


def manifest_path(name: str, snapshot: str | None = None) -> str:
    return f"{name}/manifest" if snapshot is None else f"{name}/snapshots/{snapshot}"


def load_page(objects: Objects, path: str) -> bytes:
    """The entries of a page. Raises Failure for a damaged one."""
    data = objects.get(path)
    if len(data) != _HEAD.size + len(EMPTY):
        raise Failure(errno.EIO, f"{path} is not a page of a map: it has {len(data)} bytes")
    magic, check = _HEAD.unpack_from(data)
    entries = bytes(data[_HEAD.size :])
    if magic != _MAGIC or check != zlib.crc32(entries):
        raise Failure(errno.EIO, f"{path} is a damaged page of a map")
    return entries


def dump_page(entries: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, zlib.crc32(entries)) + entries


def entries_of(page: bytes, number: int) -> Iterator[tuple[int, Entry]]:
    """The chunks that a page has objects for."""
    for at, fields in enumerate(_ENTRY.iter_unpack(page)):
        if fields[1]:
            yield number * PAGE + at, Entry(*fields)


class ChunkTable:
    """The map of an open disk: which object has a chunk's bytes. Pages are fetched when needed.

    `ensure` may wait for the store; after it, `get` does not.
    """

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self._objects = objects
        self._manifest = manifest
        self._pages: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def ensure(self, index: int) -> None:
        """Has the page that the chunk is in."""
        number = index // PAGE
        if number in self._pages:
            return
        entry = self._manifest.pages.get(number)
        if entry is None:
            page = EMPTY
        else:
            page = load_page(self._objects, self._manifest.page_path(number, entry))
        with self._lock:  # one that a flush has made meanwhile stays
            self._pages.setdefault(number, page)

    def get(self, index: int) -> Entry | None:
        """The object of a chunk; None: it is all zeroes."""
        number, at = divmod(index, PAGE)
        fields = _ENTRY.unpack_from(self._pages[number], at * _ENTRY.size)
        return Entry(*fields) if fields[1] else None

    def with_changes(self, changes: Mapping[int, Entry | None]) -> dict[int, bytes]:
        """The pages that these chunks are in, changed; they are not used yet."""
        changed: dict[int, bytearray] = {}
        for index, entry in changes.items():
            self.ensure(index)
            number, at = divmod(index, PAGE)
            if number not in changed:
                changed[number] = bytearray(self._pages[number])
            _ENTRY.pack_into(changed[number], at * _ENTRY.size, *(entry or (0, 0, 0)))
        return {number: bytes(page) for number, page in changed.items()}

    def use(self, pages: Mapping[int, bytes]) -> None:
        """From now on these."""
        with self._lock:
            self._pages.update(pages)


def put_pages(
    objects: Objects, manifest: Manifest, pages: Mapping[int, bytes], name: Callable[[], Entry]
) -> Manifest:
    """Writes pages under new names, and returns the manifest with these."""
    found = dict(manifest.pages)
    for number, page in pages.items():
        found.pop(number, None)
        if page != EMPTY:
            found[number] = name()
            objects.put(manifest.page_path(number, found[number]), dump_page(page))
    return replace(manifest, pages=found)
