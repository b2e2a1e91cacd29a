"""The units and the rule: in their places once, and gone again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyublk import errors
from pyublk.service import definitions
from pyublk.service.definitions import Definition
from pyublk.service.installing import Change, Work, carry_out, installation, removal

DISKS = """\
[disk.base]
target = "ram"
size = "1G"

[disk.top]
target = "file"
arguments = ["/dev/ublkb0"]
after = ["base"]
"""

#: Notes what it is called with, in the place of systemctl and udevadm.
RECORDER = '#!/bin/sh\necho "${0##*/} $*" >>"${0%/*}/called"\n'


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("systemctl", "udevadm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(RECORDER)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin" / "called"


@pytest.fixture
def found(tmp_path: Path) -> list[Definition]:
    file = tmp_path / "disks.toml"
    file.write_text(DISKS)
    return definitions.read([file])


def work_for(found: list[Definition], tmp_path: Path, users: str | None = "disks") -> Work:
    return installation(found, users=users, units=tmp_path / "units", rules=tmp_path / "rules")


def test_an_installation(tmp_path: Path, found: list[Definition], called: Path) -> None:
    work = work_for(found, tmp_path)
    assert not (tmp_path / "units").exists()  # nothing is done before it is to be
    carry_out(work)
    template = (tmp_path / "units/pyublk@.service").read_text()
    assert f"ExecStart={sys.executable} -P -m pyublk serve %i\n" in template
    assert "{" not in template
    drop_in = tmp_path / "units/pyublk@top.service.d/after.conf"
    assert "After=pyublk@base.service\n" in drop_in.read_text()
    assert 'GROUP="disks"' in (tmp_path / "rules/60-pyublk.rules").read_text()
    assert called.read_text().splitlines() == [
        "systemctl daemon-reload",
        "udevadm control --reload",
        "udevadm trigger --action=add --sysname-match=ublk-control",
    ]

    again = work_for(found, tmp_path)
    assert {step.change for step in again.files} == {Change.KEEP}
    assert again.after == ()

    # A definition that comes after no other any more has no drop-in.
    work = work_for(found[:1], tmp_path)
    changed = [step for step in work.files if step.change is not Change.KEEP]
    assert [(step.change, step.path) for step in changed] == [(Change.REMOVE, drop_in)]
    carry_out(work)
    assert not drop_in.parent.exists()


def test_a_removal(tmp_path: Path, found: list[Definition], called: Path) -> None:
    carry_out(work_for(found, tmp_path))
    called.unlink()
    others = tmp_path / "units/pyublk@top.service.d/mine.conf"
    others.write_text("[Service]\n")
    carry_out(removal(units=tmp_path / "units", rules=tmp_path / "rules"))
    left = [path for path in tmp_path.glob("[ur]*/**/*") if path.is_file()]
    assert left == [others]
    assert called.read_text().splitlines()[:2] == [
        "systemctl disable pyublk.service pyublk@.service",
        "systemctl daemon-reload",
    ]
    assert removal(units=tmp_path / "units", rules=tmp_path / "rules") == Work(())


def test_files_that_are_not_ours(tmp_path: Path, found: list[Definition]) -> None:
    unit = tmp_path / "units/pyublk.service"
    unit.parent.mkdir()
    unit.write_text("[Unit]\n")
    with pytest.raises(errors.UblkError, match="was not written by pyublk: move it away"):
        work_for(found, tmp_path)
    assert removal(units=tmp_path / "units", rules=tmp_path / "rules").files == ()


def test_a_command_that_fails(tmp_path: Path, found: list[Definition], called: Path) -> None:
    called.with_name("systemctl").write_text("#!/bin/sh\necho no manager >&2\nexit 1\n")
    with pytest.raises(errors.UblkError, match="systemctl daemon-reload: no manager"):
        carry_out(work_for(found, tmp_path))


def test_a_machine_without_systemd(
    tmp_path: Path, found: list[Definition], called: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, or removed, whose commands cannot be run then."""
    work = work_for(found, tmp_path)
    called.with_name("udevadm").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(errors.UblkError, match="udevadm is not there: this machine does not run"):
        carry_out(work)
    assert not (tmp_path / "units").exists()
    assert not called.exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not there")
def test_systemd_understands_the_units(
    tmp_path: Path, found: list[Definition], called: Path
) -> None:
    carry_out(work_for(found, tmp_path))
    units = tmp_path / "units"
    shutil.copy(units / "pyublk@.service", units / "pyublk@top.service")
    done = subprocess.run(
        [
            *("systemd-analyze", "verify", "--man=no", "--recursive-errors=no"),
            *(str(units / "pyublk@top.service"), str(units / "pyublk.service")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
