# SPDX-License-Identifier: MIT
"""Keeps a disk's queues connected to its server: makes connections, and replaces those that break.

What was in flight on a connection that broke is sent again. Before that, the server must be done
with it, else an old write could come after a new one to the same block: so a broken connection's
sending side is shut down, and the server's end of it is waited for.
"""

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyublk._native import ConnectedQueue
from pyublk.connected import reason_text
from pyublk.pauses import drawn, longer

logger = logging.getLogger(__name__)

#: Seconds that the server's end of a broken connection is waited for.
FENCE = 5.0
#: Seconds that an attempt to connect may take, the handshake with it; less when the budget ends.
CONNECTING, SHORTEST_ATTEMPT = 10.0, 1.0


class ExportChanged(OSError):
    """What the server offers now is not what the disk was made of: time does not help."""


@dataclass(eq=False, slots=True)
class _Link:
    """One of a queue's connections."""

    number: int
    is_up: bool = False
    pause: float = 0.0  # before the next attempt
    due: float = 0.0  # when that is
    answers: int = -1  # that it had given when it was last looked at, with requests in flight
    answers_at: float = 0.0


@dataclass(eq=False, slots=True)
class _Links:
    """Those of a queue, and since when it has none."""

    links: list[_Link]
    down_since: float
    failing: bool = False


@dataclass(eq=False, slots=True)
class _Loss:
    queue: ConnectedQueue
    number: int
    connection: socket.socket
    reason: int


