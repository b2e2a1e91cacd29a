"""What goes wrong with `pyublk upgrade`, and when. It takes minutes, and is no part of the suite:

.venv/bin/python -m pyublk.vm -- .venv/bin/python -m pytest tests/kernel/upgrade_trouble.py
"""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import added, run_here
from load import Load
from servers import HERE, until
from test_upgrade import MIB, RESEND, place, server_of

from pyublk.cli.failures import ExitCode
from pyublk.control import Controller
from pyublk.service.records import recorded_ids
from pyublk.uapi import DeviceStatus

__all__ = ["place"]

#: A class that a new server has anew; `trouble` says where that comes to grief.
CLASS = """
import os
import signal
import time
from pathlib import Path

from files import PlainFile

{first}


class Store(PlainFile):
    recoverable = True

    def __init__(self, path: Path, *, trouble: str = "") -> None:
        super().__init__(path)
        self.trouble = trouble

    def open(self) -> None:
        if self.trouble == "larger":
            self.size *= 2
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        super().open()

    def close(self) -> None:
        while os.path.exists("wait"):
            time.sleep(0.01)
        super().close()

    def status(self) -> dict[str, int]:
        return {{"version": {version}}}
"""


def write_class(version: int, first: str = "") -> None:
    Path("disk.py").write_text(CLASS.format(version=version, first=first))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)


def info_of(device: int) -> dict[str, Any]:
    (told,) = json.loads(run_here("info", str(device), "--json").stdout)
    found: dict[str, Any] = told
    return found


def test_a_new_server_that_fails_leaves_the_disk_to_the_old_one(place: Path) -> None:
    """Whatever it fails in, and whenever; then there is one with newer code."""
    write_class(1)
    disk = added("disk.py:Store", "store", *RESEND)
    number, first = str(disk["id"]), disk["server_pid"]
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    with Load(disk["path"]) as load:
        for code, option, words in (
            ("import no_such_module", "", "No module named 'no_such_module'"),
            (kill, "", "the server ended by signal 9 before the disk was there"),
            ("", "speed=3", "speed"),
            ("", "trouble=larger", "the disk has basic.size 1048576, and the target has 2097152"),
            ("", "trouble=killed", "the server ended by signal 9 before the disk was there"),
        ):
            write_class(2, code)
            refused = run_here("upgrade", number, *(("-o", option) if option else ()))
            assert refused.exit_code != 0
            assert words in refused.stderr
            assert f"served by process {first}, as before" in refused.stderr
            load.goes_on()
            assert server_of(disk["id"]) == first
        assert info_of(disk["id"])["status"] == {"version": 1}
        done = run_here("upgrade", number)
        assert done.exit_code == 0, done.stderr
        load.goes_on()
        assert info_of(disk["id"])["status"] == {"version": 2}
    load.check()
    assert load.failed == 0
    assert run_here("stop", number).exit_code == 0


def in_background(*arguments: str) -> tuple[threading.Thread, list[Result]]:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(run_here(*arguments)))
    thread.start()
    return thread, results


def test_what_comes_in_the_middle_of_an_upgrade(place: Path, controller: Controller) -> None:
    """Another upgrade, the end of the old server, and a stop."""
    write_class(1)
    disk = added("disk.py:Store", "store", *RESEND)
    number, first = str(disk["id"]), disk["server_pid"]

    def begun() -> tuple[threading.Thread, list[Result]]:
        """An upgrade in whose middle the old server waits."""
        Path("wait").touch()
        begun = in_background("upgrade", number)
        until(lambda: controller.info(disk["id"]).status is DeviceStatus.QUIESCED)
        return begun

    with Load(disk["path"]) as load:
        upgrading, done = begun()
        second = run_here("upgrade", number)
        assert second.exit_code == ExitCode.BUSY
        assert f"{disk['path']} is just handed over to another server" in second.stderr
        os.kill(first, signal.SIGKILL)
        upgrading.join(60)
        assert done[0].exit_code == 0, done[0].stderr
        load.goes_on()
    load.check()
    assert load.failed == 0
    upgrading, done = begun()
    stopping, stopped = in_background("stop", number)
    Path("wait").unlink()
    upgrading.join(60)
    stopping.join(60)
    assert (done[0].exit_code, stopped[0].exit_code) == (0, 0), done[0].stderr + stopped[0].stderr
    assert recorded_ids() == []
    assert not os.path.exists(disk["path"])


def test_a_mirror_is_closed_before_it_is_opened_again(place: Path) -> None:
    Path("leg").write_bytes(bytes(MIB))
    disk = added("mirror", "store", "leg", *RESEND)
    until(lambda: info_of(disk["id"])["status"]["progress"] == 1)
    with Load(disk["path"]) as load:
        done = run_here("upgrade", str(disk["id"]))
        assert done.exit_code == 0, done.stderr
        load.goes_on()
        legs = info_of(disk["id"])["status"]["legs"]
        assert [leg["state"] for leg in legs] == ["synced", "synced"]
    load.check()
    assert load.failed == 0
    assert run_here("stop", str(disk["id"])).exit_code == 0
    assert Path("store").read_bytes() == Path("leg").read_bytes()
