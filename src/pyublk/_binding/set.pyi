"""Many queues of one thread."""

from typing import Self, final

from pyublk._binding.queue import Queue

@final
class QueueSet:
    """Many queues of one thread, which waits until one of them has requests.

    ::

        with QueueSet() as queues:
            queues.add(queue)
            while len(queues):
                for queue in queues.wait():
                    if not queue.turn(handlers):
                        queues.remove(queue)
                        queue.close()

    Only the thread that made it and its queues may use it (RuntimeError otherwise), except for
    `wake` and `close`. Each queue has its own ring, so each busy queue takes system calls of its
    own; idle queues cost nothing.

    Args:
        room: the largest number of queues, as far as the process may open files; when it is full,
            `add` raises OSError ENOSPC.
    """

    def __init__(self, room: int = 4096) -> None: ...
    def close(self) -> None:
        """Closes the set, not its queues. Not while its thread waits."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def __len__(self) -> int: ...
    def add(self, queue: Queue) -> None:
        """Watches a queue; the next `wait` returns it."""
    def remove(self, queue: Queue) -> None:
        """Stops watching a queue."""
    def wait(self, timeout: float | None = None) -> list[Queue]:
        """Waits until some queues have requests, and returns these queues: none after `timeout`
        seconds, a signal or a `wake`. Take a queue's requests by its own `wait(0)`, or a `turn`; if
        some are left, the next call returns that queue again, at once."""
    def wake(self) -> None:
        """Makes a wait return. [any thread]"""
