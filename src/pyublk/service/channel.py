# SPDX-License-Identifier: MIT
"""The channel to a disk's server: a Unix socket beside the record, one JSON object a line.

`/run/pyublk/N.sock` leads to whoever serves `/dev/ublkbN`, `/run/pyublk/NAME.server.sock` to the
server of that name. The server greets each client, then answers each request by one line:

    {"pyublk": "0.1.0", "protocol": 1, "capabilities": ["resize", "stats", ...]}
    {"execute": "resize", "arguments": {"size": 1073741824}, "id": 1}
    {"return": {"size": 1073741824}, "id": 1}
    {"error": {"kind": "ValueError", "text": "..."}, "id": 1}

Both sides look at whose the other is: root, or the user of the server.
"""

import errno
import json
import os
import re
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from pyublk import errors
from pyublk.files import StrangeFile, trusted_owners
from pyublk.service import reports
from pyublk.service.records import Record, json_object, run_directory, socket_place

PROTOCOL = 1
#: Seconds for a server to change a disk; files and the kernel may take their time.
CHANGE = 60.0
#: Bytes of the longest request, and of the longest answer that is read.
LONGEST_REQUEST = 1 << 20
LONGEST_ANSWER = 16 << 20
#: Seconds for a server to take a client and greet it.
GREETING = 5.0


class ChannelError(errors.UblkError):
    """A server cannot be asked: it has no channel, or it does not answer."""


class Unread(ChannelError):
    """The server closed the connection with what it had not read, which the kernel tells apart."""


def server_place(name: str) -> Path:
    """The channel to a server that serves several disks."""
    return run_directory() / f"{name}.server.sock"


