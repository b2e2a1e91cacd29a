"""Disks that do what they should, and servers that are killed: what a disk owes its clients.

A life is a disk of one kind, from its start to its end. Clients use it all the time, while its
server is killed and another takes over, the target is swapped and the disk resized; the history of
what they saw is explained (`linear`). With recovery="resend" no request may fail, and no answered
write may be lost: a file's bytes outlive the process. Each life has files of its own, so that one
can be repeated by itself.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks import Blocks
from clients import BLOCK, PATIENCE, Clients, read_blocks, values_in, write_blocks
from files import FILES
from linear import History, Kind
from nursery import Child, Nursery, Wire
from report import Report
from servers import helpers_of, until

import pyublk
from pyublk.targets import Linear, Mirror, Stripe
from pyublk.uapi import DeviceStatus, Feature

#: The clients' blocks: a few that all of them use, and some for each of them.
SHARED = 8
OWN = 16
CLIENTS = 4
USED = SHARED + CLIENTS * OWN
#: Sizes of a disk come in these steps: a stripe over two files has whole chunks.
STEP = 32
CHUNK = STEP // 2 * BLOCK
SMALLEST = -(-USED // STEP) * STEP
LARGEST = SMALLEST + 3 * STEP

#: Each kind of target, and which may serve its files next.
SAME_FILE = ["file", "plain", "async", "linear"]
KINDS = dict.fromkeys(SAME_FILE, SAME_FILE) | {"stripe": ["stripe"], "mirror": ["mirror"]}


@dataclass(frozen=True, kw_only=True)
class Life:
    """How a disk begins, what happens to it, and how it ends."""

    seed: int
    kind: str
    path: str
    queues: int
    depth: int
    shared: bool  # all clients use the same few blocks
    actions: tuple[str, ...]
    end: str


#: What may happen to a disk, and how often.
ACTIONS = {
    "kill": 5,
    "kill the helper": 1,
    "kill both": 2,
    "kill the next server while it starts": 1,
    "two servers at once": 1,
    "swap": 3,
    "kill in a swap": 1,
    "grow": 1,
    "shrink": 1,
    "kill in a resize": 1,
}
#: Those after which another server gets what the last one held.
RESENDING = set(ACTIONS) - {"kill the helper", "swap", "grow", "shrink"}
ENDS = {"stop": 3, "stop under load": 2, "delete while it waits": 2, "kill in a stop": 1}
NEEDS_QUIESCE = {"swap", "kill in a swap"}
NEEDS_UPDATE_SIZE = {"grow", "shrink", "kill in a resize"}


def planned(dice: random.Random, number: int, features: pyublk.Features) -> Life:
    """A life of each kind in turn."""
    kind = list(KINDS)[number % len(KINDS)]
    possible = dict(ACTIONS)
    if kind == "mirror" or not features.has(Feature.QUIESCE):
        possible = {name: n for name, n in possible.items() if name not in NEEDS_QUIESCE}
    if not features.has(Feature.UPDATE_SIZE):
        possible = {name: n for name, n in possible.items() if name not in NEEDS_UPDATE_SIZE}
    return Life(
        seed=dice.randrange(1 << 30),
        kind=kind,
        path=dice.choice(["auto", "copy", "user-copy"]),
        queues=dice.randint(1, min(4, os.cpu_count() or 1)),
        depth=dice.choice([2, 4, 16]),
        shared=dice.random() < 0.5,
        actions=tuple(dice.choices(list(possible), list(possible.values()), k=6)),
        end=dice.choices(list(ENDS), list(ENDS.values()))[0],
    )


# ---- the server ----


def made(kind: str, folder: Path, size: int) -> pyublk.Target:
    """A target over the life's files."""
    if kind == "stripe":
        return Stripe(folder / "a", folder / "b", chunk=CHUNK, size=size)
    if kind == "mirror":
        return Mirror(folder / "a", folder / "b", size=size)
    if kind == "linear":
        return Linear(folder / "a", size=size)
    return FILES[kind](folder / "a", size=size)


def serve(wire: Wire) -> None:
    """Makes a disk, or takes one over, and does with it what it is told."""
    how = wire.hear()
    folder = Path(how["folder"])
    target = made(how["kind"], folder, how["size"])
    options: Any = how["options"]
    if how["device"] is None:
        disk = pyublk.Device(target, **options)
    else:
        disk = pyublk.Device.take_over(how["device"], target, **options)

    def do(words: list[Any]) -> None:
        if words[0] == "swap":
            disk.swap(made(words[1], folder, disk.params.basic.size))
        elif words[0] == "resize":
            disk.resize(words[1], shrink=True)
        else:
            disk.stop()

    _answered(wire, lambda: disk.start() or disk.id)
    while (words := wire.hear()) is not None:
        _answered(wire, lambda: do(words))


