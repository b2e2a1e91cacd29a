"""Targets that raise, hang or misuse their requests, and servers that are killed: the client gets
an error, the disk lives on or goes, and nothing waits for ever."""

import asyncio
import ctypes
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve, existing
from memory import HANDLER, AsyncMemory, DeferredMemory, HandleMemory, Memory
from needs import needs
from servers import Server, device_is_gone, sleeping_beyond_signals, until
from variations import variations

import pyublk
from pyublk import Device
from pyublk.engines.failures import FailureLog
from pyublk.uapi import Feature, Op

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20


class Seconds:
    """How long something took."""

    def __init__(self) -> None:
        self._from = time.monotonic()

    @property
    def gone(self) -> float:
        return time.monotonic() - self._from


# ---- targets that raise ----


class Raising(Memory):
    """Raises what is in `error` from reads of the second half."""

    error: BaseException | None = None

    def read(self, offset: int, buffer: memoryview) -> None:
        if offset >= self.size // 2 and self.error is not None:
            raise self.error
        super().read(offset, buffer)


class ParallelRaising(Raising):
    concurrency = "parallel"


class AsyncRaising(AsyncMemory):
    error: BaseException | None = None

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        if offset >= self.size // 2 and self.error is not None:
            raise self.error
        await super().read(offset, buffer)


class HandleRaising(HandleMemory):
    error: BaseException | None = None

    def handle(self, io: pyublk.IO) -> None:
        if io.op is Op.READ and io.offset >= self.size // 2 and self.error is not None:
            raise self.error
        super().handle(io)


RAISING: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "sync": (Raising, {}),
    "workers": (ParallelRaising, {"workers": 2}),
    "async": (AsyncRaising, {}),
    "handle": (HandleRaising, {}),
}


def failure_of(client: Blocks, offset: int = MIB - 4096) -> int:
    with pytest.raises(OSError, match=r".") as failed:
        client.read(4096, offset)
    assert failed.value.errno is not None
    return failed.value.errno


