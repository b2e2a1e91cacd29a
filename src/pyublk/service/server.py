# SPDX-License-Identifier: MIT
"""Serving a spec until a signal comes or the disk ends; also the program that a daemon runs."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pyublk.device import Device
from pyublk.interruptions import handled
from pyublk.options import DISK
from pyublk.service import logs, reports
from pyublk.service.processes import ProcessId
from pyublk.service.records import (
    FAILED,
    Record,
    log_place,
    make_run_directory,
    memory_place,
    remove_log,
)
from pyublk.service.spec import DiskSpec
from pyublk.sharing import SharedMemory
from pyublk.stats import QueueStats
from pyublk.target import Target

log = logging.getLogger("pyublk.server")

#: Seconds between two looks at what is to be told, and at how long the log is.
LOOK_AFTER = 1.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGINT, SIGTERM, or SIGHUP (the terminal has gone) came."""


class _Termination:
    """Lets _SIGNALS raise Terminated inside `raising`; elsewhere they are only noted.

    Stopping a disk must not be cut short. Every signal raises, not just the first: Python drops an
    exception that happens to be raised in a finalizer.
    """

    def __init__(self) -> None:
        self.came = False
        self._raises = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        if self._raises:
            raise Terminated

    def handled(self) -> AbstractContextManager[None]:
        # Under nohup a disk outlives its terminal.
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [one for one in _SIGNALS if one != signal.SIGHUP or not nohup]
        return handled(dict.fromkeys(numbers, self._note))

    @contextmanager
    def raising(self) -> Iterator[None]:
        self._raises = True
        try:
            if self.came:
                raise Terminated
            yield
        finally:
            self._raises = False


@dataclass(frozen=True, slots=True)
class ServeResult:
    """What a server did: counters summed over its queues, and for how many `seconds`."""

    total: QueueStats
    seconds: float


def serve(
    spec: DiskSpec, *, log_file: Path | None, ready: Callable[[Record], None]
) -> ServeResult | None:
    """Serves until one of _SIGNALS, or the end of the disk by another hand. Main thread only.

    `ready` is called, once the disk is there, with its record, which is in the run directory while
    the disk is. `log_file` is moved to its place beside the record. Returns None when a signal came
    before the disk was there. Raises what `DiskSpec.device` and `Device` raise.
    """
    make_run_directory()
    termination = _Termination()
    device: Device | None = None
    record: Record | None = None
    began: float | None = None
    memory: SharedMemory | None = None
    with termination.handled():
        try:
            with termination.raising():
                device = spec.device()
                device.start()
            began = time.monotonic()
            record = _record(spec, device, log_file)
            record.write()
            memory = _share(spec, device)  # until the end
            keep = _keep_status(record, device.target, _failed(device))
            ready(record)
            with termination.raising():
                while not device.wait(LOOK_AFTER):
                    keep()
                    if log_file is not None:
                        logs.trim(sys.stderr.fileno())
        except Terminated:
            pass
        finally:
            try:
                if device is not None:
                    device.stop()
            finally:
                del memory  # its number is what the link names
                if record is not None:
                    record.remove()
    if device is None or began is None:
        return None
    return ServeResult(device.stats().total, time.monotonic() - began)


def _record(spec: DiskSpec, device: Device, log_file: Path | None) -> Record:
    return Record(
        id=device.id,
        cookie=device.info().cookie,
        server=ProcessId.own(),
        spec=spec,
        log=log_file and log_file.replace(log_place(device.id)),
        data_path=str(device.data_path),
    )


def _share(spec: DiskSpec, device: Device) -> SharedMemory | None:
    """Shares memory with clients, if that was asked for, by a link that they can open."""
    if not spec.disk.get("shared_memory"):
        return None
    size = spec.disk.get("shared_memory_size", DISK["shared_memory_size"].default)
    memory = device.share(size)
    place = memory_place(device.id)
    place.unlink(missing_ok=True)
    place.symlink_to(f"/proc/{os.getpid()}/fd/{memory.fd}")
    return memory


def _failed(device: Device) -> Callable[[], int]:
    return lambda: device.stats().total.errors


def _keep_status(
    record: Record, target: Target, failed: Callable[[], int] = lambda: 0
) -> Callable[[], None]:
    """From now on, what the target says of itself is beside the record, as soon as it says so, and
    with it how many requests have failed, whenever what is returned is called."""
    lock = threading.Lock()
    written = 0

    def keep() -> None:
        nonlocal written
        with lock:
            status = target.status()
            if count := failed():
                status = (status or {}) | {FAILED: count}
            written = count
            try:
                if status is not None:
                    record.write_status(status)
            except OSError as error:  # a full /run is no reason to stop serving
                log.warning("the status of %s cannot be written down: %s", record.path, error)

    def keep_failed() -> None:
        if failed() != written:
            keep()

    target.status_changed = keep
    keep()
    return keep_failed


def _run_daemon(report_fd: int, log_file: Path) -> int:
    """Reads a spec from the standard input, serves it, and reports to a pipe how its start went."""
    os.set_inheritable(report_fd, False)
    spec = DiskSpec.from_json(sys.stdin.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    report = open(report_fd, "w")  # noqa: SIM115 - closed by the report, when it is known
    live: Record | None = None

    def ready(record: Record) -> None:
        nonlocal live
        log.info("serving %s as %s by %s", spec.target, record.path, record.data_path)
        # The target has opened its files by now; no directory is to be kept busy for ever.
        os.chdir("/")
        with report:
            json.dump({"ready": record.id}, report)
        live = record

    try:
        served = serve(spec, log_file=log_file, ready=ready)
    except BaseException as error:
        log.error("the server ends with an error", exc_info=error)
        if live is None and not report.closed:
            with report:
                json.dump({"failed": reports.describe(error)}, report)
        return 1
    if served is not None:
        log.info("stopped after %d requests", served.total.requests)
    if live is not None and live.log is not None:
        remove_log(sys.stderr.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(_run_daemon(int(sys.argv[1]), Path(sys.argv[2])))
