"""What stands between a handler and its answer: whatever a handler raises, returns, or forgets, its
client is answered and the log tells, and the next request is served."""

import asyncio
import ctypes
import errno
import gc
import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pyublk
from pyublk import IO, Queue
from pyublk._native import Handlers
from pyublk.engines.failures import FailureLog
from pyublk.targets import Mirror
from pyublk.testing import Disk
from pyublk.uapi import Op

SIZE = 1 << 16

pytestmark = pytest.mark.timeout(60)


class Outcome:
    """What the next request is to end with: `thing` is raised if it can be, else returned."""

    thing: Any = None

    def end(self) -> Any:
        thing, self.thing = self.thing, None
        if issubclass(type(thing), BaseException):
            raise thing
        return thing


class Plain(Outcome, pyublk.Target):
    concurrency = "parallel"

    def read(self, offset: int, buffer: memoryview) -> Any:
        return self.end()

    def write(self, offset: int, data: memoryview) -> Any:
        return self.end()


class Handle(Outcome, pyublk.Target):
    concurrency = "parallel"

    def handle(self, io: IO) -> Any:
        return self.end()


class Deferring(Handle):
    """Ends as it is to after `defer`; a request that is to end well is answered."""

    def handle(self, io: IO) -> Any:
        io.defer()
        if self.thing is None:
            io.complete()  # then the thing may be the next request's
            return None
        return self.end()


class AtOnce(Outcome, pyublk.Target):
    async def read(self, offset: int, buffer: memoryview) -> Any:
        return self.end()

    async def write(self, offset: int, data: memoryview) -> Any:
        return self.end()


class Later(AtOnce):
    async def read(self, offset: int, buffer: memoryview) -> Any:
        await asyncio.sleep(0)
        return self.end()


class InATask(AtOnce):
    async def read(self, offset: int, buffer: memoryview) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.get_name()
        await asyncio.sleep(0)
        return self.end()


class AsyncHandle(Outcome, pyublk.Target):
    async def handle(self, io: IO) -> Any:
        io.defer()
        await asyncio.sleep(0)
        if self.thing is None:
            io.complete()  # then the thing may be the next request's
            return None
        return self.end()


class Mapping(Outcome, pyublk.MappedTarget):
    def map(self, op: Op, offset: int, length: int) -> Any:  # type: ignore[override]
        thing = self.end()
        return offset if thing is None else thing


KINDS: dict[str, Callable[[Path], Disk]] = {
    "plain": lambda _: Disk(Plain(size=SIZE)),
    "handle": lambda _: Disk(Handle(size=SIZE)),
    "deferring": lambda _: Disk(Deferring(size=SIZE)),
    "workers": lambda _: Disk(Plain(size=SIZE), workers=2),
    "deferring workers": lambda _: Disk(Deferring(size=SIZE), workers=2),
    "at once": lambda _: Disk(AtOnce(size=SIZE)),
    "later": lambda _: Disk(Later(size=SIZE)),
    "in a task": lambda _: Disk(InATask(size=SIZE)),
    "async handle": lambda _: Disk(AsyncHandle(size=SIZE)),
    "mapped": lambda path: Disk(Mapping([path / "file"], size=SIZE)),
}


