"""Queues that are served by an NBD server."""

import socket
from collections.abc import Callable
from typing import Self

from typing_extensions import disjoint_base

from pyublk._binding.buffers import Buffers, CharDevice
from pyublk._binding.gate import Gate
from pyublk._binding.queue import Queue

@disjoint_base
class ConnectedQueue(Queue):
    """A queue whose requests an NBD server does; `ConnectedTarget` has these.

    As `Queue`, but its requests are not returned: `serve_connected` or `step` serve them, over as
    many `links` as there are sockets for, on which the handshake is over. Requests that find no
    link wait for one. Sockets are the queue's until their link is lost: it closes them at its end,
    but for the `unfinished`, whose server may still do something. They are shut down for sending.
    """

    def __init__(
        self,
        fd: int | CharDevice,
        queue_id: int = 0,
        *,
        links: int = 1,
        depth: int = 128,
        buffer_size: int = 524288,
        flags: int = 0,
        first_tag: int = 0,
        tag_step: int = 1,
        buffers: Buffers | None = None,
        trim_after: float | None = None,
        faults: int = 0,
        gate: Gate | None = None,
    ) -> None: ...
    @classmethod
    def loopback(  # type: ignore[override]
        cls,
        *,
        links: int = 1,
        depth: int = 128,
        buffer_size: int = 524288,
        gate: Gate | None = None,
    ) -> Self: ...
    unfinished: list[socket.socket]
    def attach(self, link: int, socket: socket.socket) -> bool:
        """Gives a link that is down a socket; False when the queue is closed. From any thread, as
        what follows."""
    def drop(self, link: int, reason: int) -> None:
        """Gives a link up, for that reason (an errno)."""
    def release(self, link: int) -> None:
        """Has the requests that went down with a link sent again, over whichever is up."""
    def set_fail(self, fail: bool) -> None:
        """Whether requests that find no link up fail with EIO, instead of waiting; a link that is
        attached ends that."""
    def links(self) -> list[tuple[bool, int, int]]:
        """Of each link: whether it has a socket, requests in flight, answers so far."""
    @property
    def resent(self) -> int:
        """Requests that were sent again, so far."""
    def serve_connected(
        self, lost: Callable[[ConnectedQueue, int, socket.socket, int], object]
    ) -> None:
        """Serves until the device stops. `lost` is called with each link that went down: this
        queue, its number, its socket, which nobody uses any more and whose sending side is shut
        down, and why: an errno, or a key of `pyublk.connected.REASONS`."""
    def step(  # as of MappedQueue
        self,
        lost: Callable[[ConnectedQueue, int, socket.socket, int], object],
        *,
        timeout: float | None = None,
    ) -> bool:
        """Waits for requests, at most `timeout` seconds (None: for ever), and serves those that
        have come; False when the device has been stopped."""
