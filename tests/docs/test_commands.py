"""The commands that the documentation shows are read by the command's own parser."""

from pathlib import Path
from typing import Any

import click
import pytest
from commands import Command, File, arguments, named, shown, steps
from pages import PAGES, ROOT

from pyublk import targets
from pyublk.cli import main
from pyublk.service.plan import DiskSpec

SOURCES = sorted((ROOT / "src").rglob("*.py"))


def parse(words: list[str]) -> click.Context:
    """What `pyublk WORDS` would be called with, without the call."""
    root = main.make_context("pyublk", [*words])
    rest = [*root._protected_args, *root.args]
    if not rest:  # options alone
        return root
    name, command, rest = main.resolve_command(root, rest)
    assert command is not None
    return command.make_context(name, rest, parent=root)


def build(params: dict[str, Any]) -> None:
    """Makes the target, if it ships or is an example: opens nothing, but reads its options."""
    if params["spec"] is not None:
        DiskSpec.from_toml(params["spec"]).device()
        return
    name: str = params["target"]
    place, colon, _ = name.rpartition(":")
    if not colon or Path(place).exists():
        cls = targets.resolve(name)
        targets.build(cls, params["options"], params["arguments"], size=params["size"])


@pytest.mark.parametrize("page", [page for page in PAGES if [*shown(page)]], ids=lambda p: p.name)
def test_shown_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in shown(page):
        try:
            context = parse(words)
            if context.command.name == "add":
                build(context.params)
        except (click.ClickException, ValueError, OSError) as error:
            said = error.message if isinstance(error, click.ClickException) else error
            pytest.fail(f"{page.name} shows `pyublk {' '.join(words)}`: {said}")


@pytest.mark.parametrize(
    "page", [page for page in (*PAGES, *SOURCES) if [*named(page)]], ids=lambda p: p.name
)
def test_named_commands_exist(page: Path) -> None:
    for words in named(page):
        try:
            parse(words)
        except click.ClickException as error:
            # What it needs may be left out, or be a placeholder: `pyublk del N`.
            known = "No such" not in error.message
            assert known, f"{page.name} names `pyublk {' '.join(words)}`: {error.message}"  # noqa: PT017
        except click.exceptions.Exit:
            pass  # an option that prints something, such as --version


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pyublk add ram --size 4G  # in memory", [["add", "ram", "--size", "4G"]]),
        ("umount /mnt && pyublk stop 0", [["stop", "0"]]),
        ("pyublk list --json | jq .; A=1 pyublk doctor", [["list", "--json"], ["doctor"]]),
        ('eval "$(pyublk completion bash)"', [["completion", "bash"]]),
        ("pyublk vm -- sh -c 'pyublk x; y'", [["vm", "--", "sh", "-c", "pyublk x; y"]]),
        ("pyublk: /dev/ublkb0 is mounted", []),
    ],
)
def test_commands_are_found_in_shell(line: str, found: list[list[str]]) -> None:
    assert list(arguments(line)) == found


@pytest.mark.parametrize(
    "line", ["add null --quees 2", "ad null", "stop", "add null -o x", "info x"]
)
def test_a_command_that_does_not_exist_is_refused(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(line.split())


def test_the_steps_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```ini\n# /etc/one.conf\n[Unit]\n```\n```toml\n[no.file]\n```\n"
        "```console\n# one\nsaid\nmore\n$ two # three\n```\n"
    )
    assert [*steps(page)] == [
        File(Path("/etc/one.conf"), "# /etc/one.conf\n[Unit]\n"),
        Command(True, "one", "said\nmore"),
        Command(False, "two # three", ""),
    ]
