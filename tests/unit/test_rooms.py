"""The rooms of the house: who may import whom, and what an import must not bring along."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyublk

PACKAGE = Path(pyublk.__file__).parent

#: The most lines of a module, and of a function.
MODULE, FUNCTION = 600, 60


def rows() -> list[list[str]]:
    """The map in the package's docstring, from the bottom up: the rooms of each row."""
    assert pyublk.__doc__ is not None
    found = re.findall(r"^ {4}(\S+(?:, \S+)*) {2,}\S", pyublk.__doc__, re.MULTILINE)
    return [[room.rstrip("/") for room in row.split(", ")] for row in found]


ROWS = rows()
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
#: Of what the binding is made, which is one room.
BINDING = sorted([PACKAGE / "_native.pyx", *PACKAGE.glob("_binding/*.pxi")])
TARGET_KINDS = re.compile(r"isinstance\([^)]*Target|dispatch (==|!=|in|not in) ")


def module_of(path: Path) -> str:
    """Its dotted name below the package: `cli.output`; that of a package is its directory's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str:
    return module.partition(".")[0]


NAMES = {module_of(path) for path in MODULES} | {"_native"}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that it imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (module for name in names if (module := module_named(name)) is not None)


def module_named(name: str) -> str | None:
    """The module that is meant by `pyublk.some.name`, which may be one or something in one."""
    package, _, inner = name.partition(".")
    if package != "pyublk":
        return None
    while inner and inner not in NAMES:
        if "." not in inner:  # what the package itself exports
            return str(getattr(pyublk, inner).__module__).removeprefix("pyublk.")
        inner = inner.rpartition(".")[0]
    return inner or None


IMPORTS = {module_of(path): sorted(set(imported(path))) for path in MODULES}
IMPORTS["_native"] = sorted(
    {
        module
        for path in BINDING
        for package, names in re.findall(r"^from (pyublk\S*) import (.+)$", path.read_text(), re.M)
        for name in names.split(", ")
        if (module := module_named(f"{package}.{name}")) is not None
    }
)


def test_the_map_has_every_room_once() -> None:
    on_the_map = [room for row in ROWS for room in row]
    assert sorted(on_the_map) == sorted({room_of(module) for module in NAMES} - {"__main__"})


@pytest.mark.parametrize("module", sorted(NAMES - {"__main__"}))
def test_imports_only_from_below(module: str) -> None:
    room = room_of(module)
    for other in map(room_of, IMPORTS[module]):
        assert other == room or LEVEL[other] < LEVEL[room], f"{room} imports {other}"


def test_there_is_no_circle() -> None:
    """Nor one inside of a room, and whether or not an import is at the top of its module."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " imports ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in IMPORTS[module]:
                if other != module:
                    visit(other, (*way, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_engines_tell_kinds_of_targets_apart(path: Path) -> None:
    if room_of(module_of(path)) != "engines":
        assert not TARGET_KINDS.search(path.read_text())


def test_no_module_is_long() -> None:
    kinds = (".py", ".pyi", ".pyx", ".pxi", ".c", ".h")
    lines = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*")
        if path.suffix in kinds
    }
    assert not {name: count for name, count in lines.items() if count > MODULE}


def test_no_function_is_long() -> None:
    long = {
        f"{module_of(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION
    }
    assert not long


@pytest.mark.parametrize(
    "stub", sorted(PACKAGE.glob("_binding/[a-z]*.pyi")), ids=lambda path: path.stem
)
def test_the_stub_beside_a_part_of_the_binding_is_of_that_part(stub: Path) -> None:
    described = {
        node.name
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    part = stub.with_suffix(".pxi").read_text()
    assert described
    assert described <= set(re.findall(r"^(?:cdef class|class|def) (\w+)", part, re.M))


def test_the_leaf_imports_nothing_of_ours() -> None:
    assert IMPORTS["uapi"] == []


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
