"""Disks under random trouble and verified load: `./run chaos --minutes 60 --seed 7`.

A life is a disk of one kind, from its start to its stop, or to the SIGKILL of its server. Clients
write stamped blocks and read them back; handlers raise, stall, hang, forget their requests, keep
their buffers and wake up too late. The bytes outlive the disk in a file: each life goes on where
the one before ended. A block that is read must hold the last write that was acknowledged, or one
that failed since. A seed gives the same lives, with the same trouble in the same order of requests.
"""

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from blocks import Blocks
from servers import Server, until

import pyublk
from pyublk.targets import File
from pyublk.uapi import Feature, Op

BLOCK = 4096
CLIENTS = 4
BLOCKS_EACH = 64
SIZE = CLIENTS * BLOCKS_EACH * BLOCK
#: Seconds after which whatever does not go on is a failure.
PATIENCE = 60.0


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


@dataclass
class Report:
    """What happened."""

    lives: int = 0
    events: Counter[str] = field(default_factory=Counter)
    blocks: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.events.items()))
        return (
            f"{self.lives} lives, {self.events.total()} events ({kinds}), "
            f"{self.blocks} blocks verified, {len(self.wrong)} wrong"
        )


def planned(seed: int, batch_is_there: bool) -> Iterator[Life]:
    """The lives that follow from a seed."""
    for number in range(sys.maxsize):
        dice = random.Random(f"{seed}/{number}")
        kind = KINDS_IN_TURN[number % len(KINDS_IN_TURN)]
        path = "auto" if kind == "mapped" else dice.choice(["copy", "user-copy", "get-data"])
        yield Life(
            seed=dice.randrange(1 << 30),
            kind=kind,
            path=path,
            batch=batch_is_there and path != "get-data" and dice.random() < 0.6,
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


# ---- clients ----


def stamp(number: int, count: int) -> bytes:
    return struct.pack("<Q", number) * (count * BLOCK // 8)


class Client:
    """Writes and reads blocks of its own; knows what each may hold."""

    def __init__(self, number: int, report: Report) -> None:
        self.first = number * BLOCKS_EACH
        self.report = report
        self.lock = threading.Lock()
        self.next_stamp = number + 1
        self.may_hold: list[set[int]] = [{0} for _ in range(BLOCKS_EACH)]

    def run(self, path: str, seed: int, requests: int, over: threading.Event) -> None:
        dice = random.Random(seed)
        try:
            blocks = Blocks(path)
        except OSError:  # it is gone already
            return
        with blocks, contextlib.suppress(OSError):
            for _ in range(requests):
                if over.is_set():
                    return
                count = dice.choice([1, 1, 2, 8])
                block = dice.randrange(BLOCKS_EACH - count + 1)
                step = self.write if dice.random() < 0.6 else self.read
                with contextlib.suppress(OSError):
                    step(blocks, block, count)

    def write(self, blocks: Blocks, block: int, count: int) -> None:
        number, self.next_stamp = self.next_stamp, self.next_stamp + CLIENTS
        for each in range(block, block + count):
            self.may_hold[each].add(number)  # also when it fails
        blocks.write(stamp(number, count), (self.first + block) * BLOCK)
        for each in range(block, block + count):
            self.may_hold[each] = {number}

    def read(self, blocks: Blocks, block: int, count: int) -> None:
        self.check(block, blocks.read(count * BLOCK, (self.first + block) * BLOCK))

    def check(self, block: int, data: bytes) -> None:
        for at in range(0, len(data), BLOCK):
            found = set(struct.unpack(f"<{BLOCK // 8}Q", data[at : at + BLOCK]))
            allowed = self.may_hold[block + at // BLOCK]
            self.report.blocks += 1
            if not found <= allowed:  # several at once where a server was killed in the middle
                self.report.wrong.append(
                    f"block {self.first + block + at // BLOCK} holds {sorted(found)[:4]}, "
                    f"and may hold {sorted(allowed)[:4]}"
                )


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


def serve_until_killed(text: str, place: str) -> None:
    """What a server of its own runs."""
    life = Life(**json.loads(text))
    with device_of(life, target_of(life, Path(place))) as disk:
        print(disk.path, flush=True)
        disk.wait()


class World:
    """The file that outlives the disks, the clients that know its content, and what went wrong."""

    def __init__(self, place: Path) -> None:
        place.write_bytes(bytes(SIZE))
        self.place = place
        self.report = Report()
        self.clients = [Client(number, self.report) for number in range(CLIENTS)]

    def live(self, life: Life) -> None:
        self.report.lives += 1
        (self.kill if life.end == "kill" else self.stop)(life)
        data = self.place.read_bytes()
        for client in self.clients:
            start = client.first * BLOCK
            client.check(0, data[start : start + BLOCKS_EACH * BLOCK])
        self.report.wrong = [f"{wrong} ({life})" for wrong in self.report.wrong]

    @contextlib.contextmanager
    def load(self, path: str, life: Life) -> Iterator[Callable[[], bool]]:
        over = threading.Event()
        threads = [
            threading.Thread(
                target=client.run, args=[path, life.seed + n, life.requests, over], daemon=True
            )
            for n, client in enumerate(self.clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield lambda: any(thread.is_alive() for thread in threads)
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE)
            assert not any(thread.is_alive() for thread in threads), f"a client hangs: {life}"

    def stop(self, life: Life) -> None:
        target = target_of(life, self.place)
        disk = device_of(life, target)
        disk.start()
        with self.load(disk.path, life) as busy:
            dice = random.Random(life.seed + 99)
            until(lambda: not busy() or getattr(target, "hanging", 0), timeout=PATIENCE)
            if busy():
                time.sleep(dice.random() * 0.3)  # so that the stop comes at any moment
            try:
                disk.stop(0.3)
                self.report.events["stop"] += 1
            except pyublk.HandlerTimeout:
                self.report.events["stop with a hanging handler"] += 1
            if isinstance(target, Chaos):
                target.calm.set()
        if isinstance(target, Chaos):
            until(lambda: not target.hanging, timeout=PATIENCE, what="late handlers end")
            target.compare_all()
            self.report.events += target.events
            self.report.wrong += target.wrong

    def kill(self, life: Life) -> None:
        program = "from chaos import serve_until_killed; serve_until_killed(*sys.argv[1:])"
        with Server(program, json.dumps(asdict(life)), self.place) as server:
            path = server.line()
            with self.load(path, life) as busy:
                dice = random.Random(life.seed + 99)
                end = time.monotonic() + dice.random() * 3
                until(lambda: not busy() or time.monotonic() > end, timeout=PATIENCE)
                server.send(signal.SIGKILL)
                self.report.events["SIGKILL"] += 1
                server.ended()
            until(lambda: not os.path.exists(path), timeout=PATIENCE, what=f"{path} is deleted")


def run(seed: int, enough: Callable[[Report], bool], tell: Callable[[str], Any]) -> Report:
    """Lives that follow from a seed, until it is enough or something is wrong."""
    with pyublk.Controller() as controller:
        batch = controller.features().has(Feature.BATCH_IO)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world = World(Path(folder, "bytes"))
        for life in planned(seed, batch):
            world.live(life)
            tell(f"seed {seed}: {world.report}")
            if world.report.wrong or enough(world.report):
                break
    return world.report


def main() -> int:
    parser = argparse.ArgumentParser(description="Disks under random trouble and verified load.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="repeats the lives of a run")
    options = parser.parse_args()
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be a positive number, not {options.minutes:g}")
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    until_then = time.monotonic() + options.minutes * 60
    report = run(seed, lambda _report: time.monotonic() > until_then, print)
    for wrong in report.wrong:
        print("WRONG:", wrong)
    print(f"--seed {seed} repeats it")
    return bool(report.wrong)


if __name__ == "__main__":
    import logging

    logging.getLogger("pyublk").addHandler(logging.NullHandler())
    logging.getLogger("pyublk").propagate = False
    sys.exit(main())
