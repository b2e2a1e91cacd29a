"""The examples of the documentation that start a machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from pages import blocks, pages_that_need, run


@pytest.mark.parametrize("page", pages_that_need("machine"), ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    assert run(page, available="machine") == len(blocks(page))
