# SPDX-License-Identifier: MIT
"""Processes named so that a reused pid is never taken for the one that was meant."""

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyublk.openers import start_time


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid and its start time: together they name one process for as long as the machine runs."""

    pid: int
    started: int

    @classmethod
    def own(cls) -> Self:
        """The calling process."""
        started = start_time(os.getpid())
        assert started is not None
        return cls(os.getpid(), started)

    def open(self) -> "Process | None":
        """A handle on it, or None when it has ended."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Looked at with the handle in hand: from here on the pid cannot change its meaning.
        if start_time(self.pid) != self.started:
            os.close(pidfd)
            return None
        return Process(self.pid, pidfd)


def unit_of(pid: int, *, proc: Path = Path("/proc")) -> str | None:
    """The service of systemd's that a process belongs to; None: none that can be told."""
    try:
        groups = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        return None
    units = [part for part in groups.split("/") if part.strip().endswith(".service")]
    return units[-1].strip() if units else None


class Process:
    """A handle on a process, which need not be a child (pidfd_open(2)). Use `with`."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._pidfd)

    def wait(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(timeout * 1000))

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; a process that has ended is left in peace."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return
