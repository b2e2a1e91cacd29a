# SPDX-License-Identifier: MIT
"""I/O on a mirror's legs by a thread that may be given up, since a leg may hang."""

import errno
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

#: Bytes that are copied at a time.
PIECE = 1 << 20

#: Which leg, and what is done to it.
Step = tuple[int, Callable[[], object]]


class Job(threading.Thread):
    """Takes steps, one after the other, until one fails.

    It has its descriptors for itself, and closes them: when it goes on after a hang, nobody else's
    file can have taken the number.
    """

    def __init__(self, steps: Iterator[Step], descriptors: Sequence[int]) -> None:
        super().__init__(name="mirror-copy", daemon=True)
        self.leg = -1  # where it is, or was when it ended
        self.error = errno.EIO  # 0 when every step is taken
        self._steps = steps
        self._descriptors = descriptors
        self._since = math.inf
        self._given_up = False
        self._lock = threading.Lock()  # a step begins, or the job is given up

    def run(self) -> None:
        try:
            for leg, step in self._steps:
                with self._lock:
                    if self._given_up:
                        return
                    self.leg, self._since = leg, time.monotonic()
                step()
            self.error = 0
        except OSError as error:
            self.error = error.errno or errno.EIO
        finally:
            self.close()

    def close(self) -> None:
        """Of one that was not started; it does so itself when it ends."""
        for fd in self._descriptors:
            os.close(fd)

    def give_up(self, after: float) -> bool:
        """Lets it begin nothing more if its step takes longer than `after` seconds; whether so."""
        with self._lock:
            self._given_up = self.is_alive() and time.monotonic() - self._since > after
            return self._given_up


def copy_steps(
    descriptors: Mapping[int, int],
    source: int,
    legs: Sequence[int],
    alike: Collection[int],
    memory: memoryview,
    offset: int,
    length: int,
) -> Iterator[Step]:
    """Copies a range from one leg to others, by way of `memory`; to those that are `alike` only
    where they differ."""
    for at in range(offset, offset + length, len(memory)):
        piece = memory[: offset + length - at]
        yield source, partial(_transfer, os.preadv, descriptors[source], piece, at)
        for leg in legs:
            if leg in alike:
                yield leg, partial(_write_where_different, descriptors[leg], piece, at)
            else:
                yield leg, partial(_transfer, os.pwritev, descriptors[leg], piece, at)


def sync_steps(descriptors: Mapping[int, int]) -> Iterator[Step]:
    for leg, fd in descriptors.items():
        yield leg, partial(os.fsync, fd)


def _write_where_different(fd: int, piece: memoryview, offset: int) -> None:
    """A sparse file stays sparse."""
    there = memoryview(mmap.mmap(-1, len(piece)))  # page-aligned, for direct I/O
    try:
        _transfer(os.preadv, fd, there, offset)
        if there.tobytes() == piece.tobytes():
            return
    except OSError:
        pass  # what cannot be read may yet be written
    _transfer(os.pwritev, fd, piece, offset)


def _transfer(call: Any, fd: int, memory: memoryview, offset: int) -> None:
    while memory:
        done = call(fd, [memory], offset)
        if not done:
            raise OSError(errno.EIO, f"the file ends at {offset}")
        memory, offset = memory[done:], offset + done
