# SPDX-License-Identifier: MIT
"""Everyone who serves a device: a thread for each queue or more, workers, event loops.

Nothing here holds the `Device`: one that is dropped open is collected while its threads still run,
and stops them.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pyublk import errors, serving
from pyublk._native import Buffers, CharDevice, Handlers, MappedQueue, Queue, SharedTable
from pyublk.arguments import whole
from pyublk.control import DeviceInfo
from pyublk.mapped import MappedTarget
from pyublk.methods import call_plain
from pyublk.stats import DeviceStats, QueueStats
from pyublk.target import FailureLog, NativeTarget, Target, dispatch_of

# Event loops are for disks that need one: asyncio is half of what importing pyublk would cost.
if TYPE_CHECKING:
    from pyublk.loops import AsyncServer, TargetLoop


@dataclass(frozen=True, slots=True)
class Share:
    """What one thread serves: every `step`th tag of a queue, from `first` on.

    With batch I/O any of the tags may come to it, so the threads of a queue share its buffers.
    """

    queue: int
    first: int
    step: int
    buffers: Buffers | None


@dataclass(frozen=True, slots=True)
class Hanging:
    """What did not return when it was given up.

    `stacks` tell where, in words; `holds_queue`: a thread that still runs, cut off from its queue,
    holds every request of it.
    """

    stacks: list[str]
    holds_queue: bool


#: Seconds between two looks at whether requests go on.
LOOK = 0.02
#: Seconds without progress that are enough when a queue is closed before the device is stopped.
CLOSED = 0.5


def check_workers(target: Target, workers: int) -> None:
    """Raises ValueError unless so many workers may run the target's handlers."""
    whole("workers", workers)
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, not {workers}")
    dispatch = dispatch_of(target)
    if workers and (dispatch != "sync" or target.concurrency != "parallel"):
        raise ValueError(
            f"workers={workers} needs a target with plain methods and concurrency 'parallel'; "
            f"{type(target).__name__} is {dispatch} and {target.concurrency!r}"
        )


