# SPDX-License-Identifier: MIT
"""The fio jobs, and what is read from fio's answer."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import programs

#: Bytes of the disks that keep them.
BYTES_SIZE = 64 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """A fio job: `pattern` is its `rw`, `block` bytes a request, `depth` requests in flight.

    With `stride`, there is one request in each so many bytes of a disk of `BYTES_SIZE`, and no
    second one: it shows what the first costs, so it is not repeated.
    """

    name: str
    title: str
    pattern: str
    block: int
    depth: int
    stride: int = 0


JOBS = {
    job.name: job
    for job in (
        Job("randread", "4k random read, depth 64", "randread", 4096, 64),
        Job("randwrite", "4k random write, depth 64", "randwrite", 4096, 64),
        Job("read", "128k sequential read, depth 64", "read", 128 * 1024, 64),
        Job("write", "128k sequential write, depth 64", "write", 128 * 1024, 64),
        Job("read-1m", "1 MiB sequential read, depth 16", "read", 1 << 20, 16),
        Job("latency", "latency: 4k random read, depth 1", "randread", 4096, 1),
        Job("first", "one 4k write in each 64k, depth 64", "write", 4096, 64, 64 << 10),
    )
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What fio says: requests and bytes a second, latencies in seconds."""

    iops: float
    bandwidth: float
    latency_mean: float
    latency_median: float
    latency_p99: float


def command(job: Job, path: str, *, runtime: float, ramp: float, processes: int) -> list[str]:
    """fio's command line for a job on the disk at `path`; `runtime` and `ramp` are seconds."""
    if job.stride:
        pattern = f"{job.pattern}:{job.stride - job.block}"  # so many bytes are left out
        end = [f"--number_ios={BYTES_SIZE // job.stride // processes}"]
    else:
        pattern = job.pattern
        end = ["--time_based", f"--runtime={round(runtime * 1000)}ms"]
        end += [f"--ramp_time={round(ramp * 1000)}ms"]
    return [
        programs.find("fio", "fio"),
        f"--name={job.name}",
        f"--filename={path}",
        f"--rw={pattern}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        "--ioengine=libaio",
        "--direct=1",
        "--norandommap",
        f"--numjobs={processes}",
        "--group_reporting",
        # Of the whole time a request takes: with one processor it may be done before fio's
        # submission returns, and only from there on does the completion latency count.
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        *end,
        "--output-format=json",
    ]


def parse(text: str) -> Outcome:
    """Read fio's JSON. Raises ValueError when a request failed, or none was served."""
    # Warnings may stand before the JSON.
    report: dict[str, Any] = json.loads(text[text.index("{") :])
    (job,) = report["jobs"]
    if job["error"]:
        raise ValueError(f"fio stopped with errno {job['error']}")
    side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
    if not side["total_ios"]:
        raise ValueError("fio served no request in the time it had")
    percentiles = side["lat_ns"]["percentile"]
    return Outcome(
        iops=side["iops"],
        bandwidth=side["bw_bytes"],
        latency_mean=side["lat_ns"]["mean"] / 1e9,
        latency_median=percentiles["50.000000"] / 1e9,
        latency_p99=percentiles["99.000000"] / 1e9,
    )


def run(line: list[str], *, timeout: float | None, unblock: Callable[[], None]) -> Outcome:
    """Run a line of `command`; everything on the disk may be overwritten.

    fio cannot be killed while requests of its are unanswered, so after `timeout` seconds `unblock`
    is called, which makes them fail.

    Raises:
        RuntimeError: fio failed; holds its last words.
    """
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, complaints = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            unblock()
            process.kill()
            raise RuntimeError(f"fio did not end within {timeout:g} s") from None
    try:
        return parse(output)
    except ValueError as error:
        words = complaints.strip().splitlines()
        raise RuntimeError(f"fio failed: {words[-1] if words else error}") from error
