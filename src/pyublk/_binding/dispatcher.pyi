"""The requests of an async target, on an asyncio event loop."""

from asyncio import AbstractEventLoop, Task
from collections.abc import Callable, Coroutine
from typing import Any, final

from pyublk._binding.io import Handlers
from pyublk._binding.queue import Queue

@final
class Dispatcher:
    """Runs a target's coroutines on `loop`: a first step on the spot, the rest when what they wait
    for is done. `answered` is told of a queue, once, when requests of it were answered outside of
    `turn` and `sleep`: it wants one of these. For the loop's thread, except where it says so."""

    def __init__(
        self,
        handlers: Handlers,
        loop: AbstractEventLoop,
        answered: Callable[[Queue], None] | None = None,
    ) -> None: ...
    def turn(self, queue: Queue) -> int | None:
        """Submits the commits, takes what is there and begins it: how many requests. None when
        the kernel has taken every tag back."""
    def sleep(self, queue: Queue, other: int, timeout: float | None = None) -> bool | None:
        """Serves in the queue's ring until the loop has something to do, or for `timeout` seconds.

        True when the descriptor `other` is readable; None when the kernel has taken every tag back.
        """
    def waiting(self) -> list[Coroutine[Any, Any, object]]:
        """The coroutines that have not ended yet. From any thread."""
    def tasks(self) -> list[Task[object]]:
        """These as tasks, made where there are none yet."""
