"""The rooms of the house: who may import whom, and what an import must not bring along."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyublk

PACKAGE = Path(pyublk.__file__).parent

#: From the bottom up. A room imports from its own row or rows above it in this list only.
ROOMS = [
    ["arguments", "launch", "uapi", "uring", "interruptions", "files"],
    ["openers"],
    ["keeping"],
    ["errors"],
    ["_native"],
    ["features", "methods", "occupants", "params", "stats", "zones"],
    ["paths", "backing", "scheduling"],
    ["resizing"],
    ["control"],
    ["target", "sharing"],
    ["mapped"],
    ["serving", "zoned"],
    ["loops"],
    ["crew"],
    ["device"],
    ["targets", "vm", "testing"],
    ["service"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyublk" and len(parts) > 1 and parts[1] in LEVEL:
                yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_below(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"{room} has no place in the house: give it a row in ROOMS"
    for other in imported_rooms(path):
        assert LEVEL[other] <= LEVEL[room], f"{room} imports {other}, which is above it"


def test_the_leaf_imports_nothing_of_ours() -> None:
    assert list(imported_rooms(PACKAGE / "uapi.py")) == []


def test_the_core_never_sees_python() -> None:
    for path in (PACKAGE / "_core").iterdir():
        assert "Python.h" not in path.read_text(), path


def test_the_library_needs_no_other_package() -> None:
    """`import pyublk` loads the standard library and itself: no command, no test runner."""
    program = """
import sys
before = set(sys.modules)
import pyublk
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    others = set(done.stdout.split()) - sys.stdlib_module_names - {"pyublk", "cython_runtime"}
    assert {name for name in others if not name.startswith("_cython_")} == set()


@pytest.mark.parametrize("heavy", ["asyncio", "importlib.metadata"])
def test_an_import_does_not_bring_what_few_disks_need(heavy: str) -> None:
    program = f"import sys, pyublk, pyublk.targets; print({heavy!r} in sys.modules)"
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.append({str(PACKAGE.parent)!r})\n" + program,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_everything_exported_is_there_and_sorted() -> None:
    assert list(pyublk.__all__) == sorted(
        pyublk.__all__, key=lambda name: (not name.isupper(), name)
    )
    for name in pyublk.__all__:
        assert getattr(pyublk, name) is not None
