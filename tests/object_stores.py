# SPDX-License-Identifier: MIT
"""Stores for tests of disks in object stores: in memory, watched or failing; and servers."""

import errno
import os
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
from pathlib import Path
from typing import Any

import obstore
from obstore.store import MemoryStore, ObjectStore

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


def put_bucket(endpoint: str, name: str) -> None:
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=20).close()


@contextmanager
def localbucket(folder: Path) -> Iterator[str]:
    """The endpoint of a server that ignores If-Match."""
    port = free_port()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "localbucket"), "--port", str(port), str(folder)],
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
