"""Every example that needs no kernel; tests/kernel and tests/vm have the others."""

import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, pages_that_need, run


@pytest.mark.parametrize("page", pages_that_need(None), ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    assert run(page) == sum(needs is None for needs, _ in blocks(page))


def test_the_tutorial_has_examples() -> None:
    assert len(blocks(ROOT / "docs" / "tutorial.md")) >= 8


def test_the_command_reference_is_as_the_commands_are() -> None:
    command = [sys.executable, ROOT / "docs" / "cli_reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_table_of_contents(tmp_path: Path) -> None:
    """Sphinx warns of anything wrong, and -W makes it an error."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
