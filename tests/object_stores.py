# SPDX-License-Identifier: MIT
"""Stores for tests of disks in object stores: in memory, watched or failing; and servers."""

import errno
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore, ObjectStore
from web_server import Server

from pyublk.targets.objects.failures import Failure
from pyublk.targets.objects.store import Objects, Version
from pyublk.targets.s3 import S3

CHUNK = 65536


@dataclass(frozen=True)
class Put:
    """What was asked of the store: `mode` is "create", "overwrite", or the version to replace."""

    path: str
    data: bytes
    mode: Any


class WatchedObjects(Objects):
    """Records each PUT, in order; `before` is called with each, and may raise in its place, and
    `after` when the store has it, and may raise in place of the answer."""

    def __init__(self, store: ObjectStore, *, retry_for: float = 0.0) -> None:
        super().__init__(store, "bucket/disk", retry_for=retry_for)
        self.puts: list[Put] = []
        self.before: Callable[[Put], None] = lambda put: None
        self.after: Callable[[Put], None] = lambda put: None
        self._recording = threading.Lock()

    def _put(self, path: str, data: bytes, mode: Any) -> Version:
        put = Put(path, bytes(data), mode)
        self.before(put)
        version = super()._put(path, data, mode)
        with self._recording:
            self.puts.append(put)
        self.after(put)
        return version


def lost(put: Put) -> None:
    """No answer."""
    raise Failure(errno.ETIMEDOUT, "it does not answer in time", passing=True)


def state_of(store: ObjectStore) -> dict[str, bytes]:
    """All objects of a store."""
    return {
        meta["path"]: bytes(obstore.get(store, meta["path"]).bytes())
        for some in obstore.list(store)
        for meta in some
    }


def store_with(objects: dict[str, bytes]) -> MemoryStore:
    """A store that has these."""
    store = MemoryStore()
    for path, data in objects.items():
        obstore.put(store, path, data)
    return store


class Served(S3):
    """A disk of small chunks by the objects that it is given."""

    def __init__(self, objects: Objects, **options: Any) -> None:
        super().__init__("bucket/disk", **{"chunk_size": CHUNK, "retry_for": 0, **options})
        self._given = objects

    def open(self) -> None:
        self.serve_from(self._given)


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def wait_for(url: str, process: "subprocess.Popen[bytes]", seconds: float = 60) -> None:
    """Until somebody answers there, whatever that is."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.05)
        else:
            return


KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Has the disks of a test ask that server, with the keys that it knows."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)


def put_bucket(endpoint: str, name: str) -> None:
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=20).close()


@contextmanager
def localbucket(folder: Path) -> Iterator[str]:
    """The endpoint of a server that ignores If-Match."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "localbucket", "--port", str(port), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | KEYS,
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(endpoint, process)
        yield endpoint
    finally:
        process.kill()
        process.wait()


class SmallS3:
    """A server of what a served disk asks of S3: GET with ranges, PUT with conditions. It starts at
    once, where a whole one takes a minute to do so.

    `faults` are taken one for each request, in order, and `always` is that of those after them: an
    HTTP status, or one of FAULTS. A "late" answer takes `silence` seconds, a "silent" one never
    comes. A PUT that is answered otherwise has not landed, unless it is late or silent."""

    FAULTS = ("short", "cut", "reset", "late", "silent", "elsewhere")

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        #: Called with each PUT's path; False: it is not done, nor answered.
        self.before_put: Callable[[str], bool] = lambda path: True
        self.faults: list[str | int] = []
        self.always: str | int | None = None
        self.silence = 0.3
        self._released = threading.Event()
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fault = owner._next_fault()
                if owner._is_refused(self, fault):
                    return
                with owner._lock:
                    data = owner.objects.get(self.path)
                if data is None:
                    owner._answer(self, 404)
                    return
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked is None:
                    owner._answer(self, 200, data, tag=data, fault=fault)
                    return
                first, last = int(asked[1]), int(asked[2])
                shift = 512 if fault == "elsewhere" else 0
                there = f"bytes {first + shift}-{last + shift}/{len(data)}"
                body = data[first : last + 1]
                owner._answer(self, 206, body, tag=data, range=there, fault=fault)

            def do_PUT(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if not owner.before_put(self.path):
                    self.close_connection = True
                    return
                fault = owner._next_fault()
                if fault not in ("late", "silent") and owner._is_refused(self, fault):
                    return
                with owner._lock:
                    there = owner.objects.get(self.path)
                    wanted = self.headers.get("If-Match")
                    refused = (
                        wanted is not None and (there is None or tag_of(there) != wanted)
                    ) or (self.headers.get("If-None-Match") == "*" and there is not None)
                    if not refused:
                        owner.objects[self.path] = data
                if not owner._is_refused(self, fault):
                    owner._answer(self, 412 if refused else 200, tag=data)

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes = b"",
        *,
        tag: bytes | None = None,
        range: str | None = None,
        fault: str | int | None = None,
    ) -> None:
        if fault == "short":
            body = body[: len(body) // 2]
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Last-Modified", "Sat, 28 Nov 2026 20:00:00 GMT")
        if tag is not None:
            request.send_header("ETag", tag_of(tag))
        if range is not None:
            request.send_header("Content-Range", range)
        request.end_headers()
        if fault == "cut":
            request.wfile.write(body[: len(body) // 2])
            self._cut(request)
        else:
            request.wfile.write(body)

    def _next_fault(self) -> str | int | None:
        with self._lock:
            return self.faults.pop(0) if self.faults else self.always

    def _is_refused(self, request: BaseHTTPRequestHandler, fault: str | int | None) -> bool:
        """Whether that was its answer already."""
        if isinstance(fault, int):
            self._answer(request, fault)
        elif fault in ("silent", "reset"):
            if fault == "silent":
                self._released.wait(30)
            self._cut(request)
        else:
            if fault == "late":
                time.sleep(self.silence)
            return False
        return True

    def _cut(self, request: BaseHTTPRequestHandler) -> None:
        request.wfile.flush()
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "SmallS3":
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.end()


def tag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
