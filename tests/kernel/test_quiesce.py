"""A busy device is quiesced: its queues end, whoever serves them, and the next server goes on."""

import asyncio
import errno
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from needs import needs
from servers import start_recovery, until
from variations import variations

import pyublk
from pyublk.engines.coroutines import AsyncServer
from pyublk.params import Basic, Params
from pyublk.targets import File, Mirror, Ram
from pyublk.uapi import ControlCommand, DeviceStatus, Feature, Op

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
BLOCK = 4096
QUEUES, DEPTH = 2, 4
#: As many requests as there are tags, and some more.
CLIENTS = QUEUES * DEPTH + 2

RECOVERY = Feature.USER_RECOVERY | Feature.QUIESCE


class OutOfHand:
    """A device whose queues are served by hand, on threads, by one server after the other."""

    def __init__(self, controller: pyublk.Controller, store: Path, **options: Any) -> None:
        self.controller = controller
        self.info = controller.add(max_io_size=65536, **options)
        self.store = store
        self.char = -1
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def options(self) -> dict[str, Any]:
        return {
            "depth": self.info.depth,
            "buffer_size": self.info.max_io_size,
            "flags": int(self.info.flags),
        }

    def serve(self, serve: "Serve", begin: Callable[[int, int], object]) -> None:
        """A server: `begin` starts the device, or ends its recovery."""
        self.char = os.open(self.info.char_path, os.O_RDWR | os.O_CLOEXEC)
        self.threads = []
        for number in range(self.info.queues):
            primed = threading.Event()

            def run(number: int = number, primed: threading.Event = primed) -> None:
                try:
                    serve(self, number, primed)
                except BaseException as error:
                    self.failures.append(error)
                finally:
                    primed.set()

            self.threads.append(threading.Thread(target=run, daemon=True))
            self.threads[-1].start()
            assert primed.wait(60)
        begin(self.info.id, os.getpid())

    def start(self, serve: "Serve") -> None:
        self.controller.set_params(
            self.info.id, Params(basic=Basic(size=MIB, max_io_size=self.info.max_io_size))
        )
        self.serve(serve, self.controller.start)

    def recover(self, serve: "Serve") -> None:
        start_recovery(self.controller, self.info.id)
        self.serve(serve, self.controller.end_recovery)

    def ended(self) -> None:
        """The server is gone, by itself."""
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a queue does not end"
        assert self.failures == []
        os.close(self.char)
        self.char = -1

    def quiesced(self) -> None:
        self.controller.quiesce(self.info.id)
        self.ended()
        self.controller.wait_for_status(self.info.id, DeviceStatus.QUIESCED)


Serve = Callable[[OutOfHand, int, threading.Event], None]


@contextmanager
def out_of_hand(controller: pyublk.Controller, store: Path, **options: Any) -> Iterator[OutOfHand]:
    store.write_bytes(bytes(MIB))
    disk = OutOfHand(controller, store, **{"depth": DEPTH, **options})
    try:
        yield disk
    finally:
        with pyublk.Controller() as other:  # whatever the test has left
            other.delete(disk.info.id, wait=False, deadline=60)
            for thread in disk.threads:
                thread.join(60)
            if disk.char >= 0:
                os.close(disk.char)


def transfer(io: pyublk.IO, fd: int) -> None:
    if io.op is Op.READ:
        io.buffer[:] = os.pread(fd, io.length, io.offset)
    elif io.op is Op.WRITE:
        os.pwrite(fd, io.buffer, io.offset)
    io.complete()


@contextmanager
def queue_and_file(
    disk: OutOfHand, number: int, primed: threading.Event
) -> Iterator[tuple[pyublk.Queue, int]]:
    fd = os.open(disk.store, os.O_RDWR | os.O_CLOEXEC)
    try:
        with pyublk.Queue(disk.char, number, **disk.options()) as queue:
            queue.fetch()
            primed.set()
            yield queue, fd
            assert queue.ending
            assert queue.wait() is None
    finally:
        os.close(fd)