@pytest.mark.parametrize("kind", RAISING)
def test_reports_of_a_place_are_counted_while_they_are_held_back(
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    make, options = RAISING[kind]
    target = make(MIB)
    disk = serve(target, **options)
    target.error = ValueError("again and again")
    with Blocks(disk.path, os.O_RDONLY) as client:
        for _ in range(5):
            failure_of(client)
        assert len(caplog.records) == 1
        monkeypatch.setattr(FailureLog, "INTERVAL", 0.0)  # a minute is over
        failure_of(client)
    assert [record.getMessage() for record in caplog.records[1:]] == [
        f"{make.__name__}: the handler of a READ raised ValueError; the client gets EIO "
        "(4 more since the last report)"
    ]


class OddClass(Exception):
    __class__ = property(lambda self: 1 // 0)  # type: ignore[assignment]


class OddWords(Exception):
    def __str__(self) -> str:
        raise SystemExit

    __repr__ = __str__


class OddErrno(OSError):
    @property
    def errno(self) -> int:  # type: ignore[override]
        raise KeyError(self)


ODD: list[BaseException] = [
    OSError("cannot read", "sector 5"),
    OSError(True, "yes"),
    OSError(10**30, "huge"),
    OSError(-5, "negative"),
    OddErrno(errno.ENOSPC, "full"),
    OddClass("odd"),
    OddWords("odd"),
    ExceptionGroup("many", [OSError(errno.ENOSPC, "full"), ValueError("wrong")]),
    SystemExit(0),
    KeyboardInterrupt(),
    GeneratorExit(),
    BaseException(),
]


@pytest.mark.parametrize("kind", RAISING)
def test_whatever_is_raised_the_disk_goes_on(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(FailureLog, "INTERVAL", 0.0)
    make, options = RAISING[kind]
    target = make(MIB)
    disk = serve(target, **options)
    with Blocks(disk.path, os.O_RDONLY) as client:
        for error in ODD:
            target.error = error
            assert failure_of(client) == errno.EIO
            target.error = None
            assert client.read(4096, MIB - 4096) == bytes(4096)
    told = caplog.text  # of other readers of the block, such as udev, as well
    assert all(f"raised {type(error).__name__};" in told for error in ODD)
    assert disk.wait(0) is False


class Returning(Memory):
    def read(self, offset: int, buffer: memoryview) -> Any:
        if offset:
            return "the data"
        return super().read(offset, buffer)


class AsyncReturning(AsyncMemory):
    async def read(self, offset: int, buffer: memoryview) -> Any:
        return b"the data" if offset else None


@pytest.mark.parametrize(("make", "what"), [(Returning, "str"), (AsyncReturning, "bytes")])
def test_a_handler_that_returns_something(
    serve: Serve, caplog: pytest.LogCaptureFixture, make: type[Memory], what: str
) -> None:
    disk = serve(make(MIB))  # whose reads behind the first block may be reported already
    with Blocks(disk.path, os.O_RDONLY) as client:
        assert client.read(512, 0) == bytes(512)
        first = {failure_of(client, 65536) for _ in range(3)}
    assert first == {errno.EIO}
    assert {record.getMessage() for record in caplog.records} == {
        f"{make.__name__}: the handler of a READ returned {what} instead of None (to read, fill "
        "the buffer); the client gets EIO"
    }
    assert disk.stats().total.errors >= 3


# ---- requests that are misused ----


class Keeping(Memory):
    """Keeps every buffer it is given, with the bytes that it has then."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.kept: list[tuple[memoryview, bytes]] = []

    def read(self, offset: int, buffer: memoryview) -> None:
        super().read(offset, buffer)
        self.kept.append((buffer, bytes(buffer)))

    def write(self, offset: int, data: memoryview) -> None:
        with pytest.raises(TypeError, match="read-only"):
            data[0] = 1
        super().write(offset, data)
        self.kept.append((data, bytes(data)))


def test_a_buffer_kept_after_the_call_stays_as_it_was(serve: Serve) -> None:
    target = Keeping(MIB)
    disk = serve(target, depth=2)
    with Blocks(disk.path) as client:
        for byte in (b"k", b"l", b"m"):
            client.write(byte * 4096, 0)
            assert client.read(4096, 0) == byte * 4096
    assert disk.stats().total.errors == 0
    assert len(target.kept) >= 6
    for kept, before in target.kept:
        assert kept == before


class Misusing(HandleMemory):
    """Does everything wrong that can be done with an IO, and collects what is said about it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.said: list[BaseException] = []
        self.kept: pyublk.IO | None = None

    def attempt(self, wrong: Callable[[], object]) -> None:
        try:
            wrong()
        except Exception as error:
            self.said.append(error)

    def handle(self, io: pyublk.IO) -> None:
        self.move(io)
        if io.offset != 65536:
            return
        self.attempt(lambda: io.fail(0))
        self.attempt(lambda: io.fail(-errno.EIO))
        io.complete()
        self.attempt(io.complete)
        self.attempt(lambda: io.fail(errno.EIO))
        self.attempt(io.defer)
        for name in ("op", "flags", "fua", "unmap", "offset", "length", "buffer"):
            self.attempt(partial(getattr, io, name))
        self.kept = io


def test_a_request_is_completed_once_and_used_no_more(serve: Serve) -> None:
    target = Misusing(MIB)
    disk = serve(target, depth=1)
    target.data[65536:69632] = b"m" * 4096
    with Blocks(disk.path, os.O_RDONLY) as client:
        assert client.read(4096, 65536) == b"m" * 4096
        for said in target.said[:2]:
            assert type(said) is ValueError
            assert str(said).startswith("error must be an errno value such as errno.EIO, not ")
        assert len(target.said) == 12
        for said in target.said[2:]:
            assert type(said) is pyublk.StaleIO
            assert str(said) == (
                "this IO (tag 0) was completed already: read what you need of it before you "
                "complete it, and complete it once"
            )
        # The only tag carries another request now: the old one stays stale.
        assert client.read(4096, 0) == bytes(4096)
        kept = target.kept
        assert kept is not None
        assert kept.completed
        assert (kept.tag, kept.queue_id) == (0, 0)
        assert repr(kept) == "<IO tag 0 (completed)>"
        with pytest.raises(pyublk.StaleIO, match="was completed already"):
            kept.offset  # noqa: B018
        with pytest.raises(pyublk.StaleIO, match="was completed already"):
            kept.complete()
    assert disk.stats().total.errors == 0


def test_nobody_makes_an_io() -> None:
    with pytest.raises(TypeError, match="IO objects come from a Queue"):
        pyublk.IO()


class FailingLater(DeferredMemory):
    def move(self, io: pyublk.IO) -> None:
        if io.offset != 65536:
            super().move(io)
            return
        buffer = io.buffer
        buffer[:] = b"late" * (len(buffer) // 4)
        io.fail(errno.ENOSPC)
        self.late = (io, buffer)

    def _work(self) -> None:
        while (io := self._inbox.get()) is not None:
            self.move(io)
            if not io.completed:
                io.complete()


def test_requests_are_completed_from_another_thread(serve: Serve) -> None:
    target = FailingLater(MIB)
    disk = serve(target)
    with Blocks(disk.path) as client:
        client.write(b"d" * 65536, 0)
        assert client.read(65536, 0) == b"d" * 65536
        assert failure_of(client, 65536) == errno.ENOSPC
    io, buffer = target.late
    with pytest.raises(pyublk.StaleIO):
        io.complete()
    assert bytes(buffer[:4]) == b"late"


# ---- requests that are forgotten ----


class Forgetting(HandleMemory):
    """Defers reads of its last block, and then does as it is told."""

    concurrency = "parallel"
    then: Callable[[pyublk.IO], object] | None = None

    def handle(self, io: pyublk.IO) -> None:
        if io.op is Op.READ and io.offset == MIB - 4096 and self.then is not None:
            io.defer()
            self.then(io)
        else:
            self.move(io)


class AsyncForgetting(Forgetting):
    async def handle(self, io: pyublk.IO) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        Forgetting.handle(self, io)


def forget_later(io: pyublk.IO) -> None:
    threading.Timer(0.1, lambda io: None, args=(io,)).start()


def fail_after_it(io: pyublk.IO) -> None:
    raise ValueError("after defer")


FORGETTING: dict[str, tuple[type[Forgetting], dict[str, Any]]] = {
    "sync": (Forgetting, {}),
    "plain commands": (Forgetting, {"batch": False}),
    "user copy": (Forgetting, {"path": "user-copy"}),
    "several": (Forgetting, {"threads": 2}),
    "workers": (Forgetting, {"workers": 2}),
    "async": (AsyncForgetting, {}),
}


FEATURES = {"threads": Feature.PER_IO_DAEMON, "batch": Feature.BATCH_IO}


@pytest.mark.parametrize("kind", FORGETTING)
def test_a_deferred_request_that_nobody_has_fails_at_once(
    serve: Serve, caplog: pytest.LogCaptureFixture, controller: pyublk.Controller, kind: str
) -> None:
    make, options = FORGETTING[kind]
    needs(*(FEATURES[option] for option in options if option in FEATURES))
    target = make(MIB)
    disk = serve(target, **options)
    with Blocks(disk.path, os.O_RDONLY) as client:
        for then in (str, forget_later, fail_after_it, str):
            target.then = then
            took = Seconds()
            assert failure_of(client) == errno.EIO
            assert took.gone < 5
            target.then = None
            assert client.read(4096, MIB - 4096) == bytes(4096)
    assert "no reference to its IO is left" in caplog.text
    assert "raised ValueError" in caplog.text


# ---- handlers that never return ----


class Hanging:
    """`hang` does not return before `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.hanging = threading.Semaphore(0)

    def hang(self, offset: int) -> None:
        if offset >= MIB // 2:
            self.hanging.release()
            self.never_returns()

    def never_returns(self) -> None:
        self.release.wait()

    def wait_for(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.hanging.acquire(timeout=60), "no handler hangs"


class SyncHanging(Hanging, Memory):
    def __init__(self) -> None:
        Memory.__init__(self, MIB)
        Hanging.__init__(self)

    def read(self, offset: int, buffer: memoryview) -> None:
        self.hang(offset)
        super().read(offset, buffer)


class PerQueueHanging(SyncHanging):
    concurrency = "per_queue"


class ParallelHanging(SyncHanging):
    concurrency = "parallel"


class AsyncHanging(Hanging, AsyncMemory):
    """Hangs in an await: its loop runs on."""

    def __init__(self) -> None:
        AsyncMemory.__init__(self, MIB)
        Hanging.__init__(self)

    async def read(self, offset: int, buffer: memoryview) -> None:
        if offset >= MIB // 2:
            self.hanging.release()
            await self.never_returns()
        await super().read(offset, buffer)

    async def never_returns(self) -> None:  # type: ignore[override]
        await asyncio.Event().wait()


class BlockingCoroutine(AsyncHanging):
    """Hangs outside of any await, and its loop with it."""

    async def never_returns(self) -> None:  # type: ignore[override]
        self.release.wait()


class NeverCompleting(Hanging, HandleMemory):
    """Defers requests, keeps them, and does no more."""

    def __init__(self) -> None:
        HandleMemory.__init__(self, MIB)
        Hanging.__init__(self)
        self.kept: list[pyublk.IO] = []

    def handle(self, io: pyublk.IO) -> None:
        if io.op is Op.READ and io.offset >= MIB // 2:
            io.defer()
            self.kept.append(io)
            self.hanging.release()
        else:
            super().handle(io)


class CallbackHanging(Hanging, pyublk.NativeTarget):
    """A Python function behind a C pointer."""

    def __init__(self) -> None:
        pyublk.NativeTarget.__init__(self, size=MIB)
        Hanging.__init__(self)
        self._function = HANDLER(self._handle)
        self.handler = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _handle(self, _context: int, _op: int, _flags: int, offset: int, *_rest: int) -> int:
        self.hang(offset)
        return 0


SLEEPS = """
#include <stdint.h>
#include <unistd.h>
struct context { int hanging, released; };
int64_t handle(volatile struct context *context, uint32_t op, uint32_t flags, uint64_t offset)
{
        (void)op;
        (void)flags;
        if (offset < (1 << 19))
                return 0;
        context->hanging = 1;
        while (!context->released)
                usleep(20000);
        return 0;
}
"""


class PointerHanging(pyublk.NativeTarget):
    """A C function that sleeps, and never sees Python."""

    def __init__(self, directory: Path) -> None:
        super().__init__(size=MIB)
        library = directory / "sleeps.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-xc", "-", "-o", library],
            input=SLEEPS.encode(),
            check=True,
            timeout=50,
        )
        self._library = ctypes.CDLL(str(library))
        self.handler = ctypes.cast(self._library.handle, ctypes.c_void_p).value or 0
        self.words = (ctypes.c_int * 2)()
        self.context = ctypes.addressof(self.words)
        self.release = self

    def set(self) -> None:
        self.words[1] = 1

    def wait_for(self, count: int = 1) -> None:
        until(lambda: self.words[0], what="the C function hangs")


class Client(threading.Thread):
    """Reads one place; `error` is what it got."""

    def __init__(self, path: str, offset: int, direct: bool = True) -> None:
        super().__init__(daemon=True)
        self.path, self.offset, self.direct = path, offset, direct
        self.error: OSError | None = None
        self.length = 0
        self.start()

    def run(self) -> None:
        try:
            with Blocks(self.path, os.O_RDONLY, direct=self.direct) as blocks:
                self.length = len(blocks.read(4096, self.offset))
        except OSError as error:
            self.error = error

    def got(self, timeout: float = 60.0) -> int | None:
        self.join(timeout)
        assert not self.is_alive(), "the client hangs"
        return self.error.errno if self.error else None


HANGING: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "sync": (SyncHanging, {}, "never_returns"),
    "per_queue": (PerQueueHanging, {"queues": 2}, "never_returns"),
    "serial": (SyncHanging, {"queues": 2}, "never_returns"),
    "workers": (ParallelHanging, {"workers": 3}, "never_returns"),
    "async": (AsyncHanging, {}, "never_returns"),
    "blocking-coroutine": (BlockingCoroutine, {}, "never_returns"),
    "deferred": (NeverCompleting, {}, "held 1 request"),
    "callback": (CallbackHanging, {"queues": 2}, "never_returns"),
    "pointer": (PointerHanging, {"queues": 2}, "serve_native"),
}


@contextmanager
def released(target: Any) -> Iterator[None]:
    """Lets the thread go after the test, and gives it the time to."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        target.release.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)


@pytest.mark.parametrize(
    "kind", variations(HANGING, ["sync", "workers", "async", "deferred", "pointer"])
)
def test_stop_ends_a_disk_whose_handler_hangs(tmp_path: Path, kind: str) -> None:
    make, options, where = HANGING[kind]
    target = make(tmp_path) if make is PointerHanging else make()
    with released(target):
        disk = Device(target, **options)
        disk.start()
        path = disk.path
        with Blocks(path, os.O_RDONLY) as other:
            other.read(4096, 0)
        client = Client(path, MIB - 4096)
        target.wait_for()
        took = Seconds()
        with pytest.raises(pyublk.HandlerTimeout) as hung:
            disk.stop(0.5)
        assert took.gone < 60
        assert client.got() == errno.EIO
        assert str(hung.value) == (
            f"a handler of {make.__name__} never returned: every request it held was failed, and "
            f"{path} was deleted"
        )
        [stack] = hung.value.__notes__
        assert where in stack
        assert disk.state == "stopped"
        assert not Path(path).exists()
        assert existing() == set()
        disk.stop()  # it is over
        assert disk.stats().total.reads >= 2


def test_a_coroutine_that_hangs_on_the_users_loop() -> None:
    target = AsyncHanging()

    async def main() -> None:
        async with Device(target, stop_timeout=0.5) as disk:
            main.client = Client(disk.path, MIB - 4096)  # type: ignore[attr-defined]
            await asyncio.to_thread(target.wait_for)
            assert await asyncio.to_thread(disk.wait, 0) is False

    took = Seconds()
    with pytest.raises(pyublk.HandlerTimeout, match="a handler of AsyncHanging never") as hung:
        asyncio.run(main())
    assert took.gone < 60
    [stack] = hung.value.__notes__
    assert "never_returns" in stack
    assert main.client.got() == errno.EIO  # type: ignore[attr-defined]
    assert existing() == set()


def test_a_slow_handler_is_waited_for(serve: Serve) -> None:
    """What still makes progress does not hang: time that passes is told by the requests."""
    target = SyncHanging()
    disk = serve(target)
    client = Client(disk.path, MIB - 4096)
    target.wait_for()
    stopping = threading.Thread(target=disk.stop, args=(30,))
    stopping.start()
    until(lambda: disk.state == "stopping", what="it stops")
    target.release.set()
    stopping.join(30)
    assert not stopping.is_alive()
    assert client.got() is None
    assert disk.stats().total.errors == 0


class Slow(pyublk.Target):
    """Answers one write after the other, each after a while."""

    def __init__(self) -> None:
        super().__init__(size=MIB)
        self.data = bytearray(MIB)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        time.sleep(0.4)
        self.data[offset : offset + len(data)] = data


def test_writes_that_are_answered_one_by_one_are_all_waited_for(serve: Serve) -> None:
    """Each in less than the patience of the stop, all together in more."""
    target = Slow()
    disk = serve(target, max_io_size=4096, stop_timeout=2)
    written = os.urandom(16 * 4096)
    file = os.open(disk.path, os.O_RDWR)
    os.pwrite(file, written, 0)  # into the page cache, which the stop writes back
    os.close(file)
    disk.stop()
    assert bytes(target.data[: len(written)]) == written
    assert disk.stats().total.errors == 0


# ---- servers that are killed ----

SERVES = """
class Null(pyublk.Target):
    concurrency = "per_queue"

    def read(self, offset, buffer):
        pass

    def write(self, offset, data):
        pass

with pyublk.Device(Null(size=1 << 40), queues=min(2, os.cpu_count()), depth=16) as disk:
    tell_when_waiting(disk.id, disk._life.kernel.controller.helper.pid)
    disk.wait()
tell(disk.state)
"""


class Load:
    """Clients that read and write until they cannot."""

    # Never making a file: one in the place of a disk that went first would hide the next disk.
    COMMANDS = (
        "dd if={path} of=/dev/null bs=16k iflag=direct",
        "dd if=/dev/zero of={path} bs=16k oflag=direct conv=nocreat,notrunc",
        # Through the page cache.
        "dd if=/dev/zero of={path} bs=64k seek=65536 conv=nocreat,notrunc",
    )

    def __init__(self, path: str) -> None:
        self.path = path
        self.clients = [
            subprocess.Popen(
                command.format(path=path).split(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for command in self.COMMANDS
        ]

    def __enter__(self) -> "Load":
        counters = Path(f"/sys/block/{Path(self.path).name}/stat")

        def busy() -> bool:
            reads, _, _, _, writes, *_ = map(int, counters.read_text().split())
            return reads > 20 and writes > 20

        until(busy, what="the clients are at work")
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self.clients:
            client.kill()
        for client in self.clients:
            client.wait(60)

    def ended(self) -> list[int]:
        """Every client ends by itself, for it has lost its disk: its exit code."""
        return [client.wait(60) for client in self.clients]


def nothing_left(controller: pyublk.Controller, number: int, guard: int) -> None:
    until(lambda: device_is_gone(controller, number), what="the device goes")
    until(lambda: not Path(f"/proc/{guard}").exists(), what="the guardian ends")
    assert not Path(f"/dev/ublkb{number}").exists()
    assert not Path(f"/dev/ublkc{number}").exists()
    until(lambda: not sleeping_beyond_signals(), what="nobody sleeps beyond signals")


@pytest.mark.parametrize(
    ("number", "loaded"),
    variations(
        [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGKILL, True)],
        [(signal.SIGINT, False), (signal.SIGKILL, True)],
    ),
)
def test_a_server_that_gets_a_signal(
    controller: pyublk.Controller, number: signal.Signals, loaded: bool
) -> None:
    with Server(SERVES) as server:
        device, guard = map(int, server.line().split())
        if loaded:
            with Load(f"/dev/ublkb{device}") as load:
                server.send(number)
                code = server.ended()
                codes = load.ended()
            # To a reader a disk that was taken away in order may look like its end.
            assert all(codes[1:] if number is not signal.SIGKILL else codes)
        else:
            server.send(number)
            code = server.ended()
        if number is signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert (code, server.line(), server.errors()) == (0, "stopped", "")
        nothing_left(controller, device, guard)


@pytest.mark.thorough
def test_a_server_without_wait_that_is_terminated(controller: pyublk.Controller) -> None:
    """SIGTERM's own action ends it at once: what is left is the guardian's."""
    program = """
disk = pyublk.Device(Memory(MIB))
disk.start()
tell(disk.id, disk._life.kernel.controller.helper.pid)
sys.stdin.read()
"""
    with Server(program) as server:
        device, guard = map(int, server.line().split())
        server.send(signal.SIGTERM)
        assert server.ended() == -signal.SIGTERM
        nothing_left(controller, device, guard)


HANGS = """
class Hangs(Memory):
    def read(self, offset, buffer):
        if offset >= MIB // 2:
            tell("hangs")
            threading.Event().wait()
        super().read(offset, buffer)

disk = pyublk.Device(Hangs(MIB), depth=int(sys.argv[1]))
disk.start()
tell(disk.id, disk._life.kernel.controller.helper.pid)
"""


@pytest.mark.parametrize("direct", variations([True, False], [False]), ids=["direct", "cached"])
def test_a_killed_server_whose_handler_hangs(controller: pyublk.Controller, direct: bool) -> None:
    with Server(HANGS + "sys.stdin.read()", 16) as server:
        device, guard = map(int, server.line().split())
        client = Client(f"/dev/ublkb{device}", MIB // 2, direct)
        assert server.line() == "hangs"
        server.send(signal.SIGKILL)
        took = Seconds()
        assert server.ended() == -signal.SIGKILL
        # The page cache tries again, and may find a disk of no size.
        assert client.got() == errno.EIO or (not direct and client.length == 0)
        nothing_left(controller, device, guard)
        assert took.gone < 30  # the kernel's block timeout, which was not waited for


def test_a_killed_server_whose_every_tag_hangs(controller: pyublk.Controller) -> None:
    """Linux before 6.16 notices after its block timeout of 30 s."""
    patient = not controller.features().has(Feature.UPDATE_SIZE)
    with Server(HANGS + "sys.stdin.read()", 1) as server:
        device, guard = map(int, server.line().split())
        client = Client(f"/dev/ublkb{device}", MIB // 2)
        assert server.line() == "hangs"
        server.send(signal.SIGKILL)
        took = Seconds()
        assert server.ended() == -signal.SIGKILL
        assert client.got(90 if patient else 30) == errno.EIO
        nothing_left(controller, device, guard)
        assert took.gone < (90 if patient else 30)


def test_stop_when_every_tag_hangs(controller: pyublk.Controller) -> None:
    """Linux before 6.16 then keeps the disk until its server has ended, and says so."""
    keeps = not controller.features().has(Feature.UPDATE_SIZE)
    program = """
sys.stdin.readline()
try:
    disk.stop(0.5)
except pyublk.HandlerTimeout as hung:
    tell(hung, disk.state, sep="|")
sys.stdin.readline()
"""
    with Server(HANGS + program, 1) as server:
        device, guard = map(int, server.line().split())
        path = f"/dev/ublkb{device}"
        client = Client(path, MIB // 2)
        assert server.line() == "hangs"
        server.say("stop")
        said, state = server.line().split("|")
        hung, outcome = said.split(": ", 1)
        assert hung == "a handler of Hangs never returned"
        assert state == "stopped"
        if keeps:
            assert outcome == (
                "every request of a queue is in its hands, and Linux before 6.16 keeps such a disk "
                f"until its server ends: {path} goes half a minute after this process"
            )
        else:
            assert outcome == f"every request it held was failed, and {path} was deleted"
            assert client.got() == errno.EIO
            assert device_is_gone(controller, device)
        server.say("end")
        assert server.ended() == 0
        assert client.got(90) == errno.EIO
        nothing_left(controller, device, guard)


@pytest.mark.parametrize("when", variations(["at once", "later"], ["later"]))
def test_ctrl_c_again_gives_up_what_hangs(controller: pyublk.Controller, when: str) -> None:
    """However early in the stop it comes, and how many more come after it."""
    program = (
        HANGS.split("disk =")[0]
        + """
disk = pyublk.Device(Hangs(MIB), stop_timeout=3600)

def look():
    while disk.state != "stopping":
        time.sleep(0.001)
    if sys.argv[1] == "at once":
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    tell("stops")

threading.Thread(target=look, daemon=True).start()
with disk:
    tell_when_waiting(disk.id, disk._life.kernel.controller.helper.pid)
    disk.wait()
"""
    )
    with Server(program, when) as server:
        device, guard = map(int, server.line().split())
        client = Client(f"/dev/ublkb{device}", MIB // 2)
        assert server.line() == "hangs"
        server.send(signal.SIGINT)
        assert server.line() == "stops"
        server.send(signal.SIGINT)
        assert server.ended() == -signal.SIGINT, server.errors()
        assert server.errors().endswith("KeyboardInterrupt\n")
        assert client.got() == errno.EIO
        nothing_left(controller, device, guard)


def stacks_of(pid: int) -> str:
    """Where the kernel is in a process, whose workers are tasks of it."""
    found = ""
    for stack in Path(f"/proc/{pid}/task").glob("*/stack"):
        with suppress(OSError):  # ended meanwhile
            found += stack.read_text()
    return found


@pytest.mark.parametrize(
    "stop",
    variations(
        ["disk.stop(3600)", "disk._life.kernel.controller.stop(disk.id)"], ["disk.stop(3600)"]
    ),
)
def test_who_stops_a_hanging_disk_of_its_own_can_be_killed(
    controller: pyublk.Controller, stop: str
) -> None:
    with Server(HANGS + f"sys.stdin.readline()\ntell('stops')\n{stop}\n", 16) as server:
        device, guard = map(int, server.line().split())
        client = Client(f"/dev/ublkb{device}", MIB // 2)
        assert server.line() == "hangs"
        server.say("stop")
        assert server.line() == "stops"
        until(lambda: "del_gendisk" in stacks_of(guard), what="the kernel stops it")
        server.send(signal.SIGKILL)
        assert server.ended() == -signal.SIGKILL
        assert client.got() == errno.EIO
        nothing_left(controller, device, guard)


@pytest.mark.thorough
def test_the_guardian_leaves_a_stranger_of_the_same_number(
    serve: Serve, controller: pyublk.Controller
) -> None:
    program = """
disk = pyublk.Device(Memory(MIB), id=5)
disk.start()
tell(disk._life.kernel.controller.helper.pid)
disk.wait()
disk._life.kernel.char_device.close()  # lets the device go, and the guardian stay
tell("let go")
sys.stdin.read()
"""
    with Server(program) as server:
        guard = int(server.line())
        controller.delete(5)
        assert server.line() == "let go"
        stranger = serve(Memory(MIB), id=5)
        server.send(signal.SIGKILL)
        assert server.ended() == -signal.SIGKILL
        until(lambda: not Path(f"/proc/{guard}").exists(), what="the guardian ends")
        with Blocks(stranger.path) as client:
            client.write(b"s" * 512, 0)
            assert client.read(512, 0) == b"s" * 512


HOLDS_THE_GIL = """
import ctypes, tempfile
output = tempfile.TemporaryFile()
os.dup2(output.fileno(), 2)

class Sleepy(Memory):
    def read(self, offset, buffer):
        if offset == MIB - 4096:
            time.sleep(float(sys.argv[1]))
        super().read(offset, buffer)

def text():
    return os.pread(2, 1 << 16, 0).decode()

with pyublk.Device(Sleepy(MIB)) as disk:
    tell(disk.path)
    sys.stdin.readline()
    time.sleep(0.5)  # the client is at it
    if sys.argv[2] == "held":
        ctypes.PyDLL(None).sleep(10)  # which keeps the GIL, as a page fault does
    sys.stdin.readline()
    told = text()
    tell(told.count("has kept Python's GIL for 4 seconds"), f" {disk.path} (queue 0, " in told)
"""


@pytest.mark.parametrize(
    ("seconds", "gil"), variations([("0.8", "held"), ("8", "free")], [("0.8", "held")])
)
def test_a_gil_that_is_kept_is_told_and_a_slow_handler_is_not(seconds: str, gil: str) -> None:
    with Server(HOLDS_THE_GIL, seconds, gil) as server:
        path = server.line()
        with Blocks(path, os.O_RDONLY) as client, ThreadPoolExecutor(1) as clients:
            reading = clients.submit(client.read, 4096, MIB - 4096)
            server.say("the client is at it")
            assert reading.result(60) == bytes(4096)
        server.say("")
        assert server.line() == ("1 True" if gil == "held" else "0 False")
        assert server.ended() == 0


MAPS_ITS_OWN_DISK = """
import mmap
with pyublk.Device(Memory(MIB)) as disk:
    view = mmap.mmap(os.open(disk.path, os.O_RDWR), MIB)
    tell(disk.path)
    view[600000:600004]
"""


def test_a_program_that_waits_for_its_own_disk_can_be_killed(
    controller: pyublk.Controller,
) -> None:
    """The page fault keeps the GIL. What the kernel closes first is what answers the request."""
    with Server(MAPS_ITS_OWN_DISK) as server:
        path = server.line()
        number = int(path.removeprefix("/dev/ublkb"))
        until(sleeping_beyond_signals, what="the page fault waits")
        server.send(signal.SIGKILL)
        server.ended()
        until(lambda: device_is_gone(controller, number), what="the disk goes with its server")
