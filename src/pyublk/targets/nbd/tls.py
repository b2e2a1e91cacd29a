# SPDX-License-Identifier: MIT
"""TLS: certificates or keys, and a thread that carries bytes between TLS and a socket pair.

The queue's ring sends plain bytes: with TLS it has one end of a socket pair, and a thread has the
other. So the protocol is in one place, and TLS costs a thread and two copies.
"""

import select
import socket
import ssl
import sys
import threading
from contextlib import suppress
from pathlib import Path

#: Bytes that are read at once, and that are kept for a side that does not take them.
_PIECE, _MOST = 256 << 10, 1 << 20


def make_context(certificates: Path | None, *, verify: bool) -> ssl.SSLContext:
    """The context of a client.

    `certificates`: a file with the CAs to trust, or a folder with `ca-cert.pem` and, for a server
    that wants to know its clients, `client-cert.pem` and `client-key.pem`. None: the system's CAs.
    Raises ValueError and OSError in a sentence.
    """
    authority = certificates
    if certificates is not None and certificates.is_dir():
        authority = certificates / "ca-cert.pem"
    try:
        context = ssl.create_default_context(cafile=None if authority is None else str(authority))
        if certificates is not None and certificates.is_dir():
            client = certificates / "client-cert.pem"
            if client.exists():
                context.load_cert_chain(client, certificates / "client-key.pem")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno,
            f"tls_certificates: there is no file {error.filename or authority}: it must be a file "
            "of CAs, or a folder with ca-cert.pem (and client-cert.pem, client-key.pem)",
        ) from None
    except ssl.SSLError as error:
        raise ValueError(
            f"tls_certificates: {certificates} has no certificates that can be used: {error.reason}"
        ) from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def make_psk_context(keys: Path, user: str | None) -> ssl.SSLContext:
    """The context of a client that shares a key with the server, which proves both to each other.

    `keys`: a file as psktool writes it, with lines of `USER:KEY`, the key in hexadecimal. `user`:
    whose; None: the first line's. Raises ValueError and OSError in a sentence.
    """
    name, key = _shared_key(keys, user)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not hasattr(context, "set_psk_client_callback"):
        version = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(
            f"tls_psk needs Python 3.13 or newer, and this is {version}: use certificates instead "
            "(tls_certificates)"
        )
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # A server without the key gets nowhere with these ciphers; one that speaks TLS 1.3 could offer
    # a certificate in its place, which nobody checks.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("kECDHEPSK:kDHEPSK")
    context.set_psk_client_callback(lambda hint: (name, key))
    return context


def _shared_key(keys: Path, user: str | None) -> tuple[str, bytes]:
    try:
        lines = keys.read_text().split()
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"tls_psk: there is no file {keys}") from None
    found: dict[str, bytes] = {}
    for line in lines:
        name, colon, key = line.partition(":")
        try:
            found.setdefault(name, bytes.fromhex(key))
        except ValueError:
            colon = ""
        if not (colon and name and key):
            raise ValueError(
                f"tls_psk: {keys} must have lines of USER:KEY, the key in hexadecimal, as psktool "
                "writes them"
            )
    if not found:
        raise ValueError(f"tls_psk: {keys} has no key")
    name = next(iter(found)) if user is None else user
    if name not in found:
        raise ValueError(f"tls_psk: {keys} has no key of {name!r}; it has {', '.join(found)}")
    return name, found[name]


def plain_end(secure: ssl.SSLSocket) -> socket.socket:
    """A socket on which what is said over TLS is plain. A thread carries it until either side ends;
    it owns the other socket."""
    ours, theirs = socket.socketpair()
    carrier = _Carrier(secure, theirs)
    threading.Thread(target=carrier.run, name="nbd tls", daemon=True).start()
    return ours


class _Carrier:
    """Both directions of a connection, by one thread: a TLS session is not for two."""

    def __init__(self, secure: ssl.SSLSocket, plain: socket.socket) -> None:
        self._secure = secure
        self._plain = plain
        secure.setblocking(False)
        plain.setblocking(False)
        self._out = bytearray()  # to the server
        self._in = bytearray()  # from it
        self._plain_open = self._secure_open = True

    def run(self) -> None:
        with suppress(OSError, ValueError):  # either side went away
            while self._secure_open or self._in:
                self._wait()
                self._take_plain()
                self._give_secure()
                self._take_secure()
                self._give_plain()
                if not self._plain_open and not self._out:
                    self._say_end()
        self._plain.close()
        self._secure.close()

    def _wait(self) -> None:
        poll = select.poll()
        wanted = select.POLLIN if self._secure_open and len(self._in) < _MOST else 0
        poll.register(self._secure, wanted | (select.POLLOUT if self._out else 0))
        wanted = select.POLLIN if self._plain_open and len(self._out) < _MOST else 0
        poll.register(self._plain, wanted | (select.POLLOUT if self._in else 0))
        # A poll tells nothing of what is decrypted already.
        poll.poll(0 if self._secure.pending() and len(self._in) < _MOST else None)

    def _take_plain(self) -> None:
        if self._plain_open and len(self._out) < _MOST:
            with suppress(BlockingIOError):
                piece = self._plain.recv(_PIECE)
                self._plain_open = bool(piece)
                self._out += piece

    def _give_secure(self) -> None:
        while self._out:
            try:
                sent = self._secure.send(memoryview(self._out)[:_PIECE].toreadonly())
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            del self._out[:sent]

    def _take_secure(self) -> None:
        while self._secure_open and len(self._in) < _MOST:
            try:
                piece = self._secure.recv(_PIECE)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except ssl.SSLEOFError:
                piece = b""
            self._secure_open = bool(piece)
            self._in += piece

    def _give_plain(self) -> None:
        while self._in:
            try:
                sent = self._plain.send(memoryview(self._in)[:_PIECE].toreadonly())
            except BlockingIOError:
                return
            del self._in[:sent]

    def _say_end(self) -> None:
        """The queue has said its last: the server is to end what it has, and close."""
        with suppress(OSError):
            self._secure.shutdown(socket.SHUT_WR)
        self._plain_open = True  # nothing more is to be said
        self._take_plain = lambda: None  # type: ignore[method-assign]
