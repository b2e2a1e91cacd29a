# SPDX-License-Identifier: MIT
"""Traces as other programs read them: fio's iolog, Chrome's trace events (Perfetto), CSV."""

import csv
import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import IO

from pyublk.traces.requests import Request, Trace
from pyublk.traces.summary import depth

#: Of fio's iolog; it knows no other requests, and a file that is not a disk takes no `trim`.
_FIO = {"read": "read", "write": "write", "discard": "trim", "flush": "sync"}


def to_fio(trace: Trace, file: IO[str]) -> int:
    """Writes fio's iolog, version 3, of a file `disk`; `fio --replay_redirect` names another.

    Returns how many requests were left out, since an iolog cannot name their operation.
    """
    left_out = 0
    time = 1  # microseconds; after a 0, fio does not wait for the next
    file.write("fio version 3 iolog\n0 disk add\n0 disk open\n")
    for one in trace.requests:
        if (word := _FIO.get(one.operation)) is None:
            left_out += 1
            continue
        time = 1 + round(one.arrived * 1e6)
        place = "0 0" if word == "sync" else f"{one.offset} {one.length}"
        file.write(f"{time} disk {word} {place}\n")
    file.write(f"{time} disk close\n")
    return left_out


def to_chrome(trace: Trace, file: IO[str]) -> int:
    """Writes Chrome's trace events, which ui.perfetto.dev and chrome://tracing show: each queue's
    requests in as many lanes as it had at a time, and how many there were. Returns 0."""
    file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
    separator = ""
    for event in _chrome_events(trace):
        file.write(separator + json.dumps(event))
        separator = ",\n"
    file.write("\n]}\n")
    return 0


def _chrome_events(trace: Trace) -> Iterator[dict[str, object]]:
    yield _named("process_name", f"disk {trace.device}", 0)
    seen = set()
    for one, queue, lane in _lanes(trace):
        thread = queue << 16 | lane
        if thread not in seen:
            seen.add(thread)
            yield _named("thread_name", f"queue {queue}, {lane}", thread)
        end = trace.duration if one.answered is None else one.answered
        yield {
            "ph": "X",
            "name": one.operation,
            "cat": "unanswered" if one.latency is None else "error" if one.error else "request",
            "pid": 0,
            "tid": thread,
            "ts": one.arrived * 1e6,
            "dur": (end - one.arrived) * 1e6,
            "args": {
                "offset": one.offset,
                "length": one.length,
                "waited_us": one.waited * 1e6,
                "error": one.error,
                "fua": one.fua,
            },
        }
    for time, have in depth(trace):
        yield {
            "ph": "C",
            "name": "in flight",
            "pid": 0,
            "ts": time * 1e6,
            "args": {"requests": have},
        }


def _named(what: str, name: str, thread: int) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": 0, "tid": thread, "args": {"name": name}}


def _lanes(trace: Trace) -> Iterator[tuple[Request, int, int]]:
    """Each request with its queue and a lane that no other has at the time, the lowest one."""
    free: defaultdict[int, list[int]] = defaultdict(list)
    busy: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for one in trace.requests:
        lanes, used = free[one.queue], busy[one.queue]
        while used and used[0][0] <= one.arrived:
            heapq.heappush(lanes, heapq.heappop(used)[1])
        lane = heapq.heappop(lanes) if lanes else len(used)
        end = float("inf") if one.answered is None else one.answered
        heapq.heappush(used, (end, lane))
        yield one, one.queue, lane


def to_csv(trace: Trace, file: IO[str]) -> int:
    """Writes a line for each request, with the names of `Request`'s fields. Returns 0."""
    table = csv.writer(file, lineterminator="\n")
    table.writerow(Request._fields)
    for one in trace.requests:
        times = {"arrived": f"{one.arrived:.9f}", "waited": f"{one.waited:.9f}"}
        times["latency"] = "" if one.latency is None else f"{one.latency:.9f}"
        table.writerow((one._asdict() | times | {"fua": int(one.fua)}).values())
    return 0


#: Name of a format -> what writes it, and returns how many requests it had to leave out.
FORMATS: dict[str, Callable[[Trace, IO[str]], int]] = {
    "fio": to_fio,
    "chrome": to_chrome,
    "csv": to_csv,
}
