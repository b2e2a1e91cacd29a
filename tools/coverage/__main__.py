"""`./run coverage`: which lines the tests run.

The extension and the helper are built once more, with gcc's counters, beside the package's Python
files. Processes that are killed, or that end by os._exit, do not tell what they ran.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.coverage import cython
from tools.coverage.rooms import Lines, table

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "coverage"
LIBRARY, HTML, SETTINGS = WORK / "lib", WORK / "html", WORK / "coveragerc"
GENERATED = ROOT / "generated/src/pyublk/_native.c"
COUNTERS = "--coverage -fprofile-update=atomic -O0"
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "--reruns", "1")
#: It raises in a thread from outside, between two lines: with counters that is another place.
NOT_COUNTED = "tests/unit/test_answers.py::test_a_worker_outlives_what_is_raised_in_it"


class StepFailed(Exception):
    """A step without which there is nothing to tell."""


def run(*command: str | Path, may_fail: bool = False, **environment: str) -> None:
    """Run a step.

    Raises:
        StepFailed: it failed, and that makes what follows useless.
    """
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0:
        return
    words = " ".join(str(word) for word in command[:4])
    if not may_fail:
        raise StepFailed(f"{words} failed")
    print(f"coverage: {words} failed; what it ran before is counted", file=sys.stderr)


def build() -> None:
    """Build the package with counters, into a directory of its own."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    words = ["setup.py", "-q", "build", "--build-base", str(WORK / "build")]
    run(sys.executable, *words, "--build-lib", str(LIBRARY), PYUBLK_COVERAGE="1")
    SETTINGS.write_text(
        f"[run]\nparallel = true\npatch = subprocess\nsource_pkgs = pyublk\n"
        f"data_file = {WORK / 'data' / 'python'}\n"
        f"[paths]\npackage =\n    src/pyublk\n    {LIBRARY / 'pyublk'}\n"
        "[report]\nexclude_also =\n    if TYPE_CHECKING:\n    @overload\n    raise AssertionError\n"
    )
    (WORK / "data").mkdir()


def test(options: Sequence[str]) -> None:
    """Run the tests that need no kernel."""
    measured = ("-m", "coverage", "run", "--rcfile", str(SETTINGS))
    path = {"PYTHONPATH": str(LIBRARY)}
    unit = ("tests/unit", "--deselect", NOT_COUNTED, *options)
    run(sys.executable, *measured, *PYTEST, *unit, may_fail=True, **path)
    core = ("tests/core", "-k", "test_core and plain", "--basetemp", str(WORK / "core"))
    run(sys.executable, *PYTEST, *core, may_fail=True, CFLAGS=COUNTERS, **path)


def test_kernel(options: Sequence[str]) -> None:
    """Run the kernel's tests in a machine that can write what was counted."""
    machine = ("-m", "pyublk.vm", "--cpus", "4", "--memory", "4G", "--timeout", "10800")
    guest = (*machine, "--output", str(WORK), "--env", f"PYTHONPATH={LIBRARY}", "--")
    measured = ("-m", "coverage", "run", "--rcfile", str(SETTINGS))
    tests = ("tests/kernel", "--require-kernel", "--timeout", "600", *options)
    run(sys.executable, *guest, sys.executable, *measured, *PYTEST, *tests, may_fail=True)


def _lines_of(report: Mapping[str, Any]) -> dict[str, Lines]:
    """The files of one of gcovr's reports."""
    return {
        file["file"]: Lines(len(file["lines"]), sum(line["count"] > 0 for line in file["lines"]))
        for file in report["files"]
    }


def _gcovr(name: str, *filters: str) -> dict[str, Any]:
    output = WORK / name
    chosen = [word for text in filters for word in ("--filter", text)]
    # Two builds of one source have its functions in other places: which does not matter here.
    words = ["--root", str(ROOT), "--merge-mode-functions", "merge-use-line-min", *chosen]
    places = [str(WORK / "build"), *([str(WORK / "core")] if (WORK / "core").exists() else [])]
    run(sys.executable, "-m", "gcovr", *words, "--json", str(output), *places)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def _of_generated() -> dict[int, int]:
    """How often lines of the generated C ran, of which gcovr tells nothing."""
    data = next(WORK.glob("build/temp*/generated/src/pyublk/_native.gcda"))
    words = ["gcov", "--json-format", "--stdout", str(data)]
    said = subprocess.run(words, cwd=data.parent, capture_output=True, check=False).stdout
    if not said:
        raise StepFailed("gcov told nothing of the generated C: the tests did not run it")
    counted: dict[int, int] = {}
    for file in json.loads(said)["files"]:
        for line in file["lines"] if file["file"].endswith("/_native.c") else []:
            number = line["line_number"]
            counted[number] = max(counted.get(number, 0), line["count"])
    return counted


def native() -> dict[str, Lines]:
    """Return the lines of Cython and of C, and write their pages."""
    core = _gcovr("c.json", r"src/pyublk/_core/", r"src/pyublk/_helper/")
    counted = _of_generated()
    found = cython.map_back(GENERATED.read_text().splitlines(), counted)
    files = [
        {
            "file": f"src/{name.removeprefix('src/')}",  # a module's own begins with its package
            "lines": [
                {"line_number": number, "count": count, "branches": []}
                for number, count in sorted(lines.items())
            ],
            "functions": [],
        }
        for name, lines in sorted(found.items())
    ]
    mapped = {**core, "files": files}
    (WORK / "cython.json").write_text(json.dumps(mapped))
    (HTML / "native").mkdir(parents=True)
    traces = [word for name in ("c", "cython") for word in ("-a", str(WORK / f"{name}.json"))]
    pages = ["--html-nested", str(HTML / "native" / "index.html")]
    merge = ["--merge-mode-functions", "merge-use-line-min"]
    run(sys.executable, "-m", "gcovr", "--root", str(ROOT), *merge, *traces, *pages)
    return {**_lines_of(core), **_lines_of(mapped)}


def python() -> dict[str, Lines]:
    """Return the lines of Python, and write their pages."""
    rc = ("--rcfile", str(SETTINGS))
    run(sys.executable, "-m", "coverage", "combine", "-q", *rc)
    run(sys.executable, "-m", "coverage", "html", "-q", *rc, "-d", str(HTML / "python"))
    output = WORK / "python.json"
    run(sys.executable, "-m", "coverage", "json", "-q", *rc, "-o", str(output))
    return {
        path: Lines(file["summary"]["num_statements"], file["summary"]["covered_lines"])
        for path, file in json.loads(output.read_text())["files"].items()
    }


def main() -> int:
    parser = argparse.ArgumentParser("./run coverage", description=__doc__)
    parser.add_argument(
        "--kernel", action="store_true", help="also the tests of tests/kernel, in a virtual machine"
    )
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    arguments = parser.parse_args()
    # A shell has its background jobs ignore Ctrl-C, and so would the tests that are about it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        build()
        test(arguments.pytest)
        if arguments.kernel:
            test_kernel(arguments.pytest)
        lines = {**python(), **native()}
    except StepFailed as error:
        print(f"coverage: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(lines)))
    print(f"\npages: {HTML}/python/index.html, {HTML}/native/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
