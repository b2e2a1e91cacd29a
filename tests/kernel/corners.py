"""Kills at bad moments, and little room: `./run soak --corners`, each a few times.

Whatever happens, the disk must come back with all that was answered, or be gone when that was asked
for; and nothing may be left of it.
"""

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from blocks import Blocks
from clients import BLOCK, PATIENCE, stamped
from command_line import COMMAND, run_here
from kills import SIZE, WAITS, Disk, by_command, left_clean, running
from report import Report
from servers import until

import pyublk
from pyublk.cli.failures import ExitCode
from pyublk.service.records import run_directory
from pyublk.uapi import DeviceStatus, Feature

MIB = 1 << 20


def corners(
    times: int, seed: int, report: Report, tell: Callable[[str], Any], only: str | None = None
) -> None:
    """Raises AssertionError when anything is wrong."""
    with left_clean() as place:
        for number in range(times):
            for name, corner in CORNERS.items():
                if only not in (None, name):
                    continue
                tell(f"{name}, {number}")
                corner(place, random.Random(f"{seed}/{name}/{number}"), report)
                report.events[name] += 1


def command(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Its exit code, and what it said of a failure."""
    _, errors = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, errors


def children(process: int) -> list[int]:
    """Its child processes, which are a command's server and helper."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def kill_server(disk: Disk) -> None:
    server = disk.server
    os.kill(server, 9)
    until(lambda: not running(server), what="the server is dead")


def waits(disk: Disk) -> None:
    with pyublk.Controller() as controller:
        until(lambda: controller.info(disk.number).status is DeviceStatus.QUIESCED)


def a_recovery_is_killed(place: Path, dice: random.Random, report: Report) -> None:
    """The command, its server, or both."""
    disk = Disk(place, 2, report, *WAITS)
    with disk.load(dice.randrange(1000), resending=True):
        kill_server(disk)
        first = command("recover", str(disk.number))
        time.sleep(dice.random() * 3)
        victims = children(first.pid)
        who = dice.choice(["command", "server", "both"])
        if who != "server":
            first.kill()
        if who != "command":
            for victim in victims:
                with suppress(ProcessLookupError):
                    os.kill(victim, 9)
        outcome(first)
        served_again(disk)
        disk.clients.goes_on(3)
    disk.stop()


def two_recoveries_at_once(place: Path, dice: random.Random, report: Report) -> None:
    disk = Disk(place, 1, report, *WAITS)
    with disk.load(dice.randrange(1000), resending=True):
        kill_server(disk)
        both = [command("recover", str(disk.number)) for _ in range(2)]
        outcomes = [outcome(one) for one in both]
        assert sorted(code for code, _ in outcomes) == [0, ExitCode.BUSY], outcomes
        disk.clients.goes_on(3)
    disk.stop()


def an_upgrade_is_killed(place: Path, dice: random.Random, report: Report) -> None:
    """At each of its steps: the old server, the new one, both, or the command. None but the kernel
    fails a request, so none does; and somebody serves the disk in the end, if need be by hand."""
    with pyublk.Controller() as controller:
        if not controller.features().has(Feature.QUIESCE):
            report.events["no upgrade on this kernel"] += 1
            return
        disk = Disk(place, dice.choice([1, 2, 4]), report, *WAITS)
        with disk.load(dice.randrange(1000), resending=True):
            for step in UPGRADE_STEPS:
                for who in ("old", "new", "both", "command"):
                    in_time = _kill_in_an_upgrade(disk, controller, step, who, dice)
                    when = step if in_time else f"it is over, not when {step}"
                    report.events[f"upgrade: {who} killed when {when}"] += 1
        disk.stop()


#: When a server is killed in an upgrade.
UPGRADE_STEPS = ("it begins", "the new one starts", "nobody serves", "the new one serves")


def _kill_in_an_upgrade(
    disk: Disk, controller: pyublk.Controller, step: str, who: str, dice: random.Random
) -> bool:
    """Whether the upgrade was still under way."""
    old = disk.server
    disk.history.note("an upgrade begins")
    upgrade = command("upgrade", str(disk.number))

    def there() -> bool:
        if upgrade.poll() is not None:
            return True
        if step == "it begins":
            return bool(children(upgrade.pid))
        info = controller.info(disk.number)
        if step == "nobody serves":
            return info.status.awaits_server
        return info.server_pid not in (None, old) and info.status is DeviceStatus.LIVE

    if step == "the new one starts":
        until(lambda: children(upgrade.pid) or upgrade.poll() is not None, PATIENCE, step)
        time.sleep(dice.random() * 3)
    else:
        end = time.monotonic() + 5 * PATIENCE  # two starts of Python beside clients and fio
        while not there():
            assert time.monotonic() < end, f"an upgrade comes never so far: {step}"
            time.sleep(0.002)  # nobody serves for a moment only
    new = children(upgrade.pid)
    if (server := controller.info(disk.number).server_pid) not in (None, old, *new):
        new.append(server)  # the command has ended meanwhile
    victims = {"old": [old], "new": new, "both": [old, *new], "command": [upgrade.pid]}[who]
    in_time = upgrade.poll() is None
    disk.history.note(f"kill of {who}, {victims}, when {step}")
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, 9)
    disk.history.note(f"the upgrade ends: {outcome(upgrade)}")
    served_again(disk)
    disk.history.note(f"{disk.server} serves")
    disk.clients.goes_on(2)
    return in_time


