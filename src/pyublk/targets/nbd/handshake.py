# SPDX-License-Identifier: MIT
"""Connecting to an NBD server, and what is agreed with it before the first request.

The newstyle handshake of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, with
NBD_OPT_GO where the server has it. Replies are simple ones: structured ones would only tell holes
apart, in return for longer headers.
"""

import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from pyublk.targets.nbd.uri import Place

_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = b"IHAVEOPT"
_OLDSTYLE_MAGIC = bytes.fromhex("00420281861253")
_REPLY_MAGIC = 0x0003E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
#: What a server may say in one reply, and how many replies it may give: more is nonsense.
_MOST_BYTES, _MOST_REPLIES = 64 << 10, 10_000
#: Exports of which a message tells the names.
_NAMES_TOLD = 8


class _Option(IntEnum):
    EXPORT_NAME = 1
    LIST = 3
    STARTTLS = 5
    GO = 7


class _Reply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9


_ERROR = 1 << 31
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3


class Flag(IntFlag):
    """What a server says of an export (transmission flags)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    CAN_MULTI_CONN = 1 << 8


@dataclass(frozen=True, slots=True)
class Export:
    """An export: bytes, flags, and the sizes (bytes) of the requests that its server takes."""

    size: int
    flags: Flag
    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 << 20


class ServerRefuses(OSError):
    """The server was reached, and does not offer what is wanted."""

    def __init__(self, message: str, number: int = errno.EPROTO) -> None:
        super().__init__(number, message)


def connect(
    place: Place, *, timeout: float, context: ssl.SSLContext | None, hostname: str | None
) -> tuple[socket.socket, Export]:
    """A connection on which requests may be sent, within `timeout` seconds.

    With a `context`, TLS is begun; the socket is then an SSLSocket. Raises OSError, in one sentence
    that names the server.
    """
    until = time.monotonic() + timeout
    try:
        plain = _reach(place, timeout)
    except OSError as error:
        raise _told(place, error) from error
    talk = _Talk(plain, until)
    try:
        _greet(talk)
        if context is not None:
            _start_tls(talk, context, hostname)
        export = _go(talk, place)
        talk.socket.settimeout(None)
        return talk.socket, export
    except OSError as error:
        talk.socket.close()
        raise _told(place, error) from error
    except BaseException:
        talk.socket.close()
        raise


def _told(place: Place, error: OSError) -> OSError:
    if isinstance(error, ServerRefuses):
        return OSError(error.errno, f"the NBD server at {place.server} {error.strerror}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return OSError(
            errno.EACCES,
            f"the certificate of the NBD server at {place.server} is not trusted: "
            f"{error.verify_message}",
        )
    if isinstance(error, ssl.SSLError):
        return OSError(
            errno.EPROTO, f"TLS with the NBD server at {place.server} fails: {error.reason}"
        )
    if isinstance(error, TimeoutError):
        return OSError(errno.ETIMEDOUT, f"the NBD server at {place.server} does not answer in time")
    if isinstance(error, socket.gaierror):
        return OSError(errno.EHOSTUNREACH, f"there is no host {place.host!r}: {error.strerror}")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(
        error.errno or errno.EIO, f"no NBD server can be reached at {place.server}: {reason}"
    )


def _reach(place: Place, timeout: float) -> socket.socket:
    if place.path:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            plain.settimeout(timeout)
            plain.connect(place.path)
        except BaseException:
            plain.close()
            raise
        return plain
    plain = socket.create_connection((place.host, place.port), timeout)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that is gone without a word is noticed within a minute or so.
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
    return plain


class _Talk:
    """What is said on a socket before `until` (of the monotonic clock)."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self.socket = connection
        self.no_zeroes = False
        self._until = until

    def set_limit(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def send(self, data: bytes) -> None:
        self.set_limit()
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            self.set_limit()
            piece = self.socket.recv(length - len(found))
            if not piece:
                raise ServerRefuses("ends the connection in the handshake", errno.ECONNRESET)
            found += piece
        return bytes(found)

    def ask(self, option: _Option, data: bytes = b"") -> None:
        self.send(_OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)

    def reply(self, option: _Option) -> tuple[int, bytes]:
        magic, echoed, kind, length = struct.unpack(">QIII", self.receive(20))
        if magic != _REPLY_MAGIC or echoed != option or length > _MOST_BYTES:
            raise ServerRefuses("does not keep to the NBD protocol in the handshake")
        return kind, self.receive(length)

    def replies(self, option: _Option, take: Callable[[int, bytes], None]) -> tuple[int, str]:
        """Takes what comes before the last reply; returns that, and what it says."""
        for _ in range(_MOST_REPLIES):
            kind, data = self.reply(option)
            if kind == _Reply.ACK or kind & _ERROR:
                return kind, _clean(data)
            take(kind, data)
        raise ServerRefuses("does not come to an end in the handshake")


def _clean(data: bytes) -> str:
    """A server's text, on one line."""
    text = data[:500].decode(errors="replace")
    return "".join(one if one.isprintable() else " " for one in text).strip().rstrip(".")


def _greet(talk: _Talk) -> None:
    magic = talk.receive(8)
    if magic != _MAGIC:
        raise ServerRefuses("is not an NBD server: it greets otherwise")
    style = talk.receive(8)
    if style[-7:] == _OLDSTYLE_MAGIC:
        raise ServerRefuses("speaks the oldstyle protocol, which has no exports: use a newer one")
    if style != _OPTION_MAGIC:
        raise ServerRefuses("is not an NBD server: it greets otherwise")
    (offered,) = struct.unpack(">H", talk.receive(2))
    if not offered & _FIXED_NEWSTYLE:
        raise ServerRefuses("does not speak the fixed newstyle protocol: use a newer one")
    talk.no_zeroes = bool(offered & _NO_ZEROES)
    talk.send(struct.pack(">I", offered & (_FIXED_NEWSTYLE | _NO_ZEROES)))


def _start_tls(talk: _Talk, context: ssl.SSLContext, hostname: str | None) -> None:
    talk.ask(_Option.STARTTLS)
    kind, text = talk.replies(_Option.STARTTLS, lambda kind, data: None)
    if kind != _Reply.ACK:
        raise ServerRefuses(
            f"does not offer TLS{_because(text)}: use nbd:// in the place of nbds://", errno.EACCES
        )
    talk.set_limit()
    plain = talk.socket
    talk.socket = context.wrap_socket(plain, server_hostname=hostname)


def _because(text: str) -> str:
    return f" ({text})" if text else ""


def _go(talk: _Talk, place: Place) -> Export:
    name = place.export.encode()
    found: dict[int, bytes] = {}

    def take(kind: int, data: bytes) -> None:
        if kind == _Reply.INFO and len(data) >= 2:
            found[struct.unpack(">H", data[:2])[0]] = data[2:]

    request = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
    talk.ask(_Option.GO, request)
    kind, text = talk.replies(_Option.GO, take)
    if kind == _Reply.ERR_UNSUP:
        return _go_by_name(talk, name)
    if kind != _Reply.ACK:
        raise _refusal(talk, place, kind, text)
    if len(found.get(_INFO_EXPORT, b"")) != 10:
        raise ServerRefuses("does not say how large the export is")
    size, flags = struct.unpack(">QH", found[_INFO_EXPORT])
    if len(found.get(_INFO_BLOCK_SIZE, b"")) != 12:
        return Export(size, Flag(flags))
    return Export(size, Flag(flags), *struct.unpack(">III", found[_INFO_BLOCK_SIZE]))


def _go_by_name(talk: _Talk, name: bytes) -> Export:
    """As older servers have it: one that has no such export ends the connection."""
    talk.ask(_Option.EXPORT_NAME, name)
    size, flags = struct.unpack(">QH", talk.receive(10))
    if not talk.no_zeroes:
        talk.receive(124)
    return Export(size, Flag(flags))


def _refusal(talk: _Talk, place: Place, kind: int, text: str) -> ServerRefuses:
    because = _because(text)
    export = f"the export {place.export!r}" if place.export else "a default export"
    if kind == _Reply.ERR_TLS_REQD:
        return ServerRefuses(
            f"requires TLS{because}: use nbds:// in the place of nbd://", errno.EACCES
        )
    if kind == _Reply.ERR_UNKNOWN:
        return ServerRefuses(f"does not have {export}{because}; {_names(talk)}", errno.ENOENT)
    if kind == _Reply.ERR_POLICY:
        return ServerRefuses(f"does not give out {export}{because}", errno.EACCES)
    if kind == _Reply.ERR_SHUTDOWN:
        return ServerRefuses(f"is shutting down{because}", errno.ESHUTDOWN)
    if kind == _Reply.ERR_BLOCK_SIZE_REQD:
        return ServerRefuses(f"wants another block size for {export}{because}")
    word = _Reply(kind).name if kind in set(_Reply) else f"error {kind & ~_ERROR}"
    return ServerRefuses(f"refuses {export}: {word}{because}")


def _names(talk: _Talk) -> str:
    """What the server has, in words."""
    found: list[str] = []

    def take(kind: int, data: bytes) -> None:
        if kind == _Reply.SERVER and len(data) >= 4 and len(found) <= _NAMES_TOLD:
            (length,) = struct.unpack(">I", data[:4])
            found.append(_clean(data[4 : 4 + length]))

    try:
        talk.ask(_Option.LIST)
        kind, _ = talk.replies(_Option.LIST, take)
    except OSError:
        return "it does not tell its exports"
    if kind != _Reply.ACK or not found:
        return "it does not tell its exports"
    names = ", ".join(repr(name) for name in found[:_NAMES_TOLD])
    return f"it has {names}{' and others' if len(found) > _NAMES_TOLD else ''}"
