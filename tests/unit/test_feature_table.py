"""docs/features.md speaks of every flag, and of tests that are there."""

import re
from pathlib import Path

from pyublk.uapi import Feature

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| `([A-Z_]+)` \| ([\d.]+) \| (.+) \|$",
    (ROOT / "docs" / "features.md").read_text(),
    re.MULTILINE,
)


def test_every_flag_has_a_row() -> None:
    assert [name for name, _, _ in ROWS] == [feature.name for feature in Feature]


def test_every_test_in_the_table_is_there() -> None:
    for name, _, used in ROWS:
        named = re.match(r"`(test_\w+\.py)(?:::(test_\w+))?`", used)
        if named is None:
            assert used.startswith("not used: "), name
            continue
        text = (ROOT / "tests" / "kernel" / named[1]).read_text()
        assert named[2] is None or f"def {named[2]}(" in text, used
