"""Disks of the command whose servers are killed, or upgraded, under `fio --verify` and under
clients whose history is explained: `./run soak --kills 100`, `./run soak --upgrades 20`.

fio's checksums tell of a block that is wrong, and the history of the clients, which use the disk's
first blocks, of one that is old.
"""

import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clients import PATIENCE, Clients
from command_line import added, run_here
from fio import verified
from linear import History, Inexplicable
from report import Report
from servers import helpers_of, sleeping_beyond_signals, state_in, until

import pyublk
from pyublk.cli.failures import ExitCode
from pyublk.service.records import Record, log_place, recorded_ids, run_directory

MIB = 1 << 20
BLOCKS = 64
SIZE = 9 * MIB
QUEUES = (1, 2, 4)
#: Who is killed, and how often.
WHO = {"server": 3, "helper": 1, "both": 1}
#: Kills of a disk, which is not restarted more often within ten minutes.
KILLS = 5
#: Options of a disk that waits for `pyublk recover`.
WAITS = ("--recovery", "resend", "--no-restart")


class Fio:
    """fio that writes and verifies, over and over, in a thread."""

    def __init__(self, path: str) -> None:
        self.runs = 0
        self.wrong: list[str] = []
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set() and not self.wrong:
            try:
                verified(
                    self._path,
                    offset=MIB,
                    size=SIZE - MIB,
                    rw="randwrite",
                    bsrange="4k-64k",
                    iodepth=8,
                    verify_backlog=64,
                    randrepeat=0,
                    timeout=6 * PATIENCE,
                )
                self.runs += 1
            except BaseException as error:
                self.wrong.append(str(error))

    def end(self) -> None:
        self._over.set()
        self._thread.join(6 * PATIENCE)
        assert not self._thread.is_alive(), "fio hangs"
        assert not self.wrong, self.wrong


class Disk:
    """One that `pyublk add` made, under load."""

    def __init__(self, place: Path, queues: int, report: Report, *options: str) -> None:
        self.report = report
        self.place = place / f"disk-{queues}"
        self.queues = min(queues, os.cpu_count() or 1)
        made = added(
            "file", str(self.place), "--size", str(SIZE), "--queues", str(self.queues),
            *options,
        )  # fmt: skip
        self.number: int = made["id"]
        self.path: str = made["path"]
        self.history = History()

    @property
    def server(self) -> int:
        """The one that runs: clients may be served before a new one is on record."""

        def recorded() -> int:
            record = Record.read(self.number)
            return 0 if record is None or not running(record.server.pid) else record.server.pid

        until(recorded, what=f"the record of device {self.number} has its server")
        return recorded()

    @contextmanager
    def load(self, seed: int, *, resending: bool = False, goes: bool = False) -> Iterator[None]:
        """While the block runs. `resending`: servers are killed in it all the time. `goes`: the
        disk is deleted in it, and clients get errors; fio does not take part."""
        fio = None if goes else Fio(self.path)
        spans = [range(8)] * 2 + [range(8, BLOCKS)]
        with Clients(self.path, self.history, spans, seed=seed) as self.clients:
            self.clients.goes_on(3)
            self.clients.may_fail = goes
            with self.history.resending() if resending else nullcontext():
                yield
        if fio is not None:
            fio.end()
            self.report.events["runs of fio, verified"] += fio.runs
        self.report.operations += self.clients.done
        try:
            self.history.check()
        except Inexplicable as wrong:  # its servers tell what they left to the next one
            if (log := log_place(self.number)).exists():
                wrong.add_note(log.read_text())
            raise
        self.report.checked += self.history.checked

    def stop(self) -> None:
        done = run_here("stop", str(self.number))
        assert done.exit_code == 0, done.stderr
        self.place.unlink()

    def kill(self, who: str, *, restarts: bool) -> None:
        """Kills, sees to it that another server comes, and waits until clients go on."""
        self.clients.longest = 0.0
        server = self.server
        helpers = helpers_of(server)
        self.history.note(f"kill of {who}")
        if who != "server":
            for helper in helpers:
                os.kill(helper, 9)
        if who == "helper":
            until(lambda: set(helpers_of(server)) - set(helpers), what="there is another helper")
            self.clients.goes_on(1)
        else:
            with self.history.resending():
                os.kill(server, 9)
                until(lambda: not running(server), what="the server is dead")
                how = "restarted by the helper"
                if not restarts or who == "both":
                    how = "recovered by command"
                    by_command(self, restarts=restarts)
                self.clients.goes_on(2)  # the first may be of before, and be seen only now
                self.report.pauses[how].append(self.clients.longest)
        self.report.events[f"kill of {who}"] += 1

    def upgrade(self) -> None:
        """Each request is answered once: nothing is sent again."""
        self.clients.longest = 0.0
        before = self.server
        self.history.note("an upgrade begins")
        done = run_here("upgrade", str(self.number))
        self.history.note("it is over")
        assert done.exit_code == 0, done.stderr
        assert self.server != before
        until(lambda: not running(before), what="the server before ends")
        self.clients.goes_on(3)
        self.report.pauses["upgraded"].append(self.clients.longest)
        self.report.events["upgrade"] += 1


