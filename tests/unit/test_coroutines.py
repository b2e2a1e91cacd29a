"""Async targets on a queue without a kernel: on a loop that sleeps in the ring, and on others."""

import asyncio
import contextvars
import errno
import gc
import socket
import threading
import types
import weakref
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import pytest

import pyublk
from pyublk._native import Handlers, Queue
from pyublk.engines import coroutines as loops
from pyublk.engines.failures import FailureLog
from pyublk.targets import Ram
from pyublk.testing import Disk
from pyublk.uapi import Op

Body = Callable[..., Any]
SIZE = 1 << 20


class Client:
    """Sends requests to the queue and sees their answers; runs on the loop that serves it."""

    def __init__(self, queue: Queue, server: loops.AsyncServer) -> None:
        self.queue = queue
        self.server = server

    def send(self, tag: int = 0, op: Op = Op.READ) -> None:
        self.queue.inject(tag, op, tag * 512, 512)

    async def answer(self, tag: int = 0) -> int:
        """Bounded by the test's time."""
        while (result := self.queue.answered(tag)) is None:
            await asyncio.sleep(0)
        return result

    async def ask(self, tag: int = 0, op: Op = Op.READ) -> int:
        self.send(tag, op)
        return await self.answer(tag)


Serve = Callable[[Body, Callable[[Client], Awaitable[None]]], None]


@pytest.fixture(params=["ring", "descriptor"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """Runs a client beside a target whose reads are `body`."""

    def run(body: Body, client: Callable[[Client], Awaitable[None]]) -> None:
        selector = loops.RingSelector() if request.param == "ring" else None
        target = make(body)
        with Queue.loopback(depth=8, buffer_size=4096) as queue:
            queue.fetch()

            async def main() -> None:
                server = loops.AsyncServer(Handlers(target, FailureLog(target)))
                ended = server.attach(queue, selector)
                try:
                    await asyncio.wait_for(client(Client(queue, server)), 30)
                finally:
                    server.detach(queue)
                await ended

            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
                runner.run(main())

    return run


def make(body: Body) -> pyublk.Target:
    class Reads(pyublk.Target):
        read = staticmethod(body)

    class Handles(pyublk.Target):
        handle = staticmethod(body)

    kind = Handles if body.__code__.co_argcount == 1 else Reads
    return kind(size=1 << 20, read_only=True)


def asks(*expected: int) -> Callable[[Client], Awaitable[None]]:
    """Reads one after the other, and all at once."""

    async def client(client: Client) -> None:
        assert [await client.ask(tag) for tag in range(len(expected))] == list(expected)
        for tag in range(len(expected)):
            client.send(tag)
        assert [await client.answer(tag) for tag in range(len(expected))] == list(expected)

    return client


def test_a_coroutine_that_never_suspends_is_no_task(serve: Serve) -> None:
    tasks = set()

    async def read(offset: int, buffer: memoryview) -> None:
        tasks.update(asyncio.all_tasks())
        buffer[:] = b"%512d" % offset

    async def client(client: Client) -> None:
        assert await client.ask(3) == 512
        assert int(bytes(client.queue.memory(3, 512))) == 3 * 512
        assert not client.server.hanging()
        tasks.update(asyncio.all_tasks())
        assert len(tasks) == len(asyncio.all_tasks())

    serve(read, client)


async def sleeps_once(offset: int, buffer: memoryview) -> None:
    await asyncio.sleep(0)


async def sleeps(offset: int, buffer: memoryview) -> None:
    for _ in range(3):
        await asyncio.sleep(0.0005)


async def gathers(offset: int, buffer: memoryview) -> None:
    assert await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0.0005, 2)) == [1, 2]


async def in_time(offset: int, buffer: memoryview) -> None:
    async with asyncio.timeout(30):
        await asyncio.sleep(0.0005)
    async with asyncio.timeout(30):
        pass
    assert await asyncio.wait_for(asyncio.sleep(0, "here"), 30) == "here"


async def too_late(offset: int, buffer: memoryview) -> None:
    for seconds in (0, 0.0005):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def groups(offset: int, buffer: memoryview) -> None:
    done = []

    async def work(number: int) -> None:
        await asyncio.sleep(0)
        done.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(work(number))
    assert done == [0, 1, 2]