def _answered(wire: Wire, step: Callable[[], Any]) -> None:
    try:
        answer = {"done": step()}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    wire.say(answer)


# ---- a life ----


def live(life: Life, nursery: Nursery, folder: Path, report: Report) -> None:
    """Raises AssertionError when anything is wrong."""
    with ExitStack() as stack:
        Living(life, nursery, folder, report, stack).live()


class Living:
    """A disk, its files, its clients and its servers, one after the other."""

    def __init__(
        self, life: Life, nursery: Nursery, folder: Path, report: Report, stack: ExitStack
    ) -> None:
        self.life, self.nursery, self.folder, self.report = life, nursery, folder, report
        self.stack = stack
        self.dice = random.Random(life.seed)
        self.history = History()
        self.kind = life.kind
        self.size = SMALLEST
        self.cuts: Kind = "write"  # what is cut off is gone
        self.device: int | None = None
        self.controller = stack.enter_context(pyublk.Controller(deadline=PATIENCE))
        self._make_files()

    def _make_files(self) -> None:
        files = 2 if self.kind in ("stripe", "mirror") else 1
        length = self.size * BLOCK // (2 if self.kind == "stripe" else 1)
        for name in ("a", "b")[:files]:
            (self.folder / name).write_bytes(bytes(length))

    @property
    def path(self) -> str:
        return f"/dev/ublkb{self.device}"

    def live(self) -> None:
        recovering = {"recovery": "resend", "path": self.life.path}
        self.server = self._start(queues=self.life.queues, depth=self.life.depth, **recovering)
        self.device = self.server.outcome()
        self.stack.callback(self._delete)
        with self._load() as self.clients:
            for action in self.life.actions:
                self.clients.goes_on(self.dice.choice([1, 3, 10]))
                step = getattr(self, "_" + action.replace(" ", "_"))
                with self.history.resending() if action in RESENDING else nullcontext():
                    step()
                self.report.events[action] += 1
            self.clients.goes_on(3)
            if self.life.end != "stop":
                self.clients.may_fail = True
                self._end()
        if self.life.end == "stop":
            self._check_disk()
            self._end()
        self.report.events[self.life.end] += 1
        self._check_files()

    @contextmanager
    def _load(self) -> Iterator[Clients]:
        spans = [range(SHARED)] * CLIENTS
        if not self.life.shared:
            spans = [range(at, at + OWN) for at in range(SHARED, USED, OWN)]
        with Clients(self.path, self.history, spans, seed=self.life.seed) as clients:
            yield clients
        self.report.operations += clients.done

    def _delete(self) -> None:
        with suppress(pyublk.DeviceNotFound):
            self.controller.delete(self.device)  # type: ignore[arg-type]

    # ---- servers ----

    def _start(self, **options: Any) -> Child:
        """A server that starts."""
        server = self.stack.enter_context(self.nursery.start("model", "serve"))
        size = self._size_now() if self.device is not None else self.size * BLOCK
        self._told = {
            "kind": self.kind,
            "folder": str(self.folder),
            "size": size,
            "device": self.device,
            "options": options,
        }
        server.begin(self._told)
        return server

    def _size_now(self) -> int:
        """Of the disk, as its clients see it, in bytes."""
        return int(Path(f"/sys/block/ublkb{self.device}/size").read_text()) * 512

    def _next_kind(self) -> str:
        """Who may serve the disk: its data path must be theirs."""
        if self.life.path == "auto":
            return self.kind
        return self.dice.choice(KINDS[self.kind])

    def _recover(self) -> None:
        """Another server, for one that is dead."""
        answers = sum(self.clients.answers)
        self.kind = self._next_kind()
        self.server = self._start()
        self.server.outcome()
        self.clients.next_answer(answers)
        self.report.pauses["another server"].append(self.clients.longest)

    # ---- what happens to the disk ----

    def _kill(self) -> None:
        self.clients.longest = 0.0
        self.server.kill()
        self._recover()

    def _kill_the_helper(self) -> None:
        (helper,) = helpers_of(self.server.pid)
        os.kill(helper, 9)
        until(lambda: set(helpers_of(self.server.pid)) - {helper}, what="there is another helper")

    def _kill_both(self) -> None:
        self.clients.longest = 0.0
        for helper in helpers_of(self.server.pid):
            os.kill(helper, 9)
        self.server.kill()
        self._recover()

    def _kill_the_next_server_while_it_starts(self) -> None:
        self.clients.longest = 0.0
        self.server.kill()
        follower = self._start()
        time.sleep(self.dice.random() * 0.3)
        follower.kill()
        self._recover()

    def _two_servers_at_once(self) -> None:
        self.server.kill()
        answers = sum(self.clients.answers)
        both = [self._start(deadline=10), self._start(deadline=10)]
        refused = []
        for server in both:
            try:
                server.outcome()
            except RuntimeError as error:
                refused.append(str(error))
                server.kill()
            else:
                self.server = server
        # A file is kept from the one who comes late; else the kernel's device is.
        assert len(refused) == 1, refused
        self.clients.next_answer(answers)

    def _swap(self) -> None:
        kind = self._next_kind()
        self.server.ask(["swap", kind])
        self.kind = kind

    def _kill_in_a_swap(self) -> None:
        self.server.begin(["swap", self._next_kind()])
        time.sleep(self.dice.random() * 0.2)
        self._kill()

    def _grow(self) -> None:
        if self.size < LARGEST:
            self._resize(self.size + STEP)

    def _shrink(self) -> None:
        if self.size > SMALLEST:
            self._resize(self.size - STEP)

    def _resize(self, size: int) -> None:
        """What is cut off reads as zeroes, once it is there again."""
        with self.history.writing(range(size, self.size), 0, self.cuts):
            self.server.ask(["resize", size * BLOCK])
        self.size = size
        assert self._size_now() == size * BLOCK
        self._use_end()

    def _use_end(self) -> None:
        """Reads and writes the blocks that are not always there, which no client uses."""
        if self.size > SMALLEST:
            with Blocks(self.path) as disk:
                read_blocks(disk, self.history, SMALLEST, self.size - SMALLEST)
                write_blocks(disk, self.history, SMALLEST, self.size - SMALLEST)
                read_blocks(disk, self.history, SMALLEST, self.size - SMALLEST)

    def _kill_in_a_resize(self) -> None:
        """The disk has one of the two sizes. Its file may be longer then, and is not cut."""
        self.cuts = "maybe"
        size = self.size + STEP if self.size < LARGEST else self.size - STEP
        with self.history.writing(range(size, self.size), 0, "maybe"):
            self.server.begin(["resize", size * BLOCK])
            time.sleep(self.dice.random() * 0.1)
            self._kill()
        assert self._size_now() in (self.size * BLOCK, size * BLOCK)
        self.size = self._size_now() // BLOCK
        self._use_end()

    # ---- its end ----

    def _end(self) -> None:
        if self.life.end in ("stop", "stop under load"):
            self.server.ask(["stop"])
        elif self.life.end == "kill in a stop":
            self.server.begin(["stop"])
            time.sleep(self.dice.random() * 0.3)
            self.server.kill()
            self._delete()
        else:
            self.server.kill()
            until(lambda: self._status() is DeviceStatus.QUIESCED, what="the disk waits")
            self._delete()
        until(lambda: not os.path.exists(self.path), PATIENCE, "the disk is gone")

    def _status(self) -> DeviceStatus:
        assert self.device is not None
        return self.controller.info(self.device).status

    def _check_disk(self) -> None:
        with Blocks(self.path) as disk:
            for first in range(0, self.size, STEP):
                read_blocks(disk, self.history, first, STEP)
        self.history.check()

    def _check_files(self) -> None:
        """What is in the files when all is over; clients and servers are gone."""
        legs = [self._content()]
        if self.kind == "mirror" and self.life.end.startswith("stop"):
            legs.append((self.folder / "b").read_bytes())
            assert legs[0] == legs[1], "a mirror's legs differ after its stop"
        called = self.history.reading()
        for number in range(USED):
            block = legs[0][number * BLOCK :][:BLOCK]
            self.history.found(called, number, values_in(block))
        self.history.check()
        self.report.checked += self.history.checked

    def _content(self) -> bytes:
        first = (self.folder / "a").read_bytes()
        if self.kind != "stripe":
            return first
        second = (self.folder / "b").read_bytes()
        return b"".join(
            one[at : at + CHUNK] for at in range(0, len(first), CHUNK) for one in (first, second)
        )
