"""The command's input and output on this side of the machine."""

import contextlib
import os
import socket
import subprocess


class EndMark:
    """Tell where a stream ends that others may keep open.

    The guest writes a random mark after the command's last byte; what could be the beginning
    of the mark is held back until the next bytes decide.
    """

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._held = b""
        self.found = False

    def feed(self, data: bytes) -> bytes:
        """Return the bytes now known to be the command's."""
        if self.found:
            return b""
        data = self._held + data
        place = data.find(self._mark)
        if place >= 0:
            self.found, self._held = True, b""
            return data[:place]
        held = next(
            length
            for length in range(min(len(self._mark) - 1, len(data)), -1, -1)
            if data.endswith(self._mark[:length])
        )
        self._held = data[len(data) - held :]
        return data[: len(data) - held]


class Sink:
    """Where an output stream of the command goes.

    Args:
        target: a descriptor, `subprocess.PIPE` to collect the bytes, or `subprocess.DEVNULL`.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._collected = bytearray()

    def deliver(self, data: bytes) -> None:
        """Take bytes; waits for whoever reads a descriptor."""
        if self._target == subprocess.PIPE:
            self._collected += data
        elif self._target != subprocess.DEVNULL:
            view = memoryview(data)
            while view:
                view = view[os.write(self._target, view) :]

    def content(self) -> bytes | None:
        """Return the bytes collected, or None where they went elsewhere."""
        return bytes(self._collected) if self._target == subprocess.PIPE else None


class Output:
    """One output stream of the command: from a port's socket to its sink."""

    def __init__(self, port: socket.socket, mark: str, sink: Sink) -> None:
        self.port = port
        self.sink = sink
        self._mark = EndMark(mark.encode())
        self.closed = False

    @property
    def ended(self) -> bool:
        """Whether the command's last byte has been delivered."""
        return self._mark.found or self.closed

    def pump(self) -> None:
        """Pass on what the port has; called when it has something.

        Raises:
            BrokenPipeError: nobody reads the output any more.
        """
        data = self.port.recv(1 << 16)
        if not data:
            self.closed = True
            return
        data = self._mark.feed(data)
        if data:
            self.sink.deliver(data)


class Input:
    """The command's standard input: from a descriptor, or bytes, to a port's socket."""

    def __init__(self, port: socket.socket, source: int | None, pending: bytes) -> None:
        port.setblocking(False)
        self.port = port
        self._source = source
        self._pending = memoryview(pending)
        self._finished = False

    @property
    def source(self) -> int | None:
        """The descriptor to wait for, or None while there is nothing to be read from it."""
        return None if self._pending else self._source

    @property
    def wants_to_send(self) -> bool:
        """Whether to wait until the port takes more."""
        return bool(self._pending)

    def pull(self) -> bytes:
        """Read from the source; returns what came, empty at its end."""
        assert self._source is not None
        try:
            data = os.read(self._source, 1 << 16)
        except OSError:
            # A terminal that went away reads as EIO; for the command that is the end as well.
            data = b""
        self._pending = memoryview(data)
        if not data:
            self._source = None
        return data

    def push(self) -> None:
        """Send what is pending, and the end of input once there is no more to come."""
        try:
            while self._pending:
                self._pending = self._pending[self.port.send(self._pending) :]
        except BlockingIOError:
            return
        except OSError:
            # The machine is going; the control port tells why.
            self._source, self._pending = None, memoryview(b"")
        if self._source is None and not self._finished:
            self._finished = True
            # Only this half: closing both could make the emulator drop what is under way.
            with contextlib.suppress(OSError):
                self.port.shutdown(socket.SHUT_WR)
