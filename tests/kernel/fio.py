"""Runs fio and reads its report."""

import json
import subprocess
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What the jobs of one run did: requests and bytes, summed over the jobs."""

    reads: int
    writes: int
    bytes_read: int
    bytes_written: int

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Report":
        jobs = answer["jobs"]
        for job in jobs:
            assert job["error"] == 0, f"fio job {job['jobname']}: error {job['error']}"
        return cls(
            reads=sum(job["read"]["total_ios"] for job in jobs),
            writes=sum(job["write"]["total_ios"] for job in jobs),
            bytes_read=sum(job["read"]["io_bytes"] for job in jobs),
            bytes_written=sum(job["write"]["io_bytes"] for job in jobs),
        )


def fio(path: str, *, timeout: float = 55, **options: object) -> Report:
    """One run on `path`, by default direct I/O through libaio.

    Options are fio's, with None for one without a value. Raises AssertionError with what fio said.
    """
    settings = {"ioengine": "libaio", "direct": 1, "thread": None, "randseed": 1, **options}
    command = ["fio", "--name=job", f"--filename={path}", "--output-format=json"]
    for name, value in settings.items():
        command.append(f"--{name}" if value is None else f"--{name}={value}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    # Complaints, if any, come before the report.
    return Report.of(json.loads(done.stdout[done.stdout.index("{") :]))


def verified(path: str, **options: Any) -> Report:
    """Writes blocks with checksums, then reads and checks all of them."""
    return fio(path, verify="crc32c", verify_fatal=1, do_verify=1, **options)