async def group_fails(offset: int, buffer: memoryview) -> None:
    async def fail() -> None:
        raise ValueError("child")

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="child")):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def threads(offset: int, buffer: memoryview) -> None:
    assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()


async def talks(offset: int, buffer: memoryview) -> None:
    """Descriptors of the handler's own: the loop sleeps on these too."""
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        sending = loop.call_later(0.0005, far.send, b"hello")
        assert await loop.sock_recv(near, 5) == b"hello"
        assert not sending.cancelled()


@types.coroutine
def waits_for(future: "asyncio.Future[None]") -> Generator[Any, None, None]:
    yield from future.__await__()


async def by_an_old_coroutine(offset: int, buffer: memoryview) -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, None)
    await waits_for(future)


@pytest.mark.parametrize(
    "body",
    [
        sleeps_once,
        sleeps,
        gathers,
        in_time,
        too_late,
        groups,
        group_fails,
        threads,
        talks,
        by_an_old_coroutine,
    ],
)
def test_what_handlers_await(serve: Serve, body: Body, caplog: pytest.LogCaptureFixture) -> None:
    serve(body, asks(512, 512, 512))
    assert caplog.records == []


def test_requests_of_one_batch_overlap(serve: Serve) -> None:
    """Each waits for the next one; the first of them is answered last."""
    here: dict[int, asyncio.Event] = {}
    order = []

    async def read(offset: int, buffer: memoryview) -> None:
        here.setdefault(offset, asyncio.Event()).set()
        if offset < 7 * 512:
            await here.setdefault(offset + 512, asyncio.Event()).wait()
            await asyncio.sleep(0.0001 * (8 - offset // 512))
        order.append(offset // 512)

    async def client(client: Client) -> None:
        for tag in range(8):
            client.send(tag)
        assert {await client.answer(tag) for tag in range(8)} == {512}

    serve(read, client)
    assert order[0] == 7
    assert sorted(order) == list(range(8))


# ---- failures ----


class Strange(BaseException):
    pass


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize(
    ("error", "number", "reports"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, 0),
        (ValueError("wrong"), errno.EIO, 1),
        (KeyboardInterrupt(), errno.EIO, 1),
        (SystemExit(3), errno.EIO, 1),
        (GeneratorExit(), errno.EIO, 1),
        (Strange(), errno.EIO, 1),
        (asyncio.CancelledError(), errno.EIO, 0),
    ],
)
def test_failures(
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    suspends: bool,
    error: BaseException,
    number: int,
    reports: int,
) -> None:
    async def read(offset: int, buffer: memoryview) -> None:
        if suspends:
            await asyncio.sleep(0)
        if offset == 512:
            raise error

    serve(read, asks(512, -number, 512))
    assert len(caplog.records) == reports


@pytest.mark.parametrize("suspends", [False, True])
def test_returning_something(
    serve: Serve, caplog: pytest.LogCaptureFixture, suspends: bool
) -> None:
    async def read(offset: int, buffer: memoryview) -> bytes:
        if suspends:
            await asyncio.sleep(0)
        return b"data"

    serve(read, asks(-errno.EIO))
    assert "returned bytes instead of None" in caplog.text


def test_a_method_that_gives_a_future(serve: Serve) -> None:
    def read(offset: int, buffer: memoryview) -> "asyncio.Future[None]":
        return asyncio.ensure_future(asyncio.sleep(0))

    serve(read, asks(512, 512))


def test_a_method_that_gives_nothing_to_await(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def read(offset: int, buffer: memoryview) -> int:
        return 5

    serve(read, asks(-errno.EIO))
    assert "raised TypeError" in caplog.text


def test_yielding_what_asyncio_cannot_wait_for(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    @types.coroutine
    def strange() -> Generator[int, None, None]:
        yield 5

    async def read(offset: int, buffer: memoryview) -> None:
        await strange()

    serve(read, asks(-errno.EIO))
    assert "raised RuntimeError" in caplog.text


class Unaskable:
    """Yielded to the loop: asking whether it is a future fails."""

    @property
    def _asyncio_future_blocking(self) -> bool:
        raise Strange


class Undecided:
    class Neither:
        def __bool__(self) -> bool:
            raise Strange

    _asyncio_future_blocking = Neither()


class Unchangeable:
    """It says that it is a future, and takes no part in it."""

    @property
    def _asyncio_future_blocking(self) -> bool:
        return True


class OddFuture(asyncio.Future[None]):
    def add_done_callback(self, *_: object, **__: object) -> None:
        raise Strange


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("make", "in_a_task"),
    [
        (Unaskable, False),
        (Unaskable, True),
        (Undecided, False),
        (Undecided, True),
        (Unchangeable, False),
        (OddFuture, False),
    ],
)
def test_yielding_what_cannot_be_asked(
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], object],
    later: bool,
    in_a_task: bool,
) -> None:
    """The request fails, and none but it."""

    @types.coroutine
    def strange() -> Generator[object, None, None]:
        future = make()
        if isinstance(future, asyncio.Future):
            future._asyncio_future_blocking = True
        yield future

    async def read(offset: int, buffer: memoryview) -> None:
        task = asyncio.current_task()
        assert task is not None
        if in_a_task:
            task.get_name()
        if later:
            await asyncio.sleep(0)
        if offset == 512:
            await strange()

    serve(read, asks(512, -errno.EIO, 512))
    assert caplog.records


# ---- the current task ----


def test_the_current_task_stays_the_same_for_those_who_keep_it(serve: Serve) -> None:
    kept = set()

    async def read(offset: int, buffer: memoryview) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert task not in kept  # no other request's
        kept.add(task)
        for _ in range(2):
            await asyncio.sleep(0)
            assert asyncio.current_task() is task
            assert await asyncio.wait_for(asyncio.sleep(0, 1), 30) == 1
        assert not task.done()

    async def client(client: Client) -> None:
        await asks(512, 512)(client)
        assert all(task.done() for task in kept)
        assert not any(task.cancel() for task in kept)
        assert await client.ask() == 512  # which they do not cancel

    serve(read, client)


def test_what_a_kept_task_runs_is_never_another_requests(serve: Serve) -> None:
    kept: list[asyncio.Task[Any]] = []
    running = []

    async def read(offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        if not kept:
            before = asyncio.all_tasks()
            task = asyncio.current_task()
            assert task is not None
            task.get_name()  # which only an asyncio.Task has
            kept.extend(asyncio.all_tasks() - before)
        await asyncio.sleep(0)
        coroutine: Any = kept[0].get_coro()
        running.append(coroutine.cr_frame is not None)

    async def client(client: Client) -> None:
        await asks(512, 512, 512)(client)
        assert len(kept) == 1
        assert running == [True] + 5 * [False]

    serve(read, client)


def test_a_kept_task_of_a_request_that_never_suspended(serve: Serve) -> None:
    kept = []

    async def read(offset: int, buffer: memoryview) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert all(task is not other for other in kept)
        kept.append(task)
        if offset:
            task.add_done_callback(done.append)
            task.set_name("mine")

    done: list[object] = []

    async def client(client: Client) -> None:
        assert await client.ask(0) == 512
        assert await client.ask(1) == 512
        await asyncio.sleep(0)
        assert kept[1].get_name() == "mine"
        await asyncio.gather(kept[0].get_loop().create_task(waiting_for(kept[0])))
        assert [task.done() for task in kept] == [True, True]
        assert len(done) == 1

    serve(read, client)


async def waiting_for(awaitable: Awaitable[object]) -> object:
    return await awaitable


def test_a_task_is_made_when_it_is_wanted(serve: Serve) -> None:
    tasks = []

    async def read(offset: int, buffer: memoryview) -> None:
        before = asyncio.all_tasks()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(tasks.append)
        [real] = asyncio.all_tasks() - before
        assert type(real) is asyncio.Task
        assert "read" in repr(real)
        assert real.get_stack()[-1].f_code.co_name == "read"
        assert task.get_name() == real.get_name()
        await asyncio.sleep(0)
        assert asyncio.current_task() is task
        assert real in asyncio.all_tasks()

    async def client(client: Client) -> None:
        assert await client.ask(0) == 512
        assert await client.ask(1) == 512

    serve(read, client)
    assert len(tasks) == 2


def test_a_future_of_another_loop(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    other = asyncio.new_event_loop()

    async def read(offset: int, buffer: memoryview) -> None:
        await other.create_future()

    serve(read, asks(-errno.EIO))
    assert "attached to a different loop" in caplog.text
    other.close()


@pytest.mark.parametrize("failure", [ValueError("no"), asyncio.CancelledError()])
def test_a_future_that_fails(serve: Serve, failure: BaseException) -> None:
    async def read(offset: int, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(2):
            future = loop.create_future()
            if isinstance(failure, asyncio.CancelledError):
                loop.call_soon(future.cancel)
            else:
                loop.call_soon(future.set_exception, failure)
            with pytest.raises(type(failure)):
                await future

    serve(read, asks(512, 512))


def test_cancelled_from_elsewhere_while_its_future_is_done(serve: Serve) -> None:
    """Between the end of what it waits for and its own step."""
    seen = []

    async def read(offset: int, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for _ in range(2):
            future = loop.create_future()
            loop.call_soon(future.set_result, None)
            loop.call_soon(task.cancel)
            try:
                await future
            except asyncio.CancelledError:
                seen.append(task.uncancel())

    serve(read, asks(512))
    assert seen == [0] * 4


@pytest.mark.parametrize("again", [False, True])
def test_cancelling_itself(serve: Serve, caplog: pytest.LogCaptureFixture, again: bool) -> None:
    """The request fails, and what it waited for is cancelled too."""
    futures = []

    async def read(offset: int, buffer: memoryview) -> None:
        task = asyncio.current_task()
        assert task is not None
        if again:
            await asyncio.sleep(0)
        futures.append(asyncio.get_running_loop().create_future())
        task.cancel("enough")
        assert task.cancelling() == 1
        await futures[-1]

    serve(read, asks(-errno.EIO, -errno.EIO))
    assert [future.cancelled() for future in futures] == [True] * 4
    assert caplog.records == []


def test_a_cancellation_that_is_caught(serve: Serve) -> None:
    async def read(offset: int, buffer: memoryview) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        assert task.uncancel() == 0
        await asyncio.sleep(0)

    serve(read, asks(512, 512))


def test_two_that_wait_for_one_future(serve: Serve) -> None:
    """Somebody else's task awaits the future after the request did, before its task has run."""
    beside: list[asyncio.Task[object]] = []

    async def read(offset: int, buffer: memoryview) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        beside.append(loop.create_task(waiting_for(future)))
        loop.call_later(0.0005, future.set_result, 5)
        assert await future == 5

    serve(read, asks(512, 512))
    assert [task.result() for task in beside] == [5] * 4


# ---- context ----


def test_each_request_has_a_context_of_its_own(serve: Serve) -> None:
    variable = contextvars.ContextVar("variable", default=-1)

    async def read(offset: int, buffer: memoryview) -> None:
        assert variable.get() == -1
        variable.set(offset)
        if offset:
            await asyncio.sleep(0.0001)
        assert variable.get() == offset

    serve(read, asks(512, 512, 512))


@pytest.mark.parametrize("base", ["empty", "with a variable"])
@pytest.mark.parametrize("means", ["turns", "a future", "a task", "a task of all", "kept"])
def test_what_is_set_among_requests_that_wait_together(serve: Serve, means: str, base: str) -> None:
    """All of them begin with nothing set; each sets something in a step of its own."""
    variable = contextvars.ContextVar("variable", default=-1)
    inherited = contextvars.ContextVar("inherited", default="")
    kept: list[asyncio.Task[object] | None] = []
    steps: list[int] = []

    async def pause() -> None:
        await asyncio.sleep(0.0001 if means == "a future" else 0)

    async def read(offset: int, buffer: memoryview) -> None:
        number = offset // 512
        for step in range(6):
            if means == "kept" and step == number:
                kept.append(asyncio.current_task())
            if (means == "a task" and step == number) or (means == "a task of all" and step == 2):
                task = asyncio.current_task()
                assert task is not None
                task.get_name()  # makes one
            assert variable.get() == (number if step > number else -1)
            assert inherited.get() == ("" if base == "empty" else base)
            if step == number:
                variable.set(number)
            steps.append(variable.get())
            await pause()
        assert variable.get() == number

    def run() -> None:
        if base != "empty":
            inherited.set(base)
        serve(read, asks(512, 512, 512, 512))

    contextvars.Context().run(run)
    assert len(steps) == 2 * 4 * 6


# ---- IO objects ----


def test_completed_later(serve: Serve) -> None:
    held: list[pyublk.IO] = []

    async def handle(io: pyublk.IO) -> None:
        io.defer()
        if io.offset:
            await asyncio.sleep(0)
        held.append(io)

    async def client(client: Client) -> None:
        for tag in range(4):
            client.send(tag)
        while len(held) < 4:
            await asyncio.sleep(0)
        assert [client.queue.answered(tag) for tag in range(4)] == [None] * 4
        held.pop().fail(errno.ENOSPC)
        held.pop().complete()
        await asyncio.to_thread(held.pop().complete)
        asyncio.get_running_loop().call_later(0.0005, held.pop().complete)
        assert sorted([await client.answer(tag) for tag in range(4)]) == [
            -errno.ENOSPC,
            512,
            512,
            512,
        ]

    serve(handle, client)


@pytest.mark.parametrize("where", ["here", "on a thread", "in a task"])
def test_deferred_and_dropped(serve: Serve, caplog: pytest.LogCaptureFixture, where: str) -> None:
    async def fails(io: pyublk.IO) -> None:
        await asyncio.sleep(0)
        raise ValueError(f"and forgets {io}")

    tasks: list[asyncio.Task[None]] = []

    async def handle(io: pyublk.IO) -> None:
        io.defer()
        if io.offset:
            await asyncio.sleep(0)
        if where == "on a thread":
            threading.Timer(0.005, lambda _: None, args=(io,)).start()
        elif where == "in a task":
            tasks.append(asyncio.create_task(fails(io)))
            tasks[-1].add_done_callback(lambda task: task.exception() and tasks.remove(task))

    serve(handle, asks(-errno.EIO, -errno.EIO))
    assert "no reference to its IO is left" in caplog.text


def test_completed_by_the_handler_itself(serve: Serve) -> None:
    async def handle(io: pyublk.IO) -> None:
        if io.offset == 512:
            await asyncio.sleep(0)
        if io.offset == 1024:
            io.fail(errno.ENOSPC)
        else:
            io.complete()
        await asyncio.sleep(0)
        assert io.completed

    serve(handle, asks(512, 512, -errno.ENOSPC))


@pytest.mark.parametrize("suspends", [False, True])
def test_a_kept_buffer_is_no_other_request_s(serve: Serve, suspends: bool) -> None:
    kept: dict[int, memoryview] = {}

    async def read(offset: int, buffer: memoryview) -> None:
        number = len(kept)
        kept[number] = buffer
        if suspends:
            await asyncio.sleep(0)
        buffer[:] = bytes([number]) * len(buffer)

    serve(read, asks(512, 512))  # each tag twice
    assert len(kept) == 4
    assert [set(buffer) for buffer in kept.values()] == [{0}, {1}, {2}, {3}]


# ---- those that hang ----


def test_hanging_coroutines_are_told_and_cancelled(serve: Serve) -> None:
    cleaned = []

    async def never() -> None:
        await asyncio.Event().wait()

    async def read(offset: int, buffer: memoryview) -> None:
        if offset:
            try:
                await never()
            finally:
                await asyncio.sleep(0)
                cleaned.append(offset)

    async def client(client: Client) -> None:
        for tag in range(3):
            client.send(tag)
        while len(client.server.hanging()) < 2:
            await asyncio.sleep(0)
        for stack in await asyncio.to_thread(client.server.hanging):
            assert "in read" in stack
            assert "in never" in stack
        await asyncio.to_thread(client.server.cancel_held)
        assert [await client.answer(tag) for tag in range(3)] == [512, -errno.EIO, -errno.EIO]
        assert sorted(cleaned) == [512, 1024]
        assert client.server.hanging() == []

    serve(read, client)


def test_a_late_end_does_not_answer_the_tags_next_request(serve: Serve) -> None:
    first, second = asyncio.Event(), asyncio.Event()
    begun = []

    async def read(offset: int, buffer: memoryview) -> None:
        begun.append(offset)
        await (first if len(begun) == 1 else second).wait()

    async def client(client: Client) -> None:
        client.send()
        while not client.server.hanging():
            await asyncio.sleep(0)
        await asyncio.to_thread(client.queue.fail_held)
        assert await client.answer() == -errno.EIO
        client.send()
        while len(client.server.hanging()) < 2:
            await asyncio.sleep(0)
        first.set()
        while len(client.server.hanging()) > 1:
            await asyncio.sleep(0)
        assert client.queue.answered(0) is None
        second.set()
        assert await client.answer() == 512

    serve(read, client)


def test_nothing_of_a_request_stays(serve: Serve) -> None:
    class Thing:
        pass

    things: list[weakref.ref[Thing]] = []

    async def read(offset: int, buffer: memoryview) -> None:
        thing = Thing()
        things.append(weakref.ref(thing))
        if offset:
            await asyncio.sleep(0)
            assert asyncio.current_task() is not None
            await asyncio.sleep(0.0001)

    gc.collect()
    gc.disable()
    try:
        serve(read, asks(512, 512, 512))
        assert [thing() for thing in things] == [None] * 6
    finally:
        gc.enable()


# ---- the loop ----


def test_the_loop_does_all_else_while_requests_come(serve: Serve) -> None:
    """Answering at once, for ever, must not keep timers and other descriptors waiting."""
    ticks: list[int] = []

    async def read(offset: int, buffer: memoryview) -> None:
        answered.append(offset)

    answered: list[int] = []

    async def client(client: Client) -> None:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            loop.call_later(0.001, ticks.append, 1)
            thread = asyncio.create_task(asyncio.to_thread(far.send, b"x"))
            receiving = asyncio.create_task(loop.sock_recv(near, 1))
            while not (ticks and thread.done() and receiving.done()):
                assert await client.ask() == 512
            assert await receiving == b"x"
        assert answered

    serve(read, client)


def test_the_ring_sleeps_as_long_as_the_loop_says() -> None:
    """And wakes for the epoll's descriptors, also when they are ready before it sleeps."""
    with Queue.loopback(depth=1) as queue:
        queue.fetch()
        selector = loops.RingSelector()
        near, far = socket.socketpair()
        with near, far:
            asked = []

            def sleep(others: int, timeout: float | None) -> bool:
                asked.append(timeout)
                return True

            selector.register(near, 1, "near")
            selector.sleep_by(sleep)
            assert selector.select(5) == []
            far.send(b"x")
            [(key, events)] = selector.select(None)
            assert (key.data, events) == ("near", 1)
            assert asked == [5, None]
            assert selector.get_key(near).data == "near"
            selector.modify(near, 1, "again")
            selector.sleep_by(None)
            assert selector.select(0)[0][0].data == "again"
            selector.unregister(near)
            assert len(selector.get_map()) == 0
        selector.close()


# ---- open and close ----


class Plain(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, data: memoryview) -> None:
        pass


class Scoped(pyublk.Target):
    """Notes what happens on which loop; a task of its own beats from open to close."""

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.events: list[str] = []
        self.loops: set[object] = set()
        self.beats = 0

    async def open(self) -> None:
        await asyncio.sleep(0)
        self.note("open")
        self.task = asyncio.create_task(self.beat())

    async def beat(self) -> None:
        while True:
            self.beats += 1
            await asyncio.sleep(0)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.note("close")
        assert not self.task.done()

    async def read(self, offset: int, buffer: memoryview) -> None:
        beats = self.beats
        while self.beats == beats:
            await asyncio.sleep(0)
        self.note("read")
        buffer[:] = bytes(len(buffer))

    async def write(self, offset: int, data: memoryview) -> None:
        self.note("write")

    def note(self, event: str) -> None:
        self.events.append(event)
        self.loops.add(asyncio.get_running_loop())


def test_open_and_close_are_awaited_on_the_loop_that_serves() -> None:
    target = Scoped()
    for _ in range(2):
        target.events.clear()
        target.loops.clear()
        with Disk(target) as disk:
            assert disk.pread(512, 0) == bytes(512)
            disk.pwrite(bytes(512), 0)
        assert target.events == ["open", "read", "write", "close"]
        assert len(target.loops) == 1


def test_a_disk_on_a_running_loop_is_served_by_it() -> None:
    async def main() -> None:
        target = Scoped()
        async with Disk(target, max_io_size=4096, depth=4) as disk:
            assert await disk.pread(65536, 0) == bytes(65536)
            await disk.pwrite(bytes(512), 0)
            assert disk.size == SIZE
            assert disk.stats().total.requests == 17
        assert target.loops == {asyncio.get_running_loop()}
        assert target.events == ["open", *["read"] * 16, "write", "close"]
        assert len(asyncio.all_tasks()) <= 2, "only the beat, which nobody has cancelled"
        target.task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("target", [Plain, Scoped])
def test_every_kind_can_be_used_on_a_running_loop(target: Callable[[], pyublk.Target]) -> None:
    async def main() -> None:
        async with Disk(target()) as disk:
            assert await disk.pread(512, 0) == bytes(512)

    asyncio.run(main())


def test_a_disk_with_its_own_loop_on_a_running_one_says_what_to_do() -> None:
    target = Scoped()

    async def main(disk: Disk) -> None:
        with pytest.raises(RuntimeError, match="use `async with Disk"):
            Disk(target).open()
        assert target.events == ["open"]
        with pytest.raises(RuntimeError, match="use `async with Disk"):
            disk.pread(512, 0)
        assert await asyncio.to_thread(disk.pread, 512, 0) == bytes(512)

    with Disk(target) as disk:
        asyncio.run(main(disk))
    assert target.events[-1] == "close"


def test_a_failing_open_is_not_closed_and_a_failing_start_is() -> None:
    class FailsToOpen(Scoped):
        async def open(self) -> None:
            await asyncio.sleep(0)
            raise ConnectionRefusedError("nobody there")

    class TellsNoSize(Scoped):
        def profile(self) -> pyublk.Profile:
            raise ValueError("no size yet")

    async def enter(target: pyublk.Target) -> None:
        async with Disk(target):
            pass

    for begin in (lambda t: Disk(t).open(), lambda t: asyncio.run(enter(t))):
        target: Scoped = FailsToOpen()
        with pytest.raises(ConnectionRefusedError):
            begin(target)
        assert target.events == []
        target = TellsNoSize()
        with pytest.raises(ValueError, match="no size yet"):
            begin(target)
        assert target.events == ["open", "close"]


class AsyncOpen(Plain):
    async def open(self) -> None:
        raise AssertionError("nobody awaits it")


class AsyncClose(Plain):
    async def close(self) -> None:
        raise AssertionError("nobody awaits it")


class AsyncStatus(Scoped):
    async def status(self) -> dict[str, Any]:  # type: ignore[override]
        return {}


class AsyncRam(Ram):
    async def open(self) -> None:
        raise AssertionError("nobody awaits it")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (AsyncOpen(), "AsyncOpen.open is async, and nobody would await it"),
        (AsyncClose(), "AsyncClose.close is async, and nobody would await it"),
        (AsyncStatus(), "AsyncStatus.status is async, and nobody would await it"),
        (AsyncRam(size=SIZE), "AsyncRam.open is async, and nobody would await it"),
    ],
)
@pytest.mark.parametrize("make", [Disk, pyublk.Device])
def test_a_coroutine_that_nobody_would_await_is_refused(
    make: Callable[[pyublk.Target], object], target: pyublk.Target, words: str
) -> None:
    with pytest.raises(pyublk.InvalidTarget, match=words):
        make(target)


def test_an_open_that_hides_its_coroutine_is_refused_too() -> None:
    class Hides(Plain):
        def open(self) -> Any:
            return AsyncOpen.open(self)  # type: ignore[arg-type]

    with pytest.raises(pyublk.InvalidTarget, match=r"Hides.open returned something to await"):
        Disk(Hides()).open()


def test_callbacks_that_end_a_targets_loop_end_neither_its_close_nor_its_callers() -> None:
    loop = loops.TargetLoop()
    ended: list[str] = []
    running: list[asyncio.Task[None]] = []

    async def task() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("task")
            raise SystemExit(4)

    async def begin() -> None:
        asyncio.get_running_loop().call_soon(exits)
        running.append(asyncio.create_task(task()))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(exits)

    async def close() -> None:
        await asyncio.sleep(0.001)
        ended.append("close")

    def exits() -> None:
        raise SystemExit(3)

    loop.call(begin)
    loop.call(close)
    loop.close()
    assert ended == ["close", "task"]
    assert running[0].done()


def test_what_a_targets_close_raises_itself_is_raised() -> None:
    loop = loops.TargetLoop()

    async def close() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        loop.call(close)
    loop.close()
