# SPDX-License-Identifier: MIT
"""The files by which systemd and udev know pyublk: put in their places, and taken away again."""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from pyublk import errors
from pyublk.files import write_record
from pyublk.service.definitions import Definition

#: Where an administrator's units and rules are.
UNITS = Path("/etc/systemd/system")
RULES = Path("/etc/udev/rules.d")

UNIT, TEMPLATE, RULE = "pyublk.service", "pyublk@.service", "60-pyublk.rules"
#: What makes a file one of ours.
_MARK = "# Written by `pyublk service install`"
#: Seconds for a command of systemd's or udev's.
_PATIENCE = 90.0


class Change(StrEnum):
    """What becomes of a file."""

    WRITE = "write"
    KEEP = "keep"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class FileStep:
    """A file of ours, and what is done about it; `text` is what it says then."""

    change: Change
    path: Path
    text: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: first the `before` commands, then the files, then the `after` ones."""

    files: tuple[FileStep, ...]
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()


def installation(
    definitions: Iterable[Definition],
    *,
    users: str | None,
    units: Path = UNITS,
    rules: Path = RULES,
) -> Work:
    """The units, a drop-in for each definition that comes `after` others, and, for a group of
    `users` who may have disks of their own, the rule of udev's. No command is left to be run where
    every file is there already.

    Raises UblkError for a file in the way that is not ours.
    """
    wanted = {units / name: _shipped(name) for name in (UNIT, TEMPLATE)}
    for one in definitions:
        if one.after and one.server is None:
            wanted[_drop_in(units, one.name)] = _ordering(one.after)
    if users is not None:
        wanted[rules / RULE] = _shipped(RULE, group=users)
    steps = [FileStep(_change(path, text), path, text) for path, text in wanted.items()]
    steps += [
        FileStep(Change.REMOVE, path)
        for path in _ours(units.glob("pyublk@*.service.d/after.conf"))
        if path not in wanted
    ]
    return Work(tuple(steps), after=_commands(steps, units, rules))


def removal(*, units: Path = UNITS, rules: Path = RULES) -> Work:
    """The end of all that `installation` makes; disks that are served stay so."""
    places = [units / UNIT, units / TEMPLATE, rules / RULE]
    found = _ours([*places, *sorted(units.glob("pyublk@*.service.d/after.conf"))])
    steps = [FileStep(Change.REMOVE, path) for path in found]
    enabled = [path.name for path in found if path in places[:2]]
    before = (("systemctl", "disable", *enabled),) if enabled else ()
    return Work(tuple(steps), before=before, after=_commands(steps, units, rules))


def carry_out(work: Work) -> None:
    """Does it. Raises OSError, and UblkError for a command that fails. One that is not there is
    found before anything is changed."""
    for program, *_ in (*work.before, *work.after):
        if shutil.which(program) is None:
            raise errors.UblkError(f"{program} is not there: this machine does not run systemd")
    for command in work.before:
        _run(command)
    for step in work.files:
        if step.change is Change.WRITE:
            step.path.parent.mkdir(parents=True, exist_ok=True)
            write_record(step.path, step.text, mode=0o644)
        elif step.change is Change.REMOVE:
            step.path.unlink(missing_ok=True)
            if step.path.parent.suffix == ".d":
                with suppress(OSError):  # others have drop-ins there
                    step.path.parent.rmdir()
    for command in work.after:
        _run(command)


def _shipped(name: str, **words: str) -> str:
    text = (files("pyublk.service") / "units" / name).read_text()
    for word, value in {"python": sys.executable, **words}.items():
        text = text.replace(f"{{{word}}}", value)
    return text


def _drop_in(units: Path, name: str) -> Path:
    return units / f"pyublk@{name}.service.d" / "after.conf"


def _ordering(names: Sequence[str]) -> str:
    others = " ".join(f"pyublk@{name}.service" for name in names)
    return f"{_MARK}, from the definition's `after`.\n[Unit]\nWants={others}\nAfter={others}\n"


def _change(path: Path, text: str) -> Change:
    try:
        found = path.read_text()
    except FileNotFoundError:
        return Change.WRITE
    if not found.startswith(_MARK):
        raise errors.UblkError(f"{path} was not written by pyublk: move it away first")
    return Change.KEEP if found == text else Change.WRITE


def _ours(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file() and path.read_text().startswith(_MARK)]


def _commands(steps: Sequence[FileStep], units: Path, rules: Path) -> tuple[tuple[str, ...], ...]:
    changed = [step.path for step in steps if step.change is not Change.KEEP]
    found: list[tuple[str, ...]] = []
    if any(path.is_relative_to(units) for path in changed):
        found.append(("systemctl", "daemon-reload"))
    if any(path.is_relative_to(rules) for path in changed):
        found.append(("udevadm", "control", "--reload"))
        found.append(("udevadm", "trigger", "--action=add", "--sysname-match=ublk-control"))
    return tuple(found)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise errors.UblkError(f"{' '.join(command)}: {said}")
