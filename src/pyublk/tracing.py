# SPDX-License-Identifier: MIT
"""Traces: a record of each request of a disk, in files that blktrace's programs read."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pyublk._native import Queue, TraceBuffer
from pyublk.arguments import whole

#: MiB of records, of all queues together, unless told otherwise: 1.4 million, of 470,000 requests.
DEFAULT_MEGABYTES = 64


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a trace has when it is over.

    `events` counts the records in its files, about three for each request; `lost` those for which
    there was no room. `files` has one for each queue, or each thread that serves one.
    """

    events: int
    lost: int
    files: tuple[Path, ...]


class Trace:
    """Records requests until `stop`, the end of `with`, or the end of its disk; see `Device.trace`.

    The records are kept in memory that is taken at the beginning, and written to the files at the
    end: the files may lie on the disk itself, and no request waits for them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        queues: Sequence[Queue],
        *,
        megabytes: int = DEFAULT_MEGABYTES,
        device: int = 0,
    ) -> None:
        whole("megabytes", megabytes, least=1)
        size = (megabytes << 20) // len(queues)
        self._buffers = [
            TraceBuffer(size, device=device, number=number) for number in range(len(queues))
        ]
        self._lock = threading.Lock()
        self._summary: TraceSummary | None = None
        self._failure: OSError | None = None
        self._queues: Sequence[Queue] = ()
        with ExitStack() as opened:
            self._files = [
                opened.enter_context(open(f"{os.fspath(path)}.blktrace.{number}", "wb", 0))
                for number in range(len(queues))
            ]
            self._opened = opened.pop_all()
        self.follow(queues)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files to which the records go, `PATH.blktrace.0` and so on."""
        return tuple(Path(file.name) for file in self._files)

    @property
    def is_over(self) -> bool:
        """Whether it was stopped."""
        return self._summary is not None

    def follow(self, queues: Sequence[Queue]) -> None:
        """Goes on with the queues that serve the disk now, as many as before."""
        with self._lock:
            if self._summary is None:
                self._leave()
                for queue, buffer in zip(queues, self._buffers, strict=True):
                    queue.trace(buffer)
                self._queues = queues

    def _leave(self) -> None:
        for queue in self._queues:
            queue.trace(None)
        self._queues = ()

    def stop(self) -> TraceSummary:
        """Ends the recording, and writes the files. Stopping twice is allowed.

        Raises OSError when they cannot be written; then they are not complete.
        """
        with self._lock:
            if self._summary is None:
                self._leave()
                self._summary = TraceSummary(
                    sum(buffer.kept for buffer in self._buffers),
                    sum(buffer.lost for buffer in self._buffers),
                    self.files,
                )
                self._write()
            if self._failure is not None:
                raise self._failure
            return self._summary

    def _write(self) -> None:
        buffers, self._buffers = self._buffers, []
        try:
            with self._opened:
                for file, buffer in zip(self._files, buffers, strict=True):
                    records = buffer.records()
                    while records:
                        records = records[file.write(records) :]
        except OSError as error:
            self._failure = error

    def end(self) -> None:
        """As `stop`, when the disk ends; what fails is for who stops it."""
        with suppress(OSError):
            self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
