# SPDX-License-Identifier: MIT
"""A disk from an NBD server."""

import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pyublk._native import ConnectedQueue
from pyublk.arguments import seconds, whole
from pyublk.connected import ConnectedTarget
from pyublk.profile import Profile
from pyublk.sizes import format_size
from pyublk.targets.nbd.handshake import Export, Flag, connect
from pyublk.targets.nbd.keeper import CONNECTING, FENCE, ExportChanged, Keeper
from pyublk.targets.nbd.tls import make_context, make_psk_context, plain_end
from pyublk.targets.nbd.uri import Place, parse

__all__ = ["Nbd", "NbdOverTls"]

#: The largest logical block that a disk may have (bytes): a page.
LARGEST_BLOCK = os.sysconf("SC_PAGESIZE")
#: Connections of a queue.
MOST_CONNECTIONS = 16


class Nbd(ConnectedTarget):
    """A disk whose bytes an NBD server has: nbdkit, qemu-nbd, nbd-server or another.

    Args:
        uri: the export: `nbd://HOST[:PORT]/EXPORT`, `nbds://…` (TLS), `nbd+unix:///EXPORT?socket=PATH`,
            `unix:PATH`, or `HOST:PORT`.
        size: bytes of the disk, at most the export's size; by default, that.
        block_size: the disk's logical block size in bytes; at least what the server demands.
        read_only: never write, whatever the server allows.
        connections: to the server, for each queue; one, if the server does not say that several
            may be used at once (multi-conn). Such a server allows no more than one queue either.
        retry_for: seconds that requests wait while there is no connection; then they fail with EIO.
        timeout: seconds after which a connection on which requests wait and nothing is answered is
            given up, and its requests are sent again on a new one; 0: never.
        tls_certificates: a file with the CAs to trust, or a folder with `ca-cert.pem` and perhaps
            `client-cert.pem` and `client-key.pem`; by default, the system's CAs.
        tls_hostname: the name in the server's certificate; by default, the host of the URI.
        tls_verify: whether the certificate is checked at all.
        tls_psk: a file of pre-shared keys, as psktool writes it; then there are no certificates.
            Needs Python 3.13.
        tls_username: whose key of these; by default, the user in the URI, else the file's first.
    """

    recoverable = True

    #: Whether TLS is required, whatever the URI says.
    tls: ClassVar[bool] = False

    def __init__(
        self,
        uri: str,
        *,
        size: int | None = None,
        block_size: int = 512,
        read_only: bool = False,
        connections: int = 1,
        retry_for: float = 30.0,
        timeout: float = 120.0,
        tls_certificates: Path | None = None,
        tls_hostname: str | None = None,
        tls_verify: bool = True,
        tls_psk: Path | None = None,
        tls_username: str | None = None,
    ) -> None:
        super().__init__(size=size or 0, block_size=block_size, read_only=read_only)
        place = parse(uri)
        self.place = replace(place, tls=place.tls or self.tls)
        options = _tls_options(self.place)
        certificates = tls_certificates or options.get("certificates")
        self._certificates = Path(certificates) if certificates else None
        self._hostname = tls_hostname or options.get("hostname") or self.place.host or "localhost"
        self._verify = tls_verify and options.get("verify", True)
        keys = tls_psk or options.get("keys")
        self._keys = Path(keys) if keys else None
        self._user: str | None = tls_username or options.get("user")
        if self._keys is not None and self._certificates is not None:
            raise ValueError("tls_psk and tls_certificates are two ways: give one of them")
        self._connections = whole("connections", connections, least=1)
        if self._connections > MOST_CONNECTIONS:
            raise ValueError(f"connections must be at most {MOST_CONNECTIONS}, not {connections}")
        self._retry_for = seconds("retry_for", retry_for, zero=True)
        self._timeout = seconds("timeout", timeout, zero=True)
        self.max_stall = self._retry_for + FENCE + CONNECTING
        self._wanted_size = size
        self._wanted_block_size = block_size
        self._wanted_read_only = read_only
        self._context: ssl.SSLContext | None = None
        self._export: Export | None = None
        self._keeper: Keeper | None = None

    # ---- the server ----

    @property
    def export(self) -> Export:
        """What the server says of the export, while the disk is served."""
        if self._export is None:
            raise RuntimeError("the target is not open")
        return self._export

    def _connect(self, timeout: float = CONNECTING) -> tuple[socket.socket, Export]:
        context = self._context
        connection, export = connect(
            self.place, timeout=timeout, context=context, hostname=self._hostname
        )
        if isinstance(connection, ssl.SSLSocket):
            connection = plain_end(connection)
        return connection, export

    def _connect_again(self, timeout: float) -> socket.socket:
        """A connection to the same export. Raises OSError."""
        connection, export = self._connect(timeout)
        try:
            self._check_same(export)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_same(self, export: Export) -> None:
        before = self.export
        missing = before.flags & ~export.flags & ~(Flag.READ_ONLY | Flag.ROTATIONAL)
        why = ""
        if export.size != before.size:
            why = f"it has {export.size} bytes, and had {before.size}"
        elif missing:
            why = f"it lacks {missing!r}".replace("Flag.", "")
        elif Flag.READ_ONLY in export.flags and not self.read_only:
            why = "it is read-only now"
        elif export.minimum > self.block_size or export.maximum < before.maximum:
            why = "it takes requests of other sizes"
        if why:
            raise ExportChanged(
                5, f"the export at {self.place.server} is not the same any more: {why}"
            )

    # ---- scope ----

    def open(self) -> None:
        if self.place.tls:
            self._context = (
                make_context(self._certificates, verify=self._verify)
                if self._keys is None
                else make_psk_context(self._keys, self._user)
            )
        connection, export = self._connect()
        try:
            self._take(export)
        except BaseException:
            connection.close()
            raise
        self._keeper = Keeper(
            str(self.place), self._connect_again, retry_for=self._retry_for, timeout=self._timeout
        )
        self._keeper.start(connection)

    def _take(self, export: Export) -> None:
        """The disk's properties, from what the server says."""
        flags = export.flags
        self.block_size = max(self._wanted_block_size, export.minimum, 512)
        if self.block_size > LARGEST_BLOCK:
            raise ValueError(
                f"{self.place} is read and written in blocks of {self.block_size} bytes: a disk's "
                f"have at most {LARGEST_BLOCK}"
            )
        self.read_only = self._wanted_read_only or Flag.READ_ONLY in flags
        self.rotational = Flag.ROTATIONAL in flags
        self.size = export.size if self._wanted_size is None else self._wanted_size
        if self.size > export.size:
            raise ValueError(f"size is {self.size} bytes: {self.place} has only {export.size}")
        if not self.size or self.size % self.block_size:
            whole_blocks = self.size - self.size % self.block_size
            hint = f"; give size={whole_blocks} to leave its end out" if whole_blocks else ""
            raise ValueError(
                f"{self.place} has {self.size} bytes: a disk needs a positive multiple of its "
                f"block size, {self.block_size}{hint}"
            )
        self._export = export

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()
        self._keeper = self._export = None

    # ---- what it is like ----

    def announces(self, method: str) -> bool:
        # Not open: what it may come to be.
        flags = ~Flag(0) if self._export is None else self._export.flags
        writable = not self.read_only
        return {
            "read": True,
            "write": writable,
            "flush": Flag.SEND_FLUSH in flags,
            "discard": Flag.SEND_TRIM in flags and writable,
            "write_zeroes": Flag.SEND_WRITE_ZEROES in flags and writable,
            "write_fua": Flag.SEND_FUA in flags and writable,
        }.get(method, False)

    def profile(self) -> Profile:
        preferred = self.export.preferred
        fits = preferred > self.block_size and not preferred & (preferred - 1)
        return replace(super().profile(), io_opt=preferred if fits else 0)

    def status(self) -> dict[str, Any] | None:
        keeper, export = self._keeper, self._export
        if keeper is None or export is None:
            return None
        return {
            "uri": str(self.place),
            "size": export.size,
            "multi_conn": Flag.CAN_MULTI_CONN in export.flags,
            "connections": keeper.status(),
            "lost": keeper.lost,
            "resent": keeper.resent(),
        }

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        if size > self.export.size:
            raise ValueError(
                f"{self.place} has only {self.export.size} bytes: the disk cannot have {size}"
            )
        super().resize(size, update)
        self._wanted_size = size

    # ---- its queues ----

    def links_per_queue(self) -> int:
        return self._connections if Flag.CAN_MULTI_CONN in self.export.flags else 1

    def check_queues(self, count: int) -> None:
        if count > 1 and Flag.CAN_MULTI_CONN not in self.export.flags:
            raise ValueError(
                f"{self.place} may only be used over one connection (its server does not offer "
                f"multi-conn), and a disk of {count} queues has as many: use one queue"
            )

    def check_size_of_requests(self, size: int) -> None:
        most = self.export.maximum
        if size > most:
            raise ValueError(
                f"{self.place} takes requests of at most {most} bytes: use "
                f"max_io_size={format_size(most).replace(' ', '')} or less"
            )

    def queue_made(self, queue: ConnectedQueue) -> None:
        assert self._keeper is not None
        self._keeper.add(queue)

    def connection_lost(
        self, queue: ConnectedQueue, link: int, connection: socket.socket, reason: int
    ) -> None:
        if self._keeper is not None:
            self._keeper.lose(queue, link, connection, reason)


class NbdOverTls(Nbd):
    """The same with TLS, also where the address has no scheme (`nbds:HOST:PORT`)."""

    tls = True


def _tls_options(place: Place) -> dict[str, Any]:
    """What the URI says of TLS. Raises ValueError for what is not known."""
    found: dict[str, Any] = {}
    for name, value in place.options.items():
        if name == "tls-certificates":
            found["certificates"] = Path(value)
        elif name == "tls-hostname":
            found["hostname"] = value
        elif name == "tls-verify-peer":
            found["verify"] = value.lower() not in ("0", "false", "no", "off")
        elif name == "tls-psk-file":
            found["keys"] = Path(value)
        elif name == "tls-username":
            found["user"] = value
        elif name == "tls-type" and value.lower() in ("x509", "psk"):
            pass
        else:
            raise ValueError(
                f"the option {name} of an NBD URI is not supported: tls-certificates, "
                "tls-hostname, tls-verify-peer, tls-psk-file and tls-username are"
            )
    return found
