# SPDX-License-Identifier: MIT
"""An image in a Ceph cluster, by librbd's own binding."""

import asyncio
import ctypes
import errno
import importlib
import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyublk.arguments import seconds
from pyublk.errors import FeatureMissing
from pyublk.target import Target

log = logging.getLogger("pyublk.rbd")

#: Discards of less are not worth an object's while (librbd's own default).
DISCARD_GRANULARITY = 64 << 10
#: Seconds in which an image is closed; with a cluster that does not answer, it is left open.
CLOSES = 10.0
#: To keep its blocks allocated, where zeroes are written (librbd.h).
THICK = 1

_NAME = re.compile(
    r"(?P<pool>[^/@]+)/(?:(?P<space>[^/@]+)/)?(?P<image>[^/@]+)(?:@(?P<snap>[^/@]+))?"
)


class Rbd(Target):
    """Serves an image of Ceph's: `pool/image`, or read-only `pool/image@snapshot`.

    librbd keeps what is written in a cache of its own until a flush: the disk has a volatile cache.

    Args:
        image: `POOL/IMAGE` or `POOL/NAMESPACE/IMAGE`, and `@SNAPSHOT` behind it for a snapshot.
        conf: the cluster's configuration; by default, what librados finds (/etc/ceph/ceph.conf).
        user: the name to authenticate by, without "client."; by default, admin.
        timeout: seconds after which a request fails with ETIMEDOUT, and the opening too: a cluster
            that is down never says so. 0: never.
        exclusive: take the image's exclusive lock, and do not give it to another client.
        cache: have librbd cache writes.
        block_size: the disk's logical block size in bytes.
        read_only: open it for reading, and make the disk read-only.
    """

    recoverable = True

    def __init__(
        self,
        image: str,
        *,
        conf: Path | None = None,
        user: str | None = None,
        timeout: float = 30.0,
        exclusive: bool = False,
        cache: bool = True,
        block_size: int = 512,
        read_only: bool = False,
    ) -> None:
        found = _NAME.fullmatch(image.removeprefix("rbd:"))
        if found is None:
            raise ValueError(
                f"{image!r} names no image of Ceph's: write POOL/IMAGE, POOL/NAMESPACE/IMAGE, or "
                "either with @SNAPSHOT behind it"
            )
        snapshot = found["snap"]
        if exclusive and (snapshot or read_only):
            raise ValueError("exclusive is for who writes: leave it out of what is read-only")
        super().__init__(
            size=0,
            block_size=block_size,
            read_only=read_only or snapshot is not None,
            discard_granularity=DISCARD_GRANULARITY,
        )
        self._names = found
        self._text = found[0]
        self._conf = conf
        self._user = user
        self._timeout = seconds("timeout", timeout, zero=True)
        self.max_stall = self._timeout
        self._exclusive = exclusive
        self._cache = cache
        self._opened: tuple[Any, Any, Any] | None = None  # cluster, pool, image
        self._told: dict[str, Any] = {}
        self._identity = ""
        self._late = 0

    # ---- scope ----

    async def open(self) -> None:
        rbd, rados = _binding()
        opening = asyncio.ensure_future(_in_thread(self._open, rbd, rados))
        try:
            async with asyncio.timeout(self._timeout or None):
                self._opened = await asyncio.shield(opening)
        except TimeoutError:
            opening.add_done_callback(_close_late)
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"the Ceph cluster of {self._text} did not answer within {self._timeout:g} s",
            ) from None

    def _open(self, rbd: Any, rados: Any) -> tuple[Any, Any, Any]:
        """All that waits for the cluster."""
        names = self._names
        what = "the Ceph cluster"
        cluster = pool = image = None
        try:
            cluster = rados.Rados(
                conffile=str(self._conf) if self._conf else rados.Rados.DEFAULT_CONF_FILES,
                rados_id=self._user or "admin",
                conf=self._settings(),
            )
            cluster.connect()
            what = f"the pool {names['pool']}"
            pool = cluster.open_ioctx(names["pool"])
            pool.set_namespace(names["space"] or "")
            what = f"the image {self._text}"
            image = rbd.Image(
                pool, names["image"], snapshot=names["snap"], read_only=self.read_only
            )
            if self._exclusive:
                what = f"the exclusive lock of {self._text}"
                image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
            self._look(cluster, image)
        except Exception as error:
            _close(cluster, pool, image)
            raise _told(error, what) from error
        return cluster, pool, image

    def _settings(self) -> dict[str, str]:
        settings = {"rbd_cache": "true" if self._cache else "false"}
        if self._timeout:
            wait = str(max(1, round(self._timeout)))
            settings |= {
                "client_mount_timeout": wait,
                "rados_mon_op_timeout": wait,
                "rados_osd_op_timeout": wait,
            }
        return settings

    def _look(self, cluster: Any, image: Any) -> None:
        stat = image.stat()
        self.size = stat["size"]
        if not self.size or self.size % self.block_size:
            raise ValueError(
                f"{self._text} has {self.size} bytes: a disk needs a positive multiple of its "
                f"block size, {self.block_size}"
            )
        self.io_opt = stat["obj_size"]
        self._told = {
            "cluster": cluster.get_fsid(),
            "object_size": stat["obj_size"],
            "snapshots": [snapshot["name"] for snapshot in image.list_snaps()],
        }
        changed = "" if self._names["snap"] else f" {image.modify_timestamp()}"
        self._identity = f"{cluster.get_fsid()} {image.id()} {self._names['snap']}{changed}"

    async def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is None:
            return
        closing = asyncio.ensure_future(_in_thread(_close, *opened))
        try:
            async with asyncio.timeout(CLOSES):
                await asyncio.shield(closing)
        except TimeoutError:
            # The binding closes what the collector finds, and waits for the cluster with the GIL
            # held for that: it is never to find these.
            for one in opened:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
            log.error("%s was left open: its cluster does not answer", self._text)

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        raise ValueError(
            "an image of Ceph's is not resized while it is served: stop the disk, use rbd resize, "
            "and serve it again"
        )

    def identity(self) -> str:
        """Changes when the image does."""
        return self._identity

    def status(self) -> dict[str, Any]:
        return {"image": self._text, **self._told, "timed_out": self._late}

    # ---- requests ----

    @property
    def _image(self) -> Any:
        assert self._opened is not None
        return self._opened[2]

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Reads."""
        found = await self._request(self._image.aio_read, offset, len(buffer))
        buffer[:] = found

    async def write(self, offset: int, data: memoryview) -> None:
        """Writes, to librbd's cache."""
        await self._request(self._image.aio_write, bytes(data), offset)

    async def write_fua(self, offset: int, data: memoryview) -> None:
        """Writes, and flushes the cache."""
        await self.write(offset, data)
        await self.flush()

    async def flush(self) -> None:
        """Writes the cache to the cluster."""
        await self._request(self._image.aio_flush)

    async def discard(self, offset: int, length: int) -> None:
        """Gives objects back."""
        await self._request(self._image.aio_discard, offset, length)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Makes zeroes."""
        flags = 0 if unmap else THICK
        done = self._image.aio_write_zeroes
        await self._request(lambda o, n, call: done(o, n, call, flags), offset, length)

    async def _request(self, start: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()

        def done(completion: Any, data: Any = None) -> None:
            """Called by a thread of librbd's."""
            result = completion.get_return_value()
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_settle, answered, result, data)

        try:
            start(*arguments, done)
        except Exception as error:
            raise _told(error, self._text) from error
        try:
            async with asyncio.timeout(self._timeout or None):
                return await answered
        except TimeoutError:
            self._late += 1
            raise OSError(errno.ETIMEDOUT, f"{self._text}: the cluster did not answer") from None