@pytest.fixture(autouse=True)
def nothing_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By these targets: their disks read as what the buffers held before."""
    monkeypatch.setattr("pyublk.testing.client.POISON", b"\0")


@pytest.fixture(params=KINDS)
def disk(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Disk]:
    monkeypatch.setattr(FailureLog, "INTERVAL", 0.0)
    with KINDS[request.param](tmp_path) as disk:
        yield disk


def outcome_of(disk: Disk, thing: object) -> int:
    """The errno at the client, 0 for none. The disk is well afterwards."""
    disk.target.thing = thing  # type: ignore[attr-defined]
    number = 0
    try:
        disk.pread(512, 0)
    except OSError as error:
        number = error.errno or -1
    assert disk.pread(512, 0) == bytes(512)
    return number


# ---- whatever is raised, or returned ----


class Evil(BaseException):
    pass


def raiser(kind: type[BaseException]) -> Callable[..., Any]:
    def always(*_: object) -> Any:
        raise kind("asked")

    return always


class Index:
    """An errno that may be asked for its number, and answers or does not."""

    def __init__(self, number: Any) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number if type(self.number) is int else self.number()  # type: ignore[no-any-return]


BASES: list[tuple[type[BaseException], tuple[Any, ...]]] = [
    (ValueError, ("wrong",)),
    (Evil, ()),
    (SystemExit, (0,)),
    (KeyboardInterrupt, ()),
    (GeneratorExit, ()),
    (MemoryError, ()),
    (StopIteration, (1,)),
    (StopAsyncIteration, ()),
    (SyntaxError, ("no", ("file", "line", object(), b"text"))),
    (UnicodeDecodeError, ("x", b"", 5, -1, "y")),
    (BaseExceptionGroup, ("many", [ValueError(1), Evil(2), ExceptionGroup("some", [OSError(3)])])),
]
#: What somebody asks an exception, or a returned object, and what may be odd about it.
ASKED = [
    *("errno", "strerror", "filename", "args", "exceptions", "msg", "text", "__notes__"),
    *("__class__", "__traceback__", "__cause__", "__context__", "__suppress_context__"),
    *("__str__", "__repr__", "__eq__", "__hash__", "__bool__", "__len__", "__iter__", "__int__"),
    *("__index__", "__await__", "__getattr__", "__format__", "__name__"),
]
ERRNOS = st.one_of(
    st.integers(),
    st.integers(-4, 4097),
    st.text(),
    st.none(),
    st.floats(),
    st.booleans(),
    st.builds(Index, st.sampled_from([5, 10**30, raiser(ValueError), raiser(SystemExit)])),
)
KIND_OF_FAILURE = st.sampled_from([ValueError, Evil, SystemExit, KeyboardInterrupt, StopIteration])


class OddlyNamed(type):
    __name__ = property(raiser(ValueError))  # type: ignore[assignment]


def odd_class(base: type, odd: set[str], failure: type[BaseException], how: str) -> Any:
    """A class of which everything in `odd` raises, or gives nonsense."""
    if how == "nonsense":
        return type("Odd", (base,), {name: property(lambda _: 5) for name in odd})
    make: Any = property if how == "property" else lambda method: method
    kind = OddlyNamed if how == "metaclass" else type
    return kind("Odd", (base,), {name: make(raiser(failure)) for name in odd})


HOW = st.sampled_from(["property", "method", "nonsense", "metaclass"])


def test_whatever_is_raised_is_eio_and_told(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(BASES), st.sets(st.sampled_from(ASKED)), KIND_OF_FAILURE, HOW)
    @example(BASES[0], set(ASKED), Evil, "property")
    @example(BASES[2], {"__class__", "__traceback__"}, SystemExit, "property")
    @example(BASES[-1], {"exceptions", "__cause__"}, KeyboardInterrupt, "nonsense")
    def check(
        base: tuple[type[BaseException], tuple[Any, ...]],
        odd: set[str],
        failure: type[BaseException],
        how: str,
    ) -> None:
        caplog.clear()
        kind, arguments = base
        assert outcome_of(disk, odd_class(kind, odd, failure, how)(*arguments)) == errno.EIO
        assert caplog.records

    check()


def test_an_oserror_is_its_errno_or_eio(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    @settings(max_examples=60, deadline=None)
    @given(ERRNOS, st.sets(st.sampled_from(ASKED), max_size=3), KIND_OF_FAILURE, HOW)
    @example(errno.ENOSPC, set(), ValueError, "method")
    @example("sector 5", set(), ValueError, "method")
    @example(True, set(), ValueError, "method")
    @example(errno.ENOSPC, {"errno"}, ValueError, "property")
    @example(errno.ENOSPC, {"__class__", "__str__"}, SystemExit, "property")
    def check(number: Any, odd: set[str], failure: type[BaseException], how: str) -> None:
        caplog.clear()
        error = odd_class(OSError, odd, failure, how)(number, "odd")
        got = outcome_of(disk, error)
        given = number.number if type(number) is Index else number
        if "errno" in odd and how == "nonsense":
            given = 5
        elif "errno" in odd:
            given = None
        passes = type(given) is int and 0 < given < 4096
        assert got in ({given, errno.EIO} if passes else {errno.EIO})
        assert got == given or given != errno.ENOSPC
        assert bool(caplog.records) != passes

    check()


def test_whatever_is_returned_is_eio_and_told(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    async def nothing() -> None: ...

    @settings(max_examples=40, deadline=None)
    @given(
        st.one_of(
            st.booleans(),
            st.floats(),
            st.integers(max_value=-1),
            st.sampled_from([0.0, b"data", "", (), [], object, nothing, Evil]),
            st.builds(
                lambda *how: odd_class(object, *how)(),
                st.sets(st.sampled_from(ASKED)),
                KIND_OF_FAILURE,
                HOW,
            ),
        )
    )
    def check(thing: object) -> None:
        caplog.clear()
        assert outcome_of(disk, thing) == errno.EIO
        assert caplog.records

    check()
    caplog.clear()
    if not isinstance(disk.target, Mapping):
        assert outcome_of(disk, nothing()) == errno.EIO
        assert "returned coroutine instead of None" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        itertools.repeat((0, 0, 512)),
        itertools.repeat((0, 0, 0)),
        itertools.count(),
        [(0, 0, (1 << 64) - 512), (0, 0, 1024)],
        [(0, 0, 1 << 63), (0, 0, 1 << 63), (0, 0, 512)],
        [(0, 0, 512), (0, 0, 512)],
        [(1, 0, 512)],
        (-1, 0, 512),
        -1,
        1 << 64,
    ],
    ids=repr,
)
def test_a_map_without_an_end_or_a_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: object
) -> None:
    with Disk(Mapping([tmp_path / "file"], size=SIZE)) as disk:
        assert outcome_of(disk, answer) == errno.EIO
    assert "raised" in caplog.text


def odd_chains() -> list[BaseException]:
    """Causes and contexts in circles, in numbers, and of groups in groups."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    deep: BaseException = ValueError("deepest")
    for depth in range(3000):
        outer = ValueError(depth)
        outer.__cause__, deep = deep, outer
    group = ExceptionGroup("inner", [ValueError(1)])
    for depth in range(3000):
        group = ExceptionGroup(str(depth), [group])
    return [first, deep, group, ValueError("x" * 1_000_000)]