def check_server_name(name: str) -> str:
    """The name; raises ValueError for one that a file beside the records cannot have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(
            f"{name!r} is not a server's name: use 1 to 64 letters, digits, `-`, `_` and `.`, "
            "beginning with a letter or digit"
        )
    return name


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as of when it connected or listened."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


class Lines:
    """JSON objects, one a line, from and to a connected socket."""

    def __init__(self, connection: socket.socket, longest: int) -> None:
        self._connection = connection
        self._longest = longest
        self._unread = b""

    def send(self, message: str) -> None:
        self._connection.sendall(message.encode() + b"\n")

    def receive(self, until: float | None = None) -> bytes | None:
        """The next line; None at the end. Raises ValueError for one that is too long, TimeoutError
        when it is not there `until` then (time.monotonic)."""
        seen = 0
        while (end := self._unread.find(b"\n", seen)) < 0:
            seen = len(self._unread)
            if seen > self._longest:
                raise ValueError(f"a line has at most {self._longest} bytes")
            if until is not None:
                self._connection.settimeout(max(0.001, until - time.monotonic()))
            more = self._connection.recv(65536)
            if not more:
                return None
            self._unread += more
        line, self._unread = self._unread[:end], self._unread[end + 1 :]
        return line


class Client:
    """A connection to a server's channel; use `with`.

    Raises ChannelError when nobody listens there, or does not greet within `timeout` seconds.
    """

    def __init__(self, place: Path, *, timeout: float = GREETING) -> None:
        self._place = place
        with _failures_told(place, timeout):
            self._connection = _connected(place, timeout)
        self._lines = Lines(self._connection, LONGEST_ANSWER)
        try:
            #: What the server said first.
            self.greeting = self._answer(time.monotonic() + timeout, timeout)
            if "error" in self.greeting:
                raise ChannelError(f"{place}: {self.greeting['error']['text']}")
        except BaseException:
            self.close()
            raise

    @property
    def server_pid(self) -> int:
        return peer_of(self._connection)[0]

    def ask(self, request: str, /, *, timeout: float | None = 30.0, **arguments: Any) -> Any:
        """What the server returns. Raises what it raised (`reports.revive`), and ChannelError when
        it does not answer within `timeout` seconds (None: whenever), or ends meanwhile."""
        with _failures_told(self._place, timeout):
            self._connection.settimeout(timeout)
            self._lines.send(json.dumps({"execute": request, "arguments": arguments}))
        answer = self._answer(None if timeout is None else time.monotonic() + timeout, timeout)
        if "error" in answer:
            raise reports.revive(answer["error"])
        return answer["return"]

    def ends_within(self, seconds: float | None) -> bool:
        """Waits for the server's end of the connection, at most so long (None: for ever): whether
        it came. Between two requests only."""
        return bool(select.select([self._connection], [], [], seconds)[0])

    def _answer(self, until: float | None, timeout: float | None) -> dict[str, Any]:
        with _failures_told(self._place, timeout):
            line = self._lines.receive(until)
        if line is None:
            raise ChannelError(f"the server behind {self._place} ended before it answered")
        answer = json_object(line)
        if answer is None:
            raise ChannelError(f"what listens at {self._place} does not speak this protocol")
        return answer

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def ask(record: Record, request: str, /, *, timeout: float | None = 30.0, **arguments: Any) -> Any:
    """As `Client.ask`, of the server of a disk; if another one takes its place, of that one."""
    until = time.monotonic() + GREETING
    while True:
        try:
            with connect(record, timeout=timeout) as client:
                return client.ask(request, timeout=timeout, **arguments)
        except Unread:
            if time.monotonic() > until:
                raise
            record = _now(record)


def connect(record: Record, *, timeout: float | None = 30.0) -> Client:
    """A client of the server of a disk, or of the one that takes its place meanwhile."""
    place = socket_place(record.id)
    patience = GREETING if timeout is None else min(timeout, GREETING)
    until = time.monotonic() + patience
    while True:
        try:
            client = Client(place, timeout=patience)
        except Unread:  # it hands over, or ends: then nobody listens at the next attempt
            if time.monotonic() > until:
                raise
        except ChannelError:  # also when the socket changes hands just now
            if (now := _now(record)).server == record.server:
                raise
            record = now
            continue
        else:
            if client.server_pid == record.server.pid:
                return client
            with client:
                if time.monotonic() > until:
                    raise ChannelError(
                        f"{place} belongs to process {client.server_pid}, and {record.path} to "
                        f"{record.server.pid}"
                    )
        time.sleep(0.01)
        record = _now(record)


def _now(record: Record) -> Record:
    """What is on record of the same disk now."""
    now = Record.read(record.id)
    return now if now is not None and now.cookie == record.cookie else record


@contextmanager
def _failures_told(place: Path, timeout: float | None) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, BlockingIOError):
        raise ChannelError(
            f"the server behind {place} did not answer within {timeout:g} s"
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise ChannelError(
            f"nobody listens at {place}: the server has ended, was started by an older version of "
            "pyublk, or could not make its channel (see its log)"
        ) from None
    except (ConnectionResetError, BrokenPipeError) as error:
        raise Unread(f"{place} cannot be used: {error}") from None
    except (ConnectionError, StrangeFile) as error:
        raise ChannelError(f"{place} cannot be used: {error}") from None
    except ValueError as error:
        raise ChannelError(f"the answer of the server at {place} is too long: {error}") from None


def _connected(place: Path, timeout: float) -> socket.socket:
    """To the socket that lies there, and to none that a link leads to."""
    node = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(node)
        if not stat.S_ISSOCK(found.st_mode):
            raise StrangeFile("it is not a socket")
        if found.st_uid not in trusted_owners():
            raise StrangeFile(f"it belongs to another user, {found.st_uid}")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            # By the descriptor: what lies there may change meanwhile, and its name may be too long.
            connection.connect(f"/proc/self/fd/{node}")
            pid, uid = peer_of(connection)
            if uid not in trusted_owners():
                raise StrangeFile(f"process {pid}, which listens there, is another user's, {uid}")
        except BaseException:
            connection.close()
            raise
    finally:
        os.close(node)
    return connection


def listen(place: Path) -> socket.socket:
    """A listening socket in its place, for its owner only; what lies there is replaced."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listening.fileno(), 0o600)  # the file that `bind` makes has the socket's mode
        directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By the directory's descriptor: the whole name may be longer than a socket's can be.
            draft = f".{place.name}.{os.getpid()}"
            with suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=directory)
            listening.bind(f"/proc/self/fd/{directory}/{draft}")
            listening.listen(64)
            os.rename(draft, place.name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(directory)
    except BaseException:
        listening.close()
        raise
    return listening


def is_abandoned(place: Path) -> bool:
    """Whether it is a socket at which nobody listens any more."""
    try:
        with closing(_connected(place, 1.0)):
            return False
    except ConnectionRefusedError:
        return True
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    except StrangeFile:
        return False
