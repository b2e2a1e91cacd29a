# SPDX-License-Identifier: MIT
"""One target served on one char device, from the target's opening to its closing.

Nothing here holds the `Device`: one that is dropped open is collected while its threads still run,
and stops them.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pyublk import errors
from pyublk._native import Buffers, CharDevice, Queue, SharedTable
from pyublk.control import DeviceInfo
from pyublk.engines import engine_for
from pyublk.engines.base import Setup
from pyublk.faults import Faults
from pyublk.keeping import opened_for
from pyublk.paths import path_of
from pyublk.profile import Profile
from pyublk.queue_servers import QueueServer, ServingTask, TagSet, ThreadProvider
from pyublk.scheduling import queue_thread_name
from pyublk.stats import DeviceStats, QueueStats, latency_of, sum_latency
from pyublk.target import Target


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


class Session:
    """Serves a device's queues from `begin` until the kernel takes every tag back.

    Args as for `Device`; `provider` has the threads that serve the queues.
    """

    def __init__(
        self,
        target: Target,
        *,
        threads: int,
        workers: int | None,
        shared_memory: bool,
        trim_after: float | None,
        provider: ThreadProvider,
        faults: Faults,
    ) -> None:
        self._engine = engine_for(target)
        self._engine.check(threads=threads, workers=workers, shared_memory=shared_memory)
        self.threads = threads
        self._workers = workers
        self._trim_after = trim_after
        self._provider = provider
        self._faults = faults
        #: What the target says of itself, once it is open.
        self.profile: Profile | None = None
        self._opened = False
        self.closed = False  # the target: a session ends once
        self._owner = object()  # of the files that the target opens
        self.attention = threading.Event()  # a queue's server ended, or failed
        self.moved = threading.Event()  # something that `progress_until` waits for may have ended
        #: What first ended the serving of some queues by failure: an Exception.
        self.failure: Exception | None = None
        self._failure_lock = threading.Lock()
        self._severed = False  # who fails from now on was made to
        self._servers: list[QueueServer] = []

    # ---- the target's own beginning and end ----

    @property
    def needs_loop(self) -> bool:
        """Whether the target is served on an event loop."""
        return self._engine.needs_loop

    def prepare(self, *, on_this_loop: bool) -> None:
        """Makes, or finds, the event loop that an async target begins, serves and ends on."""
        self._engine.prepare(on_this_loop=on_this_loop)

    @property
    def target(self) -> Target:
        return self._engine.target

    def open_target(self, *, after: "Session | None" = None, new: bool = True) -> Profile:
        """Opens the target, which is to replace that of `after`, if there is one. Not `new`: the
        disk is there, and so must its files be."""
        with opened_for(self._owner, after=None if after is None else after._owner, new=new):
            self._engine.open()
        self._opened = True
        self.profile = profile = self._engine.target.profile()
        return profile

    @property
    def max_stall(self) -> float:
        """Seconds that a request may take with nothing wrong."""
        return 0.0 if self.profile is None else self.profile.max_stall

    def cancel_opening(self) -> None:
        self._engine.cancel_opening()

    def close_target(self) -> None:
        if self.closed:
            return
        self.closed = True
        opened, self._opened = self._opened, False
        self._engine.close(opened=opened)

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

        What a server fails with at its start is for `raise_error`, once all are `primed`. `failed`
        is called once, when one has failed, by it.
        """
        assert self.profile is not None
        self._faults.serve(self.profile, path_of(info.flags).path)
        self._faults.suspend(False)
        self._tell_failure = failed
        self._severed = False
        engine = self._engine
        name = f"ublk{info.id}"
        engine.begin(
            Setup(
                name=name,
                queues=info.queues,
                threads=self.threads,
                workers=self._workers,
                wake=partial(_wake, self._servers),
            )
        )
        tag_sets = self._tag_sets(info)
        provider = engine.loop_provider() if on_this_loop else self._provider
        make = partial(
            _make_queues,
            partial(engine.make_queue, char_device),
            {
                "depth": info.depth,
                "buffer_size": info.max_io_size,
                "flags": info.flags,
                "table": table,
                "trim_after": self._trim_after,
                "gate": self._faults.gate,
            },
        )
        for group in [tag_sets] if on_this_loop else engine.groups(tag_sets):
            task = ServingTask(
                name=queue_thread_name(info.id, [one.queue for one in group]),
                make_queues=partial(make, group),
                serve=engine.serve,
                turns=engine.turns,
                cpus=None if on_this_loop else cpus_of([one.queue for one in group]),
                failed=self._server_failed,
                ended=self._server_ended,
            )
            self._servers.append(provider.begin(task))

    def _tag_sets(self, info: DeviceInfo) -> list[TagSet]:
        found = []
        for queue in range(info.queues):
            buffers = Buffers(info.depth, info.max_io_size) if self.threads > 1 else None
            for thread in range(self.threads):
                found.append(TagSet(queue, thread, self.threads, buffers))
        return found

    def _server_ended(self) -> None:
        self.attention.set()
        self.moved.set()

    def _server_failed(self, error: BaseException) -> None:
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
        """Waits until every tag of every queue was fetched, or a server failed; at most `timeout`
        seconds, then False."""
        until = time.monotonic() + timeout
        return all(
            server.primed.wait(max(0.0, until - time.monotonic())) for server in self._servers
        )

    def raise_error(self) -> None:
        """Raises what a server failed with, if one did."""
        if self.failure is not None:
            raise self.failure

    # ---- while it is served ----

    def suspend_faults(self, suspended: bool) -> None:
        """See `Faults.suspend`."""
        self._faults.suspend(suspended)

    def queues(self) -> list[Queue]:
        """Once all are `primed`; those of a disk's queue, if it has several threads, together."""
        return [queue for server in self._servers for queue in server.queues]

    def stats(self) -> DeviceStats:
        """Counters of each queue, those of its threads added up, and all latencies."""
        parts: dict[int, list[QueueStats]] = {}
        latency = sum_latency(latency_of(queue.latency()) for queue in self.queues())
        for queue in self.queues():
            held = queue.held  # first: what is answered meanwhile is still held, not forgotten
            parts.setdefault(queue.id, []).append(QueueStats.from_counters(queue.counters(), held))
        sums = tuple(QueueStats.sum(parts[queue]) for queue in sorted(parts))
        return DeviceStats(sums, latency)

    def runs_here(self) -> bool:
        """Whether the caller is a handler."""
        return self._engine.runs_here() or any(server.runs_here() for server in self._servers)

    def one_ended(self) -> bool:
        return any(server.ended.is_set() for server in self._servers)

    # ---- ending ----

    def all_ended(self) -> bool:
        return all(server.ended.is_set() for server in self._servers)

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
            held = sum(queue.held for queue in self.queues())
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
        servers = [server for server in self._servers if server.holds()]
        stacks = {server: server.stack() for server in servers}
        workers, waiting = self._engine.hanging(), self._engine.waiting()
        held = [
            f"queue {queue.id} held {queue.held} request(s) that nobody completed"
            for queue in self.queues()
            if queue.held
        ]
        full = [server for server in servers if server.holds_everything()]
        self._engine.cancel()
        for queue in self.queues():
            queue.fail_held()
        if self.progress_until(self.all_ended, patience=1.0, idle=1.0):
            # What a queue that failed held is no handler's doing.
            held = [] if self.failure is not None else held
            return Hanging(workers + waiting or held, holds_queue=False)
        with self._failure_lock:
            self._severed = True
        for server in self._servers:
            server.sever()
        if self.failure is not None:  # those that hang nowhere end now
            self.progress_until(self.all_ended, patience=CLOSED, idle=CLOSED)
        still = [server for server in servers if not server.ended.is_set()]
        return Hanging(
            workers + [stacks[server] for server in still],
            holds_queue=any(server in full for server in still),
        )

    def leave(self, patience: float) -> bool:
        """Ends the serving without a word to the kernel, which gives what was not answered to the
        next server. False: some handler still runs after `patience` seconds."""
        with self._failure_lock:
            self._severed = True
        for server in self._servers:
            server.leave()
        self._engine.leave()
        until = time.monotonic() + patience
        while not (self.all_ended() and self._engine.has_left()):
            if time.monotonic() > until:
                return False
            self.moved.wait(LOOK)
            self.moved.clear()
        return True

    def dismiss(self) -> None:
        """Lets go of all that ended, and of the workers."""
        self._engine.end()
        self._servers.clear()  # also for the target, which wakes them


def _make_queues(
    make: Callable[..., Queue], options: dict[str, object], group: list[TagSet]
) -> list[Queue]:
    queues: list[Queue] = []
    try:
        for one in group:
            queues.append(
                make(
                    one.queue,
                    first_tag=one.first,
                    tag_step=one.step,
                    buffers=one.buffers,
                    **options,
                )
            )
    except BaseException:
        for queue in queues:
            queue.close()
        raise
    return queues


def _wake(servers: list[QueueServer]) -> None:
    """Wakes every queue of these servers, and of those that are added."""
    for server in servers:
        for queue in server.queues:
            queue.wake()