def test_odd_chains_are_eio_and_told(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    for error in odd_chains():
        caplog.clear()
        assert outcome_of(disk, error) == errno.EIO
        assert caplog.records


def test_a_cancelled_error_is_eio(disk: Disk) -> None:
    assert outcome_of(disk, asyncio.CancelledError()) == errno.EIO


# ---- what tells fails itself ----


@pytest.mark.parametrize("failure", [ValueError, SystemExit, Evil])
@pytest.mark.parametrize("part", ["filter", "emit", "handle", "factory"])
def test_a_log_that_raises(
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    failure: type[BaseException],
    part: str,
) -> None:
    handler = logging.Handler()
    log = logging.getLogger("pyublk.target")
    if part == "filter":
        handler.addFilter(raiser(failure))
    elif part == "factory":
        monkeypatch.setattr(logging, "_logRecordFactory", raiser(failure))
    else:
        monkeypatch.setattr(handler, part, raiser(failure))
    log.addHandler(handler)
    try:
        for _ in range(3):
            assert outcome_of(disk, ValueError("wrong")) == errno.EIO
    finally:
        log.removeHandler(handler)
    assert capfd.readouterr().err.count("ValueError of ") == 1


@pytest.mark.parametrize(
    "report",
    [
        raiser(ValueError),
        raiser(SystemExit),
        raiser(Evil),
        lambda outcome, io: None,
        lambda outcome, io: "five",
        lambda outcome, io: 1 << 80,
        lambda outcome, io: 0,
        lambda outcome, io: -5,
        lambda outcome, io: 4096,
        lambda outcome: 5,
        None,
    ],
)
@pytest.mark.parametrize("make", [Plain, Handle, Deferring])
def test_a_reporter_that_does_not_say_which_errno(
    monkeypatch: pytest.MonkeyPatch, report: Any, make: type[Plain]
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: told.append(hook.exc_type))
    target = make(size=SIZE)
    handlers = Handlers(target, report)
    with Queue.loopback(depth=4, buffer_size=4096) as queue:
        queue.fetch()
        for _ in range(3):
            target.thing = ValueError("wrong")
            queue.inject(0, Op.READ, 0, 512)
            queue.serve(handlers)
            assert queue.answered(0) == -errno.EIO
        queue.inject(1, Op.READ, 0, 512)
        queue.serve(handlers)
        assert queue.answered(1) == 512
    assert len(told) <= 1


def test_leg_failed_that_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the log can be told; the disk goes on."""

    class Raising(Mirror):
        def leg_failed(self, leg: int, error: int, file_generation: int | None = None) -> None:
            super().leg_failed(leg, error, file_generation)
            raise SystemExit(1)

    legs = [tmp_path / "a", tmp_path / "b"]
    for leg in legs:
        leg.write_bytes(bytes(SIZE))
    target = Raising(*legs, state=tmp_path / "state")
    with Disk(target) as disk:
        disk.pwrite(b"1" * 4096, 0)
        target.layout.fail_leg(1)
        disk.pwrite(b"2" * 4096, 0)
        assert disk.pread(4096, 0) == b"2" * 4096
    assert "leg_failed() raised SystemExit" in caplog.text


# ---- what nobody can answer any more ----


class Forgetting(pyublk.Target):
    """Defers, and does with the IO what `then` says."""

    concurrency = "parallel"
    then: Callable[[IO], object] | None = None

    def handle(self, io: IO) -> None:
        then, self.then = self.then, None
        if then is None:
            return
        io.defer()
        then(io)


class AsyncForgetting(Forgetting):
    async def handle(self, io: IO) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        Forgetting.handle(self, io)


FORGETTING: dict[str, Callable[[], Disk]] = {
    "plain": lambda: Disk(Forgetting(size=SIZE)),
    "workers": lambda: Disk(Forgetting(size=SIZE), workers=2),
    "async": lambda: Disk(AsyncForgetting(size=SIZE)),
}


def after_a_while(io: IO) -> None:
    """Dropped on another thread, while the queue is idle."""
    threading.Timer(0.02, lambda _: None, args=(io,)).start()


def collect_soon() -> None:
    """More than once: a handler may not have returned yet."""

    def collect() -> None:
        for _ in range(25):
            time.sleep(0.04)
            gc.collect()

    threading.Thread(target=collect).start()


def in_a_circle(io: IO) -> None:
    circle: list[object] = [io]
    circle.append(circle)
    collect_soon()


def by_an_object(io: IO) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.io = io
            self.me = self
            self.view = io.buffer

    Keeper()
    collect_soon()


@pytest.mark.parametrize("kind", FORGETTING)
@pytest.mark.parametrize("then", [str, after_a_while, in_a_circle, by_an_object])
def test_a_dropped_request_fails(
    caplog: pytest.LogCaptureFixture, kind: str, then: Callable[[IO], object]
) -> None:
    with FORGETTING[kind]() as disk:
        for _ in range(2):
            disk.target.then = then  # type: ignore[attr-defined]
            with pytest.raises(OSError, match="READ at 0 failed") as failed:
                disk.pread(512, 0)
            assert failed.value.errno == errno.EIO
            assert disk.pread(512, 0) == bytes(512)
    (message,) = (record.getMessage() for record in caplog.records)  # the other is held back
    assert "the handler of a READ deferred it, and no reference to its IO is left" in message


@pytest.mark.parametrize("kind", FORGETTING)
def test_many_dropped_at_once(kind: str) -> None:
    """With others between them that are answered."""
    with FORGETTING[kind]() as disk:
        disk.pread(512, 0)
        for _ in range(20):
            disk.target.then = str  # type: ignore[attr-defined]
            with pytest.raises(OSError, match="failed"):
                disk.pread(SIZE, 0)
            assert disk.pread(SIZE, 0) == bytes(SIZE)


def test_dropped_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """By whoever takes requests himself, too: in the next wait, also of an idle queue."""
    with Queue.loopback(depth=4, buffer_size=4096) as queue:
        queue.fetch()
        for tag in range(4):
            queue.inject(tag, Op.READ, 0, 512)
        batch = queue.wait(0)
        assert batch is not None
        batch.pop().complete()
        kept = batch.pop()
        batch.clear()
        assert queue.wait(30) == []
        assert [queue.answered(tag) for tag in range(4)] == [-5, -5, None, 512]
        kept.complete()
        assert queue.answered(2) == 512
        assert not queue.held
    assert caplog.text.count("a request was dropped unanswered") == 2


def test_dropped_in_a_loop() -> None:
    """The iteration keeps nothing of what it gave."""
    with Queue.loopback(depth=4, buffer_size=4096) as queue:
        queue.fetch()
        queue.inject(0, Op.READ, 0, 512)
        queue.inject(1, Op.READ, 512, 512)
        for io in queue:
            if io.offset == 512:
                break
        io.complete()
        assert queue.wait(30) == []
        assert [queue.answered(tag) for tag in range(2)] == [-errno.EIO, 512]


def test_an_io_that_was_answered_serves_its_tag_again() -> None:
    with Queue.loopback(depth=1, buffer_size=4096) as queue:
        queue.fetch()
        seen = set()
        for _ in range(5):
            queue.inject(0, Op.READ, 0, 512)
            (io,) = queue.wait(0) or []
            seen.add(id(io))
            io.complete()
            del io
        assert len(seen) == 1


@pytest.mark.parametrize("closed", [False, True])
def test_dropped_late(closed: bool) -> None:
    """After the queue was closed, or with it."""
    queue = Queue.loopback(depth=2, buffer_size=4096)
    queue.fetch()
    queue.inject(0, Op.READ, 0, 512)
    queue.inject(1, Op.READ, 0, 512)
    kept = queue.wait(0)
    if closed:
        queue.close()
    del queue
    del kept
    gc.collect()


def test_dropped_after_it_was_failed_from_outside(caplog: pytest.LogCaptureFixture) -> None:
    with Queue.loopback(depth=1, buffer_size=4096) as queue:
        queue.fetch()
        queue.inject(0, Op.READ, 0, 512)
        kept = queue.wait(0)
        queue.fail_held(errno.ENOSPC)
        assert queue.wait(0) == []
        queue.inject(0, Op.READ, 0, 512)
        (other,) = queue.wait(0) or []
        del kept
        assert queue.wait(0) == []
        assert not other.completed
        other.complete()
        assert queue.answered(0) == 512
    assert caplog.records == []


def test_a_handler_that_fails_as_another_thread_completes() -> None:
    """One of the two answers, whichever it is."""

    class Racing(pyublk.Target):
        concurrency = "parallel"

        def handle(self, io: IO) -> None:
            if io.offset == 0:
                return
            io.defer()
            start = threading.Barrier(2)

            def complete() -> None:
                start.wait(30)
                try:
                    io.complete()
                except (pyublk.StaleIO, ValueError):
                    lost.append(1)
                else:
                    won.append(1)

            threads.append(threading.Thread(target=complete))
            threads[-1].start()
            start.wait(30)
            raise OSError(errno.ENOSPC, "full")

    won: list[int] = []
    lost: list[int] = []
    failed = 0
    threads: list[threading.Thread] = []
    for workers in (0, 1):
        with Disk(Racing(size=SIZE), workers=workers) as disk:
            for _ in range(100):
                try:
                    disk.pread(512, 512)
                except OSError:
                    failed += 1
                assert disk.pread(512, 0) == bytes(512)
            for thread in threads:
                thread.join(30)
    assert len(won) + failed == 200
    assert len(lost) == failed


EXIT = """
import threading
import pyublk
from pyublk.uapi import Op

queue = pyublk.Queue.loopback(depth=4, buffer_size=4096)
queue.fetch()
for tag in range(4):
    queue.inject(tag, Op.READ, 0, 512)
kept = queue.wait(0)
circle = [kept.pop()]
circle.append(circle)
local = threading.local()
local.io = kept.pop()
"""


def test_dropped_as_the_interpreter_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- threads that are told to end ----


def test_a_worker_outlives_what_is_raised_in_it() -> None:
    """By whoever can raise in another thread: its request fails, and it takes the next."""
    workers = []

    class Noting(Plain):
        def read(self, offset: int, buffer: memoryview) -> None:
            workers.append(threading.get_ident())

    with Disk(Noting(size=SIZE), workers=1) as disk:
        disk.pread(512, 0)
        until = time.monotonic() + 30
        while sys._current_frames()[workers[0]].f_code.co_name != "_work":
            assert time.monotonic() < until
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(workers[0]), ctypes.py_object(SystemExit)
        )
        with pytest.raises(OSError, match="failed"):
            disk.pread(512, 0)
        assert disk.pread(512, 0) == bytes(512)
    assert len(set(workers)) == 1