class Crew:
    """Serves a device's queues from `begin` until the kernel takes every tag back.

    Args as for `Device`.
    """

    def __init__(
        self,
        target: Target,
        *,
        threads: int,
        workers: int,
        preempt: bool,
        trim_after: float | None,
    ) -> None:
        self.target = target
        self.dispatch = dispatch_of(target)
        check_workers(target, workers)
        if threads > 1 and self.dispatch == "async":
            raise ValueError(
                f"threads={threads} needs a target without coroutines, which one event loop runs; "
                f"{type(target).__name__} is async"
            )
        if isinstance(target, MappedTarget):
            target.check_threads(threads)
        if trim_after is not None and (not isinstance(trim_after, (int, float)) or trim_after <= 0):
            raise ValueError(f"trim_after must be positive seconds or None, not {trim_after!r}")
        self.threads = threads
        self._workers = workers
        self._preempt = preempt
        self._trim_after = trim_after
        self.attention = threading.Event()  # a servant ended, or failed
        self.moved = threading.Event()  # something that `progress_until` waits for may have ended
        #: What first ended the serving of some queues by failure: an Exception.
        self.failure: Exception | None = None
        self._failure_lock = threading.Lock()
        self._severed = False  # who fails from now on was made to
        self._pool: serving.WorkerPool | None = None
        self._async_servers: list[AsyncServer] = []
        self._servants: list[serving.QueueServer] = []
        self._loop: TargetLoop | None = None

    # ---- the target's own beginning and end ----

    def prepare(self, *, on_this_loop: bool) -> None:
        """Makes, or finds, the event loop that an async target begins, serves and ends on."""
        if self.dispatch == "async":
            import asyncio

            from pyublk import loops

            self._loop = loops.TargetLoop(asyncio.get_running_loop() if on_this_loop else None)

    def open_target(self) -> None:
        self._call(self.target.open)

    def cancel_opening(self) -> None:
        if self._loop is not None:
            self._loop.cancel()

    def close_target(self, *, opened: bool) -> None:
        try:
            if opened:
                self._call(self.target.close)
        finally:
            if self._loop is not None:
                self._loop.close()

    def _call(self, step: Callable[[], object]) -> None:
        if self._loop is None:
            call_plain(step)
        else:
            self._loop.call(step)

    # ---- beginning ----

    def begin(
        self,
        char_device: CharDevice,
        info: DeviceInfo,
        *,
        table: SharedTable | None,
        cpus_of: Callable[[list[int]], frozenset[int] | None],
        on_this_loop: bool,
        failed: Callable[[], None],
    ) -> None:
        """Starts to serve, on threads that keep to `cpus_of` their queues, or on the running loop.

        What a servant fails with at its start is for `raise_error`, once all are `primed`. `failed`
        is called once, when one has failed, by it.
        """
        self._tell_failure = failed
        report = FailureLog(self.target)
        handlers = Handlers(self.target, report)
        shares = []
        for queue in range(info.queues):
            buffers = Buffers(info.depth, info.max_io_size) if self.threads > 1 else None
            for thread in range(self.threads):
                shares.append(Share(queue, thread, self.threads, buffers))
        make: Callable[..., Queue] = Queue
        if isinstance(self.target, MappedTarget):
            make = partial(MappedQueue, layout=self.target.layout)
        make = partial(make, table=table, trim_after=self._trim_after)
        make_queues = partial(_make_queues, make, char_device, info)
        if on_this_loop:
            from pyublk import loops

            server = loops.AsyncServer(handlers)
            self._async_servers.append(server)
            self._servants = [
                loops.ServingLoop(
                    partial(make_queues, shares), self._servant_failed, self._servant_ended, server
                )
            ]
            return
        one_thread = self.dispatch == "async" and self.target.concurrency == "serial"
        groups = [shares] if one_thread else [[share] for share in shares]
        if self._workers:
            self._pool = serving.WorkerPool(handlers, self._workers, f"ublk{info.id}")
        serve = self._serve_function(handlers, report, info.queues)
        for group in groups:
            self._servants.append(
                serving.ServingThread(
                    partial(make_queues, group),
                    self._servant_failed,
                    self._servant_ended,
                    serve,
                    name=f"ublk{info.id}-q{group[0].queue}",
                    cpus=cpus_of([share.queue for share in group]),
                    preempt=self._preempt,
                )
            )

    def _serve_function(
        self, handlers: Handlers, report: FailureLog, queues: int
    ) -> Callable[[list[Queue]], None]:
        """The dispatcher, bound to what it needs."""
        target, pool, servers = self.target, self._pool, self._async_servers
        if isinstance(target, NativeTarget):
            handler, context = target.handler, target.context
            if not handler:
                raise errors.InvalidTarget(
                    f"{type(target).__name__}.handler is 0: set it before open() returns"
                )
            blind = target.blind
            return lambda queues: queues[0].serve_native(handler, context, blind=blind)
        if isinstance(target, MappedTarget):
            target.wake_queues = serving.waker(self._servants)
            return lambda queues: serving.serve_mapped(queues[0], target, report)
        if self.dispatch == "async":
            from pyublk import loops

            first = self._loop
            assert first is not None
            return lambda queues: loops.serve_on_own_loop(queues, handlers, servers, first)
        if pool is not None:
            return lambda queues: serving.serve_with_workers(queues[0], pool)
        locks = self._locks(queues)
        return lambda queues: queues[0].serve(handlers, locks[queues[0].id])

    def _locks(self, queues: int) -> "list[threading.Lock | None]":
        """What a sync handler holds, for each queue, so that the target's promise is kept."""
        concurrency = self.target.concurrency
        if concurrency == "serial" and queues * self.threads > 1:
            return [threading.Lock()] * queues
        if concurrency == "per_queue" and self.threads > 1:
            return [threading.Lock() for _ in range(queues)]
        return [None] * queues

    def _servant_ended(self) -> None:
        self.attention.set()
        self.moved.set()

    def _servant_failed(self, error: BaseException) -> None:
        """Its clients get EIO from now on; those of the others until the device is stopped."""
        failure = error
        if not isinstance(failure, Exception):  # which would end whoever is told
            failure = errors.DeviceLost(f"a queue's thread was ended by {type(error).__name__}")
            failure.__cause__ = error
        with self._failure_lock:
            if self.failure is not None or self._severed:
                return
            self.failure = failure
        self.attention.set()
        self._tell_failure()

    def primed(self, timeout: float) -> bool:
        """Waits until every tag of every queue was fetched, or a servant failed; at most `timeout`
        seconds, then False."""
        until = time.monotonic() + timeout
        return all(
            servant.primed.wait(max(0.0, until - time.monotonic())) for servant in self._servants
        )

    def raise_error(self) -> None:
        """Raises what a servant failed with, if one did."""
        if self.failure is not None:
            raise self.failure

    # ---- while they serve ----

    def _queues(self) -> list[Queue]:
        return [queue for servant in self._servants for queue in servant.queues]

    def stats(self) -> DeviceStats:
        """Counters of each queue, those of its threads added up."""
        parts: dict[int, list[QueueStats]] = {}
        for queue in self._queues():
            parts.setdefault(queue.id, []).append(QueueStats.from_counters(queue.counters()))
        return DeviceStats(tuple(QueueStats.sum(parts[queue]) for queue in sorted(parts)))

    def runs_here(self) -> bool:
        """Whether the caller is a handler."""
        pool = self._pool is not None and self._pool.runs_here()
        return pool or any(servant.runs_here() for servant in self._servants)

    def one_ended(self) -> bool:
        return any(servant.ended.is_set() for servant in self._servants)

    # ---- ending ----

    def all_ended(self) -> bool:
        return all(servant.ended.is_set() for servant in self._servants)

    def progress_until(
        self,
        done: Callable[[], bool],
        *,
        patience: float,
        idle: float,
        enough: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Waits for `done`; False after `patience` seconds in which requests were held and none
        came nor was answered, after `idle` seconds without any, or when it is `enough`; sooner once
        a queue that failed is closed: what it held ends with the others, not before."""
        last: tuple[int, int] | None = None
        since = 0.0
        while not done():
            held = sum(queue.held for queue in self._queues())
            if (now := (self.stats().total.requests, held)) != last:
                last, since = now, time.monotonic()
            limit = patience if held else idle
            if self.failure is not None and self.one_ended():
                limit = min(limit, CLOSED)
            if time.monotonic() - since > limit:
                return False
            if enough():
                return False
            self.moved.wait(LOOK)
            self.moved.clear()
        return True

    def give_up(self) -> Hanging:
        """Fails what handlers hold, then cuts off the threads that still do not return."""
        servants = [servant for servant in self._servants if servant.holds()]
        stacks = {servant: servant.stack() for servant in servants}
        workers = [] if self._pool is None else self._pool.hanging()
        coroutines = [stack for server in self._async_servers for stack in server.hanging()]
        held = [
            f"queue {queue.id} held {queue.held} request(s) that nobody completed"
            for queue in self._queues()
            if queue.held
        ]
        full = [servant for servant in servants if servant.holds_everything()]
        for server in self._async_servers:
            server.cancel_held()
        for queue in self._queues():
            queue.fail_held()
        if self.progress_until(self.all_ended, patience=1.0, idle=1.0):
            # What a queue that failed held is no handler's doing.
            held = [] if self.failure is not None else held
            return Hanging(workers + coroutines or held, holds_queue=False)
        with self._failure_lock:
            self._severed = True
        for queue in self._queues():
            queue.sever()
        if self.failure is not None:  # those that hang nowhere end now
            self.progress_until(self.all_ended, patience=CLOSED, idle=CLOSED)
        still = [servant for servant in servants if not servant.ended.is_set()]
        return Hanging(
            workers + [stacks[servant] for servant in still],
            holds_queue=any(servant in full for servant in still),
        )

    def dismiss(self) -> None:
        """Lets go of all that ended, and of the workers."""
        if self._pool is not None:
            self._pool.close()
        self._servants = []


def _make_queues(
    make: Callable[..., Queue], char_device: CharDevice, info: DeviceInfo, shares: list[Share]
) -> list[Queue]:
    queues: list[Queue] = []
    try:
        for share in shares:
            queues.append(
                make(
                    char_device,
                    share.queue,
                    depth=info.depth,
                    buffer_size=info.max_io_size,
                    flags=info.flags,
                    first_tag=share.first,
                    tag_step=share.step,
                    buffers=share.buffers,
                )
            )
    except BaseException:
        for queue in queues:
            queue.close()
        raise
    return queues
