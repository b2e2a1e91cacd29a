"""Disks whose handlers raise, stall, hang, forget their requests, keep their buffers and wake up
too late.

A life is a disk of one kind, from its start to its stop, or to the SIGKILL of its server. Its bytes
are in a file, and in the end in what clients saw of them (`linear`): a block that is read must hold
the last write that was acknowledged, or one that failed since.
"""

import asyncio
import contextlib
import json
import mmap
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from clients import BLOCK, PATIENCE, READS_AND_WRITES, Clients, values_in
from linear import History
from nursery import Nursery, Wire
from report import Report
from servers import until

import pyublk
from pyublk.targets import File
from pyublk.uapi import Feature, Op

CLIENTS = 4
BLOCKS_EACH = 64
SIZE = CLIENTS * BLOCKS_EACH * BLOCK


@dataclass(frozen=True, kw_only=True)
class Life:
    """How one disk is served, and how it ends."""

    seed: int
    kind: str
    path: str
    batch: bool
    queues: int
    depth: int
    workers: int
    end: str  # "stop", "hang" (and stop), or "kill"; nothing hangs in a mapped target
    requests: int  # of each client


def planned(dice: random.Random, number: int, features: pyublk.Features) -> Life:
    """A life of each kind in turn."""
    kind = KINDS_IN_TURN[number % len(KINDS_IN_TURN)]
    path = "auto" if kind == "mapped" else dice.choice(["copy", "user-copy", "get-data"])
    batch_is_there = features.has(Feature.BATCH_IO) and path != "get-data"
    return Life(
        seed=dice.randrange(1 << 30),
        kind=kind,
        path=path,
        batch=batch_is_there and dice.random() < 0.6,
        queues=dice.randint(1, min(2, os.cpu_count() or 1)),
        depth=dice.choice([2, 4, 16]),
        workers=dice.randint(1, 3) if kind == "workers" else 0,
        end=ENDS[(number + number // len(KINDS_IN_TURN)) % len(ENDS)],
        requests=dice.randint(100, 200),
    )


# ---- the target ----


class Trouble(Exception):
    """Raised on purpose, with an errno that may be anything."""

    def __init__(self, errno: object) -> None:
        super().__init__("trouble")
        self.errno = errno


class Chaos(pyublk.Target):
    """Bytes in a file, and handlers that do not always do what they should."""

    concurrency = "parallel"

    def __init__(self, life: Life, place: Path) -> None:
        super().__init__(size=SIZE)
        self.life, self.place = life, place
        self.events: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.calm = threading.Event()  # no more trouble: what hangs goes on
        self.hanging = 0
        self._dice = random.Random(life.seed)
        self._lock = threading.Lock()
        self._kept: list[tuple[memoryview, bytes]] = []

    def open(self) -> None:
        with open(self.place, "r+b") as file:
            self.bytes = memoryview(mmap.mmap(file.fileno(), SIZE))

    def event(self) -> str:
        """What happens to the next request."""
        with self._lock:
            what = self._dice.choices(
                ["", "raise first", "raise last", "stall", "keep", "hang"],
                [44, 14, 12, 8, 20, 2 if self.life.end == "hang" else 0],
            )[0]
            if self.calm.is_set() or (what == "hang" and self.hanging >= self.life.depth - 1):
                what = ""
            if what == "hang":
                self.hanging += 1
            if what:
                self.events[what] += 1
            return what

    def keep(self, data: memoryview) -> None:
        """Slices, which are compared a while later with what they were."""
        with self._lock:
            self._kept.append((data[:: self._dice.choice([1, 2])], bytes(data[:BLOCK])))
            old = self._kept.pop(0) if len(self._kept) > 16 else None
        if old is not None:
            self.compare(*old)

    def compare(self, seen: memoryview, before: bytes) -> None:
        """Whatever step the slice has, a stamp is in it: eight bytes, over and over."""
        step = 1 if bytes(seen[:BLOCK]) == before else 2
        if bytes(seen[: BLOCK // step]) != before[::step]:
            self.wrong.append(f"a kept buffer was {before[:8].hex()}, is {bytes(seen[:8]).hex()}")

    def compare_all(self) -> None:
        while self._kept:
            self.compare(*self._kept.pop())

    def hang(self, data: memoryview | None) -> None:
        """Until it is given up, and beyond."""
        before = None if data is None else bytes(data[:BLOCK])
        self.calm.wait(PATIENCE)
        if data is not None and bytes(data[:BLOCK]) != before:
            self.wrong.append("the buffer of a request that was given up changed")
        with self._lock:
            self.events["late wake-up"] += 1
            self.hanging -= 1
        raise Trouble(5)

    def failure(self) -> Exception:
        with self._lock:
            return Trouble(self._dice.choice([5, 28, None, "5", -1, 1 << 40, 2.5, [], True]))

    def move(self, op: Op, offset: int, data: memoryview) -> None:
        there = self.bytes[offset : offset + len(data)]
        if op is Op.READ:
            data[:] = there
        else:
            there[:] = data

    def serve(self, op: Op, offset: int, data: memoryview) -> None:
        what = self.event()
        if what == "raise first":
            raise self.failure()
        if what == "stall":
            time.sleep(0.005)
        if what == "hang":
            self.hang(data if op is Op.WRITE else None)
        self.move(op, offset, data)
        if what == "keep":
            self.keep(data)
        if what == "raise last":
            raise self.failure()


class Methods(Chaos):
    def read(self, offset: int, buffer: memoryview) -> None:
        self.serve(Op.READ, offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self.serve(Op.WRITE, offset, data)


class Coroutines(Chaos):
    """Half of them suspend; what hangs does so in a thread."""

    concurrency = "serial"

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self.serve_some(Op.READ, offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await self.serve_some(Op.WRITE, offset, data)

    async def serve_some(self, op: Op, offset: int, data: memoryview) -> None:
        what = self.event()
        if offset // BLOCK % 2:
            await asyncio.sleep(0)
        if what == "raise first":
            raise self.failure()
        if what == "stall":
            await asyncio.sleep(0.005)
        if what == "hang":
            await asyncio.to_thread(self.hang, data if op is Op.WRITE else None)
        self.move(op, offset, data)
        if what == "keep":
            self.keep(data)
        if what == "raise last":
            raise self.failure()


class Deferred(Chaos):
    """Requests are answered by threads, in any order; some are forgotten."""

    def handle(self, io: pyublk.IO) -> None:
        what = self.event()
        if what == "raise first":
            raise self.failure()
        io.defer()
        if what == "raise last":
            raise self.failure()
        if what == "stall":
            with self._lock:
                self.events["forgotten"] += 1
            return
        threading.Thread(target=self.answer, args=[io, what], daemon=True).start()

    def answer(self, io: pyublk.IO, what: str) -> None:
        with contextlib.suppress(pyublk.StaleIO, Trouble, OSError):
            data = io.buffer
            if what == "hang":
                self.hang(data if io.op is Op.WRITE else None)
            self.move(io.op, io.offset, data)
            if what == "keep":
                self.keep(data)
            io.complete()


KINDS: dict[str, type[Chaos]] = {
    "methods": Methods,
    "workers": Methods,
    "coroutines": Coroutines,
    "deferred": Deferred,
}
KINDS_IN_TURN = [*KINDS, "mapped"]
ENDS = ["stop", "hang", "hang", "kill"]


# ---- lives ----


def target_of(life: Life, place: Path) -> pyublk.Target:
    return File(place) if life.kind == "mapped" else KINDS[life.kind](life, place)


def device_of(life: Life, target: pyublk.Target) -> pyublk.Device:
    return pyublk.Device(
        target,
        queues=life.queues,
        depth=life.depth,
        workers=life.workers,
        path=life.path,
        batch=life.batch,
        stop_timeout=0.5,
        deadline=PATIENCE,
    )


def serve(wire: Wire) -> None:
    """A server that is to be killed."""
    text, place = wire.hear()
    life = Life(**json.loads(text))
    with device_of(life, target_of(life, Path(place))) as disk:
        wire.say({"done": disk.path})
        disk.wait()


def live(life: Life, nursery: Nursery, folder: Path, report: Report) -> None:
    """Raises AssertionError when anything is wrong."""
    place = folder / "bytes"
    place.write_bytes(bytes(SIZE))
    history = History()
    if life.end == "kill":
        _until_it_is_killed(life, nursery, place, history, report)
    else:
        _until_it_is_stopped(life, place, history, report)
    data = place.read_bytes()
    called = history.reading()
    for number in range(SIZE // BLOCK):
        history.found(called, number, values_in(data[number * BLOCK :][:BLOCK]))
    history.check()
    report.checked += history.checked


@contextlib.contextmanager
def _load(path: str, life: Life, history: History, report: Report) -> Iterator[Clients]:
    """Each client has blocks of its own: targets that copy bytes are not atomic."""
    spans = [range(at, at + BLOCKS_EACH) for at in range(0, CLIENTS * BLOCKS_EACH, BLOCKS_EACH)]
    with Clients(
        path,
        history,
        spans,
        seed=life.seed,
        kinds=READS_AND_WRITES,
        requests=life.requests,
        may_fail=True,
    ) as clients:
        yield clients
    report.operations += clients.done


def _until_it_is_stopped(life: Life, place: Path, history: History, report: Report) -> None:
    target = target_of(life, place)
    disk = device_of(life, target)
    disk.start()
    with _load(disk.path, life, history, report) as clients:
        dice = random.Random(life.seed + 99)
        until(lambda: not clients.busy() or getattr(target, "hanging", 0), timeout=PATIENCE)
        if clients.busy():
            time.sleep(dice.random() * 0.3)  # so that the stop comes at any moment
        try:
            disk.stop(0.3)
            report.events["stop"] += 1
        except pyublk.HandlerTimeout:
            report.events["stop with a hanging handler"] += 1
        if isinstance(target, Chaos):
            target.calm.set()
    if isinstance(target, Chaos):
        until(lambda: not target.hanging, timeout=PATIENCE, what="late handlers end")
        target.compare_all()
        report.events += target.events
        assert not target.wrong, target.wrong[:5]


def _until_it_is_killed(
    life: Life, nursery: Nursery, place: Path, history: History, report: Report
) -> None:
    with nursery.start("chaos", "serve") as server:
        path = server.ask([json.dumps(asdict(life)), str(place)])
        with _load(path, life, history, report) as clients:
            dice = random.Random(life.seed + 99)
            end = time.monotonic() + dice.random() * 3
            until(lambda: not clients.busy() or time.monotonic() > end, timeout=PATIENCE)
            server.kill()
            report.events["kill"] += 1
        until(lambda: not os.path.exists(path), timeout=PATIENCE, what=f"{path} is deleted")
