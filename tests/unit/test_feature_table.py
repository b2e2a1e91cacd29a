"""docs/features.md speaks of every flag, and of tests that are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from pyublk.uapi import Feature

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| `([A-Z_]+)` \| ([\d.]+) \| (.+) \|$",
    (ROOT / "docs" / "features.md").read_text(),
    re.MULTILINE,
)
TEST = r"`(test_\w+\.py)::(test_\w+)`"


@cache
def functions_of(name: str) -> set[str]:
    """The functions that pytest takes from a file of tests/kernel."""
    path = ROOT / "tests" / "kernel" / name
    if not path.exists():
        return set()
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


def fault(used: str) -> str | None:
    """What is wrong with the last column of a row: it names tests, with a remark in parentheses if
    any, or says why there is none."""
    if re.fullmatch(r"not used: .{20,}", used):
        return None
    if not re.fullmatch(rf"{TEST}(, {TEST})*( \(.+\))?", used):
        return "it neither names tests nor says why none uses the flag"
    missing = [f"{file}::{test}" for file, test in re.findall(TEST, used)]
    missing = [
        name for name in missing if name.split("::")[1] not in functions_of(name.split("::")[0])
    ]
    return f"there is no {', '.join(missing)}" if missing else None


def test_every_flag_has_a_row() -> None:
    assert [name for name, _, _ in ROWS] == [feature.name for feature in Feature]


@pytest.mark.parametrize(("name", "used"), [(name, used) for name, _, used in ROWS])
def test_every_row_names_tests_that_are_there_or_says_why_not(name: str, used: str) -> None:
    assert fault(used) is None, name


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ("`test_control.py::test_safe_stop`", None),
        ("`test_control.py::test_safe_stop`, `test_zoned.py::test_zones_are_managed`", None),
        ("`test_control.py::test_safe_stop` (by hand)", None),
        ("not used: the driver does so always", None),
        ("`test_protection.py`", "it neither names"),
        ("not used: ", "it neither names"),
        ("", "it neither names"),
        ("`test_control.py::test_safe`", "there is no test_control.py::test_safe"),
        ("`test_nothing.py::test_safe_stop`", "there is no test_nothing.py::test_safe_stop"),
        ("`test_control.py::test_safe_stop`, `test_a.py::test_b`", "there is no test_a.py::test_b"),
    ],
)
def test_what_a_row_must_not_say(used: str, message: str | None) -> None:
    assert (fault(used) or "").startswith(message or "")
    assert (fault(used) is None) == (message is None)