def served_again(disk: Disk) -> None:
    """By whoever has the disk now, or by `pyublk recover`."""

    def served() -> bool:
        done = run_here("recover", str(disk.number))
        assert done.exit_code in (0, ExitCode.BUSY), done.stderr
        return done.exit_code == 0 or "is served by process" in done.stderr

    until(served, 2 * PATIENCE, "it is served again")


def deleted_while_it_waits(place: Path, dice: random.Random, report: Report) -> None:
    disk = Disk(place, 2, report, *WAITS)
    with disk.load(dice.randrange(1000), resending=True, goes=True):
        kill_server(disk)
        waits(disk)
        done = run_here("del", "--force", str(disk.number))
        assert done.exit_code == 0, done.stderr
        assert not os.path.exists(disk.path)
    disk.place.unlink()


def a_start_is_killed(place: Path, dice: random.Random, report: Report) -> None:
    """Its server. What it leaves is deleted by hand, like every disk without a server."""
    with pyublk.Controller() as controller:
        before = {device.id for device in controller.devices()}
        add = command("add", "file", f"{place}/new", "--size", "1M", *WAITS)
        time.sleep(1 + dice.random() * 3)
        for victim in children(add.pid):
            with suppress(ProcessLookupError):
                os.kill(victim, 9)
        outcome(add)
        for device in {device.id for device in controller.devices()} - before:
            if server := controller.info(device).server_pid:  # the command was quicker
                with suppress(ProcessLookupError):
                    os.kill(server, 9)
                until(lambda: not running(server), what="the server is dead")
            done = run_here("del", "--force", str(device))
            assert done.exit_code in (0, ExitCode.NO_DEVICE), done.stderr
    with suppress(FileNotFoundError):
        Path(place, "new").unlink()


def a_stop_is_killed(place: Path, dice: random.Random, report: Report) -> None:
    disk = Disk(place, 2, report, *WAITS)
    with disk.load(dice.randrange(1000), resending=True, goes=True):
        server = disk.server
        stop = command("stop", str(disk.number))
        time.sleep(1 + dice.random() * 2)
        with suppress(ProcessLookupError):
            os.kill(server, 9)
        outcome(stop)
        until(lambda: not running(server), what="the server is dead")
        done = run_here("del", "--force", str(disk.number))
        assert done.exit_code in (0, ExitCode.NO_DEVICE), done.stderr
    disk.place.unlink()


def no_room_in_the_run_directory(place: Path, dice: random.Random, report: Report) -> None:
    """A server cannot write its record: the disk waits, and comes back once there is room."""
    small = place / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=True)
    before = os.environ["PYUBLK_RUN_DIR"]
    os.environ["PYUBLK_RUN_DIR"] = str(small)
    try:
        disk = Disk(place, 1, report, *WAITS)
        with disk.load(dice.randrange(1000), resending=True):
            with open(small / "full", "wb", buffering=0) as full, suppress(OSError):
                while True:
                    full.write(bytes(4096))
            kill_server(disk)
            done = run_here("recover", str(disk.number))
            report.events[f"exit code {done.exit_code} without room"] += 1
            if done.exit_code != 0:
                assert "No space left on device" in done.stderr, done.stderr
                waits(disk)
            (small / "full").unlink()
            if done.exit_code != 0:
                by_command(disk)
            disk.clients.goes_on(3)
        disk.stop()
        assert list(run_directory().glob("*.json")) == []
    finally:
        os.environ["PYUBLK_RUN_DIR"] = before
        subprocess.run(["umount", "-l", small], check=True)
    small.rmdir()


def dirty_pages(place: Path, dice: random.Random, report: Report) -> None:
    """The next server starts while memory is full of what waits to be written to its disk."""
    size = min(96 * MIB, _total_memory() // 5) // MIB * MIB
    disk = Disk(place, 2, report, "--size", str(size), *WAITS)
    with disk.load(dice.randrange(1000), resending=True):
        begun = threading.Event()

        def write() -> None:
            with Blocks(disk.path, direct=False) as client:
                for at in range(SIZE, size, MIB):
                    os.pwrite(client.fd, stamped(at, MIB // BLOCK), at)
                    if at - SIZE > MIB:
                        begun.set()
                client.sync()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        assert begun.wait(PATIENCE)
        kill_server(disk)
        time.sleep(dice.random() * 3)
        by_command(disk)
        writer.join(2 * PATIENCE)
        assert not writer.is_alive(), "a writer hangs"
    with open(disk.place, "rb") as file:
        for at in range(SIZE, size, MIB):
            file.seek(at)
            assert file.read(MIB) == stamped(at, MIB // BLOCK), f"wrong at {at}"
    disk.stop()


def _total_memory() -> int:
    line = Path("/proc/meminfo").read_text().splitlines()[0]
    return int(line.split()[1]) * 1024


#: By their names, with spaces.
CORNERS = {
    corner.__name__.replace("_", " "): corner
    for corner in (
        a_recovery_is_killed,
        two_recoveries_at_once,
        an_upgrade_is_killed,
        deleted_while_it_waits,
        a_start_is_killed,
        a_stop_is_killed,
        no_room_in_the_run_directory,
        dirty_pages,
    )
}