def _settle(answered: "asyncio.Future[Any]", result: int, data: Any) -> None:
    if answered.done():
        return
    if result < 0:
        answered.set_exception(OSError(-result, os.strerror(-result)))
    else:
        answered.set_result(data)


async def _in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns that may never return: no exit waits for its thread."""
    loop = asyncio.get_running_loop()
    returned: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if returned.done():
            return
        if error is not None:
            returned.set_exception(error)
        else:
            returned.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = call(*arguments)
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="rbd", daemon=True).start()
    return await returned


def _close(cluster: Any, pool: Any, image: Any) -> None:
    """Closes what there is."""
    if image is not None:
        with suppress(Exception):
            image.close()
    if pool is not None:
        pool.close()
    if cluster is not None:
        cluster.shutdown()


def _close_late(opening: "asyncio.Future[Any]") -> None:
    """An opening that was given up has come to its end."""
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=_close, args=opening.result(), daemon=True).start()


def _told(error: Exception, what: str) -> Exception:
    """A failure of the binding's, in a sentence. Its exceptions are of many classes."""
    if isinstance(error, ValueError):
        return error
    number = getattr(error, "errno", None)
    number = abs(number) if isinstance(number, int) else errno.EIO
    reasons = {
        errno.ENOENT: "does not exist",
        errno.ETIMEDOUT: "does not answer",
        errno.EACCES: "may not be used by this user",
        errno.EPERM: "may not be used by this user",
        errno.EROFS: "is held by another client",
        errno.EBUSY: "is held by another client",
    }
    if what == "the Ceph cluster" and number == errno.ENOENT:
        return OSError(number, "there is no configuration or key of a Ceph cluster: give conf=FILE")
    reason = reasons.get(number, f"cannot be used: {error}")
    return OSError(number, f"{what} {reason}")


def _binding() -> tuple[Any, Any]:
    """Ceph's modules `rbd` and `rados`."""
    try:
        return importlib.import_module("rbd"), importlib.import_module("rados")
    except ImportError as error:
        raise FeatureMissing(
            "rbd",
            "Ceph's binding for Python, which is not on PyPI: install the package python3-rbd, "
            "and make the virtual environment with --system-site-packages",
            f"none ({error})",
        ) from None
