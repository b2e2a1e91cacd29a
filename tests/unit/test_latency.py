"""How long requests take, as histograms: their arithmetic, and what a disk counts."""

import asyncio
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyublk import DeviceStats, Histogram, Queue, Target
from pyublk.stats import OPERATIONS, latency_of, sum_latency
from pyublk.targets import Null, Ram
from pyublk.testing import Disk
from pyublk.uapi import Op

buckets = st.dictionaries(st.integers(1, 1 << 40), st.integers(1, 1000), max_size=8).map(
    lambda counts: tuple(sorted(counts.items()))
)
histograms = st.builds(Histogram, buckets, st.integers(0, 1 << 50))


class Slow(Target):
    """Each operation takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(size=1 << 20)
        self.seconds = seconds

    def read(self, offset: int, buffer: memoryview) -> None:
        time.sleep(self.seconds)

    def write(self, offset: int, buffer: memoryview) -> None:
        if offset:
            raise OSError(28, "full")

    def flush(self) -> None:
        time.sleep(self.seconds)


class SlowAsync(Target):
    """Its reads suspend."""

    def __init__(self) -> None:
        super().__init__(size=1 << 20, read_only=True)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0.01)


def test_a_quantile_is_the_upper_bound_of_a_bucket() -> None:
    histogram = Histogram(((1000, 1), (2000, 98), (8000, 1)), 200_000)
    assert histogram.count == 100
    assert histogram.total == pytest.approx(0.0002)
    assert histogram.buckets == ((1e-6, 1), (2e-6, 98), (8e-6, 1))
    assert histogram.quantile(0) == 1e-6
    assert histogram.quantile(0.01) == 1e-6
    assert histogram.quantile(0.011) == 2e-6
    assert histogram.quantile(0.99) == 2e-6
    assert histogram.quantile(1) == 8e-6
    assert math.isnan(Histogram().quantile(0.5))
    for wrong in (-0.1, 1.1, 99, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            histogram.quantile(wrong)


@given(histograms, histograms)
def test_what_is_added_can_be_taken_away(a: Histogram, b: Histogram) -> None:
    both = a + b
    assert both == b + a
    assert both.count == a.count + b.count
    assert both - a == b
    assert both - both == Histogram()
    assert Histogram.from_told(both.told()) == both


def test_only_an_earlier_snapshot_is_taken_away() -> None:
    with pytest.raises(ValueError, match="earlier snapshot"):
        Histogram(((1000, 1),), 900) - Histogram(((1000, 2),), 1800)


def test_every_operation_is_there_from_the_start() -> None:
    assert tuple(DeviceStats(()).latency) == OPERATIONS
    with Disk(Null(size=1 << 20)) as disk:
        found = disk.stats().latency
        assert tuple(found) == OPERATIONS
        assert all(histogram.count == 0 for histogram in found.values())


def test_requests_are_told_apart_by_operation() -> None:
    with Disk(Ram(size=1 << 20)) as disk:
        for _ in range(5):
            disk.pread(4096, 0)
        for _ in range(3):
            disk.pwrite(bytes(4096), 0)
        disk.discard(0, 4096)
        disk.write_zeroes(0, 4096)
        found = disk.stats()
    counts = {name: histogram.count for name, histogram in found.latency.items()}
    assert counts == {
        "read": 5,
        "write": 3,
        "flush": 0,
        "discard": 1,
        "write_zeroes": 1,
        "other": 0,
    }
    assert found.total.requests == sum(counts.values())
    assert all(h.total > 0 for h in found.latency.values() if h.count)


def test_a_latency_is_that_of_the_handler_and_failures_count() -> None:
    with Disk(Slow(0.02)) as disk:
        disk.pread(4096, 0)
        before = disk.stats().latency["read"]
        disk.pread(8192, 4096)
        disk.flush()
        with pytest.raises(OSError, match="WRITE at 4096 failed"):
            disk.pwrite(bytes(4096), 4096)
        found = disk.stats().latency
    since = found["read"] - before
    assert since.count == 1
    assert since.quantile(1) >= 0.02
    assert since.total >= 0.02
    assert since.quantile(1) <= since.total * 1.25
    assert found["flush"].quantile(0.5) >= 0.02
    assert found["write"].count == 1
    assert found["write"].total < found["flush"].total


def test_a_coroutine_that_suspends_is_measured_to_its_end() -> None:
    with Disk(SlowAsync(), max_io_size=4096) as disk:
        disk.pread(32768, 0)
        found = disk.stats().latency["read"]
    assert found.count == 8
    assert found.quantile(0) >= 0.01


def test_the_answers_of_other_threads_count() -> None:
    with Queue.loopback(depth=4, buffer_size=4096) as queue:
        queue.fetch()
        for tag in range(4):
            queue.inject(tag, Op.WRITE, 0, 4096)
        ios = queue.wait(0)
        assert ios is not None
        thread = threading.Thread(target=lambda: [io.complete() for io in ios])
        thread.start()
        thread.join()
        queue.wait(0)
        assert latency_of(queue.latency())["write"].count == 4


def test_latencies_of_a_closed_queue_are_its_last() -> None:
    with Queue.loopback(depth=2, buffer_size=4096) as queue:
        queue.fetch()
        queue.inject(0, Op.READ, 0, 4096)
        found = queue.wait(0)
        assert found is not None
        found[0].complete()
        before = latency_of(queue.latency())
    assert latency_of(queue.latency()) == before
    assert before["read"].count == 1


def test_sessions_add_up() -> None:
    one = DeviceStats((), {**DeviceStats(()).latency, "read": Histogram(((1000, 2),), 1900)})
    both = one.added(one).added(DeviceStats(()))
    assert both.latency["read"] == Histogram(((1000, 4),), 3800)
    assert tuple(both.latency) == OPERATIONS
    assert sum_latency(()) == DeviceStats(()).latency
