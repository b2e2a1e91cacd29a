"""Disks by nbdkit and the nbd driver, as far as they go without the driver."""

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyublk import errors
from pyublk.cli import main
from pyublk.nbdkit import disks
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId


@pytest.fixture(autouse=True)
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path))
    return tmp_path


def recorded(name: str = "nbd7") -> disks.NBDDisk:
    plan = DiskSpec(target="file", arguments=("disk.img",), disk={"size": 4096})
    server = ProcessId(os.getpid(), 1)  # no such process: it started at another time
    disk = disks.NBDDisk(name=name, server=server, plan=plan, log=Path("/run/log"))
    disk.write()
    return disk


def test_records(run_directory: Path) -> None:
    made = [recorded("nbd10"), recorded("nbd9")]
    (run_directory / "nbd8.json").write_text("{")
    (run_directory / "nbdx.json").write_text("{}")
    assert disks.disks() == made[::-1]
    assert disks.find("nbd9") == made[1]
    assert made[0].state == "dead"
    with pytest.raises(OSError, match="nbd3 is no disk of pyublk's by NBD; there are: nbd9, nbd10"):
        disks.find("nbd3")
    made[0].forget()
    assert disks.disks() == made[1:]


@pytest.mark.skipif(os.path.exists("/dev/ublk-control"), reason="this kernel has ublk")
def test_the_commands_know_them_without_a_driver() -> None:
    runner = CliRunner()
    assert runner.invoke(main, ["list"]).exit_code == 3
    recorded()
    listed = runner.invoke(main, ["list"])
    assert listed.exit_code == 0
    assert listed.stdout.splitlines()[1].split()[:5] == ["nbd7", "/dev/nbd7", "file", "-", "dead"]
    told = runner.invoke(main, ["info", "/dev/nbd7"])
    assert "file disk.img" in told.stdout
    assert runner.invoke(main, ["info", "nbd8"]).exit_code == 5
    assert runner.invoke(main, ["info", "0"]).exit_code == 3
    assert runner.invoke(main, ["stop", "nbd8"]).exit_code == 5
    stopped = runner.invoke(main, ["stop", "all", "--json"])
    assert (stopped.exit_code, stopped.stdout.split()) == (0, ['{"done":', '["nbd7"]}'])
    assert disks.disks() == []
    assert runner.invoke(main, ["stop", "all"]).exit_code == 3


def test_what_is_for_ublk_only_is_refused() -> None:
    spec = DiskSpec(target="ram", disk={"size": 4096, "depth": 4})
    with pytest.raises(ValueError, match="--depth is for disks by ublk: by NBD there are --size"):
        disks.start(spec)
    runner = CliRunner()
    both = runner.invoke(main, ["add", "ram", "--size", "1M", "--via", "nbd", "--foreground"])
    assert (both.exit_code, "--via nbd excludes" in both.stderr) == (2, True)
    wrong = runner.invoke(main, ["add", "ram", "--via", "nbd"])
    assert (wrong.exit_code, "ram needs size" in wrong.stderr) == (2, True)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(errors.FeatureMissing, match="nbdkit: install the package nbdkit, here is"):
        disks.check()
    for name in ("nbdkit", "nbd-client"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    with pytest.raises(errors.FeatureMissing, match="install the package nbdkit-plugin-python"):
        disks.check()
    (tmp_path / "nbdkit").write_text("#!/bin/sh\necho python_version=3.2.1\n")
    with pytest.raises(errors.FeatureMissing, match=r"pyublk for Python 3\.2, by which nbdkit"):
        disks.check()
    with pytest.raises(errors.FeatureMissing, match="needs the nbd driver"):
        disks._free_device(sys=tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="only root") as failure:
        disks.check()
    assert failure.value.errno == errno.EPERM


def test_a_free_device(tmp_path: Path) -> None:
    for number, size, pid in ((0, 8, True), (1, 8, False), (2, 0, False), (10, 0, False)):
        place = tmp_path / "class/block" / f"nbd{number}"
        place.mkdir(parents=True)
        (place / "size").write_text(f"{size}\n")
        if pid:
            (place / "pid").write_text("5\n")
    assert disks._free_device(sys=tmp_path) in ("nbd2", "nbd10")
    recorded("nbd2")
    assert disks._free_device(sys=tmp_path) == "nbd10"
    recorded("nbd10")
    with pytest.raises(OSError, match="all of the 4 devices of the nbd driver are in use"):
        disks._free_device(sys=tmp_path)
