# SPDX-License-Identifier: MIT
"""A virtual machine's image (qcow2, VMDK, VHDX, VDI) as a disk."""

import errno
import logging
import socket
from pathlib import Path
from typing import Any

from pyublk.targets.image_daemon import EXPORT, StorageDaemon
from pyublk.targets.image_files import ImageFile, Unmapped, empty, examine, parts
from pyublk.targets.image_map import MOST_PARTS, MappedImage
from pyublk.targets.nbd import Nbd
from pyublk.targets.nbd.handshake import Export
from pyublk.targets.nbd.keeper import CONNECTING, ExportChanged
from pyublk.targets.nbd.uri import Place

log = logging.getLogger("pyublk.image")


class Image(Nbd):
    """Serves the disk in an image of a virtual machine, with its backing files.

    For writing, QEMU's storage daemon has the image open, as long as the disk is served, and is
    spoken to by NBD on a UNIX socket of its own. Read-only, an image whose files have its data as
    it is, not compressed, is a `MappedImage` instead: it is served from them without QEMU.

    Args:
        path: the image.
        format: "qcow2", "vmdk", "vhdx", "vdi", or "raw"; by default, what its first bytes say,
            which is never taken for "raw".
        read_only: open it for reading, and make the disk read-only.
        block_size: the disk's logical block size in bytes.
        direct: bypass the page cache.
        connections: to the daemon, for each queue.
    """

    def __new__(
        cls,
        path: Path,
        *,
        format: str | None = None,
        read_only: bool = False,
        block_size: int = 512,
        direct: bool = False,
        connections: int = 1,
    ) -> Any:
        if read_only and _is_mapped(Path(path), format):
            return MappedImage(path, format=format, block_size=block_size, direct=direct)
        return super().__new__(cls)

    def __init__(
        self,
        path: Path,
        *,
        format: str | None = None,
        read_only: bool = False,
        block_size: int = 512,
        direct: bool = False,
        connections: int = 1,
    ) -> None:
        super().__init__(
            "unix:/to-be-made",
            block_size=block_size,
            read_only=read_only,
            connections=connections,
            retry_for=0.0,
            timeout=0.0,  # the daemon waits for its files as long as they take
        )
        self.path = Path(path)
        self._format = format
        self._direct = direct
        self._image: ImageFile | None = None
        self._daemon: StorageDaemon | None = None
        self._daemon_died = False

    # ---- the daemon ----

    def open(self) -> None:
        self._image = examine(self.path, self._format)
        if self._image.written_once and not self._wanted_read_only:
            raise ValueError(
                f"{self.path} is a stream-optimized VMDK, whose blocks can be written only once: "
                "serve it read-only, lay an overlay over it, or make another one by qemu-img "
                "convert -O qcow2"
            )
        self._daemon = StorageDaemon(
            self._image, read_only=self._wanted_read_only, direct=self._direct
        )
        self._daemon.start()
        self._daemon_died = False
        self.place = Place(path=self._daemon.socket, export=EXPORT)
        try:
            super().open()
        except BaseException:
            self._end_daemon()
            raise

    def _connect(self, timeout: float = CONNECTING) -> tuple[socket.socket, Export]:
        daemon = self._daemon
        if daemon is None:
            raise ExportChanged(errno.ESHUTDOWN, f"{self.path} is being closed")
        if not daemon.runs():
            self._refuse_to_go_on(daemon)
            daemon.start()
            self.place = Place(path=daemon.socket, export=EXPORT)
        connection, export = super()._connect(timeout)
        if not export.size:
            connection.close()
            raise empty(self.path)
        return connection, export

    def _refuse_to_go_on(self, daemon: StorageDaemon) -> None:
        """A daemon that died lost what it had not flushed, and a new one would not know: writes
        that were answered would be gone, and the next flush would say that they are safe."""
        if not self._daemon_died:
            said = daemon.stop() or "it ended by itself"
            log.error("QEMU's storage daemon for %s has died: %s", self.path, said)
        if not self.read_only:
            self._daemon_died = True
            raise ExportChanged(
                errno.EIO,
                f"QEMU's storage daemon for {self.path} has died, and what it had not flushed may "
                "be lost: stop the disk, look at its file system, and serve it again",
            )

    def close(self) -> None:
        super().close()
        self._end_daemon()

    def _end_daemon(self) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None and (said := daemon.stop()) is not None:
            log.error("%s", said)

    # ---- what it is ----

    def identity(self) -> str:
        """Changes when one of its files does."""
        assert self._image is not None
        told = (one.path.stat() for one in self._image.chain())
        return " ".join(f"{one.st_size}:{one.st_mtime_ns}" for one in told)

    def status(self) -> dict[str, Any] | None:
        daemon, image, told = self._daemon, self._image, super().status()
        if daemon is None or image is None or told is None:
            return None
        return {
            "image": [{"file": str(one.path), "format": one.format} for one in image.chain()],
            "served_by": "QEMU's storage daemon",
            "daemon": "running" if daemon.runs() else "dead",
            "connections": told["connections"],
        }


def _is_mapped(path: Path, format: str | None) -> bool:
    """Whether a read-only image needs no daemon. What is wrong with it is told by `open`."""
    try:
        parts(examine(path, format), MOST_PARTS)
    except Unmapped as error:
        log.info("%s is served by QEMU's storage daemon: %s", path, error)
        return False
    except (OSError, ValueError):
        return False
    return True
