"""`pyublk recover`: disks of `pyublk add --recovery` whose servers were killed."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import COMMAND, added, run_here
from servers import until

from pyublk.cli.failures import ExitCode
from pyublk.control import Controller
from pyublk.service.records import Record, log_place, recorded_ids
from pyublk.uapi import DeviceStatus

MIB = 1 << 20


def killed(controller: Controller, *arguments: str) -> dict[str, Any]:
    """A disk that waits for a server, with "kept" at its beginning."""
    disk = added(*arguments, "--recovery", "resend", "--no-restart")
    with Blocks(disk["path"]) as blocks:
        blocks.write(b"kept".ljust(4096), 0)
    kill(controller, disk)
    return disk


def kill(controller: Controller, disk: dict[str, Any]) -> None:
    os.kill(disk["server_pid"], signal.SIGKILL)
    until(lambda: controller.info(disk["id"]).status is DeviceStatus.QUIESCED)


def first_block(disk: dict[str, Any]) -> bytes:
    with Blocks(disk["path"]) as blocks:
        return blocks.read(4096, 0)


def test_a_disk_is_served_as_it_was_added(
    place: Path, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = killed(controller, "file", "disk.img", "--size", "1M", "--stop-timeout", "3")
    number = str(disk["id"])
    (entry,) = json.loads(run_here("list", "--json").stdout)
    assert entry["state"] == "quiesced"
    refused = run_here("stop", number)
    assert refused.exit_code == ExitCode.BUSY
    assert "waits for a new server" in refused.stderr
    # Another disk's start tidies up; what this one needs stays.
    other = added("null", "--size", "1M")
    checks = json.loads(run_here("doctor", "--json", "--repair").stdout)["checks"]
    (waiting,) = [check for check in checks if f"device {number} is" in check["finding"]]
    assert waiting["remedy"].startswith(f"pyublk recover {number}, or")
    monkeypatch.chdir("/")
    done = run_here("recover", number)
    assert (done.exit_code, done.stdout) == (0, f"{disk['path']}\n"), done.stderr
    assert first_block(disk).startswith(b"kept")
    record = Record.read(disk["id"])
    assert record is not None
    assert record.server.pid != disk["server_pid"]
    assert record.plan.disk["stop_timeout"] == 3
    log = log_place(disk["id"]).read_text()
    assert log.count("serving file as") == 2
    assert log.index("another server begins here") > log.index("serving file as")
    again = run_here("recover", number)
    assert again.exit_code == ExitCode.BUSY
    assert f"is served by process {record.server.pid}" in again.stderr
    assert run_here("stop", number, str(other["id"])).exit_code == 0
    assert recorded_ids() == []
    assert not log_place(disk["id"]).exists()


def test_a_disk_outlives_the_command_that_recovers_it(place: Path, controller: Controller) -> None:
    """Killed in the middle, it gets no report of the server that it has started."""
    disk = killed(controller, "file", "disk.img", "--size", "1M")
    number = str(disk["id"])
    with subprocess.Popen([*COMMAND, "recover", number], stdin=subprocess.PIPE) as command:
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children")

        def knows_its_disk() -> bool:  # a server closes its standard input then
            return any(
                os.readlink(f"/proc/{child}/fd/0") == os.devnull
                for child in children.read_text().split()
            )

        until(knows_its_disk, what="the next server knows what to serve")
        command.kill()
    until(lambda: "is served on" in log_place(disk["id"]).read_text())
    assert first_block(disk).startswith(b"kept")
    assert controller.info(disk["id"]).status is DeviceStatus.LIVE
    assert run_here("stop", number).exit_code == 0


@pytest.mark.thorough
def test_disks_of_one_server_come_back_to_one(place: Path, controller: Controller) -> None:
    options = ("--size", "1M", "--server", "small", "--recovery", "resend", "--no-restart")
    disks = [added("file", name, *options) for name in ("a.img", "b.img")]
    with Blocks(disks[0]["path"]) as blocks:
        blocks.write(b"kept".ljust(4096), 0)
    kill(controller, disks[0])
    until(lambda: controller.info(disks[1]["id"]).status is DeviceStatus.QUIESCED)
    done = run_here("recover", "all", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["id"] for one in told] == [disk["id"] for disk in disks]
    assert len({one["server_pid"] for one in told} - {disks[0]["server_pid"]}) == 1
    assert first_block(disks[0]).startswith(b"kept")
    assert first_block(disks[1]) == bytes(4096)
    assert run_here("stop", *(str(disk["id"]) for disk in disks)).exit_code == 0
    assert recorded_ids() == []


def test_what_was_lost_is_not_served_unasked(place: Path, controller: Controller) -> None:
    disk = killed(controller, "ram", "--size", "1M")
    number = str(disk["id"])
    refused = run_here("recover", number)
    assert refused.exit_code == ExitCode.USAGE
    assert "ram does not say that it keeps what was written" in refused.stderr
    with open("small.img", "wb") as file:
        file.truncate(MIB // 2)
    refused = run_here("recover", number, "file", "small.img", "--option", "size=512K")
    assert refused.exit_code == ExitCode.USAGE
    assert controller.info(disk["id"]).status is DeviceStatus.QUIESCED
    assert Path("small.img").stat().st_size == MIB // 2
    done = run_here("recover", number, "ram")
    assert done.exit_code == 0, done.stderr
    assert first_block(disk) == bytes(4096)
    assert run_here("stop", number).exit_code == 0


def test_up_recovers_what_it_has_defined(place: Path, controller: Controller) -> None:
    Path("disks.toml").write_text(
        '[disk.one]\ntarget = "file"\narguments = ["disk.img"]\nsize = "1M"\nrecovery = "resend"\n'
        "restart = false\n"
    )
    (disk,) = json.loads(run_here("up", "disks.toml", "--json").stdout)
    with Blocks(disk["path"]) as blocks:
        blocks.write(b"kept".ljust(4096), 0)
    record = Record.read(disk["id"])
    assert record is not None
    kill(controller, {**disk, "server_pid": record.server.pid})
    (step,) = json.loads(run_here("plan", "disks.toml", "--json").stdout)
    assert step["action"] == "recover"
    done = run_here("up", "disks.toml")
    assert (done.exit_code, done.stdout) == (0, f"one ({disk['path']}): recovered\n"), done.stderr
    assert first_block(disk).startswith(b"kept")
    assert run_here("down", "disks.toml").exit_code == 0
    assert recorded_ids() == []


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["0", "-o", "direct=yes"], "--option is for another TARGET", ExitCode.USAGE),
        (["all", "null"], "several disks cannot have the same TARGET", ExitCode.USAGE),
        (["1000"], "there is no device 1000", ExitCode.NO_DEVICE),
    ],
)
def test_mistakes(place: Path, arguments: list[str], words: str, code: ExitCode) -> None:
    done = run_here("recover", *arguments)
    assert done.exit_code == code
    assert words in done.stderr


def test_a_disk_without_a_server_and_without_a_record(place: Path, controller: Controller) -> None:
    disk = killed(controller, "file", "disk.img", "--size", "1M")
    record = Record.read(disk["id"])
    assert record is not None
    record.remove()
    number = str(disk["id"])
    refused = run_here("recover", number)
    assert refused.exit_code == ExitCode.USAGE
    assert "has no record: name the target that is to serve it" in refused.stderr
    done = run_here("recover", number, "file", "disk.img")
    assert done.exit_code == 0, done.stderr
    assert first_block(disk).startswith(b"kept")
    assert run_here("stop", number).exit_code == 0
