# SPDX-License-Identifier: MIT
"""The virtual machine that runs a session's tests, seen from the session: it is told which, and its
events come back."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from pyublk.pytest_plugin.guest import Job
from pyublk.vm import programs

#: Seconds that a machine may take to be there: it is booted up to three times, a minute each.
BOOT = 300
#: Seconds beyond a test's own that an event of it may take to come: `pyublk vm` finds out within 70
#: that a guest does not answer.
GRACE = 120
#: Seconds for a machine to end.
END = 20
#: The most bytes of a machine's log that a report gets: the last ones.
_LOG = 1 << 16

Event = dict[str, Any]


def boot(kernel: str, memory: int) -> list[str]:
    """The command line of the process that holds a machine: `boot.py`, which runs by itself."""
    return [sys.executable, "-m", "pyublk.pytest_plugin.boot", kernel, str(memory)]


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that can be sent: values of the kinds that a command line makes."""
    return {name: value for name, value in options.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes, PurePath))


class Lost(Exception):
    """The machine is no more, or does not answer.

    Attributes:
        log: what it, and its kernel, wrote.
    """

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(reason)
        self.log = log


class Run:
    """One machine that runs some tests, from the boot to its end."""

    def __init__(self, job: Job, command: list[str], *, directory: Path, echo: bool) -> None:
        self._timeout = job.timeout
        self._echo = echo
        self._echoed = 0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by `end`
        setpriv = programs.find("setpriv", "util-linux")
        self._process = subprocess.Popen(
            # It ends with this process, and the machine with it.
            [setpriv, "--pdeathsig", "TERM", "--", *command],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is this session's to deal with
        )
        # Read at once, whatever this session does meanwhile: else the guest's tests would wait.
        self._reader = threading.Thread(
            target=self._read, args=(job.to_line(),), name="ublk-guest", daemon=True
        )
        self._reader.start()

    def _read(self, job: bytes) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # it has ended, which shows in its output
            self._process.stdin.write(job)
            self._process.stdin.close()
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):
                    self._events.put(json.loads(line))
        self._events.put(None)

    def events(self) -> Iterator[Event]:
        """Each event when it comes, up to `end`. Raises Lost when one does not come."""
        patience: float = BOOT
        while True:
            try:
                event = self._events.get(timeout=patience)
            except queue.Empty:
                raise self._lost(f"the machine said nothing for {patience:g} s") from None
            self._show()
            if event is None:
                raise self._lost(None)
            yield event
            if event["event"] == "end":
                return
            patience = self._timeout + GRACE

    def _lost(self, reason: str | None) -> Lost:
        if reason is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END)
        log = self.log()
        self.end()
        *_, last = ["", *log.splitlines()]
        if reason is None:
            said = last.removeprefix("pyublk vm: ") if last.startswith("pyublk vm: ") else ""
            reason = said or f"its pytest ended with exit code {self._process.returncode}"
        return Lost(reason, log)

    def log(self) -> str:
        """What the machine, and its tests with capture off, wrote to the standard error."""
        return self._written_from(0)[-_LOG:].decode(errors="replace").strip()

    def _written_from(self, place: int) -> bytes:
        # The offset is the machine's as well, and stays where it is.
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), max(size - place, 0), place)

    def _show(self) -> None:
        """With capture off: passes on what tests have printed."""
        if self._echo:
            news = self._written_from(self._echoed)
            self._echoed += len(news)
            sys.stderr.write(news.decode(errors="replace"))
            sys.stderr.flush()

    def end(self) -> None:
        """Ends the machine, if it is still there."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reader.join(END)
        self._errors.close()
