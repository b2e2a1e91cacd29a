"""What a disk can be asked for: defined once, found in `Device`, TOML, the command and its help."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pyublk
from pyublk import options
from pyublk.cli import adding, main
from pyublk.control import Controller
from pyublk.scheduling import parse_affinity
from pyublk.service.plan import DiskSpec
from pyublk.targets import Null

#: Edits the source of pyublk.options, as a programmer would, before anything imports it.
WITH_ONE_MORE = '''
import importlib.abc, importlib.util, sys
LINE = """
    colour: Annotated[
        str, Option(help="Colour of the disk.", default="red", choices=("red", "blue"))
    ]
"""
PLACE = '    """What `Device` takes besides the target."""\\n'

class Edited(importlib.abc.SourceLoader):
    def __init__(self, path): self.path = path
    def get_filename(self, name): return self.path
    def get_data(self, path):
        text = open(path).read()
        assert PLACE in text
        return text.replace(PLACE, PLACE + LINE).encode()

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "pyublk.options":
            place = path[0] + "/options.py"
            return importlib.util.spec_from_file_location(name, place, loader=Edited(place))

sys.dont_write_bytecode = True
sys.meta_path.insert(0, Finder())

import inspect, json, pydoc
import pyublk
from click.testing import CliRunner
from pyublk.cli import main
from pyublk.service.plan import DiskSpec
from pyublk.targets import Null

def refused(act):
    try:
        act()
    except ValueError as error:
        return str(error)

toml = 'target = "null"\\nsize = 4096\\ncolour = "%s"\\n'
print(json.dumps({
    "signature": str(inspect.signature(pyublk.Device).parameters["colour"]),
    "documentation": "colour: Colour of the disk." in pydoc.render_doc(pyublk.Device),
    "device": str(pyublk.Device(Null(size=4096), colour="blue")),
    "device refuses": refused(lambda: pyublk.Device(Null(size=4096), colour="green")),
    "toml": DiskSpec.from_toml(toml % "blue").disk["colour"],
    "toml's disk": str(DiskSpec.from_toml(toml % "blue").device()),
    "toml refuses": refused(lambda: DiskSpec.from_toml(toml % "green")),
    "help": "Colour of the disk." in CliRunner().invoke(main, ["add", "--help"]).output,
    "command refuses": CliRunner().invoke(main, ["add", "null", "--colour", "green"]).output,
}))
'''


def test_an_option_is_added_by_one_edit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_ONE_MORE], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    sentence = "colour must be one of red, blue, not 'green'"
    assert found["signature"] == "colour: str = 'red'"
    assert found["documentation"]
    assert found["device"].startswith("<Device")
    assert found["device refuses"] == sentence
    assert found["toml"] == "blue"
    assert found["toml's disk"].startswith("<Device")
    assert found["toml refuses"] == f"line 3: {sentence}"
    assert found["help"]
    assert sentence in found["command refuses"]


def test_a_device_shows_every_option() -> None:
    parameters = inspect.signature(pyublk.Device).parameters
    assert list(parameters) == ["target", "on", *options.DEVICE]
    for name, option in options.DEVICE.items():
        assert parameters[name].default == option.default
        assert pyublk.Device.__doc__
        assert f"        {name}: {option.help[:20]}" in pyublk.Device.__doc__


@pytest.mark.parametrize("name", options.DISK)
def test_the_help_has_every_option(name: str) -> None:
    flag = options.DISK[name].flag
    shown = CliRunner().invoke(main, ["add", "--help"], terminal_width=100).output
    assert f"  {flag} " in shown


@pytest.mark.parametrize("name", options.DEVICE)
def test_every_default_is_allowed(name: str) -> None:
    option = options.DEVICE[name]
    assert option.check(option.default) == option.default


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(
        TypeError, match=r"Device takes no option 'queue' \(did you mean 'queues'\?"
    ):
        pyublk.Device(Null(size=4096), queue=2)  # type: ignore[call-arg]


def test_type_checkers_know_the_options() -> None:
    """mypy, which is part of lint, finds what is wrong here, or else an ignore that is not used."""
    with pytest.raises(ValueError, match="depth must be a whole number, not '4'"):
        pyublk.Device(Null(size=4096), depth="4")  # type: ignore[arg-type]


# ---- queues ----


def queues_of(**asked: Any) -> int:
    return options.number_of_queues(options.complete(options.DeviceOptions(**asked)))


def test_as_many_queues_as_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert queues_of(queues="max") == 3
    assert queues_of(queues=8) == 8  # the kernel refuses
    assert queues_of(queues=8, clamp_queues=True) == 3
    assert queues_of(queues=2, clamp_queues=True) == 2


def test_sets_of_cpus_are_for_the_queues_that_there_will_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    pyublk.Device(Null(size=4096), queues="max", affinity=[[0], [1]])
    with pytest.raises(ValueError, match="a set of CPUs for each of the 2 queues"):
        pyublk.Device(Null(size=4096), queues="max", affinity=[[0], [1], [2]])


def test_cpus_as_the_kernel_writes_them() -> None:
    assert parse_affinity("0-3,8") == [[0, 1, 2, 3, 8]]
    assert parse_affinity("5,4-5:0") == [[4, 5], [0]]


# ---- TOML ----

DESCRIBED = """
target = "file"
arguments = ["disk.img"]
size = "1G"
block_size = 4096
read_only = true
queues = "max"
max_io_size = "1M"
trim_after = "never"
stop_timeout = 2.5
affinity = "0-3:4-7"
path = "copy"
batch = false