class Keeper:
    """A thread that connects queues.

    Args:
        name: the export, for messages.
        connect: makes a connection within so many seconds, or raises OSError.
        retry_for: seconds that requests of a queue without connection wait.
        timeout: seconds after which a connection on which requests wait and nothing is answered is
            given up; 0: never.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[float], socket.socket],
        *,
        retry_for: float,
        timeout: float,
    ) -> None:
        self._name = name
        self._connect = connect
        self._retry_for = retry_for
        self._timeout = timeout
        self._changed = threading.Condition()
        self._queues: dict[ConnectedQueue, _Links] = {}
        self._losses: list[_Loss] = []
        self._spare: list[socket.socket] = []
        self._stopped = False
        self._burying = False  # what the server may still do is waited for
        self._thread: threading.Thread | None = None
        self._told = ""  # why there is no connection, while that is
        self.lost = 0  # connections, so far

    def start(self, first: socket.socket) -> None:
        """With a connection for the first queue."""
        self._spare.append(first)
        self._thread = threading.Thread(target=self._run, name="nbd connections", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, unless it waits for a server, and closes what there is. Called with the
        queues closed.

        What the server may still do when they end with requests in flight is waited for: these
        requests may be another server's in a moment, which sends them again.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            # One that connects meanwhile sees that it is too late.
            self._thread.join(FENCE if self._burying else 0.5)
        self._close_all()

    def _close_all(self) -> None:
        unfinished: list[socket.socket] = []
        with self._changed:
            connections = [*self._spare, *(loss.connection for loss in self._losses)]
            self._spare.clear()
            self._losses.clear()
            for queue in self._queues:
                connections += queue.unfinished
                unfinished += queue.unfinished
                queue.unfinished.clear()
            self._queues.clear()
        until = time.monotonic() + FENCE
        for connection in unfinished:
            _wait_for_end(connection, until - time.monotonic())
        for connection in connections:
            connection.close()

    # ---- called by queues ----

    def add(self, queue: ConnectedQueue) -> None:
        """A queue wants connections: the first gets the one that there is."""
        now = time.monotonic()
        links = _Links([_Link(number, due=now) for number in range(len(queue.links()))], now)
        with self._changed:
            self._queues[queue] = links
            if self._spare:
                self._give(queue, links, links.links[0], self._spare.pop())
            self._changed.notify()

    def lose(
        self, queue: ConnectedQueue, number: int, connection: socket.socket, reason: int
    ) -> None:
        """A queue's connection broke."""
        with self._changed:
            self._losses.append(_Loss(queue, number, connection, reason))
            self._changed.notify()

    def status(self) -> list[dict[str, object]]:
        """Of each connection: its queue, whether it is up, and its requests in flight."""
        return [
            {"queue": queue.id, "up": up, "in_flight": in_flight}
            for queue, _ in self._snapshot()
            for up, in_flight, _ in queue.links()
        ]

    def resent(self) -> int:
        """Requests that were sent again, so far."""
        return sum(queue.resent for queue, _ in self._snapshot())

    # ---- the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopped:
                    break
                losses, self._losses = self._losses, []
                self._burying = bool(losses)
                if not losses:
                    self._changed.wait(self._idle())
            for loss in losses:
                self._bury(loss)
            self._burying = False
            for queue, links in self._snapshot():
                self._look_after(queue, links)

    def _snapshot(self) -> list[tuple[ConnectedQueue, _Links]]:
        with self._changed:
            return list(self._queues.items())

    def _idle(self) -> float | None:
        """Seconds until there is something to do without being told."""
        now = time.monotonic()
        times = [
            link.due for links in self._queues.values() for link in links.links if not link.is_up
        ]
        times += [
            links.down_since + self._retry_for
            for links in self._queues.values()
            if not links.failing and self._is_down(links)
        ]
        if self._timeout and self._queues:
            times.append(now + self._timeout / 4)
        return max(0.0, min(times) - now) if times else None

    def _bury(self, loss: _Loss) -> None:
        """Waits until the server is done with what it had by a connection that broke."""
        reason = reason_text(loss.reason)
        with self._changed:
            links = self._queues.get(loss.queue)
            self.lost += 1
            link = links.links[loss.number] if links is not None else None
            if links is not None and link is not None:
                link.is_up = False
                link.answers = -1
                link.pause, link.due = 0.0, time.monotonic()
                if self._is_down(links):
                    links.down_since = time.monotonic()
        if not self._told:
            logger.info("%s: a connection was lost (%s); connecting again", self._name, reason)
        self._told = self._told or reason
        _wait_for_end(loss.connection, FENCE)
        loss.connection.close()
        loss.queue.release(loss.number)

    def _is_down(self, links: _Links) -> bool:
        return all(not link.is_up for link in links.links)

    def _look_after(self, queue: ConnectedQueue, links: _Links) -> None:
        for link in links.links:
            if self._stopped:
                return
            if link.is_up:
                self._look_at(queue, link)
            elif link.due <= time.monotonic():
                self._try(queue, links, link)
        over = time.monotonic() - links.down_since >= self._retry_for
        if self._is_down(links) and over and not links.failing:
            self._give_up(queue, links)

    def _try(self, queue: ConnectedQueue, links: _Links, link: _Link) -> None:
        left = links.down_since + self._retry_for - time.monotonic()
        seconds = CONNECTING
        if self._is_down(links) and not links.failing:
            seconds = min(CONNECTING, max(SHORTEST_ATTEMPT, left))
        try:
            connection = self._connect(seconds)
        except OSError as error:
            self._told = error.strerror or str(error)
            link.pause = longer(link.pause)
            link.due = time.monotonic() + drawn(link.pause)
            if isinstance(error, ExportChanged) and self._is_down(links) and not links.failing:
                self._give_up(queue, links)
            return
        with self._changed:
            if self._stopped:
                connection.close()
                return
            self._give(queue, links, link, connection)

    def _give(
        self, queue: ConnectedQueue, links: _Links, link: _Link, connection: socket.socket
    ) -> None:
        if not queue.attach(link.number, connection):
            connection.close()  # the queue is closed
            return
        link.is_up = True
        link.answers, link.pause = -1, 0.0
        if links.failing:
            logger.warning("%s: there is a connection again", self._name)
        links.failing = False
        if all(not self._is_down(one) for one in self._queues.values()):
            self._told = ""

    def _give_up(self, queue: ConnectedQueue, links: _Links) -> None:
        """Requests fail from now on, and connecting goes on."""
        if not any(one.failing for one in self._queues.values()):
            waited = time.monotonic() - links.down_since
            logger.error(
                "%s: there was no connection for %.1f s (%s): its requests fail with EIO until "
                "there is one again",
                self._name,
                waited,
                self._told,
            )
        links.failing = True
        queue.set_fail(True)

    def _look_at(self, queue: ConnectedQueue, link: _Link) -> None:
        """Gives a connection up on which nothing is answered for too long."""
        _, in_flight, answers = queue.links()[link.number]
        now = time.monotonic()
        if not in_flight or answers != link.answers:
            link.answers = answers if in_flight else -1
            link.answers_at = now
        elif self._timeout and now - link.answers_at >= self._timeout:
            link.answers = -1
            queue.drop(link.number, errno.ETIMEDOUT)


def _wait_for_end(connection: socket.socket, seconds: float) -> None:
    """Until the server has closed its side, which it does when it is done with what it had."""
    until = time.monotonic() + seconds
    try:
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(1 << 16):
                return
    except OSError:
        return
