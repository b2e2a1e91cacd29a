"""What threads other than a queue's own may do at any time, with the GIL or without."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import pyublk
from pyublk._native import IO, Buffers, Handlers, Queue
from pyublk.errors import StaleIO
from pyublk.uapi import Op

DEPTH = 8


def beside(*calls: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def ended(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_threads_race_to_complete_a_request_and_one_wins() -> None:
    wins = [0, 0, 0]
    losses = [0, 0, 0]

    def complete_all(who: int, batch: list[IO], start: threading.Barrier) -> None:
        start.wait(30)
        for io in batch:
            try:
                io.buffer[:1] = bytes([who])
                io.complete()
            except (StaleIO, ValueError):  # ValueError: its view was released between the two
                losses[who] += 1
            else:
                wins[who] += 1

    rounds = 100
    with Queue.loopback(depth=DEPTH, buffer_size=4096) as queue:
        queue.fetch()
        for number in range(rounds):
            for tag in range(DEPTH):
                queue.inject(tag, Op.READ, number * 512, 512)
            batch = queue.wait(0)
            assert batch is not None
            assert len(batch) == DEPTH
            start = threading.Barrier(3)
            threads = beside(*(partial(complete_all, who, batch, start) for who in range(3)))
            while queue.held:
                queue.wait(1)
            ended(threads)
            assert all(queue.answered(tag) == 512 for tag in range(DEPTH))
    assert sum(wins) == rounds * DEPTH
    assert sum(losses) == 2 * rounds * DEPTH


def test_an_answer_that_comes_late_is_not_given_to_the_tags_next_request() -> None:
    with Queue.loopback(depth=1, buffer_size=4096) as queue:
        queue.fetch()
        for number in range(50):
            queue.inject(0, Op.READ, 0, 512)
            (late,) = queue.wait(0) or []
            queue.fail_held(5)
            queue.wait(0)
            queue.inject(0, Op.READ, 512 * (number + 1), 512)
            (io,) = queue.wait(0) or []
            with ThreadPoolExecutor(1) as other, pytest.raises(StaleIO):
                other.submit(late.complete).result(30)
            assert not io.completed
            assert io.offset == 512 * (number + 1)
            io.complete()


def test_a_queue_is_closed_while_others_use_it() -> None:
    there: list[Queue] = []
    held: list[IO] = []
    over = threading.Event()

    def use() -> None:
        while not over.is_set():
            for queue in there[-1:]:
                queue.wake()
                queue.counters()
                queue.fail_held(5)
                assert queue.held <= DEPTH

    def look() -> None:
        while not over.is_set():
            for io in held[-DEPTH:]:
                try:
                    assert io.offset == io.tag * 512
                    io.buffer[:1] = b"x"
                except (StaleIO, ValueError):
                    pass
                except AssertionError:
                    # Between the check and the look the request went: there is nothing behind it.
                    assert io.completed

    threads = beside(use, look, look)
    for _ in range(100):
        buffers = Buffers(DEPTH, 4096)
        with Queue(-1, depth=DEPTH, buffer_size=4096, buffers=buffers) as queue:
            queue.fetch()
            there.append(queue)
            for tag in range(DEPTH):
                queue.inject(tag, Op.READ, tag * 512, 512)
            held.extend(queue.wait(0) or [])
            queue.wait(0.001)
    over.set()
    ended(threads)
    assert all(io.completed for io in held)


class SlowReads(pyublk.Target):
    def read(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.02)

    def write(self, offset: int, data: memoryview) -> None:
        pass


def test_the_answers_of_a_slow_handler_do_not_wait_for_the_batch() -> None:
    handlers = Handlers(SlowReads(size=1 << 20), print)
    with Queue.loopback(depth=DEPTH, buffer_size=4096) as queue:
        queue.fetch()
        for number in range(2):
            for tag in range(DEPTH):
                queue.inject(tag, Op.READ, number * 512, 512)
            for tag in range(DEPTH):  # a round for each
                assert queue.held == DEPTH - tag
                queue.serve(handlers)
                assert queue.answered(tag) == 512
            assert queue.held == 0
