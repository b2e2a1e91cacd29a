"""`pyublk up`, `plan` and `down` with real disks."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import run_here
from servers import end_recorded_servers

from pyublk.cli.failures import ExitCode
from pyublk.service.records import Record, recorded_ids

MIB = 1 << 20

DISKS = """\
[disk.files]
target = "file"
arguments = ["disk.img"]
size = "1M"

[disk.memory]
target = "ram"
size = "2M"
server = "small"
after = ["files"]

[disk.own]
target = "own.py:Own"
server = "small"
"""

OWN = """\
import pyublk

class Own(pyublk.Target):
    def __init__(self, size: int = 1 << 20):
        super().__init__(size=size, read_only=True)

    def read(self, offset, buffer):
        buffer[:] = b"o" * len(buffer)
"""


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of definitions; the command is called from elsewhere."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    place = tmp_path / "etc"
    place.mkdir()
    (place / "own.py").write_text(OWN)
    file = place / "disks.toml"
    file.write_text(DISKS)
    yield file
    end_recorded_servers()


def told(command: str, file: Path, *options: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the command says of each disk."""
    done = run_here(command, str(file), "--json", *options)
    assert done.exit_code == code, done.output
    return {one["name"]: one for one in json.loads(done.stdout)}


def actions(command: str, file: Path, *options: str, code: int = 0) -> dict[str, str]:
    return {name: one["action"] for name, one in told(command, file, *options, code=code).items()}


def test_up_makes_it_so_and_down_ends_it(disks: Path) -> None:
    wanted = {"files": "start", "memory": "start", "own": "start"}
    assert actions("plan", disks, code=ExitCode.CHANGES) == wanted
    assert recorded_ids() == []
    made = told("up", disks)
    assert {name: one["action"] for name, one in made.items()} == wanted
    assert [*made].index("files") < [*made].index("memory")
    assert (disks.parent / "disk.img").stat().st_size == MIB
    with Blocks(made["own"]["path"]) as own, Blocks(made["memory"]["path"]) as memory:
        assert own.read(4096, 0) == b"o" * 4096
        memory.write(b"kept".ljust(4096), 0)
    records = {name: Record.read(one["id"]) for name, one in made.items()}
    pids = {name: record.server.pid for name, record in records.items() if record is not None}
    assert pids["own"] == pids["memory"] != pids["files"]
    again = told("up", disks)
    assert {one["action"] for one in again.values()} == {"keep"}
    assert {name: one["id"] for name, one in again.items()} == {
        name: one["id"] for name, one in made.items()
    }
    with Blocks(made["memory"]["path"]) as memory:
        assert memory.read(4096, 0).startswith(b"kept")
    done = run_here("down", str(disks), "--json")
    assert done.exit_code == 0
    assert sorted(json.loads(done.stdout)["done"]) == sorted(one["id"] for one in made.values())
    assert recorded_ids() == []
    assert json.loads(run_here("down", str(disks), "--json").stdout) == {"done": []}


def test_what_has_changed(disks: Path) -> None:
    made = told("up", disks)
    with Blocks(made["files"]["path"]) as file:
        file.write(b"kept".ljust(4096), 0)
    text = DISKS.replace('size = "2M"', 'size = "2M"\nqueues = 2').split("[disk.own]")[0]
    disks.write_text(text)
    found = told("plan", disks, code=ExitCode.CHANGES)
    assert found["memory"]["differences"] == ["queues from the default to 2"]
    assert {name: one["action"] for name, one in found.items()} == {
        "own": "stop",
        "files": "keep",
        "memory": "recreate",
    }
    done = run_here("up", str(disks))
    assert done.exit_code == ExitCode.CHANGES
    assert "queues from the default to 2; --recreate stops it" in done.stderr
    assert "own (/dev/ublkb" in done.stderr
    assert "--prune stops it" in done.stderr
    assert len(recorded_ids()) == 3
    user = os.open(made["memory"]["path"], os.O_RDWR | os.O_CLOEXEC)
    try:
        done = run_here("up", str(disks), "--recreate", "--prune")
        assert done.exit_code == ExitCode.BUSY
        assert "memory: /dev/ublkb" in done.stderr
        assert len(recorded_ids()) == 2
    finally:
        os.close(user)
    assert actions("up", disks, "--recreate")["memory"] == "recreate"
    assert set(actions("plan", disks).values()) == {"keep"}
    with Blocks(told("up", disks)["files"]["path"]) as file:
        assert file.read(4096, 0).startswith(b"kept")


def test_a_disk_that_cannot_be_started(disks: Path) -> None:
    """It keeps those that come after it from being started, and no other."""
    disks.write_text(DISKS.replace('arguments = ["disk.img"]', 'arguments = ["none/disk.img"]'))
    done = run_here("up", str(disks))
    assert done.exit_code == ExitCode.FAILED
    assert "files: none, where disk.img is to be made, does not exist" in done.stderr
    assert "memory: it comes after files, which is not there" in done.stderr
    assert len(recorded_ids()) == 1
    disks.write_text(DISKS)
    assert actions("up", disks) == {"files": "start", "memory": "start", "own": "keep"}


@pytest.mark.parametrize("command", ["up", "plan", "down"])
def test_no_definition_is_told(tmp_path: Path, command: str) -> None:
    done = run_here(command, str(tmp_path))
    assert done.exit_code == ExitCode.USAGE
    assert f"there is no definition: name a file, or write one ({tmp_path}/*.toml)" in done.stderr
