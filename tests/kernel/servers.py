"""Disks served by a process of their own, which a test may signal and kill."""

import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

import pyublk
from pyublk.service.records import Record, recorded_ids

HERE = Path(__file__).parent

#: What every program starts with; `memory` and the other modules of this folder are importable.
PRELUDE = f'''
import os
import signal
import sys
import threading
import time
sys.path.insert(0, {str(HERE)!r})
import pyublk
from memory import Memory

MIB = 1 << 20

def tell(*words, **options):
    print(*words, flush=True, **options)

def tell_when_waiting(*words):
    """Once Device.wait has the signals; one that comes before it has Python's own effect."""
    def look():
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.005)
        tell(*words)
    threading.Thread(target=look, daemon=True).start()
'''


def until(true: Callable[[], object], timeout: float = 60.0, what: str = "") -> None:
    """Waits until `true()` is so; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    pause = 0.001
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout:g} s: {what or true}")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def state_in(stat: str) -> str:
    """The letter for what a process or a thread does, of its file `stat` in /proc (proc(5))."""
    return stat.rpartition(")")[2].split()[0]


def start_recovery(controller: pyublk.Controller, number: int) -> None:
    """EBUSY until the last reference to the char device is gone."""

    def started() -> bool:
        try:
            controller.start_recovery(number)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    until(started, what="the recovery starts")


class Server:
    """A Python program that talks by lines: `line()` is what it told, `say()` what it is told.

    When the `with` block ends it is killed, if it still runs, and so are its children.
    """

    def __init__(self, program: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._unread = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        try:
            self.process.wait(20)
        finally:
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()

    def line(self, timeout: float = 60.0) -> str:
        """The next line it prints; fails when none comes."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                pytest.fail(f"the program said nothing for {timeout:g} s")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                self.process.wait(20)
                pytest.fail(f"the program ended with {self.process.returncode}: {self.errors()}")
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, timeout: float = 60.0) -> int:
        """Its exit code, once it has ended; fails when it does not."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the program still runs after {timeout:g} s: {self.stacks()}")

    def errors(self) -> str:
        """What it wrote to stderr; once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def stacks(self) -> str:
        """Where its threads are in the kernel."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").glob("*"):
            for name in ("comm", "stack"):
                try:
                    found.append((task / name).read_text())
                except OSError as error:
                    found.append(f"{error}\n")
        return "".join(found)


def run_program(program: str, *arguments: object, timeout: float = 120) -> str:
    """What a program printed that ended well; fails with what it said otherwise."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def device_is_gone(controller: pyublk.Controller, number: int) -> bool:
    return not any(device.id == number for device in controller.devices())


def running_children() -> set[int]:
    """The processes that threads of this one started and that still run: no zombies, such as a
    command that was left behind leaves."""
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            for child in task.read_text().split():
                stat = Path(f"/proc/{child}/stat").read_text()
                if state_in(stat) != "Z":
                    found.add(int(child))
        except OSError:  # ended meanwhile
            continue
    return found


def helpers_of(server: int) -> list[int]:
    """The helpers that guard a process: they hold its pidfd."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "pyublk-helper\n":
                about = [info.read_text() for info in (comm.parent / "fdinfo").iterdir()]
                if any(f"Pid:\t{server}\n" in one for one in about):
                    found.append(int(comm.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def sleeping_beyond_signals() -> list[str]:
    """Processes in the state D, of which a hung disk makes some."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # ended meanwhile
            continue
        if state_in(text) == "D":
            found.append(text.rpartition(")")[0])
    return found


def end_recorded_servers() -> None:
    """Kills every server of the run directory, and deletes its disk: none outlives its test, nor is
    restarted."""
    numbers = recorded_ids()
    for number in numbers:
        record = Record.read(number)
        if record is not None:
            record.not_restarted()
        server = record.server.open() if record is not None else None
        if server is not None:
            with server:
                server.send(signal.SIGKILL)
                server.wait(10)
    # Its helper does so, or the program that would restart it; when, is theirs.
    with pyublk.Controller() as controller:
        for number in numbers:
            with suppress(pyublk.DeviceNotFound):
                controller.delete(number, deadline=30)
