# SPDX-License-Identifier: MIT
"""The server's side of its channels: greets clients, and answers what they ask.

One thread takes clients, and each has a thread of its own while it is there: no handler of a target
is needed for it, and none of them holds up another, or the server's end.
"""

import errno
import json
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pyublk.files import inode_at, trusted_owners
from pyublk.service import reports
from pyublk.service.channel import LONGEST_REQUEST, PROTOCOL, Lines, listen, peer_of

log = logging.getLogger("pyublk.server")

#: Clients at the same time; one more, and the one that has been idle longest is sent away.
MOST_CLIENTS = 64
#: Seconds that a client gets to take an answer.
SLOW = 10.0

#: Seconds at the end for answers that are under way.
FAREWELL = 1.0

#: What a request by this name does, with these arguments; returns what JSON can say.
Answer = Callable[[str, dict[str, Any], "Conversation"], Any]


@dataclass(frozen=True, slots=True)
class Undoable:
    """What a request returns, and how it is undone when its client is not there to be told."""

    value: Any
    undo: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    listening: socket.socket
    identity: tuple[int, int] | None
    requests: list[str]
    answer: Answer


class Conversation:
    """A client's requests and their answers, for a request that takes several steps."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._about: dict[str, Any] = {}  # the request that was read last

    def read(self, line: bytes) -> tuple[str, dict[str, Any]]:
        """The name of what a line requests, and the arguments. Raises ValueError."""
        self._about = {}
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the line is not JSON: {error}") from None
        if not isinstance(request, dict) or not isinstance(request.get("execute"), str):
            raise ValueError('a request is an object with "execute", the name of what to do')
        if "id" in request:
            self._about = {"id": request["id"]}
        if unknown := request.keys() - {"execute", "arguments", "id"}:
            raise ValueError(
                f'a request has "execute", "arguments" and "id", and no {sorted(unknown)[0]!r}'
            )
        arguments = request.get("arguments", {})
        if not isinstance(arguments, dict):
            raise ValueError('"arguments" is an object: a name and a value for each')
        return request["execute"], arguments

    def send(self, message: dict[str, Any]) -> None:
        """Answers it. Raises OSError when the client has gone, or does not take its answer."""
        self._lines.send(json.dumps(message | self._about))

    def goes_on(self, value: Any, *, by: str, within: float) -> bool:
        """Answers it by `value`, and reads the client's next request: whether it came within so
        many seconds, and is the one named `by`."""
        try:
            self.send({"return": value})
            line = self._lines.receive(time.monotonic() + within)
            return line is not None and self.read(line)[0] == by
        except (OSError, ValueError):
            return False


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()  # its last request, or its arrival
        self.busy = False

    def send_away(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Listener:
    """Listens at several places, each with its own answers, from a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[int, _Place] = {}  # by descriptor
        self._clients: set[_Client] = set()
        self._poll = select.epoll()
        self._over, self._end = socket.socketpair()
        self._poll.register(self._over, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()
        # A child that somebody forks would keep clients waiting after our end.
        os.register_at_fork(after_in_child=_letting_go(weakref.ref(self)))

    def open(self, place: Path, requests: list[str], answer: Answer) -> None:
        """Listens there from now on. Raises OSError."""
        listening = listen(place)
        listening.setblocking(False)
        made = _Place(place, listening, inode_at(place), requests, answer)
        with self._lock:
            self._places[listening.fileno()] = made
        self._poll.register(listening, select.EPOLLIN)

    def close(self, place: Path) -> None:
        """Listens there no more; who has asked already still gets the answer."""
        with self._lock:
            for number, one in list(self._places.items()):
                if one.path == place:
                    del self._places[number]
                    # The next disk with this id, or server of this name, may have its own there.
                    with suppress(OSError):
                        if inode_at(place) == one.identity:
                            place.unlink()
                    self._poll.unregister(number)
                    one.listening.close()

    def close_all(self) -> None:
        """Listens no more; who is being answered has a moment to be told."""
        for one in list(self._places.values()):
            self.close(one.path)
        self._end.close()
        self._thread.join(FAREWELL)
        until = time.monotonic() + FAREWELL
        while time.monotonic() < until and any(client.busy for client in list(self._clients)):
            time.sleep(0.005)
        for client in list(self._clients):
            client.send_away()

    def let_go(self) -> None:
        """In a forked child: the descriptors are closed, and all else is the parent's."""
        for one in list(self._places.values()):
            one.listening.close()
        for client in list(self._clients):
            client.connection.close()

    def _run(self) -> None:
        version()  # of what runs here: another may be installed later
        while True:
            for number, _ in self._poll.poll():
                if number == self._over.fileno():
                    self._poll.close()
                    self._over.close()
                    return
                self._accept(number)

    def _accept(self, number: int) -> None:
        with self._lock:  # this thread keeps nothing of a disk that has ended
            place = self._places.get(number)
        if place is None:
            return
        try:
            connection, _ = place.listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                time.sleep(0.1)  # it waits in the queue, until there is a descriptor for it
            return
        connection.settimeout(SLOW)
        client = _Client(connection)
        with self._lock:
            if len(self._clients) >= MOST_CLIENTS:
                idle = [other for other in self._clients if not other.busy]
                if not idle:
                    connection.close()
                    return
                min(idle, key=lambda other: other.since).send_away()
            self._clients.add(client)
        try:
            threading.Thread(
                target=self._talk, args=(client, place), name="channel-client", daemon=True
            ).start()
        except RuntimeError:  # this process may have no more threads
            self._forget(client)

    def _forget(self, client: _Client) -> None:
        with self._lock:
            self._clients.discard(client)
        client.connection.close()

    def _talk(self, client: _Client, place: _Place) -> None:
        lines = Lines(client.connection, LONGEST_REQUEST)
        try:
            pid, uid = peer_of(client.connection)
            if uid not in trusted_owners():
                raise PermissionError(
                    errno.EPERM, f"process {pid} is of user {uid}, who may not use this server"
                )
            greeting = {"pyublk": version(), "protocol": PROTOCOL, "capabilities": place.requests}
            lines.send(json.dumps(greeting))
            while True:
                client.busy = False
                client.connection.settimeout(None)
                line = lines.receive()
                if line is None:
                    return
                client.busy, client.since = True, time.monotonic()
                client.connection.settimeout(SLOW)
                if line.strip():
                    _answer(lines, line, place)
        except (ValueError, PermissionError) as error:
            with suppress(OSError):
                client.connection.settimeout(SLOW)
                lines.send(json.dumps({"error": reports.describe(error)}))
        except OSError:  # it has gone, or does not take its answers
            return
        except Exception:
            log.exception("a client of the channel is sent away")
        finally:
            self._forget(client)


def _answer(lines: Lines, line: bytes, place: _Place) -> None:
    returned: Any = None
    conversation = Conversation(lines)
    try:
        name, arguments = conversation.read(line)
        if name not in place.requests:
            known = ", ".join(place.requests)
            raise ValueError(f"there is no request {name!r} here; there is: {known}")
        returned = place.answer(name, arguments, conversation)
        value = returned.value if isinstance(returned, Undoable) else returned
        message = {"return": value}
        json.dumps(message)  # a target's status may be anything
    except Exception as error:
        message = {"error": reports.describe(error)}
    try:
        conversation.send(message)
    except OSError:
        if isinstance(returned, Undoable):
            returned.undo()
        raise


def _letting_go(listener: "weakref.ref[Listener]") -> Callable[[], None]:
    def let_go() -> None:
        if (found := listener()) is not None:
            found.let_go()

    return let_go


@cache
def version() -> str:
    """Of pyublk."""
    from importlib.metadata import version  # which takes a while

    return version("pyublk")
