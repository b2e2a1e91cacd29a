# SPDX-License-Identifier: MIT
"""What every engine does: check, make queues, serve them, tell what hangs, cancel."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pyublk._native import CharDevice, Gate, Layout, Queue
from pyublk.arguments import whole
from pyublk.engines.failures import FailureLog
from pyublk.methods import call_plain
from pyublk.profile import Dispatch
from pyublk.queue_servers import TagSet, ThreadProvider
from pyublk.target import METHODS, Target

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What an engine is to serve: how many `queues`, each by how many `threads`, with how many
    `workers` beside them (None: as many as the target says), which are called after `name`.

    `wake` makes the wait of each of these queues return, from any thread.
    """

    name: str
    queues: int
    threads: int
    workers: int | None
    wake: Callable[[], None]


class Engine:
    """Serves one target, from its `open` to its `close`."""

    kind: ClassVar[Dispatch]
    #: Whether it serves on an event loop: the caller's, or one of its own.
    needs_loop: ClassVar[bool] = False

    def __init__(self, target: Target) -> None:
        self.target = target
        self.report = FailureLog(target)

    def check(
        self, *, threads: int = 1, workers: int | None = None, shared_memory: bool = False
    ) -> None:
        """Raises ValueError for what a target of this kind cannot be served with."""
        if workers is not None and whole("workers", workers) < 0:
            raise ValueError(f"workers must be 0 or more, not {workers}")
        if workers and not self._can_have_workers():
            raise ValueError(
                f"workers={workers} needs a target with plain methods and concurrency 'parallel'; "
                f"{type(self.target).__name__} is {self.kind} and {self.target.concurrency!r}"
            )

    def _can_have_workers(self) -> bool:
        return False

    # ---- the target's own beginning and end ----

    def prepare(self, *, on_this_loop: bool) -> None:
        """Makes, or finds, the event loop that the target begins, serves and ends on."""

    def open(self) -> None:
        """Opens the target."""
        self._call(self.target.open)

    def cancel_opening(self) -> None:
        """Ends an `open` that waits. [any thread]"""

    def close(self, *, opened: bool) -> None:
        """The end of all, and of the target if it was opened."""
        if opened:
            self._call(self.target.close)

    def _call(self, step: Callable[[], object]) -> None:
        call_plain(step)

    async def call(self, step: Callable[[], object]) -> None:
        """Calls `open` or `close` of the target, on the event loop that runs if it needs one."""
        call_plain(step)

    # ---- queues ----

    def make_queue(self, char_device: CharDevice, number: int, **options: Any) -> Queue:
        """A queue of the kind that it serves; options as of `Queue`."""
        return Queue(char_device, number, **options)

    def loopback(self, *, depth: int, buffer_size: int, gate: Gate | None = None) -> Queue:
        """The same without a kernel."""
        return Queue.loopback(depth=depth, buffer_size=buffer_size, gate=gate)

    def groups(self, tag_sets: list[TagSet]) -> list[list[TagSet]]:
        """What is served together, by one thread each."""
        return [[one] for one in tag_sets]

    def loop_provider(self) -> ThreadProvider:
        """What serves queues on the running event loop, of an engine that needs one."""
        raise NotImplementedError(f"{type(self).__name__} serves on no event loop")

    # ---- serving ----

    def begin(self, setup: Setup) -> None:
        """Gets ready for `serve`, with the target open."""

    def serve(self, queues: list[Queue]) -> None:
        """Serves one of the `groups`, on the thread that made its queues, until the kernel has
        taken every tag back; a queue without a kernel until it has nothing more."""
        raise NotImplementedError(f"{type(self).__name__} must define serve(self, queues)")

    def turns(self, queue: Queue) -> Callable[[], bool]:
        """What serves a queue whose thread has others too: serves what there is, without waiting,
        and returns False when the kernel has taken every tag back."""
        raise NotImplementedError(f"{type(self).__name__} must define turns(self, queue)")

    # ---- without a kernel ----

    def make_runner(self) -> "asyncio.Runner":
        """An event loop to `attach` a queue on that has no kernel, of an engine that needs one."""
        raise NotImplementedError(f"{type(self).__name__} serves on no event loop")

    def attach(self, queue: Queue) -> None:
        """Before the first `answer` of a queue without a kernel, on the event loop if need be."""

    async def answer(self, queue: Queue) -> None:
        """Answers the requests that a queue without a kernel has, or some."""
        self.serve([queue])

    async def detach(self, queue: Queue) -> None:
        """After the last `answer`, before the queue is closed."""

    # ---- what hangs ----

    def hanging(self) -> list[str]:
        """Where handlers are now that run on no queue's thread: their stacks. [any thread]"""
        return []

    def waiting(self) -> list[str]:
        """The same of those that hold up no thread. [any thread]"""
        return []

    def cancel(self) -> None:
        """Ends those that hold up no thread; their requests fail with EIO. [any thread]"""

    def leave(self) -> None:
        """Handlers that run on no queue's thread are to end: their requests go to another server.
        [any thread]"""

    def has_left(self) -> bool:
        """Whether they have, and none begins any more. [any thread]"""
        return True

    def runs_here(self) -> bool:
        """Whether the caller is a handler, on no queue's thread."""
        return False

    def end(self) -> None:
        """No request comes any more: lets go of the threads that served none themselves."""

    # ---- called from above ----

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """The target's methods, by their names in `Target`, for a layer above it."""
        return {
            name: method
            for name in METHODS
            if (method := getattr(self.target, name, None)) is not None
        }

    def blocking_methods(self) -> Mapping[str, Callable[..., Any]]:
        """The same for a layer that does not await: plain methods."""
        return self.methods()

    def open_below(self) -> Awaitable[None] | None:
        """Opens the target for a layer above it; to be awaited, unless these methods are plain."""
        call_plain(self.target.open)
        return None

    def close_below(self) -> Awaitable[None] | None:
        """None of these methods is called any more: closes the target. As `open_below`."""
        self.end_calls()
        call_plain(self.target.close)
        return None

    def end_calls(self) -> None:
        """Gives back what calling the methods took."""

    def as_files(self) -> tuple[Layout, list[tuple[int, bool, bool]]] | None:
        """As of `MappedTarget`; None for other kinds. With the target open."""
        return None
