# SPDX-License-Identifier: MIT
"""Disks that outlive the command that made them: a server process with a record and a log."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pyublk import errors
from pyublk.launch import fill_descriptors
from pyublk.service import logs, reports
from pyublk.service.channel import (
    ChannelError,
    Client,
    ask,
    check_server_name,
    is_abandoned,
    server_place,
)
from pyublk.service.plan import DiskSpec, TakeOver, check_shareable, to_request
from pyublk.service.records import (
    Record,
    make_run_directory,
    recorded_ids,
    remove_log,
    run_directory,
    server_log_place,
)

Server = subprocess.Popen[bytes]
T = TypeVar("T")

SERVER = [sys.executable, "-P", "-m", "pyublk.service.server"]

#: Seconds that a server gets to clean up when its start is given up.
CLEANUP = 30.0
#: How often a server may be found ending when it is asked for another disk.
ATTEMPTS = 100
#: Seconds for the first read of a new disk.
FIRST_READ = 30.0


def start(
    spec: DiskSpec, ready: Callable[[Record], None] = lambda _: None, *, server: str | None = None
) -> Record:
    """Starts a server in a new session and returns when its disk can be read and `ready`, which is
    called with its record, has returned. `server`: the name of one that may serve other disks too;
    it is started if there is none.

    The server is a fresh interpreter, so that it shares neither threads nor descriptors with the
    caller. It starts in the caller's directory, where the target's class and files are looked up,
    and goes to `/` once the disk is there. Its output goes to the record's log.

    Raises what kept the disk from being made (see `reports.revive`), or what `ready` raised; then,
    as after a KeyboardInterrupt, no device, process, record or log is left.
    """
    if server is not None:
        return _add_to(check_server_name(server), spec, ready)

    def begun(told: int) -> Record:
        record = _record_of(told)
        check_readable(record)
        ready(record)
        return record

    return _start_process(json.dumps(to_request(spec, None)), begun)


def take_over(disk: TakeOver, spec: DiskSpec, *, server: str | None = None) -> Record:
    """Starts a server for a disk that waits for one, or has the one named `server` serve it. The
    spec's target is looked up in the caller's directory.

    Raises what kept the disk from being served (see `reports.revive`, `Device.take_over`); then, as
    after a KeyboardInterrupt, it waits on, or is served. It is not stopped in any case.
    """
    if server is None:
        return _start_process(json.dumps(to_request(spec, disk)), _record_of, end=_kill)
    return _record_of(_ask_to_serve(check_server_name(server), spec, disk))


def _start_process(
    text: str,
    begun: Callable[[Any], T],
    server: str | None = None,
    *,
    end: Callable[[Server], None] | None = None,
) -> T:
    """Starts a server, and returns what `begun` makes of its report. When that raises, `end` ends
    the server; by default nothing is left of it then."""
    fill_descriptors()  # the server gets descriptors by number, which these must not be
    log, name = logs.begin()
    try:
        process, report = _spawn(log, name, server)
        try:
            with report:
                told = _await_report(process, text, report, name)
            result = begun(told)
        except BaseException:
            (end or _end)(process)
            raise
    except BaseException:
        remove_log(log)
        raise
    finally:
        os.close(log)
    # Reaps the server in callers that live on; init does it for the others.
    threading.Thread(target=process.wait, daemon=True).start()
    return result


def _add_to(name: str, spec: DiskSpec, ready: Callable[[Record], None]) -> Record:
    """Has the server of that name serve it, which is started if there is none."""
    record = _record_of(_ask_to_serve(name, spec, None))
    try:
        check_readable(record)
        ready(record)
    except BaseException:
        with suppress(ChannelError):
            ask(record, "stop", timeout=CLEANUP)
        raise
    return record


def _ask_to_serve(name: str, spec: DiskSpec, disk: TakeOver | None) -> int:
    """The id of the disk that the server of that name serves now."""
    check_shareable(spec)
    wanted = to_request(spec, disk) | {"directory": os.getcwd()}
    for _ in range(ATTEMPTS):
        with _server_of(name) as client:
            try:
                return int(client.ask("add", timeout=None, **wanted)["id"])
            except errors.DeviceClosed:  # it is ending: there will be another
                time.sleep(0.1)
                continue
            except ChannelError as error:
                if not server_place(name).exists():  # it was ending when it was asked
                    time.sleep(0.1)
                    continue
                _add_last_lines(error, server_log_place(name))
                raise
    raise errors.DeviceBusy(f"the server {name} is ending, but has not ended yet: see its log")


def _server_of(name: str) -> Client:
    """A connection to it; two who want the same one at the same time get the same one."""
    directory = os.open(make_run_directory(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        place = server_place(name)
        try:
            return Client(place)
        except ChannelError:
            if place.exists() and not is_abandoned(place):
                raise
        return _start_process("", lambda _: Client(place), name)
    finally:
        os.close(directory)


def _spawn(log: int, name: str, server: str | None) -> tuple[Server, TextIO]:
    """Starts the server. Its standard input takes the spec, the file gives its report."""
    report, report_end = os.pipe()
    try:
        process = subprocess.Popen(
            [*SERVER, str(report_end), name, *([] if server is None else [server])],
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
    return process, open(report)


def _await_report(server: Server, spec: str, report: TextIO, name: str) -> Any:
    assert server.stdin is not None
    with suppress(BrokenPipeError):  # it has died; what follows tells of it
        server.stdin.write(spec.encode())
        server.stdin.close()
    text = report.read()
    if not text:
        raise _died(server, name)
    told = json.loads(text)
    if "failed" in told:
        raise reports.revive(told["failed"])
    return told["ready"]


def _record_of(device: int) -> Record:
    record = Record.load(device)
    if record is None:
        raise errors.DeviceLost(f"/dev/ublkb{device} was deleted right after it was made")
    return record


def _died(server: Server, log_name: str) -> errors.DeviceLost:
    code = server.wait()
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    error = errors.DeviceLost(f"the server ended {how} before the disk was there")
    _add_last_lines(error, Path(log_name))
    return error


def _add_last_lines(error: Exception, log: Path) -> None:
    with suppress(FileNotFoundError):
        for line in log.read_text(errors="replace").splitlines()[-20:]:
            error.add_note(line)


def check_readable(record: Record) -> None:
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
            f"{record.plan.target} did not answer the first read of {record.path} "
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


def _kill(server: Server) -> None:
    server.kill()
    server.wait()


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
    left = [record for number in recorded_ids() if (record := Record.read(number)) is not None]
    left = [record for record in left if record.server.pid == server.pid]
    for record in left:
        record.not_restarted()
    _kill(server)
    for record in left:
        record.remove()
