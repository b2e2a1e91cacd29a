# SPDX-License-Identifier: MIT
"""One defined disk, served in this process under a service manager such as systemd.

The manager starts the process again when it fails; so nobody else does.
"""

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from functools import partial
from pathlib import Path

from pyublk import errors
from pyublk.control import Controller, DeviceInfo, has_node
from pyublk.device import Device
from pyublk.layers import first_that_forgets
from pyublk.options import near
from pyublk.recovery import Recovery
from pyublk.service import daemon, definitions, rights
from pyublk.service.claim import take
from pyublk.service.definitions import Definition
from pyublk.service.hosting import Served
from pyublk.service.manager import Store, tell
from pyublk.service.plan import DiskSpec, TakeOver
from pyublk.service.records import Record
from pyublk.service.server import ServeResult, serve
from pyublk.target import Target
from pyublk.targets.ram import Ram

log = logging.getLogger("pyublk.server")

#: Seconds that the disk of a server before, which was killed, gets to be deleted.
DELETED = 30.0
#: Seconds without an answer after which a disk's users are not waited for at the end.
FLUSHED = 10.0

#: How the journal reads a level (sd-daemon(3)).
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


# ---- its watchdog and its journal ----


class Watchdog:
    """Feeds the service manager's watchdog while the disk's queues answer.

    A queue hangs when it has held requests and answered none for half the watchdog's time, or for
    the target's `max_stall` if that is longer. Then nobody feeds it, so that the server is killed
    after the whole of it.
    """

    def __init__(self, max_stall: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._limit = max(watchdog_seconds() / 2, max_stall)
        self._progress: dict[int, tuple[int, float]] = {}

    def look(self, device: Device) -> None:
        """To be called several times in the watchdog's time."""
        if watchdog_seconds() and self.answers(device):
            tell("WATCHDOG=1")

    def answers(self, device: Device) -> bool:
        """Whether no queue hangs."""
        now, longest = self._now(), 0.0
        for number, queue in enumerate(device.stats().queues):
            answered = queue.requests - queue.held
            before, since = self._progress.get(number, (-1, now))
            if answered != before or not queue.held:
                since = now
            self._progress[number] = answered, since
            longest = max(longest, now - since)
        return longest < self._limit


def watchdog_seconds() -> float:
    """The watchdog's time; 0: this process has none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0


class _ForJournal(logging.Formatter):
    """Each line with its priority; the journal has the time, and the process."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def log_to_stderr() -> None:
    """Logs to standard error, as the journal reads it if that is where it goes."""
    handler = logging.StreamHandler()
    if to_journal():
        handler.setFormatter(_ForJournal("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def to_journal() -> bool:
    """Whether standard error is the journal's (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


# ---- the disk ----


def find(name: str, files: Sequence[Path]) -> Definition:
    """The definition of that name. Raises ValueError when there is none that can be served so."""
    found = {one.name: one for one in definitions.read(files)}
    if name not in found:
        raise ValueError(
            f"no file defines {name!r}{near(name, found)}; looked in {', '.join(map(str, files))}"
        )
    if (server := found[name].server) is not None:
        raise ValueError(
            f"{name} shares the server {server} with other disks, so it cannot have a process of "
            "its own: leave out `server`, or serve it by `pyublk up`"
        )
    return found[name]


def serve_defined(definition: Definition, ready: Callable[[Record], None]) -> ServeResult | None:
    """Serves a defined disk until a signal comes, or it is stopped by another hand. Main thread
    only.

    If it is there and waits for a server, it is taken over, as it was made; else it is added. When
    a signal comes while it is in use and it can outlive its server (`recovery`), it is left as it
    is, for the next one. Raises DeviceBusy if it has a server, and what `server.serve` raises.
    """
    assert definition.spec.file is not None
    rights.begin(definition.spec.disk.get("user"))
    faulthandler.enable()  # the watchdog's SIGABRT tells where it hung
    watchdog: Watchdog | None = None

    def begun(record: Record) -> None:
        daemon.check_readable(record)
        os.chdir("/")
        log.info("serving %s as %s by %s", spec.target, record.path, record.data_path)
        ready(record)
        tell(f"READY=1\nSTATUS=serving {spec.target} as {record.path}")

    def look(device: Device) -> None:
        nonlocal watchdog
        watchdog = watchdog or Watchdog(device.target.profile().max_stall)
        watchdog.look(device)

    def prepare(target: Target) -> None:
        warn_of_recovery(spec, target)
        Store().prepare(target, new=take_over is None)

    with Controller() as controller:
        take_over, spec, directory = _what_to_serve(controller, definition)
        with chdir(directory):  # what the definition names is beside it
            return serve(
                spec,
                log_file=None,
                ready=begun,
                take_over=take_over,
                prepare=prepare,
                look=look,
                ending=partial(unless_used, controller),
            )


def warn_of_recovery(spec: DiskSpec, target: Target) -> None:
    """Of a disk that waits for its next server, which will be refused."""
    forgets = first_that_forgets(target)
    if spec.disk.get("recovery", Recovery.NONE) == Recovery.NONE or forgets is None:
        return
    if not isinstance(target, Ram):  # its memory is the manager's
        log.warning(
            "%s has recovery, but the class %s does not say `recoverable = True`: when this server "
            "ends while the disk is used, no other takes it over, and the disk's users wait",
            spec.name,
            type(forgets).__name__,
        )


def _what_to_serve(
    controller: Controller, definition: Definition
) -> tuple[TakeOver | None, DiskSpec, str]:
    """The disk that waits for a server, if there is one; what is to be served, from where."""
    spec = definition.spec
    assert spec.file is not None
    for device, record in definitions.defined(controller):
        if record.plan.name != spec.name:
            continue
        if record.plan.file != spec.file:
            raise errors.DeviceBusy(
                f"{spec.name} is {record.path} already, which {record.plan.file} defines"
            )
        if (server := record.server.open()) is not None:
            with server:
                raise errors.DeviceBusy(f"{record.path} is served already, by process {server.pid}")
        if record.may_be_recovered:
            return TakeOver(device.id), record.plan, record.directory or "/"
        _await_deletion(device)
    return None, spec, str(Path(spec.file).parent)


def _await_deletion(device: DeviceInfo) -> None:
    """Of a disk whose server was killed, by its helper; another one may want its id."""
    until = time.monotonic() + DELETED
    while has_node(device.id):
        if time.monotonic() > until:
            raise errors.DeviceBusy(
                f"{device.path} has no server, but is not deleted: see `pyublk doctor`"
            )
        time.sleep(0.05)


@contextmanager
def unless_used(controller: Controller, served: Served) -> Iterator[None]:
    """Claims the disk for its stop. One that is in use, and can wait for another server, is left to
    it: this process ends at once."""
    tell("STOPPING=1")
    path = served.record.path
    with ExitStack() as held:
        try:
            device = served.device.info()
            take(controller, device, held, FLUSHED, force=False)
        except (OSError, errors.DeviceBusy) as why:  # TimeoutError is one
            if served.record.may_be_recovered:
                log.warning("%s waits for another server from now on: %s", path, why)
                leave_now()
            log.warning("%s is stopped while it is in use: %s", path, why)
        yield


def leave_now() -> None:
    """Ends this process as it is: the kernel keeps a disk that has `recovery`, and all requests
    that were not answered."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(0)
