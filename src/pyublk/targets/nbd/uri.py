# SPDX-License-Identifier: MIT
"""Where an export is: NBD URIs, and the short forms that qemu and nbdkit print."""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlsplit

PORT = 10809
FORMS = "nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, unix:PATH or HOST:PORT"

#: Schemes, and whether they are TLS over a UNIX socket.
_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}


@dataclass(frozen=True, slots=True)
class Place:
    """An export of a server. `path`: of a UNIX socket, in the place of host and port. `tls`: TLS is
    required. `options`: what libnbd's URIs say of TLS (`tls-certificates`, `tls-hostname`, …)."""

    host: str = ""
    port: int = PORT
    path: str = ""
    export: str = ""
    tls: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Its URI."""
        scheme = "nbds" if self.tls else "nbd"
        export = quote(self.export, safe="/")
        if self.path:
            return f"{scheme}+unix:///{export}?socket={quote(self.path, safe='/')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{export}"

    @property
    def server(self) -> str:
        """The server alone, for messages."""
        return self.path or f"{self.host}:{self.port}"


def parse(text: str) -> Place:
    """The place that a text names. Raises ValueError: what it may be.

    Besides URIs (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md): ``unix:PATH``,
    ``HOST:PORT``, either with ``:exportname=NAME`` behind it, with or without ``nbd:`` before it.
    """
    place = _parse_uri(text) if "://" in text else _parse_short(text.removeprefix("nbd:"))
    if len(place.export.encode()) > 4096:
        raise ValueError("an export's name has at most 4096 bytes")
    return place


def _parse_uri(text: str) -> Place:
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise ValueError(
            f"{text!r} is no NBD URI: its scheme must be one of {', '.join(_SCHEMES)}, not "
            f"{parts.scheme!r}"
        )
    tls, unix = _SCHEMES[parts.scheme]
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = query.pop("socket", "")
    if unknown := sorted(name for name in query if not name.startswith("tls-")):
        raise ValueError(f"the URI {text!r} has {unknown[0]!r}, which means nothing in an NBD URI")
    export = unquote(parts.path[1:])
    if parts.username is not None:
        query.setdefault("tls-username", unquote(parts.username))
    if not unix:
        if path:
            raise ValueError(f"{text!r} names a socket: its scheme must be {parts.scheme}+unix")
        return Place(_host(parts.hostname), _port(text), "", export, tls, query)
    if not path:
        raise ValueError(f"{text!r} names no socket: write {parts.scheme}:///EXPORT?socket=PATH")
    if parts.hostname:
        raise ValueError(
            f"{text!r} names the host {parts.hostname!r} and a socket: write "
            f"{parts.scheme}:///EXPORT?socket=PATH"
        )
    return Place("", PORT, path, export, tls, query)


def _host(name: str | None) -> str:
    return unquote(name) if name else "localhost"


def _port(text: str) -> int:
    try:
        port = urlsplit(text).port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"the port in {text!r} must be a number from 1 to 65535")
    return PORT if port is None else port


def _parse_short(text: str) -> Place:
    where, _, export = text.partition(":exportname=")
    if where.startswith("unix:") and len(where) > len("unix:"):
        return Place(path=where.removeprefix("unix:"), export=export)
    match = re.fullmatch(r"(\[[^]]+\]|[^:/]+):(\d{1,5})", where)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{text!r} names no NBD server: write {FORMS}")
    return Place(match[1].strip("[]"), int(match[2]), export=export)