def by_iteration(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    with queue_and_file(disk, number, primed) as (queue, fd):
        for io in queue:
            transfer(io, fd)


def slowly(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    """It has every tag in its hands, nearly always."""
    with queue_and_file(disk, number, primed) as (queue, fd):
        while (batch := queue.wait()) is not None:
            if batch:
                time.sleep(0.02)
            for io in batch:
                transfer(io, fd)


def by_other_threads(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    """Which answer when the queue waits."""

    def answer(ios: list[pyublk.IO]) -> None:
        time.sleep(0.002)
        for io in ios:
            transfer(io, fd)

    with queue_and_file(disk, number, primed) as (queue, fd):
        threads = []
        while (batch := queue.wait()) is not None:
            threads.append(threading.Thread(target=answer, args=(batch,), daemon=True))
            threads[-1].start()
        assert queue.held == 0
        for thread in threads:
            thread.join(60)


def by_poller(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    with queue_and_file(disk, number, primed) as (queue, fd), select.epoll() as poller:
        poller.register(queue.fileno(), select.EPOLLIN)
        while True:
            while batch := queue.wait(0):
                for io in batch:
                    transfer(io, fd)
            if batch is None:
                return
            assert poller.poll(60)


def by_queue_set(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    with queue_and_file(disk, number, primed) as (queue, fd), pyublk.QueueSet() as queues:
        queues.add(queue)
        while True:
            for ready in queues.wait(60):
                batch = ready.wait(0)
                if batch is None:
                    queues.remove(queue)
                    return
                for io in batch:
                    transfer(io, fd)


def by_coroutines(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    class Slow(pyublk.Target):
        async def handle(self, io: pyublk.IO) -> None:
            await asyncio.sleep(0.001)
            transfer(io, fd)

    async def serve() -> None:
        handlers = pyublk._native.Handlers(Slow(size=MIB), lambda _outcome, _io: errno.EIO)
        await AsyncServer(handlers).attach(queue)

    with queue_and_file(disk, number, primed) as (queue, fd):
        asyncio.run(serve())


def from_files(disk: OutOfHand, number: int, primed: threading.Event) -> None:
    fd = os.open(disk.store, os.O_RDWR | os.O_CLOEXEC)
    try:
        layout = pyublk.Layout.table([(fd, False, False)], [(0, 0, MIB)])
        with pyublk.MappedQueue(disk.char, number, layout=layout, **disk.options()) as queue:
            queue.fetch()
            primed.set()
            queue.serve_mapped()
            assert queue.ending
    finally:
        os.close(fd)


class Client(threading.Thread):
    """Writes and reads a block, again and again, until it is told to end.

    `patient`: what fails with EIO is done again.
    """

    def __init__(
        self, path: str, number: int, over: threading.Event, *, patient: bool = False
    ) -> None:
        super().__init__(daemon=True)
        self.path, self.number, self.over, self.patient = path, number, over, patient
        self.rounds = 0
        self.failure: BaseException | None = None

    def bytes(self) -> bytes:
        return (b"%08d %08d " % (self.number, self.rounds)).ljust(BLOCK, b".")

    def run(self) -> None:
        try:
            with Blocks(self.path) as blocks:
                while not self.over.is_set():
                    self.rounds += 1
                    self.write_and_read(blocks, self.number * BLOCK)
        except BaseException as error:
            self.failure = error

    def write_and_read(self, blocks: Blocks, offset: int) -> None:
        assert self.ask(lambda: blocks.write(self.bytes(), offset)) == BLOCK
        assert self.ask(lambda: blocks.read(BLOCK, offset)) == self.bytes()

    def ask(self, question: Callable[[], object]) -> object:
        while True:
            try:
                return question()
            except OSError as error:
                if not self.patient or error.errno != errno.EIO:
                    raise


@contextmanager
def load(path: str, *, patient: bool) -> Iterator[Callable[[], None]]:
    """Clients that keep a disk busy. What is called waits until each has gone on."""
    over = threading.Event()
    clients = [Client(path, number, over, patient=patient) for number in range(CLIENTS)]

    def go_on() -> None:
        before = [client.rounds for client in clients]
        until(
            lambda: all(
                client.rounds > count + 1 or client.failure
                for client, count in zip(clients, before, strict=True)
            ),
            what="every client goes on",
        )

    for client in clients:
        client.start()
    try:
        yield go_on
    finally:
        over.set()
        for client in clients:
            client.join(60)
    assert [client.failure for client in clients] == [None] * CLIENTS
    with Blocks(path, os.O_RDONLY) as blocks:
        for client in clients:
            assert blocks.read(BLOCK, client.number * BLOCK) == client.bytes()


IN_HAND = [by_iteration, slowly, by_other_threads, by_poller, by_queue_set, by_coroutines]
WAYS = {
    "copy": (Feature(0), [*IN_HAND, from_files]),
    "get data": (Feature.NEED_GET_DATA, [by_iteration, slowly, from_files]),
    "user copy": (Feature.USER_COPY, [by_iteration, slowly, by_other_threads]),
    "zero copy": (Feature.SUPPORT_ZERO_COPY, [from_files]),
    "auto buffers": (Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG, [from_files]),
}


@pytest.mark.parametrize(
    ("way", "batch"),
    variations(
        [(way, batch) for way in WAYS for batch in (False, True)],
        [("copy", False), ("copy", True), ("auto buffers", True)],
    ),
)
def test_one_server_after_the_other(
    controller: pyublk.Controller, tmp_path: Path, way: str, batch: bool
) -> None:
    flags, servers = WAYS[way]
    if batch and flags & Feature.NEED_GET_DATA:
        return  # the kernel has no such device
    flags |= RECOVERY | (Feature.BATCH_IO if batch else Feature(0))
    needs(flags)
    with out_of_hand(controller, tmp_path / "store", queues=QUEUES, flags=flags) as disk:
        disk.start(servers[0])
        # With batch I/O, Linux 7.3 fails new requests of a quiesced device, until it is closed.
        with load(disk.info.path, patient=batch) as go_on:
            go_on()
            for serve in [*servers[1:], servers[0]]:
                disk.quiesced()
                disk.recover(serve)
                go_on()
        controller.stop(disk.info.id)
        disk.ended()


class Sync(pyublk.Target):
    """A file, by plain methods that take their time."""

    def __init__(self, path: Path) -> None:
        super().__init__(size=MIB)
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def read(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.001)
        os.preadv(self.fd, [buffer], offset)

    def write(self, offset: int, data: memoryview) -> None:
        time.sleep(0.001)
        os.pwrite(self.fd, data, offset)

    def close(self) -> None:
        os.close(self.fd)


class Parallel(Sync):
    concurrency = "parallel"


class Async(Sync):
    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0.001)
        os.preadv(self.fd, [buffer], offset)

    async def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0.001)
        os.pwrite(self.fd, data, offset)


KINDS: dict[str, tuple[Callable[[Path], pyublk.Target], dict[str, Any]]] = {
    "methods": (Sync, {}),
    "threads of a queue": (Parallel, {"threads": 2}),
    "workers": (Parallel, {"workers": 4}),
    "coroutines": (Async, {}),
    "native": (lambda _path: Ram(size=MIB), {}),
    "mapped": (lambda path: File(path), {}),
    "mirror": (lambda path: Mirror(path, path.with_name("second")), {}),
}


@pytest.mark.parametrize(
    ("kind", "shared"),
    variations(
        [(kind, shared) for kind in KINDS for shared in (False, True)],
        [("methods", True), ("workers", False), ("coroutines", False), ("mapped", True)],
    ),
)
def test_every_engine_ends(
    monkeypatch: pytest.MonkeyPatch,
    controller: pyublk.Controller,
    tmp_path: Path,
    kind: str,
    shared: bool,
) -> None:
    needs(RECOVERY)
    make, options = KINDS[kind]
    if shared and ("threads" in options or "workers" in options):
        return
    add = pyublk.Controller.add

    def recoverable(self: pyublk.Controller, **wish: Any) -> pyublk.DeviceInfo:
        return add(self, **{**wish, "flags": wish["flags"] | RECOVERY})

    monkeypatch.setattr(pyublk.Controller, "add", recoverable)
    for name in ("store", "second"):
        (tmp_path / name).write_bytes(bytes(MIB))
    with pyublk.Servers(1) as servers:
        if shared:
            options = {**options, "on": servers}
        disk = pyublk.Device(make(tmp_path / "store"), queues=QUEUES, depth=DEPTH, **options)
        disk.start()
        over = threading.Event()
        clients = [Client(disk.path, number, over) for number in range(CLIENTS)]
        try:
            for client in clients:
                client.start()
            until(lambda: all(client.rounds > 1 for client in clients), what="a busy disk")
            controller.quiesce(disk.id)
            assert disk._session is not None
            for server in disk._session._servers:
                assert server.ended.wait(60), "a queue does not end"
            over.set()
        finally:
            disk.stop(3)
            for client in clients:
                client.join(60)


@contextmanager
def one_queue(controller: pyublk.Controller, depth: int) -> Iterator[tuple[Any, pyublk.Queue]]:
    """Of a started device, on this thread."""
    info = controller.add(depth=depth, max_io_size=65536, flags=RECOVERY)
    char = -1
    try:
        controller.set_params(info.id, Params(basic=Basic(size=MIB, max_io_size=65536)))
        char = os.open(info.char_path, os.O_RDWR | os.O_CLOEXEC)
        with pyublk.Queue(char, depth=depth, buffer_size=65536, flags=int(info.flags)) as queue:
            os.close(char)
            queue.fetch()
            starting = threading.Thread(target=controller.start, args=(info.id, os.getpid()))
            starting.start()
            while starting.is_alive():
                for io in queue.wait(0.01) or []:
                    io.complete()
            yield info, queue
    finally:
        controller.delete(info.id, deadline=60)


def take(queue: pyublk.Queue, count: int) -> list[pyublk.IO]:
    """So many requests, with those that are not clients' of ours answered."""
    held: list[pyublk.IO] = []
    while len(held) < count:
        for io in queue.wait(60) or []:
            if io.op is Op.READ and io.length == BLOCK and io.offset >= MIB // 2:
                held.append(io)
            else:
                io.complete()
    return held


def serve_others(queue: pyublk.Queue) -> bool:
    """Waits for a round, and answers what the partition scan reads, which may come late; whether
    the queue goes on."""
    there = queue.wait(60)
    for io in there or []:
        io.complete()
    return there is not None


@contextmanager
def readers(path: str, count: int) -> Iterator[list[object]]:
    results: list[object] = []

    def read(number: int) -> None:
        try:
            with Blocks(path, os.O_RDONLY) as blocks:
                # Apart from each other: an I/O scheduler would merge neighbours.
                results.append(len(blocks.read(BLOCK, MIB // 2 + number * 4 * BLOCK)))
        except OSError as error:
            results.append(error.errno)

    threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(60)


@contextmanager
def beside(call: Callable[[], object]) -> Iterator[list[object]]:
    """Runs it on another thread, and has what it raised, or None."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield outcome
    thread.join(60)
    assert not thread.is_alive()


def test_a_server_sees_what_happens_to_its_device(controller: pyublk.Controller) -> None:
    needs(RECOVERY)
    with one_queue(controller, depth=8) as (info, queue), readers(info.path, 2) as results:
        held = take(queue, 2)
        assert not queue.ending
        with beside(lambda: controller.quiesce(info.id)) as outcome:
            while not queue.ending:
                assert serve_others(queue)
            assert queue.wait(0) == []  # not the end: it holds requests
            assert outcome == []
            held.pop().complete()
            assert queue.wait(0) == []
            held.pop().complete()
            assert queue.wait() is None
        assert outcome == [None]
        assert controller.info(info.id).status is DeviceStatus.LIVE
        queue.close()
        controller.wait_for_status(info.id, DeviceStatus.QUIESCED)
    assert results == [BLOCK, BLOCK]


def test_a_server_that_holds_every_tag(controller: pyublk.Controller) -> None:
    needs(RECOVERY)
    with one_queue(controller, depth=2) as (info, queue), readers(info.path, 2) as results:
        held = take(queue, 2)
        with beside(lambda: controller.quiesce(info.id, timeout=0.2)) as outcome:
            until(lambda: outcome, what="the time-out")
        [error] = outcome
        assert isinstance(error, OSError)
        assert error.errno == errno.EBUSY
        assert "the server still had requests when the time was over" in str(error)
        with beside(lambda: controller.quiesce(info.id)) as outcome:
            for io in held:
                io.complete()
            assert queue.wait(0) == []
            assert queue.wait() is None
        assert outcome == [None]
    assert results == [BLOCK, BLOCK]


def test_a_device_that_others_quiesced_once(controller: pyublk.Controller) -> None:
    needs(RECOVERY)
    with one_queue(controller, depth=8) as (info, queue), readers(info.path, 3) as results:
        held = take(queue, 3)
        controller._command(ControlCommand.QUIESCE_DEV, info.id)
        for io in held:
            io.complete()
        while serve_others(queue):
            pass
        assert queue.ending
    assert results == [BLOCK] * 3


def test_a_stopped_device_is_dead_before_its_queues_end(controller: pyublk.Controller) -> None:
    needs(RECOVERY)
    with one_queue(controller, depth=8) as (info, queue):
        with beside(lambda: controller.stop(info.id)):
            while queue.wait(60) is not None:
                pass
            assert controller.info(info.id).status is DeviceStatus.DEAD
        assert queue.ending