[options]
direct = true
"""


def test_a_disk_is_described_in_toml(tmp_path: Path) -> None:
    wanted = DiskSpec(
        target="file",
        arguments=("disk.img",),
        options={"direct": "yes"},
        disk={
            "size": 1 << 30,
            "block_size": 4096,
            "read_only": True,
            "queues": "max",
            "max_io_size": 1 << 20,
            "trim_after": None,
            "stop_timeout": 2.5,
            "affinity": [[0, 1, 2, 3], [4, 5, 6, 7]],
            "path": "copy",
            "batch": False,
        },
    )
    assert DiskSpec.from_toml(DESCRIBED) == wanted
    place = tmp_path / "disk.toml"
    place.write_text(DESCRIBED)
    assert DiskSpec.from_toml(place) == wanted
    assert DiskSpec.from_fields(json.loads(json.dumps(asdict(wanted)))) == wanted


def test_a_described_disk_is_made() -> None:
    device = DiskSpec.from_toml('target = "null"\nsize = "1G"\nread_only = true').device()
    assert (device.target.size, device.target.read_only) == (1 << 30, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("queue = 2", "there is no key 'queue' (did you mean 'queues'?); parameters of the target"),
        ("frobnicate = 2", "there is no key 'frobnicate'; parameters of the target's class go"),
        ("", "target is missing: it must be a text such as 'ram'"),
        ("target = 3", "target is 3: it must be a text"),
        ("arguments = 'disk.img'", "arguments must be a list, not 'disk.img'"),
        ("options = 3", "options must be a table, not 3"),
        ("queues = '2'", "queues must be 1 to 4096 or max, not '2'"),
        ("queues = 0", "queues must be 1 to 4096 or max, not 0"),
        ("depth = 1.5", "depth must be 1 to 4096, not 1.5"),
        ("depth = '4'", "depth must be 1 to 4096, not '4'"),
        ("depth = 5000", "depth must be 1 to 4096, not 5000"),
        ("size = '1X'", "size must be a size such as 1G or 512MiB, not '1X'"),
        ("max_io_size = '5K'", "max_io_size must be a multiple of 4096 from 4096 to 33554432, not"),
        ("trim_after = -1", "trim_after must be a number of seconds above 0 or never, not -1"),
        ("preempt = 'yes'", "preempt must be true or false, not 'yes'"),
        ("affinity = '0-'", "affinity must be sets of CPUs such as 0-3:4-7 or auto or any, not"),
        ("affinity = 3", "affinity must be sets of CPUs such as 0-3:4-7 or auto or any, not 3"),
        ("affinity = [0, 1]", "affinity must be sets of CPUs such as 0-3:4-7 or auto or any, not"),
        ("path = 'fast'", "path must be one of auto, copy, get-data, user-copy, zero-copy, auto-"),
        ("io_scheduler = 3", "io_scheduler must be a text or default, not 3"),
        ("target = ", "this is not TOML: "),
        ("[options]\nwhen = 2026-11-28", "when must be a text, a number, true or false, or a list"),
        ("[options]\nfiles = ['a,b', 'c']", "a value of files has a comma in it"),
    ],
)
def test_mistakes_in_toml(text: str, words: str, tmp_path: Path) -> None:
    if "target" not in text and text:
        text = f'target = "null"\n{text}'
    with pytest.raises(ValueError, match=re.escape(words)):
        DiskSpec.from_toml(text)
    place = tmp_path / "disk.toml"
    place.write_text(text)
    with pytest.raises(
        ValueError, match="^" + re.escape(str(place)) + r"(:\d+)?: .*" + re.escape(words)
    ):
        DiskSpec.from_toml(place)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    place = tmp_path / "disk.toml"
    place.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="this is not text in UTF-8"):
        DiskSpec.from_toml(place)


# ---- the command ----


class NoController(Controller):
    def __init__(self) -> None:
        self._fd = -1


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DiskSpec]:
    """What `pyublk add` would serve."""
    specs: list[DiskSpec] = []

    def start(spec: DiskSpec, ready: object, server: object) -> None:
        specs.append(spec)

    monkeypatch.setattr(adding, "open_controller", NoController)
    monkeypatch.setattr(adding.daemon, "start", start)

    def add(*arguments: str) -> DiskSpec:
        result = CliRunner().invoke(main, ["add", *arguments])
        assert result.exit_code == 0, result.output
        return specs.pop()

    return add


def test_the_command_asks_for_what_stands_on_its_line(added: Callable[..., DiskSpec]) -> None:
    assert added("null").disk == {}
    assert added("null", "--trim-after", "never", "--no-batch", "--io-scheduler=default").disk == {
        "trim_after": None,
        "batch": False,
        "io_scheduler": None,
    }
    asked = added("ram", "--size", "1G", "--affinity", "any", "--queues=max", "--stop-timeout=2")
    assert asked.disk == {"size": 1 << 30, "affinity": None, "queues": "max", "stop_timeout": 2.0}


def test_the_command_line_goes_before_the_file(
    added: Callable[..., DiskSpec], tmp_path: Path
) -> None:
    place = tmp_path / "disk.toml"
    place.write_text(DESCRIBED)
    assert added("--spec", str(place)) == DiskSpec.from_toml(DESCRIBED)
    spec = added("--spec", str(place), "--queues", "4", "--trim-after", "5", "-o", "direct=no")
    assert (spec.target, spec.options) == ("file", {"direct": "no"})
    expected = DiskSpec.from_toml(DESCRIBED).disk | {"queues": 4, "trim_after": 5.0}
    assert spec.disk == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'TARGET'"),
        (["null", "--spec", "disk.toml"], "TARGET and --spec exclude each other"),
        (["--spec", "none.toml"], "'none.toml' does not exist"),
        (["--spec", "wrong.toml"], "wrong.toml:2: there is no key 'sise' (did you mean 'size'?)"),
    ],
)
def test_a_command_line_that_is_wrong(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.toml").write_text(DESCRIBED)
    (tmp_path / "wrong.toml").write_text('target = "null"\nsise = "1G"\n')
    result = CliRunner().invoke(main, ["add", *arguments])
    assert result.exit_code == 2
    assert words in result.output.replace("\n  ", " ")
