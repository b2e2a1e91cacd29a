# SPDX-License-Identifier: MIT
"""Serving a spec until a signal comes or the disk ends; also the program that a daemon runs."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pyublk.device import Device
from pyublk.interruptions import handled
from pyublk.service import logs, reports, rights, title
from pyublk.service.hosting import Host, Served, made, record_of
from pyublk.service.listener import Listener
from pyublk.service.plan import DiskSpec, TakeOver, of_request
from pyublk.service.predecessor import Predecessor
from pyublk.service.records import (
    Record,
    log_place,
    make_run_directory,
    server_log_place,
)
from pyublk.stats import QueueStats
from pyublk.target import Target

log = logging.getLogger("pyublk.server")

#: Seconds between two looks at how long the log is.
LOOK_AFTER = 1.0
#: Seconds between two looks at whether one of several disks has ended.
LOOK_AFTER_SEVERAL = 0.25

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


def nothing(_: object) -> None:
    """Does it."""


def at_once(_: object) -> AbstractContextManager[None]:
    """What a disk's end waits for, when nothing is in its way."""
    return nullcontext()


def serve(
    spec: DiskSpec,
    *,
    log_file: Path | None,
    ready: Callable[[Record], None],
    take_over: TakeOver | None = None,
    prepare: Callable[[Target], None] = nothing,
    look: Callable[[Device], None] = nothing,
    ending: Callable[[Served], AbstractContextManager[None]] = at_once,
) -> ServeResult | None:
    """Serves until one of _SIGNALS, or the end of the disk by another hand. Main thread only.

    `ready` is called, once the disk is there, with its record, which is in the run directory while
    the disk is. `log_file` is moved to its place beside the record. `take_over`: a disk that is
    there, and waits for a server. `prepare` is called with the target before it is opened, and
    `look` every LOOK_AFTER seconds. The disk is stopped within `ending` when a signal came; None is
    returned if it came before that was there. Raises what `DiskSpec.device`, `Device`, `rights` do.
    """
    make_run_directory()
    if spec.disk.get("root_storage"):
        _be_spared(spec)
    rights.begin(spec.disk.get("user"))
    termination = _Termination()
    device: Device | None = None
    served: Served | None = None
    listener = Listener()
    before = None if take_over is None or not take_over.served else Predecessor(take_over.device)
    with termination.handled():
        try:
            with termination.raising():
                device, restarted = made(
                    spec,
                    take_over,
                    background=log_file is not None,
                    prepare=prepare,
                    ask=None if before is None else before.ask,
                )
                device.start()
            record = record_of(spec, device, log_file and log_place(device.id), restarted)
            served = Served(device, record, listener)
            _have(served, log_file, before)
            ready(served.record)
            with termination.raising():
                while not device.wait(LOOK_AFTER):
                    look(device)
        except Terminated:
            if served is not None:
                with ending(served):
                    served.stop()
        finally:
            try:
                if served is not None:
                    served.stop()
                elif device is not None:
                    device.stop()
            finally:
                listener.close_all()
    if served is None:
        return None
    return ServeResult(served.device.stats().total, time.monotonic() - served.began)


def _be_spared(spec: DiskSpec) -> None:
    if spec.disk.get("user") is not None or os.geteuid() != 0:
        raise ValueError(
            "root_storage is for a server that is root's, since systemd spares no other: leave it "
            "out, or user"
        )
    title.be_spared()


def _have(served: Served, log_file: Path | None, before: Predecessor | None) -> None:
    """What a disk that is there has besides: its log in its place, its name in `ps`, no other
    server, and no more rights than it needs."""
    record = served.record
    if log_file is not None:
        log_file.replace(log_place(record.id))
    title.show(*title.of_disk(record.id, record.plan.target))
    if before is not None:
        served.device.keep()
        before.dismiss()
    rights.give_up(record)


def serve_several(name: str, *, log_file: Path, ready: Callable[[], None]) -> bool:
    """Serves what it is asked to by the channel of that name, until one of _SIGNALS, or the end of
    its last disk; whether every disk ended well. Main thread only."""
    make_run_directory()
    termination = _Termination()
    with termination.handled():
        host = Host(name, log_file)
        try:
            ready()
            while host.goes_on():
                with termination.raising():
                    time.sleep(LOOK_AFTER_SEVERAL)
                logs.trim(sys.stderr.fileno())
        except Terminated:
            pass
        finally:
            host.close()
    return not host.failed


def _report(report: TextIO, how: dict[str, Any], *, stays: bool) -> None:
    """Tells who started the server. When they are gone, nobody knows of a disk that is new, and it
    must not be left; one that was there before `stays`, since others use it."""
    try:
        with report:
            json.dump(how, report)
    except BrokenPipeError:
        if not stays:
            raise
        log.warning("the command that started this server is gone; the disk is served on")


def _run_daemon(report_fd: int, log_file: Path, name: str | None) -> int:
    """Reads from the standard input what to serve, a spec, and the id of the disk to take over if
    any; or has a `name`, and is asked by its channel. Reports to a pipe how its start went."""
    os.set_inheritable(report_fd, False)
    text = sys.stdin.read()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    report = open(report_fd, "w")  # noqa: SIM115 - closed by the report, when it is known
    take_over: TakeOver | None = None
    live = False

    def tell(how: dict[str, Any]) -> None:
        nonlocal live
        # The target has opened its files by now; no directory is to be kept busy for ever.
        os.chdir("/")
        _report(report, how, stays=take_over is not None)
        live = True

    def ready(record: Record) -> None:
        log.info("serving %s as %s by %s", record.plan.target, record.path, record.data_path)
        tell({"ready": record.id})

    try:
        if name is not None:
            logs.carry_over(server_log_place(name), sys.stderr.fileno())
            place = log_file.replace(server_log_place(name))
            ended_well = serve_several(name, log_file=place, ready=lambda: tell({"ready": name}))
        else:
            spec, take_over = of_request(json.loads(text))
            if take_over is not None:
                logs.carry_over(log_place(take_over.device), sys.stderr.fileno())
            served = serve(
                spec,
                log_file=log_file,
                ready=ready,
                take_over=take_over,
                look=lambda _: logs.trim(sys.stderr.fileno()),
            )
            if served is not None:
                log.info("stopped after %d requests", served.total.requests)
            ended_well = True
    except BaseException as error:
        log.error("the server ends with an error", exc_info=error)
        if not live and not report.closed:
            with report:
                json.dump({"failed": reports.describe(error)}, report)
        return 1
    if not ended_well and name is not None:  # the logs of disks that did not are left
        server_log_place(name).unlink(missing_ok=True)
    elif live:
        rights.forget_log()
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(_run_daemon(int(sys.argv[1]), Path(sys.argv[2]), next(iter(sys.argv[3:]), None)))