def running(pid: int) -> bool:
    """No zombie: of what is dead, the files are closed."""
    try:
        return state_in(Path(f"/proc/{pid}/stat").read_text()) not in "ZX"
    except OSError:
        return False


def by_command(disk: Disk, *, restarts: bool = False) -> None:
    """`restarts`: a server that outlived its helper for a moment may have had another one, which
    was quicker."""
    done = run_here("recover", str(disk.number))
    allowed = (0, ExitCode.BUSY) if restarts else (0,)
    assert done.exit_code in allowed, done.stderr


def kills(
    count: int, seed: int, report: Report, tell: Callable[[str], Any], first: int = 0
) -> None:
    """`count` of them, KILLS of each disk. A disk follows from the seed and its number, which begin
    with `first`; every third one waits for `pyublk recover`, the others are restarted. Raises
    AssertionError when anything is wrong."""
    with left_clean() as place:
        for number in range(first, first - (-count // KILLS)):
            dice = random.Random(f"{seed}/{number}")
            restarts = number % 3 != 2
            queues = QUEUES[number // 3 % len(QUEUES)]
            disk = Disk(place, queues, report, *(() if restarts else WAITS))
            with disk.load(seed + number):
                for who in dice.choices(list(WHO), list(WHO.values()), k=KILLS):
                    disk.kill(who, restarts=restarts)
                    disk.clients.goes_on(dice.choice([1, 5, 20]))
            disk.stop()
            report.lives[f"with {disk.queues} queues"] += 1
            tell(f"disk {number}: {report}")


def upgrades(count: int, seed: int, report: Report, tell: Callable[[str], Any]) -> None:
    """`count` of them, by `pyublk upgrade`; then each disk's server is killed once, so that the
    pauses can be compared. Raises AssertionError when anything is wrong."""
    with left_clean() as place:
        for turn, queues in enumerate(QUEUES):
            disk = Disk(place, queues, report)
            with disk.load(seed + turn):
                for _ in range(turn, count, len(QUEUES)):
                    disk.upgrade()
                disk.kill("server", restarts=True)
                disk.clients.goes_on(3)
            disk.stop()
            report.lives[f"with {disk.queues} queues"] += 1
            tell(f"disk {turn}: {report}")


@contextmanager
def left_clean() -> Iterator[Path]:
    """A run directory and a folder for disks; afterwards, nothing of the disks may be there."""
    before = _devices()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.environ["PYUBLK_RUN_DIR"] = f"{folder}/run"
        yield Path(folder)
        assert _devices() == before, "devices are left"
        assert recorded_ids() == [], "records are left"
        until(lambda: not _ours(), what="servers and helpers end")
        kept = {one.name for one in run_directory().iterdir()}
        assert not any(name.endswith((".sock", ".json", ".log")) for name in kept), kept
    assert sleeping_beyond_signals() == [], "processes hang"
    log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=60, check=False).stdout
    told = [line for line in log.splitlines() if "blocked for more than" in line or "BUG" in line]
    assert not told, told


def _devices() -> set[int]:
    with pyublk.Controller() as controller:
        return {device.id for device in controller.devices()}


def _ours() -> list[str]:
    """Helpers and servers that run, but for the helper of this process."""
    found = []
    own = helpers_of(os.getpid())
    for comm in Path("/proc").glob("[0-9]*/comm"):
        number = int(comm.parent.name)
        try:
            name = comm.read_text().strip()
        except OSError:  # ended meanwhile
            continue
        if name.startswith("pyublk") and number not in own and running(number):
            found.append(f"{number} {name}")
    return found
