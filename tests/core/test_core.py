"""Builds the C core's tests plain and under each sanitizer, and runs them."""

import functools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "src" / "pyublk" / "_core"
PROGRAMS = sorted(path.stem for path in HERE.glob("*_test.c"))
BUILDS = {
    "plain": ["-O2", "-Wconversion", "-Werror"],
    "address,undefined": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
#: What failing.h, and driver.h with it, puts before the C library's.
WRAPPED = """
    aligned_alloc calloc close dup3 eventfd fallocate fdatasync free fstat madvise malloc mincore
    mmap mprotect munmap ppoll prctl pread preadv pwrite pwritev2 realloc syscall
"""
WRAP = [f"-Wl,--wrap={name}" for name in WRAPPED.split()]
LINKED = {"batch_test": WRAP, "quiesce_test": WRAP, "sweep_test": WRAP}


def compiled(build: str, *arguments: str | Path, where: Path | None = None) -> None:
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-g", *BUILDS[build], "-I", CORE]
    given = os.environ.get("CFLAGS", "").split()  # of `./run coverage`
    done = subprocess.run(
        [*command, *arguments, *given], capture_output=True, text=True, check=False, cwd=where
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The core's objects in a build; they are compiled once."""

    @functools.cache
    def objects(build: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("core")
        compiled(build, "-c", *CORE.glob("*.c"), where=folder)
        return sorted(folder.glob("*.o"))

    return objects


@pytest.fixture(scope="session")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The builds that this compiler can do at all."""
    folder = tmp_path_factory.mktemp("sanitizers")
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    able = set()
    for name, flags in BUILDS.items():
        command = ["cc", *flags, "-o", folder / "empty", source]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            able.add(name)
    return able


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_core(
    program: str,
    build: str,
    sanitizers: set[str],
    core: Callable[[str], list[Path]],
    tmp_path: Path,
) -> None:
    if build not in sanitizers:
        pytest.skip(f"this compiler cannot build with {' '.join(BUILDS[build])}")
    binary = tmp_path / program
    flags = LINKED.get(program, [])
    compiled(build, HERE / f"{program}.c", *core(build), *flags, "-pthread", "-o", binary)
    arguments = []
    if program == "control_test":  # which needs the other process, built as it is
        arguments = [tmp_path / "pyublk-helper"]
        helper = (CORE.parent / "_helper").glob("*.c")
        soon = "-DFIRST_PAUSE_MS=1"
        compiled(build, soon, *helper, *core(build), "-pthread", "-o", arguments[0])
    done = subprocess.run(
        [binary, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- how the core is built ----

SOURCES = sorted(CORE.glob("*.[ch]"))


def loops_in(edges: dict[str, set[str]]) -> list[str]:
    """What lies on a circle: what is left when all that leads nowhere is taken away."""
    left = {name: set(others) for name, others in edges.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    while unused := left.keys() - set().union(*left.values()):
        for name in unused:
            del left[name]
    return sorted(left)


def test_no_file_of_the_core_includes_itself_by_way_of_others() -> None:
    includes = {
        path.name: set(re.findall(r'^#include "(\w+\.h)"', path.read_text(), re.M))
        for path in SOURCES
    }
    assert set().union(*includes.values()) <= includes.keys()
    assert loops_in(includes) == []


def test_no_file_of_the_core_calls_itself_by_way_of_others(tmp_path: Path) -> None:
    """By the names that the linker sees: what a header only declares would hide a circle."""
    defines: dict[str, str] = {}
    wants: dict[str, set[str]] = {}
    for path in CORE.glob("*.c"):
        compiled = tmp_path / f"{path.stem}.o"
        subprocess.run(["cc", "-std=gnu11", "-O1", "-c", path, "-o", compiled], check=True)
        symbols = subprocess.run(
            ["nm", "--format=posix", compiled], capture_output=True, text=True, check=True
        )
        for line in symbols.stdout.splitlines():
            name, kind, *_ = line.split()
            if kind == "U":
                wants.setdefault(path.name, set()).add(name)
            elif kind.isupper():
                defines[name] = path.name
    calls = {
        name: {defines[other] for other in others & defines.keys()}
        for name, others in wants.items()
    }
    assert "mirrored.c" not in calls["mapped.c"]
    assert loops_in(calls) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 600
    began = 0
    for number, line in enumerate(lines, 1):
        if line == "{":
            began = number
        elif line == "}":
            assert number - began < 60, f"the function that ends in line {number}"
