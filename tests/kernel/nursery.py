"""Servers that fork from a process which has imported everything: an interpreter's start takes
seconds in an emulated machine, and these are killed all the time."""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
#: Seconds after which a server that does not answer has failed.
PATIENCE = 60.0


class Wire:
    """Words, each of them JSON, between a test and its server."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def say(self, words: Any) -> None:
        self._end.send(json.dumps(words).encode())

    def hear(self) -> Any:
        """What the other end said; None once it is gone."""
        try:
            said = self._end.recv(65536)
        except ConnectionResetError:
            return None
        return json.loads(said) if said else None

    def close(self) -> None:
        self._end.close()


class Child:
    """A server's process, as its test has it."""

    def __init__(self, end: socket.socket) -> None:
        end.settimeout(PATIENCE)
        self._wire = Wire(end)
        self.pid: int = self._wire.hear()
        self._process = os.pidfd_open(self.pid)

    def begin(self, words: Any) -> None:
        """Tells it to do something, and does not wait for it."""
        self._wire.say(words)

    def outcome(self) -> Any:
        """What became of it. Raises RuntimeError with what the server raised, or if it is gone."""
        answer = self._wire.hear()
        if answer is None:
            raise RuntimeError("the server is gone")
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["done"]

    def ask(self, words: Any) -> Any:
        self.begin(words)
        return self.outcome()

    def kill(self) -> None:
        """Returns when it is dead."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        self.ended()

    def ended(self) -> None:
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), f"the server still runs after {PATIENCE:g} s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        os.close(self._process)
        self._wire.close()


class Nursery:
    """The process that servers fork from. It ends with the `with` block."""

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
            program += f"import nursery; nursery.run({theirs.fileno()}, {modules!r})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[theirs.fileno()]
            )

    def start(self, module: str, function: str) -> Child:
        """Calls `function(wire)` in a process of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = json.dumps([module, function]).encode()
            socket.send_fds(self._socket, [words], [theirs.fileno()])
        return Child(ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._process.wait(PATIENCE)


def run(descriptor: int, modules: tuple[str, ...]) -> None:
    """The process itself."""
    import logging

    logging.getLogger("pyublk").addHandler(logging.NullHandler())  # each kill would be told
    logging.getLogger("pyublk").propagate = False
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that were killed
    with socket.socket(fileno=descriptor) as orders:
        while True:
            words, ends, _, _ = socket.recv_fds(orders, 65536, 1)
            if not words:
                return
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                orders.close()
                _live(*json.loads(words), Wire(socket.socket(fileno=ends[0])))
            os.close(ends[0])


def _live(module: str, function: str, wire: Wire) -> None:
    code = 1
    try:
        wire.say(os.getpid())
        getattr(importlib.import_module(module), function)(wire)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)
