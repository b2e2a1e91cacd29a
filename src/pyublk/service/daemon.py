# SPDX-License-Identifier: MIT
"""Disks that outlive the command that made them: a server process with a record and a log."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pyublk import errors
from pyublk.launch import fill_descriptors
from pyublk.service import logs, reports
from pyublk.service.records import (
    Record,
    recorded_ids,
    remove_log,
    run_directory,
)
from pyublk.service.spec import DiskSpec

Server = subprocess.Popen[bytes]

#: Seconds that a server gets to clean up when its start is given up.
CLEANUP = 30.0
#: Seconds for the first read of a new disk.
FIRST_READ = 30.0


def start(spec: DiskSpec, ready: Callable[[Record], None] = lambda _: None) -> Record:
    """Starts a server in a new session and returns when its disk can be read and `ready`, which is
    called with its record, has returned.

    The server is a fresh interpreter, so that it shares neither threads nor descriptors with the
    caller. It starts in the caller's directory, where the target's class and files are looked up,
    and goes to `/` once the disk is there. Its output goes to the record's log.

    Raises what kept the disk from being made (see `reports.revive`), or what `ready` raised; then,
    as after a KeyboardInterrupt, no device, process, record or log is left.
    """
    fill_descriptors()  # the server gets descriptors by number, which these must not be
    log, name = logs.begin()
    try:
        server, report = _spawn(log, name)
        try:
            with report:
                record = _await_report(server, spec, report, name)
            _check_readable(record)
            ready(record)
        except BaseException:
            _end(server)
            raise
    except BaseException:
        remove_log(log)
        raise
    finally:
        os.close(log)
    # Reaps the server in callers that live on; init does it for the others.
    threading.Thread(target=server.wait, daemon=True).start()
    return record


def _spawn(log: int, name: str) -> tuple[Server, TextIO]:
    """Starts the server. Its standard input takes the spec, the file gives its report."""
    report, report_end = os.pipe()
    try:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "pyublk.service.server", str(report_end), name],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[report_end],
            start_new_session=True,
            # The server changes its directory, and the variable may be relative to ours.
            env=os.environ | {"PYUBLK_RUN_DIR": str(run_directory())},
        )
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(report_end)
    return server, open(report)


def _await_report(server: Server, spec: DiskSpec, report: TextIO, name: str) -> Record:
    assert server.stdin is not None
    with suppress(BrokenPipeError):  # it has died; what follows tells of it
        server.stdin.write(spec.to_json().encode())
        server.stdin.close()
    text = report.read()
    if not text:
        raise _died(server, name)
    told = json.loads(text)
    if "failed" in told:
        raise reports.revive(told["failed"])
    record = Record.load(told["ready"])
    if record is None:
        raise errors.DeviceLost(f"/dev/ublkb{told['ready']} was deleted as soon as it was there")
    return record


def _died(server: Server, log_name: str) -> errors.DeviceLost:
    code = server.wait()
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    error = errors.DeviceLost(f"the server ended {how} before the disk was there")
    _add_last_lines(error, Path(log_name))
    return error


def _add_last_lines(error: Exception, log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines()[-20:]:
        error.add_note(line)


def _check_readable(record: Record) -> None:
    """Reads the first block, beside this thread: a target that hangs must not hang us."""
    failures: list[OSError] = []

    def read() -> None:
        try:
            descriptor = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.pread(descriptor, 4096, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            failures.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(FIRST_READ)
    if reader.is_alive():
        raise TimeoutError(
            f"{record.spec.target} did not answer the first read of {record.path} "
            f"within {FIRST_READ:g} s"
        )
    if failures:
        error = OSError(
            failures[0].errno,
            f"the first block of {record.path} cannot be read: {failures[0].strerror}",
        )
        if record.log is not None:
            _add_last_lines(error, record.log)
        raise error


def _end(server: Server) -> None:
    """Ends a server that is not wanted; its helper deletes what it could not."""
    until = time.monotonic() + CLEANUP
    while time.monotonic() < until:
        server.terminate()  # again and again: see _Termination in the server
        try:
            server.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
        return
    server.kill()
    server.wait()
    for number in recorded_ids():
        record = Record.read(number)
        if record is not None and record.server.pid == server.pid:
            record.remove()
