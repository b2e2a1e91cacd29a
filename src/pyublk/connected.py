# SPDX-License-Identifier: MIT
"""Targets whose server the queues themselves talk to."""

import os
import socket
from typing import ClassVar

from pyublk._native import ConnectedQueue
from pyublk.profile import Dispatch
from pyublk.target import Target

#: Why a connection was given up, where no errno says it.
REASONS = {
    1000: "the server closed the connection",
    1001: "the server is shutting down",
    1002: "the server sent something that is not an NBD reply",
    1003: "the server answered a request that it did not have",
}


def reason_text(reason: int) -> str:
    """Why a connection was given up, in words."""
    return REASONS.get(reason) or os.strerror(reason)


class ConnectedTarget(Target):
    """A disk whose requests an NBD server does: each queue's ring sends and receives them.

    What connections there are is the target's business: it makes them, on threads of its own, and
    gives them to the queues that it is told of (`ConnectedQueue.attach`). Requests of a queue that
    has none wait for one.
    """

    dispatch: ClassVar[Dispatch | None] = "connected"
    concurrency = "parallel"

    def links_per_queue(self) -> int:
        """How many connections a queue may have at the same time; called with the target open."""
        return 1

    def check_queues(self, count: int) -> None:
        """Raises ValueError when so many queues cannot serve the disk together."""

    def check_size_of_requests(self, size: int) -> None:
        """Raises ValueError when the server does not take requests of that many bytes."""

    def queue_made(self, queue: ConnectedQueue) -> None:
        """A queue is there that wants connections. Called by the thread that serves it."""
        raise NotImplementedError(f"{type(self).__name__} must define queue_made(self, queue)")

    def connection_lost(
        self, queue: ConnectedQueue, link: int, connection: socket.socket, reason: int
    ) -> None:
        """A queue's connection is of no use any more, for that reason (`reason_text`): it is to be
        closed, and the queue's requests are to be released. Called by the thread that serves it."""
        raise NotImplementedError(f"{type(self).__name__} must define connection_lost")
