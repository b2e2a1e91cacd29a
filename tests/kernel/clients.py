"""Clients of a disk: what they do, and what they were answered, goes into a history."""

import errno
import os
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from blocks import Blocks
from linear import History
from servers import until

BLOCK = 4096
#: Seconds after which a client that gets no answer has failed.
PATIENCE = 60.0

#: How often each kind of request comes.
ALL = {"read": 6, "write": 6, "fua": 1, "zeroes": 1, "discard": 1, "flush": 1}
READS_AND_WRITES = {"read": 2, "write": 3}


def stamped(value: int, count: int = 1) -> bytes:
    """Blocks that hold a value in each of their words."""
    return struct.pack("<Q", value) * (count * BLOCK // 8)


def values_in(block: bytes) -> set[int]:
    """The values that a block holds: one, unless something was in the middle of it."""
    first = struct.unpack_from("<Q", block)[0]
    return {first} if block == stamped(first) else set(struct.unpack(f"<{BLOCK // 8}Q", block))


def read_blocks(disk: Blocks, history: History, first: int, count: int) -> None:
    called = history.reading()
    data = disk.read(count * BLOCK, first * BLOCK)
    _whole(len(data), count)
    for number in range(count):
        block = data[number * BLOCK :][:BLOCK]
        history.found(called, first + number, values_in(block))


def write_blocks(disk: Blocks, history: History, first: int, count: int, flags: int = 0) -> None:
    value = history.fresh()
    with history.writing(range(first, first + count), value):
        _whole(disk.write(stamped(value, count), first * BLOCK, flags), count)


def _whole(length: int, count: int) -> None:
    """A disk that is being deleted ends before its last block."""
    if length < count * BLOCK:
        raise OSError(errno.EIO, f"only {length} bytes of {count} blocks")


class Clients:
    """A thread for each of `spans`, the blocks that it uses; several may use the same ones.

    `requests`: of each, None for as many as there is time for. `may_fail`: a request may get an
    error; else the first one is what is wrong, and ends them all.
    """

    def __init__(
        self,
        path: str,
        history: History,
        spans: Sequence[range],
        *,
        seed: int,
        kinds: dict[str, int] = ALL,
        requests: int | None = None,
        may_fail: bool = False,
    ) -> None:
        self.path, self.history, self.may_fail = path, history, may_fail
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self.answers = [0] * len(spans)
        self.longest = 0.0  # seconds without any answer; who wants to know of a while sets it back
        self._last_answer = 0.0
        self._kinds, self._requests = kinds, requests
        self._over = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=[number, span, random.Random(seed + number)], daemon=True
            )
            for number, span in enumerate(spans)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE if kind is None else 1)
        if kind is None:
            assert not self.busy(), "a client hangs"
            assert not self.wrong, self.wrong[:5]

    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def goes_on(self, answers: int) -> None:
        """Until each client has had so many answers from now on."""
        before = list(self.answers)

        def has_gone_on() -> bool:
            pairs = zip(self.answers, before, strict=True)
            return bool(self.wrong) or all(now >= then + answers for now, then in pairs)

        until(has_gone_on, 2 * PATIENCE, "clients get answers")
        assert not self.wrong, self.wrong[:5]

    def next_answer(self, before: int) -> None:
        """Waits until there are more than so many answers."""
        until(lambda: sum(self.answers) > before or self.wrong, 2 * PATIENCE, "clients get answers")
        assert not self.wrong, self.wrong[:5]

    def _run(self, number: int, span: range, dice: random.Random) -> None:
        try:
            with Blocks(self.path) as disk:
                while not self._over.is_set() and self.answers[number] != self._requests:
                    (kind,) = dice.choices(list(self._kinds), list(self._kinds.values()))
                    try:
                        self._request(disk, kind, span, dice)
                    except OSError:
                        if not self.may_fail:
                            raise
                        if disk.size == 0:  # deleted, and waiting for us to close it
                            return
                    now = time.monotonic()
                    if self._last_answer:
                        self.longest = max(self.longest, now - self._last_answer)
                    self._last_answer = now
                    self.done[kind] += 1
                    self.answers[number] += 1
        except OSError as error:
            if not self.may_fail:  # else it is gone
                self.wrong.append(f"client {number}: {error}")
                self._over.set()
        except BaseException as error:
            self.wrong.append(f"client {number} ended: {error!r}")
            self._over.set()

    def _request(self, disk: Blocks, kind: str, span: range, dice: random.Random) -> None:
        count = dice.choice([1, 1, 2, 8])
        first = span.start + dice.randrange(len(span) - count + 1)
        where = range(first, first + count)
        if kind == "read":
            read_blocks(disk, self.history, first, count)
        elif kind == "write":
            write_blocks(disk, self.history, first, count)
        elif kind == "fua":
            write_blocks(disk, self.history, first, count, os.RWF_DSYNC)
        elif kind == "zeroes":
            with self.history.writing(where, 0):
                disk.zero_out(first * BLOCK, count * BLOCK)
        elif kind == "discard":  # a target may keep what is discarded
            with self.history.writing(where, 0, "maybe"):
                disk.discard(first * BLOCK, count * BLOCK)
        else:
            disk.sync()
