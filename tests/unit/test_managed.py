"""What a server tells its service manager, and when; what it serves of the definitions."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import pyublk
from pyublk.device import Device
from pyublk.options import DiskOptions
from pyublk.recovery import Recovery
from pyublk.service import managed
from pyublk.service.managed import Watchdog
from pyublk.service.plan import DiskSpec
from pyublk.stats import DeviceStats, QueueStats
from pyublk.targets import Ram


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that a service manager listens at."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


def told(manager: socket.socket) -> str | None:
    try:
        return manager.recv(4096).decode()
    except BlockingIOError:
        return None


class Queues:
    """Counters as a test sets them: (requests, held) for each queue."""

    def __init__(self, *queues: tuple[int, int]) -> None:
        self.queues = list(queues)

    def stats(self) -> DeviceStats:
        return DeviceStats(tuple(QueueStats(reads=n, held=held) for n, held in self.queues))


def test_the_watchdog_is_fed_while_every_queue_answers(manager: socket.socket) -> None:
    clock = SimpleNamespace(now=100.0)
    watchdog = Watchdog(0.0, lambda: clock.now)  # 20 s: a queue has 10
    disk = Queues((5, 0), (5, 0))

    def fed(after: float) -> bool:
        clock.now += after
        watchdog.look(cast(Device, disk))
        return told(manager) == "WATCHDOG=1"

    assert fed(0)
    assert fed(1000)  # nothing to do is no hang
    disk.queues[1] = (9, 4)
    assert fed(0)
    disk.queues[0] = (50, 1)  # others go on
    assert fed(9.5)
    disk.queues[0] = (90, 0)
    assert not fed(1)
    assert not fed(5)
    disk.queues[1] = (9, 3)  # it answers one
    assert fed(1)
    disk.queues[1] = (30, 24)  # new ones are no answers
    assert fed(9.5)
    disk.queues[1] = (40, 34)
    assert not fed(1)


def test_a_target_may_stall_for_as_long_as_it_says(manager: socket.socket) -> None:
    clock = SimpleNamespace(now=0.0)
    watchdog = Watchdog(30.0, lambda: clock.now)
    disk = cast(Device, Queues((1, 1)))
    assert watchdog.answers(disk)
    clock.now = 29.0
    assert watchdog.answers(disk)
    clock.now = 31.0
    assert not watchdog.answers(disk)


@pytest.mark.usefixtures("manager")
def test_the_watchdog_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert managed.watchdog_seconds() == 20.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert managed.watchdog_seconds() == 0.0
    monkeypatch.delenv("WATCHDOG_PID")
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert managed.watchdog_seconds() == 0.0


def test_lines_for_the_journal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With priorities where standard error is the journal's, with the time where not."""
    found = os.fstat(sys.stderr.fileno())
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        for stream, expected in (
            (f"{found.st_dev}:{found.st_ino}", "<4>test: one\n<4>two\n"),
            ("1:2", "WARNING test: one\ntwo\n"),
        ):
            root.handlers[:] = []
            monkeypatch.setenv("JOURNAL_STREAM", stream)
            managed.log_to_stderr()
            logging.getLogger("test").warning("one\ntwo")
            assert capfd.readouterr().err.endswith(expected)
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_which_definition_is_served(tmp_path: Path) -> None:
    file = tmp_path / "disks.toml"
    file.write_text('[disk.one]\ntarget = "null"\n[disk.two]\ntarget = "null"\nserver = "big"\n')
    assert managed.find("one", [file]).name == "one"
    with pytest.raises(ValueError, match=r"no file defines 'on' \(did you mean 'one'\?\); looked"):
        managed.find("on", [file])
    with pytest.raises(ValueError, match="two shares the server big with other disks"):
        managed.find("two", [file])


class Forgetful(pyublk.Target):
    def read(self, offset: int, buffer: memoryview) -> None:
        pass


class Lasting(Forgetful):
    recoverable = True


@pytest.mark.parametrize(
    ("recovery", "target", "warns"),
    [
        (Recovery.RESEND, Forgetful(size=4096), True),
        (Recovery.FAIL, Forgetful(size=4096), True),
        (Recovery.NONE, Forgetful(size=4096), False),
        (None, Forgetful(size=4096), False),
        (Recovery.RESEND, Lasting(size=4096), False),
        (Recovery.RESEND, Ram(size=4096), False),
    ],
)
def test_a_disk_that_nobody_will_take_over_is_warned_of(
    caplog: pytest.LogCaptureFixture, recovery: Recovery | None, target: pyublk.Target, warns: bool
) -> None:
    disk: DiskOptions = {} if recovery is None else {"recovery": recovery}
    managed.warn_of_recovery(DiskSpec(target="x", name="mine", disk=disk), target)
    said = "mine has recovery, but the class Forgetful does not say `recoverable = True`"
    assert (said in caplog.text) is warns
    assert bool(caplog.text) is warns
