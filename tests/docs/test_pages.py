"""Every example that needs no kernel; tests/kernel and tests/vm have the others."""

import builtins
import errno
import html
import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from native_stub import read_stub
from pages import ROOT, blocks, pages_that_need, run

import pyublk
from pyublk import errors
from pyublk.cli import failures


@pytest.mark.parametrize("page", pages_that_need(None), ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    assert run(page) == sum(needs is None for needs, _ in blocks(page))


def test_the_tutorial_has_examples() -> None:
    assert len(blocks(ROOT / "docs" / "tutorial.md")) >= 8


def test_the_command_reference_is_as_the_commands_are() -> None:
    command = [sys.executable, ROOT / "docs" / "cli_reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built. Sphinx warns of anything wrong, and -W makes it an error."""
    made = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", ROOT / "docs", made]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def test_every_page_is_in_the_table_of_contents(site: Path) -> None:
    assert (site / "index.html").exists()


@pytest.mark.parametrize(
    "module", ["pyublk", "pyublk.targets", "pyublk.testing", "pyublk.traces", "pyublk.vm"]
)
def test_every_public_name_is_in_the_reference(site: Path, module: str) -> None:
    package = importlib.import_module(module)
    missing = [
        name
        for name in package.__all__
        if not {f"{module}.{name}", f"{getattr(package, name).__module__}.{name}"} & described(site)
    ]
    assert not missing, f"docs/api.md lacks {', '.join(missing)}"


def described(site: Path) -> set[str]:
    """The names in the reference."""
    # Four lines of text, then one line for each thing: its name, what it is, where.
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4])
    return {line.split()[0] for line in inventory.decode().splitlines() if " py:" in line}


@pytest.mark.parametrize("name", ["IO", "Queue", "Ring", "ShardedLock"])
def test_every_member_of_a_native_class_is_in_the_reference(site: Path, name: str) -> None:
    texts = {
        key.partition(".")[2]: text
        for key, (text, _) in read_stub().items()
        if key.startswith(f"{name}.") and "._" not in key
    }
    silent = [member for member, text in texts.items() if not text]
    assert not silent, f"the stub says nothing of {name}'s {', '.join(silent)}"
    missing = [member for member in texts if f"pyublk.{name}.{member}" not in described(site)]
    assert not missing, f"the reference lacks {name}'s {', '.join(missing)}"


def test_the_pictures_are_those_of_their_sources() -> None:
    pictures = ROOT / "docs" / "pictures"
    for source in pictures.glob("*.dot"):
        drawn = html.unescape(source.with_suffix(".svg").read_text())
        for label in re.findall(r'label="([^"]*)"', re.sub(r"//.*", "", source.read_text())):
            for line in label.split(r"\n"):
                assert line.strip() in drawn, f"run `./run diagrams`: {source.name} has {line!r}"


def test_the_table_of_errors_has_the_exit_codes() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)`([^|]*)\| (\d|–) \|", page, re.M)
    named = {name for name, _, _ in rows}
    raised = {name for name in pyublk.__all__ if name in vars(errors)}
    assert raised - {"UblkError"} <= named
    for name, detail, code in rows:
        cls = vars(errors).get(name) or getattr(builtins, name)
        for number in re.findall(r"\bE[A-Z]+\b", detail) or [None]:
            made = cls.__new__(cls) if number is None else cls(getattr(errno, number), "")
            if code != "–" and "ublk-control" not in detail:  # which the command looks for itself
                assert failures.exit_code(made) == int(code), f"{name} {number or ''}"


def test_the_page_on_the_design_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    package = ROOT / "src" / "pyublk"
    for new, name in re.findall(r"(\*\*)?`((?:\w+/)*\w+\.(?:pyi?|pxi|c|h)|\w+/)`", page):
        assert ((package / name).exists() or (ROOT / name).exists()) != bool(new), name
