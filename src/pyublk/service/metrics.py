# SPDX-License-Identifier: MIT
"""What Prometheus is told of the disks of this machine, by prometheus_client (extra `metrics`)."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from threading import Lock

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pyublk.service.listener import version
from pyublk.service.observing import Sample
from pyublk.stats import Histogram
from pyublk.targets.record import LegState
from pyublk.uapi import DeviceStatus

#: Upper bounds of the buckets in nanoseconds, from 1 µs to 17 s. Servers' own buckets have these
#: bounds and others between.
BOUNDS_NS = tuple(1 << power for power in range(10, 35))

_REQUESTS = {
    "read": "reads",
    "write": "writes",
    "flush": "flushes",
    "discard": "discards",
    "write_zeroes": "write_zeroes",
    "other": "others",
}
_BYTES = {
    "read": "bytes_read",
    "write": "bytes_written",
    "discard": "bytes_discarded",
    "write_zeroes": "bytes_zeroed",
}


class DiskCollector(Collector):
    """Metrics of samples, which are taken when Prometheus asks.

    The label `device` is as node_exporter has it: `ublkb0`.
    """

    def __init__(self, samples: Callable[[], list[Sample]]) -> None:
        self._samples = samples
        self._lock = Lock()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            samples = self._samples()
        build = InfoMetricFamily("pyublk_exporter", "The exporter.")
        build.add_metric([], {"version": version()})
        yield build
        yield from _of_disks(samples)
        yield from _of_servers([one for one in samples if one.target is not None])
        answering = [one for one in samples if one.answers]
        yield from _of_requests(answering)
        yield _latencies(answering)


def _device(one: Sample) -> str:
    return one.path.removeprefix("/dev/")


def _of_disks(samples: list[Sample]) -> Iterator[Metric]:
    info = InfoMetricFamily("pyublk_disk", "A ublk disk and its target.", labels=["device"])
    state = GaugeMetricFamily(
        "pyublk_disk_state", "1 for the state that the disk is in.", labels=["device", "state"]
    )
    size = GaugeMetricFamily("pyublk_disk_size_bytes", "Size of the disk.", labels=["device"])
    legs = GaugeMetricFamily(
        "pyublk_mirror_legs", "Legs of a mirror in each state.", labels=["device", "state"]
    )
    for one in samples:
        info.add_metric([_device(one)], {"target": one.target or ""})
        size.add_metric([_device(one)], one.size)
        for status in DeviceStatus:
            name = status.name.lower()
            state.add_metric([_device(one), name], float(name == one.state))
        found = [leg["state"] for leg in (one.status or {}).get("legs", ())]
        for name in map(str, LegState if found else ()):
            legs.add_metric([_device(one), name], found.count(name))
    yield from (info, state, size, legs)


def _of_servers(samples: list[Sample]) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "pyublk_server_up", "1 if the disk's server of `pyublk add` answers.", labels=["device"]
    )
    restarts = CounterMetricFamily(
        "pyublk_server_restarts", "Restarts of the disk's server by itself.", labels=["device"]
    )
    for one in samples:
        up.add_metric([_device(one)], float(one.answers))
        restarts.add_metric([_device(one)], one.restarts or 0)
    yield from (up, restarts)


def _of_requests(samples: list[Sample]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "pyublk_requests",
        "Requests that have arrived at the disk's server.",
        labels=["device", "operation"],
    )
    moved = CounterMetricFamily(
        "pyublk_request_bytes", "Bytes of these requests.", labels=["device", "operation"]
    )
    errors = CounterMetricFamily(
        "pyublk_request_errors", "Requests that the server has failed.", labels=["device"]
    )
    fallbacks = CounterMetricFamily(
        "pyublk_data_path_fallbacks",
        "Requests that had to take another data path.",
        labels=["device"],
    )
    held = GaugeMetricFamily(
        "pyublk_requests_in_flight",
        "Requests that the server has and has not answered.",
        labels=["device"],
    )
    for one in samples:
        for operation, name in _REQUESTS.items():
            requests.add_metric([_device(one), operation], getattr(one.counters, name))
        for operation, name in _BYTES.items():
            moved.add_metric([_device(one), operation], getattr(one.counters, name))
        errors.add_metric([_device(one)], one.counters.errors)
        fallbacks.add_metric([_device(one)], one.counters.fallbacks)
        held.add_metric([_device(one)], one.counters.held)
    yield from (requests, moved, errors, fallbacks, held)


def _latencies(samples: list[Sample]) -> Metric:
    latency = HistogramMetricFamily(
        "pyublk_request_duration_seconds",
        "Time from a request's arrival at the server to its answer.",
        labels=["device", "operation"],
    )
    for one in samples:
        for operation, histogram in one.latency.items():
            latency.add_metric([_device(one), operation], _buckets(histogram), histogram.total)
    return latency


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, and the same ones each time, whichever have counted something."""
    counts = [0] * (len(BOUNDS_NS) + 1)
    for upper, count in histogram.buckets_ns:
        counts[bisect_left(BOUNDS_NS, upper)] += count
    bounds = [*(str(bound / 1e9) for bound in BOUNDS_NS), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))
