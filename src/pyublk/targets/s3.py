# SPDX-License-Identifier: MIT
"""A disk of objects in S3, or in another object store."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyublk.arguments import seconds, whole
from pyublk.profile import Concurrency
from pyublk.target import Target
from pyublk.targets.objects import disks
from pyublk.targets.objects.codec import Compression
from pyublk.targets.objects.failures import Missing
from pyublk.targets.objects.manifest import DEFAULT_CHUNK
from pyublk.targets.objects.store import Location, Objects, connect
from pyublk.targets.objects.volume import Volume

if TYPE_CHECKING:
    from obstore.store import ObjectStore

log = logging.getLogger("pyublk.s3")


class S3(Target):
    """Serves a disk whose bytes are objects of a store, each a chunk of the disk.

    Writes are kept in memory until a flush, which is whole or not at all: it writes new objects,
    and then replaces the disk's manifest, if nobody else has done so. Opening the disk for writing
    fences whoever had it open before.

    Args:
        location: `bucket/name` of S3, or a URL such as `gs://bucket/name`, `az://container/name`;
            with `@snapshot`, that one, read-only.
        size: makes the disk if it is not there; by default, and otherwise, what it has.
        chunk_size, compression: of a disk that is made; see `pyublk s3 create`.
        endpoint, region: of an S3 server other than what the environment says (AWS_ENDPOINT_URL,
            AWS_REGION); credentials are taken from there too.
        anonymous: ask without credentials.
        buffer: bytes of new data that are kept in memory; what is more is uploaded early.
        cache: bytes of chunks to keep in memory that were read, or written.
        uploads: chunks that a flush uploads at once.
        ahead: chunks to fetch before sequential reads come to them; at most half of the cache.
        retry_for: seconds for which a request that fails is tried again, with growing pauses.
        timeout: seconds that the store may be silent before a request counts as failed.
        block_size: the disk's logical block size in bytes.
        read_only: serve the state of the last flush, and fence nobody.
        store: an obstore store to use in place of that of `location`.
    """

    concurrency: Concurrency = "parallel"  # type: ignore[misc]
    workers = 16

    def __init__(
        self,
        location: str,
        *,
        size: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        compression: Compression = "none",
        endpoint: str | None = None,
        region: str | None = None,
        anonymous: bool = False,
        buffer: int = 128 << 20,
        cache: int = 64 << 20,
        uploads: int = 16,
        ahead: int = 8,
        retry_for: float = 60.0,
        timeout: float = 30.0,
        block_size: int = 4096,
        read_only: bool = False,
        store: "ObjectStore | None" = None,
    ) -> None:
        self.location = Location.parse(location)
        kept = self.location.snapshot is not None
        if kept and size is not None:
            raise ValueError(f"{location} is a snapshot, which has the size that it has")
        super().__init__(
            size=size or 0,
            block_size=block_size,
            read_only=read_only or kept,
            physical_block_size=4096,
        )
        #: A snapshot is there again as it was. Of a disk that is written, what was not flushed is
        #: lost with its server, as by a power cut: nothing may go on as if it were there.
        self.recoverable = kept
        self.retry_for = seconds("retry_for", retry_for, zero=True)
        self.max_stall = self.retry_for + seconds("timeout", timeout)
        self._create = {"chunk_size": chunk_size, "compression": compression}
        self._wanted = size
        self._connect = {
            "endpoint": endpoint,
            "region": region,
            "anonymous": anonymous,
            "timeout": timeout,
        }
        self._room = {
            "buffer": whole("buffer", buffer, least=0),
            "cache": whole("cache", cache, least=0),
            "uploads": whole("uploads", uploads, least=1),
            "ahead": whole("ahead", ahead, least=0),
        }
        self._store = store
        self._volume: Volume | None = None

    # ---- open and close ----

    def open(self) -> None:
        store = self._store
        if store is None:
            store = connect(self.location.store, **self._connect)  # type: ignore[arg-type]
        self.serve_from(Objects(store, str(self.location), retry_for=self.retry_for))

    def serve_from(self, objects: Objects) -> None:
        """Opens the disk there."""
        name, snapshot = self.location.name, self.location.snapshot
        version = None
        if self.read_only:
            manifest, _ = disks.load(objects, name, snapshot)
        else:
            try:
                manifest, version = disks.open_for_writing(objects, name)
            except Missing:
                if self._wanted is None:
                    raise FileNotFoundError(
                        f"there is no disk {self.location}: give a size to make it, or use "
                        "pyublk s3 create"
                    ) from None
                disks.create(objects, name, size=self._wanted, **self._create)  # type: ignore[arg-type]
                manifest, version = disks.open_for_writing(objects, name)
        if self._wanted not in (None, manifest.size):
            raise ValueError(
                f"{self.location} has {manifest.size} bytes, not {self._wanted}: leave the size "
                "out, and resize it while it is served"
            )
        if manifest.size % self.block_size:
            raise ValueError(
                f"{self.location} has {manifest.size} bytes, which is no multiple of the block "
                f"size, {self.block_size}"
            )
        self.size = manifest.size
        self.discard_granularity = self.io_opt = manifest.chunk_size
        self._objects = objects
        self._volume = Volume(objects, name, manifest, version, **self._room)

    def close(self) -> None:
        if self._volume is None:
            return
        try:
            self._volume.close()
        except OSError as error:
            log.error(
                "%s: the last flush failed, and what it had is lost: %s", self.location, error
            )
        finally:
            self._objects.retrying.end()
            self._volume = None
            del self._objects  # and with it its connections

    @property
    def volume(self) -> Volume:
        """The open disk."""
        if self._volume is None:
            raise ValueError(f"{self.location} is not open")
        return self._volume

    # ---- requests ----

    def read(self, offset: int, buffer: memoryview) -> None:
        self.volume.read(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self.volume.write(offset, data)

    def flush(self) -> None:
        self.volume.flush()

    def discard(self, offset: int, length: int) -> None:
        self.volume.zero(offset, length, partly=False)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.volume.zero(offset, length)

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        if self.read_only:
            raise ValueError(f"{self.location} is served read-only, and keeps its size")
        update(size)
        self.volume.resize(size)
        self.size = size

    # ---- what it tells ----

    def announces(self, method: str) -> bool:
        if self.read_only and method != "read":
            return False
        return super().announces(method)

    def identity(self) -> str | None:
        return None if self._volume is None else self._volume.content()

    def status(self) -> dict[str, Any]:
        volume = self._volume
        about = {"location": str(self.location)}
        return about if volume is None else about | volume.status()
