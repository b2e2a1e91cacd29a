"""NBD servers for tests: a small one that can do everything wrong, and real ones."""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FLAGS = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6  # flush, FUA, trim, write-zeroes
READ_ONLY, MULTI_CONN = 1 << 1, 1 << 8
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
INFO, ACK, SERVER = 3, 1, 2
ERR_UNSUP, ERR_UNKNOWN = 1 << 31 | 1, 1 << 31 | 6


class Request:
    """A client's request. What `FakeServer.before` returns is said in its answer's place."""

    def __init__(self, raw: bytes, data: bytes) -> None:
        _, self.flags, self.type, self.cookie, self.offset, self.length = struct.unpack(
            ">IHHQQI", raw
        )
        self.data = data


class FakeServer:
    """An export in memory, on a UNIX socket. It does as the protocol says but for its attributes.

    `before(request)` is called with each request, on its connection's thread: it may wait, return
    bytes to be said in the place of the answer (None: the answer), or raise EOFError to end the
    connection.
    """

    def __init__(self, path: Path, size: int = 1 << 20) -> None:
        self.path = path
        self.memory = bytearray(size)
        self.size = size
        self.flags = FLAGS
        self.block_sizes: tuple[int, int, int] | None = (1, 4096, 32 << 20)
        self.names = ["", "other"]
        self.knows_go = True
        self.greeting = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        self.before: Callable[[Request], bytes | None] = lambda request: None
        self.requests: list[Request] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> "FakeServer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def stop(self) -> None:
        """As if it were killed."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            connection.sendall(self.greeting)
            _receive(connection, 4)
            if self._negotiate(connection):
                self._serve(connection)

    # ---- the handshake ----

    def _negotiate(self, connection: socket.socket) -> bool:
        while True:
            _, option, length = struct.unpack(">8sII", _receive(connection, 16))
            data = _receive(connection, length)
            if option == 7 and self.knows_go:
                name = data[4 : 4 + struct.unpack(">I", data[:4])[0]].decode()
                if self._go(connection, name):
                    return True
            elif option == 1:
                if data.decode() not in self.names:
                    return False
                connection.sendall(struct.pack(">QH", self.size, self.flags))
                return True
            elif option == 3:
                for name in self.names:
                    raw = struct.pack(">I", len(name)) + name.encode()
                    _reply(connection, option, SERVER, raw)
                _reply(connection, option, ACK)
            else:
                _reply(connection, option, ERR_UNSUP)

    def _go(self, connection: socket.socket, name: str) -> bool:
        if name not in self.names:
            _reply(connection, 7, ERR_UNKNOWN, b"no such thing here")
            return False
        _reply(connection, 7, INFO, struct.pack(">HQH", 0, self.size, self.flags))
        if self.block_sizes is not None:
            _reply(connection, 7, INFO, struct.pack(">HIII", 3, *self.block_sizes))
        _reply(connection, 7, ACK)
        return True

    # ---- requests ----

    def _serve(self, connection: socket.socket) -> None:
        while True:
            raw = _receive(connection, 28)
            kind, length = struct.unpack(">H", raw[6:8])[0], struct.unpack(">I", raw[24:])[0]
            request = Request(raw, _receive(connection, length) if kind == WRITE else b"")
            self.requests.append(request)
            if kind == DISCONNECT:
                return
            said = self.before(request)
            connection.sendall(self.answer(request) if said is None else said)

    def answer(self, request: Request) -> bytes:
        """Does what is asked, and says so."""
        part = slice(request.offset, request.offset + request.length)
        if request.type == WRITE:
            self.memory[part] = request.data
        elif request.type in (TRIM, WRITE_ZEROES):
            self.memory[part] = bytes(request.length)
        return header(request) + (bytes(self.memory[part]) if request.type == READ else b"")


def header(request: Request, error: int = 0, *, magic: int = 0x67446698) -> bytes:
    """That of an answer."""
    return struct.pack(">IIQ", magic, error, request.cookie)


def _reply(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)


def _receive(connection: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        piece = connection.recv(length - len(found))
        if not piece:
            raise EOFError
        found += piece
    return found


# ---- real ones ----


def has(program: str) -> bool:
    return shutil.which(program) is not None


def is_listening(path: Path) -> bool:
    """Whether connections are accepted there. A socket is there a moment before, and some servers
    end with their first connection."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[-1] == str(path) and int(fields[3], 16) & 0x10000:  # __SO_ACCEPTCON
            return True
    return False


@contextlib.contextmanager
def running(command: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, once it listens."""
    path.unlink(missing_ok=True)
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + 20
        while not is_listening(path):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < until, f"{command[0]} does not listen"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def nbdkit(path: Path, *arguments: str | os.PathLike[str]) -> list[str]:
    return ["nbdkit", "-f", "-U", str(path), *map(str, arguments)]
