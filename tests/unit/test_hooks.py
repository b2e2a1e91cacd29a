"""git's hooks and `./run lint` do the same."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITH_PATH = "env PATH=.venv/bin:/usr/bin:/bin "


def test_the_hooks_are_what_lint_does() -> None:
    body = re.search(r"^lint\(\) \{\n(.*?)^\}", (ROOT / "run").read_text(), re.M | re.S)
    assert body is not None
    lines = [line.strip() for line in body[1].splitlines()]
    commands = [line.replace('"$PYTHON"', ".venv/bin/python") for line in lines]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    # cython-lint looks for pycodestyle in PATH, which `run` has set for everything.
    assert hooks.count(WITH_PATH) == 1
    assert re.findall(r"entry: (.*)", hooks.replace(WITH_PATH, "")) == commands
    assert not re.search("[*$;&|]", "".join(commands))  # a hook has no shell
    assert len(commands) == 6


def test_the_hooks_need_no_network() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    assert set(re.findall(r"language: (.*)", hooks)) == {"system"}
