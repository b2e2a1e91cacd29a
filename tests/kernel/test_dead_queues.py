"""Queues that nobody serves any more: clients, `wait` and `with` hear of it at once, and why,
whoever served them and however that ended; the disk goes, and another stop finds it gone."""

import asyncio
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import existing
from memory import AsyncMemory, CallbackMemory, Memory, ParallelMemory
from needs import needs
from servers import until

import pyublk
from pyublk import Device, DeviceState
from pyublk._native import Dispatcher, MappedQueue
from pyublk.targets import File
from pyublk.uapi import Feature, Op

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
#: Seconds in which all is told. Where processors are not emulated, two.
SOON = 6.0


class Dies(Exception):
    """What the queue's thread ends by."""


#: Where `clients` read: nobody else does, such as the kernel that looks for partitions.
PLACES = range(65536, 4 * 65536, 65536)


def dying(base: Any, armed: threading.Event, how: str) -> Any:
    """A queue whose thread ends once it is `armed` and holds a client's read; only the first that
    gets one, on whichever CPU its client is."""

    kept: list[object] = []

    class Dying(base):  # type: ignore[misc]
        def live(self, *_: object, **__: object) -> None:
            while (batch := self.wait(0.05)) is not None:
                if armed.is_set() and any(io.offset in PLACES for io in batch):
                    armed.clear()
                    kept.append(batch)  # and so nobody answers
                    if how == "cut off":
                        self.sever()
                    elif how == "returns":
                        return
                    raise Dies(how)
                for io in batch:
                    if io.op is Op.READ:
                        io.buffer[:] = bytes(io.length)
                    io.complete()

        serve = serve_native = serve_mapped = live

    return Dying


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    armed = threading.Event()
    monkeypatch.setattr("pyublk.engines.base.Queue", dying(pyublk.Queue, armed, "raises"))
    monkeypatch.setattr("pyublk.engines.mapped.MappedQueue", dying(MappedQueue, armed, "raises"))
    return armed


@contextmanager
def clients(disk: Device) -> Iterator[Callable[[], None]]:
    """Clients that read at once, each its own place; to be told that all of them have ended, and
    that one of them failed."""
    with ThreadPoolExecutor(len(PLACES)) as pool, Blocks(disk.path, direct=True) as client:
        reads = [pool.submit(client.read, 4096, place) for place in PLACES]

        def ended() -> None:
            until = time.monotonic() + SOON
            outcomes = [read.exception(until - time.monotonic()) for read in reads]
            short = [read.result() != bytes(4096) for read in reads if not read.exception()]
            assert any(outcomes) or any(short)
            assert all(error is None or isinstance(error, OSError) for error in outcomes)

        yield ended


def options_here(options: dict[str, Any]) -> dict[str, Any]:
    features = {"threads": Feature.PER_IO_DAEMON, "batch": Feature.BATCH_IO}
    needs(*(features[option] for option in options if option in features))
    return options


def serve_until_dead(
    armed: Any,
    target: pyublk.Target,
    body: Callable[[Device], object] | None = None,
    **options: Any,
) -> Device:
    """Lets the disk die in the middle of its clients' requests, and raises what `with` does."""
    with Device(target, **options_here(options)) as disk:
        last.append(disk)
        armed.set()
        with clients(disk) as ended:
            try:
                if body is not None:
                    body(disk)
            finally:
                ended()
    return disk


last: list[Device] = []


def wait(disk: Device) -> None:
    disk.wait(60)


@pytest.mark.parametrize("how", ["raises", "cut off", "returns"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch": False}, {"queues": 2}, {"threads": 2}, {"path": "user-copy"}],
    ids=repr,
)
def test_clients_and_wait_are_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
    options: dict[str, Any],
) -> None:
    armed = threading.Event()
    took: list[float] = []
    monkeypatch.setattr("pyublk.engines.base.Queue", dying(pyublk.Queue, armed, how))
    raised = pyublk.InternalError if how == "returns" else Dies

    def body(disk: Device) -> None:
        took.append(time.monotonic())
        try:
            wait(disk)
        finally:
            took.append(time.monotonic())

    with pytest.raises(raised):
        serve_until_dead(armed, ParallelMemory(MIB), body, **options)
    assert took[1] - took[0] < SOON
    assert time.monotonic() - took[0] < SOON
    disk = last.pop()
    assert disk.state is DeviceState.STOPPED
    assert caplog.text.count("is stopped: a queue of it failed") <= 1
    disk.stop()  # it was told
    with pytest.raises(raised):
        disk.wait(0)


def test_with_is_told_without_wait(armed: threading.Event) -> None:
    with pytest.raises(Dies):
        serve_until_dead(armed, Memory(MIB))


