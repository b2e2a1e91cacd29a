# SPDX-License-Identifier: MIT
"""A disk claimed and flushed by a process that has nothing to do with its server."""

import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from pyublk import claimant, errors

#: Seconds for the process to begin, on a machine that is very busy: no disk is to blame for them.
BEGINS = 60.0
#: Seconds for a process that has nothing to wait for to end.
_END = 5.0


def partitions(name: str, *, sys: Path = Path("/sys")) -> list[str]:
    """The names of a disk's partitions."""
    disk = sys / "class/block" / name
    return sorted(part.parent.name for part in disk.glob(f"{name}*/partition"))


class Claim:
    """Opens a disk in a process of its own, exclusively if need be, and flushes it there.

    Nothing can interrupt either where the disk's server hangs: that process may stay behind until
    the server ends, but its caller does not. The disk is held until `close`, or until it is gone.
    """

    def __init__(self, node: str, *, exclusive: bool) -> None:
        options = ["--exclusive"] if exclusive else []
        parts = [f"/dev/{part}" for part in partitions(os.path.basename(node))]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", claimant.__file__, node, *options, *parts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._told = b""

    @property
    def pid(self) -> int:
        """The process that holds the disk."""
        return self._process.pid

    def step(self, seconds: float) -> int | None:
        """The errno of the next step, to begin, to open and then to flush, 0 for success; None when
        it is not over within so many seconds."""
        assert self._process.stdout is not None
        if b"\n" not in self._told:
            poller = select.poll()
            poller.register(self._process.stdout, select.POLLIN)
            if not poller.poll(seconds * 1000):
                return None
            more = os.read(self._process.stdout.fileno(), 64)
            if not more:
                raise errors.InternalError(
                    f"process {self.pid}, which claims a disk, ended untimely"
                )
            self._told += more
        number, _, self._told = self._told.partition(b"\n")
        return int(number)

    def close(self) -> None:
        """Lets the disk go."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            threading.Thread(target=self._process.wait, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
