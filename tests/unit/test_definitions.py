"""Definitions of disks: what files say, in which order, and what differs from what is served."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from pyublk import errors
from pyublk.cli import main
from pyublk.cli.failures import ExitCode
from pyublk.service import daemon, definitions
from pyublk.service.definitions import Action, Definition
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
from pyublk.service.records import Record
from pyublk.service.recovering import recover
from pyublk.targets import Null

WHOLE = """\
[disk.top]
target = "file"
arguments = ["/dev/ublkb7"]
after = ["base", "side"]

[disk.base]
target = "ram"
size = "1G"
id = 7
server = "small"

[disk.side]
target = "null"

[disk.side.options]
size = 4096
"""


def written(directory: Path, text: str, name: str = "disks.toml") -> Path:
    file = directory / name
    file.write_text(text)
    return file


def record(definition: Definition, **changes: object) -> Record:
    """As that of the disk that is served."""
    spec = DiskSpec.from_fields(json.loads(json.dumps(asdict(definition.spec))))
    return Record(
        id=3,
        cookie=1,
        server=ProcessId(1, 1),
        plan=replace(spec, **changes),  # type: ignore[arg-type]
        log=None,
        server_name=definition.server,
    )


def test_a_file_defines_disks(tmp_path: Path) -> None:
    file = written(tmp_path, WHOLE)
    found = definitions.read([file])
    assert [one.name for one in found][-1] == "top"
    by_name = {one.name: one for one in found}
    assert by_name["base"] == Definition(
        spec=DiskSpec(target="ram", disk={"size": 1 << 30, "id": 7}, name="base", file=str(file)),
        server="small",
    )
    assert by_name["top"].after == ("base", "side")
    assert by_name["side"].spec.options == {"size": "4096"}


def test_a_directory_has_files(tmp_path: Path) -> None:
    second = written(tmp_path, '[disk.b]\ntarget = "null"\nafter = ["a"]', "1.toml")
    first = written(tmp_path, '[disk.a]\ntarget = "null"', "2.toml")
    written(tmp_path, "this is not TOML", "notes.txt")
    files = definitions.files_of([tmp_path, first])
    assert files == [second, first]
    assert [one.name for one in definitions.read(files)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (1, '[dsk.a]\ntarget = "null"', "there is no table 'dsk' (did you mean 'disk'?)"),
        (1, 'target = "null"', "there is no table 'target'; a disk is a table such as"),
        (1, "disk = 1", "disk must have a table for each disk, such as [disk.images]"),
        (2, "[disk]\na = 1", "disk.a must be a table: [disk.a]"),
        (1, '[disk."a b"]\ntarget = "null"', "'a b' is not a disk's name: use 1 to 64 letters"),
        (2, "\n[disk.a]\nsize = 1", "target is missing: it must be a text such as 'ram'"),
        (3, '[disk.a]\ntarget = "null"\nsise = 1', "there is no key 'sise' (did you mean 'size'?)"),
        (3, '[disk.a]\ntarget = "null"\nsever = "x"', "did you mean 'server'?"),
        (3, '[disk.a]\ntarget = "null"\nqueues = 0', "queues must be 1 to 4096 or max, not 0"),
        (2, "[disk.a]\ntarget = 3", "target is 3: it must be a text"),
        (4, '[disk.a]\ntarget="null"\n[disk.a.options]\nx = {y = 1}', "x must be a text, a number"),
        (3, '[disk.a]\ntarget = "null"\noptions.x = {y = 1}', "x must be a text, a number"),
        (3, '[disk.a]\ntarget = "null"\nserver = 3', "server must be a text, not 3"),
        (3, '[disk.a]\ntarget = "null"\nserver = "a/b"', "'a/b' is not a server's name"),
        (3, '[disk.a]\ntarget = "null"\nafter = "b"', "after must be a list of disks' names"),
        (3, '[disk.base]\ntarget = "null"\nafter = ["bace"]', "no file defines"),
        (
            6,
            '[disk.a]\ntarget = "null"\nid = 1\n[disk.b]\ntarget = "null"\nid = 1',
            "a has the id 1 already",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: int, text: str, words: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(words)) as told:
        definitions.read([file])
    assert str(told.value).startswith(f"{file}:{line}: ")


def test_a_name_is_for_one_disk(tmp_path: Path) -> None:
    files = [written(tmp_path, '[disk.a]\ntarget = "null"', name) for name in ("1.toml", "2.toml")]
    with pytest.raises(ValueError, match=r"2\.toml:1: a is defined in .*1\.toml too"):
        definitions.read(files)


def test_disks_that_wait_for_each_other(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "\n".join(f'[disk.{a}]\ntarget = "null"\nafter = ["{b}"]' for a, b in ("ab", "bc", "ca")),
    )
    with pytest.raises(ValueError, match=r"the disks wait for each other: (\w after ){3}\w$"):
        definitions.read([file])


@pytest.mark.parametrize(
    ("change", "action", "differences"),
    [
        ({}, Action.KEEP, ()),
        ({"size": 1 << 31}, Action.RESIZE, ("size from 1GiB to 2GiB",)),
        ({"size": 1 << 29}, Action.RECREATE, ("size from 1GiB to 512MiB",)),
        (
            {"size": 1 << 31, "queues": 2},
            Action.RECREATE,
            ("size from 1GiB to 2GiB", "queues from the default to 2"),
        ),
        ({"affinity": [[0], [1]]}, Action.RECREATE, ("affinity from the default to [[0], [1]]",)),
    ],
)
def test_what_differs_decides(
    tmp_path: Path, change: dict[str, object], action: Action, differences: tuple[str, ...]
) -> None:
    file = written(tmp_path, '[disk.a]\ntarget = "ram"\nsize = "1G"')
    (before,) = definitions.read([file])
    disk = before.spec.disk | change
    after = replace(before, spec=replace(before.spec, disk=disk))
    (step,) = definitions.steps([after], [file], [record(before)])
    assert (step.action, step.differences) == (action, differences)


def test_a_disk_that_waits_is_recovered_first(tmp_path: Path) -> None:
    file = written(tmp_path, '[disk.a]\ntarget = "null"')
    (one,) = definitions.read([file])
    changed = replace(one, server="x")
    for wanted, differences in ((one, ()), (changed, ('server from the default to "x"',))):
        (step,) = definitions.steps([wanted], [file], [record(one)], waiting={3})
        assert (step.action, step.differences) == (Action.RECOVER, differences)


def test_other_differences(tmp_path: Path) -> None:
    file = written(
        tmp_path, '[disk.a]\ntarget = "file"\nserver = "x"\n[disk.a.options]\ndirect = true'
    )
    (one,) = definitions.read([file])
    there = record(one, options={}, arguments=("disk.img",))
    (step,) = definitions.steps([replace(one, server=None)], [file], [there])
    assert step.action is Action.RECREATE
    assert step.differences == (
        'arguments from ["disk.img"] to the default',
        'server from "x" to the default',
        'options.direct from the default to "yes"',
    )


def test_what_is_there_and_not_defined(tmp_path: Path) -> None:
    """Of the same file it is to be stopped; of another one, only its name matters."""
    file = written(tmp_path, '[disk.a]\ntarget = "null"')
    (one,) = definitions.read([file])
    gone = record(one, name="gone")
    other = record(one, name="other", file="/elsewhere.toml")
    start, keep = (
        definitions.steps([one], [file], records) for records in ([], [record(one), other])
    )
    assert [step.action for step in start] == [Action.START]
    assert [step.action for step in keep] == [Action.KEEP]
    assert [step.action for step in definitions.steps([one], [file], [gone])] == [
        Action.STOP,
        Action.START,
    ]
    with pytest.raises(
        errors.DeviceBusy, match=r"a is /dev/ublkb3 already, which /elsewhere\.toml"
    ):
        definitions.steps([one], [file], [record(one, file="/elsewhere.toml")])


def test_without_any_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "DIRECTORY", tmp_path / "none")
    done = CliRunner().invoke(main, ["plan"], prog_name="pyublk")
    assert done.exit_code == ExitCode.USAGE
    assert f"name a file, or write one ({tmp_path / 'none'}/*.toml)" in done.stderr


@pytest.mark.parametrize("command", ["plan", "up"])
def test_a_wrong_file_is_told_before_the_driver_is_asked(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise FileNotFoundError("no driver")

    monkeypatch.setattr("pyublk.cli.defining.open_controller", no_driver)
    file = written(tmp_path, '[disk.a]\ntargett = "ram"')
    done = CliRunner().invoke(main, [command, str(file)], prog_name="pyublk")
    assert done.exit_code == ExitCode.USAGE
    assert "did you mean 'target'?" in done.stderr


def test_another_target_leaves_the_definition(tmp_path: Path) -> None:
    """A disk of a definition stays one when another target recovers it."""
    (one,) = definitions.read(
        [written(tmp_path, '[disk.a]\ntarget = "ram"\nsize = "1G"\ndepth = 4')]
    )
    asked: list[DiskSpec] = []
    params = Null(size=1 << 20, block_size=4096).profile().params(65536)
    controller = SimpleNamespace(get_params=lambda _device: params)
    device = SimpleNamespace(id=3, path="/dev/ublkb3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "of", lambda _device: record(one))
        patch.setattr(daemon, "take_over", lambda _disk, spec, server: asked.append(spec))
        recover(cast(Any, controller), cast(Any, device), DiskSpec(target="null"))
    (spec,) = asked
    assert (spec.target, spec.name, spec.file) == ("null", "a", one.spec.file)
    assert spec.disk == {"size": 1 << 20, "depth": 4, "block_size": 4096, "read_only": False}
