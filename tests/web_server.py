# SPDX-License-Identifier: MIT
"""A web server on loopback that serves one file, and can be told to do it badly."""

import re
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

#: What a request can be answered with instead: an HTTP status, or one of these.
FAULTS = {"short", "cut", "reset", "late", "silent", "slow", "elsewhere"}


class Server(ThreadingHTTPServer):
    """Serves on a thread of its own from the start."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def end(self) -> None:
        """Ends it and all its connections, as a kill does."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class WebServer:
    """Serves `content` at `url`, with ranges and an ETag.

    `faults` are taken one for each request, in order; `always` is the fault of those after them.
    `silence` is how many seconds a "late" answer takes. `headers` takes those of every request.
    """

    def __init__(self, content: bytes, *, etag: str | None = '"v1"') -> None:
        self.content = content
        self.etag = etag
        self.modified: str | None = "Sat, 28 Nov 2026 20:00:00 GMT"
        self.ranges = True
        self.heeds_if_match = True
        self.faults: list[str | int] = []
        self.always: str | int | None = None
        self.silence = 0.3
        self.redirect: str | None = None
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._port = 0
        self._server: Server | None = None
        self.released = threading.Event()

    @property
    def requests(self) -> int:
        return len(self.headers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/images/disk.img"

    def start(self) -> Self:
        """Starts it, at the port that it had before, if it had one."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:
                    self.close_connection = True

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        return self

    def stop(self) -> None:
        """Ends it, and all its connections, as a kill does."""
        if self._server is None:
            return
        self.released.set()
        self._server.end()
        self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            fault = self.faults.pop(0) if self.faults else self.always
        if fault == "reset":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "silent":
            self.released.wait(30)
            request.close_connection = True
            return
        if fault == "late":
            time.sleep(self.silence)
        if self.redirect is not None and request.path != "/elsewhere":
            request.send_response(302)
            request.send_header("Location", self.redirect)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if isinstance(fault, int):
            self._refuse(request, fault)
        elif self.heeds_if_match and self.etag != request.headers.get("If-Match", self.etag):
            self._refuse(request, 412)
        else:
            self._send(request, fault)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "4")
        request.end_headers()
        request.wfile.write(b"no!\n")

    def _send(self, request: BaseHTTPRequestHandler, fault: str | None) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        first, last = 0, len(self.content) - 1
        if asked is None or not self.ranges:
            request.send_response(200)
        else:
            first, last = int(asked[1]), min(int(asked[2]), last)
            if first > last:
                self._refuse(request, 416)
                return
            request.send_response(206)
            shift = 512 if fault == "elsewhere" else 0
            request.send_header(
                "Content-Range", f"bytes {first + shift}-{last + shift}/{len(self.content)}"
            )
        body = self.content[first : last + 1]
        if fault == "short":
            body = body[: len(body) // 2]
        if self.etag is not None:
            request.send_header("ETag", self.etag)
        if self.modified is not None:
            request.send_header("Last-Modified", self.modified)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault == "cut":
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "slow":
            for at in range(0, len(body), 1024):
                request.wfile.write(body[at : at + 1024])
                request.wfile.flush()
                time.sleep(0.02)
        else:
            request.wfile.write(body)
