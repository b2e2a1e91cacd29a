"""One run of a command in a started machine: an event loop over its ports."""

import contextlib
import enum
import selectors
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyublk.vm.errors import BootFailed, GuestFailed, GuestTimeout, Interrupted
from pyublk.vm.streams import Input, Output

# Pressed so often in a row on a raw terminal, this key ends the machine.
ESCAPE_KEY = 0x1D
ESCAPE_PRESSES = 3
# A second SIGINT so soon after the first ends the machine.
_INTERRUPT_AGAIN = 3.0
# What the guest writes to the kernel's log after the blocked tasks.
_BLOCKED_SHOWN = "pyublk: these tasks are blocked"


@dataclass(frozen=True)
class Patience:
    """How long to wait for a guest before calling it hung; seconds of the host's time.

    Attributes:
        boot: until the command starts.
        ping_interval: between two questions whether the guest is alive.
        ping_answer: for the answer to one.
        output: for the rest of the output once the command has ended.
    """

    boot: float
    ping_interval: float
    ping_answer: float
    output: float


class _Stage(enum.Enum):
    BOOTING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Session:
    """The command's run, from the start of the machine to the command's exit code.

    Args:
        control: socket of the control port.
        outputs: the command's output streams.
        source: the command's input.
        console: file of the kernel's console.
        patience: when to give up.
        timeout: seconds the command may take, from its start; None for no limit.
        raw: whether the input is a raw terminal, where the escape key counts.
    """

    def __init__(
        self,
        control: socket.socket,
        outputs: Sequence[Output],
        source: Input,
        console: Path,
        patience: Patience,
        timeout: float | None,
        *,
        raw: bool,
    ) -> None:
        self._control = control
        self._outputs = outputs
        self._input = source
        self._console = console
        self._patience = patience
        self._timeout = timeout
        self._raw = raw
        self._stage = _Stage.BOOTING
        self._lines = b""
        self._code: int | None = None
        self._started = time.monotonic()
        self._deadline = self._started + patience.boot
        self._end: float | None = None
        self._next_ping = float("inf")
        self._answer_due: float | None = None
        self._interrupted = float("-inf")
        self._escapes = 0
        self.boot_time = 0.0

    def console(self) -> str:
        """Return what the guest's kernel has written so far."""
        return self._console.read_text(errors="replace")

    def tell(self, line: str) -> None:
        """Send a line to the guest's control port."""
        # When the machine is gone, the loop finds the socket closed and says so.
        with contextlib.suppress(OSError):
            self._control.send(line.encode() + b"\n")

    def interrupt(self) -> None:
        """Pass SIGINT to the command; the second one soon after ends the machine.

        Raises:
            Interrupted: the machine is to be ended.
        """
        now = time.monotonic()
        if self._stage is not _Stage.RUNNING or now - self._interrupted < _INTERRUPT_AGAIN:
            raise Interrupted(signal.SIGINT)
        self._interrupted = now
        self.tell("signal INT")

    def run(self) -> int:
        """Serve the machine until the command has ended; returns its exit code.

        Raises:
            GuestFailed: the guest panicked, hung, or stopped.
            GuestTimeout: the command took too long.
            Interrupted: the escape key was pressed.
        """
        self.tell("go")
        self._input.push()
        while not (self._stage is _Stage.ENDED and all(o.ended for o in self._outputs)):
            self._turn()
        assert self._code is not None
        return self._code

    def _turn(self) -> None:
        """Wait for the next event and serve it."""
        with selectors.PollSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, self._hear)
            for output in self._outputs:
                if not output.ended:
                    selector.register(output.port, selectors.EVENT_READ, output)
            source = self._input
            if source.wants_to_send:
                selector.register(source.port, selectors.EVENT_WRITE, source.push)
            elif source.source is not None and self._stage is _Stage.RUNNING:
                selector.register(source.source, selectors.EVENT_READ, self._take_input)
            wait = self._next_event() - time.monotonic()
            for key, _ in selector.select(max(wait, 0)):
                if isinstance(key.data, Output):
                    self._pump(key.data)
                else:
                    key.data()
        self._check_time()

    def _pump(self, output: Output) -> None:
        began = time.monotonic()
        try:
            output.pump()
        except ConnectionResetError:
            output.closed = True
        except BrokenPipeError:
            output.closed = True
            self.tell("signal PIPE")
        now = time.monotonic()
        if self._answer_due is not None:
            self._answer_due += now - began  # that our reader pauses is not the guest's doing
        if self._stage is _Stage.ENDED:
            self._deadline = now + self._patience.output

    def _take_input(self) -> None:
        data = self._input.pull()
        if self._raw:
            for byte in data:
                self._escapes = self._escapes + 1 if byte == ESCAPE_KEY else 0
                if self._escapes >= ESCAPE_PRESSES:
                    raise Interrupted(signal.SIGINT)
        self._input.push()

    def _hear(self) -> None:
        try:
            data = self._control.recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            if self._stage is _Stage.ENDED:
                for output in self._outputs:
                    output.closed = True
                return
            failure = BootFailed if self._stage is _Stage.BOOTING else GuestFailed
            raise failure(self._how_it_stopped(), self.console())
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            self._obey(line.decode(errors="replace").split())

    def _obey(self, words: list[str]) -> None:
        now = time.monotonic()
        match words:
            case ["ready"]:
                self._stage = _Stage.RUNNING
                self.boot_time = now - self._started
                self._deadline = float("inf")
                self._next_ping = now + self._patience.ping_interval
                if self._timeout is not None:
                    self._end = now + self._timeout
            case ["pong"]:
                self._answer_due = None
                self._next_ping = now + self._patience.ping_interval
            case ["exit", code]:
                self._stage = _Stage.ENDED
                self._code = int(code)
                self._next_ping, self._answer_due, self._end = float("inf"), None, None
                self._deadline = now + self._patience.output

    def _next_event(self) -> float:
        times = [self._deadline, self._next_ping]
        times += [when for when in (self._end, self._answer_due) if when is not None]
        # poll takes milliseconds as a C int.
        return min(*times, time.monotonic() + 3600)

    def _check_time(self) -> None:
        now = time.monotonic()
        if self._end is not None and now >= self._end:
            self._show_blocked()
            raise GuestTimeout(
                f"the command did not end within {self._timeout:g} s", self.console()
            )
        if self._answer_due is not None and now >= self._answer_due:
            raise GuestFailed(
                f"the guest hangs: no sign of life for {self._patience.ping_answer:g} s",
                self.console(),
            )
        if now >= self._deadline:
            if self._stage is _Stage.BOOTING:
                raise BootFailed(
                    f"the guest did not start the command within {self._patience.boot:g} s",
                    self.console(),
                )
            raise GuestFailed(
                f"the guest did not hand over the rest of the output within "
                f"{self._patience.output:g} s",
                self.console(),
            )
        if now >= self._next_ping:
            self.tell("ping")
            self._next_ping = float("inf")
            self._answer_due = now + self._patience.ping_answer

    def _show_blocked(self) -> None:
        """Have the kernel write its blocked tasks to the console; not for long."""
        self.tell("blocked")
        end = time.monotonic() + self._patience.output
        # The console has no other reader than its file, so there is nothing to wait for but time.
        while _BLOCKED_SHOWN not in self.console() and time.monotonic() < end:
            time.sleep(0.05)

    def _how_it_stopped(self) -> str:
        console = self.console()
        if "Kernel panic" in console:
            return "the guest's kernel panicked"
        if self._stage is _Stage.BOOTING:
            return "the machine stopped before it could start the command"
        return "the machine stopped before the command ended"
