# SPDX-License-Identifier: MIT
"""`pyublk vm`, which runs programs, and has commands for machines that stay."""

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyublk.cli import main, vm
from pyublk.vm import __main__ as plain
from pyublk.vm import staying


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The commands that are given to new machines."""
    found: list[tuple[str, ...]] = []

    def run(_machine: object, command: tuple[str, ...], **_: Any) -> int:
        found.append(command)
        return 3

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vm, "Machine", lambda *_, **__: None)
    monkeypatch.setattr(vm.attached, "run", run)
    return found


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], ()),
        (["--"], ()),
        (["ls", "-l"], ("ls", "-l")),
        (["--cpus", "2", "ls", "--", "stop"], ("ls", "--", "stop")),
        (["--", "stop"], ("stop",)),
        (["--cpus", "2", "--", "exec", "--name", "x"], ("exec", "--name", "x")),
    ],
)
def test_a_program_is_run_in_a_new_machine(
    ran: list[tuple[str, ...]], words: list[str], command: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(main, ["vm", *words])
    assert done.exit_code == 3, done.output
    assert ran == [command]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "newest", "true"], "no kernel is called 'newest'"),
        (["--env", "=", "true"], "the variable '=' cannot be passed on"),
        (["--env", "UNSET", "true"], "the variable 'UNSET' cannot be passed on"),
        (["--cpus", "0", "true"], "1 to 255 processors, not 0"),
        (["start", "--kernel", "6"], "no kernel is called '6'"),
        (["start", "--name", "a b"], "'a b' is no name for a machine"),
    ],
)
def test_wrong_usage_is_told_before_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = CliRunner().invoke(main, ["vm", "true"])
    assert (done.exit_code, "is not installed" in done.output) == (125, True)
    done = CliRunner().invoke(main, ["vm", *words])
    assert (done.exit_code, said in done.output) == (2, True), done.output
    if words[0] != "start":
        monkeypatch.setattr(sys, "argv", ["vm", *words])
        assert plain.main() == 2
        assert said in capsys.readouterr().err


def test_machines_that_are_not_there(ran: list[tuple[str, ...]]) -> None:
    for words, said in (
        (["stop"], "there is no machine 'default'"),
        (["exec", "ls"], "run 'pyublk vm start --name default'"),
    ):
        done = CliRunner().invoke(main, ["vm", *words])
        assert done.exit_code == 125
        assert said in done.output
    assert CliRunner().invoke(main, ["vm", "list"]).output == ""
    assert CliRunner().invoke(main, ["vm", "list", "--json"]).output == "[]\n"
    assert CliRunner().invoke(main, ["vm", "exec"]).exit_code == 2
    assert ran == []


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 33, ".hidden"])
def test_names_that_no_machine_has(ran: list[tuple[str, ...]], name: str) -> None:
    for verb in (["start"], ["stop"], ["exec", "true"]):
        done = CliRunner().invoke(main, ["vm", verb[0], "--name", name, *verb[1:]])
        assert done.exit_code == 2, done.output
        assert "is no name for a machine" in done.output


def test_a_machine_that_does_not_start(
    ran: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason comes from the process that was to hold it, and nothing is left."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(staying.VMError, match="is not installed"):
        staying.start("broken", {"kernel": "latest"})
    assert staying.machines() == []
    assert not staying._place("broken").exists()
