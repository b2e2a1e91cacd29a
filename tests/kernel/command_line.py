"""The command, as tests call it."""

import json
import subprocess
import sys
from typing import Any

from click.testing import CliRunner, Result

from pyublk.cli import main

COMMAND = [sys.executable, "-m", "pyublk"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def run_here(*arguments: str) -> Result:
    """The command in this process, which saves the start of an interpreter."""
    return CliRunner().invoke(main, arguments, prog_name="pyublk")


def added(*arguments: str) -> dict[str, Any]:
    done = run_here("add", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made