def test_what_the_body_raises_is_kept_beside_it(armed: threading.Event) -> None:
    def body(disk: Device) -> None:
        raise KeyError("the body's own")

    with pytest.raises(Dies) as told:
        serve_until_dead(armed, Memory(MIB), body)
    assert isinstance(told.value.__context__, KeyError)


def test_nobody_asks(armed: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    """The disk goes by itself; who asks later is told."""
    disk = Device(Memory(MIB))
    disk.start()
    number = disk.id
    armed.set()
    with clients(disk) as ended:
        ended()
    until(lambda: disk.state is DeviceState.STOPPED, SOON)
    assert number not in existing()
    assert "is stopped: a queue of it failed" in caplog.text
    with pytest.raises(Dies):
        disk.stop()
    disk.stop()


@pytest.mark.parametrize("kind", ["native", "mapped", "workers"])
def test_other_dispatchers(
    armed: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    make: dict[str, Callable[[], pyublk.Target]] = {
        "native": lambda: CallbackMemory(MIB),
        "mapped": lambda: File(tmp_path / "file", size=MIB),
        "workers": lambda: ParallelMemory(MIB),
    }
    monkeypatch.setattr(
        "pyublk.engines.methods.serve_with_workers", lambda queue, pool: queue.live()
    )
    with pytest.raises(Dies):
        serve_until_dead(armed, make[kind](), wait, workers=2 if kind == "workers" else 0)


class EndsItsLoop(AsyncMemory):
    """Callbacks of it end the event loop that serves: one at once, others as it is closed."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.armed = threading.Event()
        self.closed = False

    async def read(self, offset: int, buffer: memoryview) -> None:
        if self.armed.is_set():
            for _ in range(3):
                asyncio.get_running_loop().call_soon(sys.exit, 3)
            try:
                await asyncio.sleep(60)
            finally:
                asyncio.get_running_loop().call_soon(sys.exit, 4)
        await super().read(offset, buffer)

    async def close(self) -> None:
        await asyncio.sleep(0.01)
        self.closed = True


@pytest.mark.parametrize("queues", [1, 2])
def test_an_event_loop_of_ours_that_ends(queues: int) -> None:
    target = EndsItsLoop(MIB)
    with pytest.raises(pyublk.DeviceLost, match="ended by SystemExit") as told:
        serve_until_dead(target.armed, target, wait, queues=queues)
    assert isinstance(told.value.__cause__, SystemExit)
    assert target.closed


def test_the_users_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queues are refused on it, beside all else that it does."""
    armed = threading.Event()
    real = Dispatcher

    class Dying:
        def __init__(self, *arguments: Any) -> None:
            self._real = real(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def turn(self, queue: pyublk.Queue) -> int | None:
            if armed.is_set():
                raise Dies
            return self._real.turn(queue)

    monkeypatch.setattr("pyublk.engines.coroutines.Dispatcher", Dying)

    def use(disk: Device) -> None:  # not on the loop: opening a disk may read from it
        with clients(disk) as ended:
            ended()

    async def main() -> None:
        async with Device(AsyncMemory(MIB), queues=2) as disk:
            armed.set()
            await asyncio.to_thread(use, disk)

    with pytest.raises(Dies):
        asyncio.run(main())


def test_stop_from_a_thread_with_a_dead_ones_ident(
    armed: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idents go to new threads. Such a one is no handler: its stop is over when it returns."""
    monkeypatch.setattr(Device, "_stop_failed", lambda self: None)  # else it is stopped already
    monkeypatch.setattr("pyublk.queue_servers.refuse", lambda queues: [])  # so its thread ends
    disk = Device(Memory(MIB))
    disk.start()
    server = disk._session._servers[0]
    armed.set()
    with clients(disk) as ended:
        assert server.ended.wait(60)
        server._ident = threading.get_ident()  # as if this thread had been given it
        with pytest.raises(Dies):
            disk.stop()
        assert disk.state is DeviceState.STOPPED
        ended()


def test_what_another_thread_raises_in_a_queues_thread() -> None:
    """It comes in a handler, and is that one's failure; the disk goes on."""
    idents: list[int] = []

    class Noting(Memory):
        def read(self, offset: int, buffer: memoryview) -> None:
            idents.append(threading.get_ident())
            super().read(offset, buffer)

    with Device(Noting(MIB)) as disk, Blocks(disk.path) as client:
        assert client.read(4096, 0) == bytes(4096)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(idents[0]), ctypes.py_object(SystemExit)
        )
        with pytest.raises(OSError, match="Input/output error"):
            client.read(4096, 65536)
        assert client.read(4096, 65536) == bytes(4096)
        assert disk.wait(0) is False
