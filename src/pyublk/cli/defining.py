# SPDX-License-Identifier: MIT
"""`pyublk up`, `down` and `plan`: disks that files define."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pyublk.cli.adding import ended_as_by_ctrl_c
from pyublk.cli.failures import ExitCode, Failure, exit_code, message, open_controller, raise_all
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import json_option
from pyublk.cli.stopping import force_option, timeout_option
from pyublk.control import Controller
from pyublk.errors import UblkError
from pyublk.service import definitions
from pyublk.service.definitions import Action, Definition, Step
from pyublk.service.records import Record
from pyublk.service.stacking import top_first
from pyublk.service.stopping import stop

F = TypeVar("F", bound=Callable[..., Any])

#: What a disk is after a step; `up` prints it.
_DONE = {
    Action.KEEP: "as defined",
    Action.START: "started",
    Action.RESIZE: "resized",
    Action.RECREATE: "recreated",
    Action.RECOVER: "recovered",
    Action.STOP: "stopped",
}


def files_argument(command: F) -> F:
    """The definitions, as the parameter `places`."""
    return click.argument(
        "places", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, path_type=Path)
    )(command)


def named_files(places: tuple[Path, ...]) -> list[Path]:
    """Raises UsageError when there is none."""
    default = [definitions.DIRECTORY] if definitions.DIRECTORY.exists() else []
    files = definitions.files_of(places or default)
    if not files:
        where = ", ".join(map(str, places)) or definitions.DIRECTORY
        raise click.UsageError(
            f"there is no definition: name a file, or write one ({where}/*.toml)"
        )
    return files


def _steps(controller: Controller, wanted: list[Definition], files: list[Path]) -> list[Step]:
    there = definitions.defined(controller)
    records = [record for _, record in there]
    waiting = {device.id for device, _ in there if device.status.awaits_server}
    return definitions.steps(wanted, files, records, waiting)


@click.command()
@files_argument
@json_option
def plan(places: tuple[Path, ...], as_json: bool) -> None:
    """Show what `pyublk up` would change, and change nothing.

    FILE defines disks, or is a directory of such files; /etc/pyublk by default. The exit code is 8
    if there is anything to change, and 0 if not.
    """
    files = named_files(places)
    wanted = definitions.read(files)
    with open_controller() as controller:
        steps = _steps(controller, wanted, files)
    if as_json:
        print_json([_as_json(step, step.record) for step in steps])
    else:
        rows = [
            [step.name, step.action, _path(step.record) or "-", "; ".join(step.differences) or "-"]
            for step in steps
        ]
        print_table(["NAME", "ACTION", "DISK", "DIFFERENCES"], rows)
    if any(step.action is not Action.KEEP for step in steps):
        click.get_current_context().exit(ExitCode.CHANGES)


@click.command()
@files_argument
@click.option("--recreate", is_flag=True,
              help="Stop and start disks whose definition has changed, unless they are in use. "
              "What a disk in memory holds is lost.")  # fmt: skip
@click.option("--prune", is_flag=True,
              help="Stop disks that are no longer in FILE, unless they are in use.")  # fmt: skip
@timeout_option
@json_option
def up(
    places: tuple[Path, ...], recreate: bool, prune: bool, timeout: float, as_json: bool
) -> None:
    """Serve the disks that files define, each after those that it names in `after`.

    FILE defines disks, or is a directory of such files; /etc/pyublk by default. Relative
    paths in a definition start at its file's directory.

    \b
    [disk.images]
    target = "file"
    arguments = ["images.img"]
    size = "10G"

    A disk that is there already is left as it is. One whose server is gone gets another, if it was
    made with `recovery`; one that should be larger is resized. Other changes are only reported, and
    so are disks that are no longer in FILE: the exit code is 8 then. --recreate stops a changed
    disk and starts it anew, --prune stops one that is gone from FILE.
    """
    files = named_files(places)
    wanted = definitions.read(files)
    told: list[dict[str, Any]] = []
    failures: list[Failure] = []
    failed: set[str] = set()
    remaining = False
    with open_controller() as controller, ended_as_by_ctrl_c():
        for step in _steps(controller, wanted, files):
            try:
                _refuse_if_alone(step, failed)
                if advice := _advice(step, recreate=recreate, prune=prune):
                    message(advice)
                    remaining = True
                    continue
                record = definitions.carry_out(controller, step, timeout=timeout)
            except Exception as error:
                failed.add(step.name)
                failures.append(Failure(error, of=step.name))
                continue
            told.append(_as_json(step, record))
            if not as_json:
                where = f" ({record.path})" if record is not None else ""
                click.echo(f"{step.name}{where}: {_DONE[step.action]}")
    if as_json:
        print_json(told)
    raise_all(failures)
    if remaining:
        click.get_current_context().exit(ExitCode.CHANGES)


@click.command()
@files_argument
@force_option
@timeout_option
@json_option
def down(places: tuple[Path, ...], force: bool, timeout: float, as_json: bool) -> None:
    """Stop the disks that files define, the last one first. A disk that lies on another is
    stopped before it.

    FILE defines disks, or is a directory of such files; /etc/pyublk by default. Disks are stopped
    as by `pyublk stop`: those in use are left as they are, and their users are named.
    """
    files = {str(file) for file in named_files(places)}
    done: list[int] = []
    failures: list[Failure] = []
    with open_controller() as controller:
        there = definitions.defined(controller)
        for device in top_first([device for device, one in there if one.plan.file in files]):
            try:
                stop(controller, device, timeout=timeout, force=force)
                done.append(device.id)
            except Exception as error:
                if exit_code(error) is not ExitCode.NO_DEVICE:  # else: somebody else was faster
                    failures.append(Failure(error))
    if as_json:
        print_json({"done": done})
    raise_all(failures)


def _refuse_if_alone(step: Step, failed: set[str]) -> None:
    for name in step.definition.after if step.definition else ():
        if name in failed:
            raise UblkError(f"it comes after {name}, which is not there")


def _advice(step: Step, *, recreate: bool, prune: bool) -> str | None:
    """What to do about a step that was not asked for."""
    if step.action is Action.RECREATE and not recreate:
        return (
            f"{step.name} ({_path(step.record)}) is not as defined: {'; '.join(step.differences)}; "
            "--recreate stops it and starts it anew"
        )
    if step.action is Action.STOP and not prune:
        return f"{step.name} ({_path(step.record)}) is not defined any more; --prune stops it"
    return None


def _path(record: Record | None) -> str | None:
    return record.path if record is not None else None


def _as_json(step: Step, record: Record | None) -> dict[str, Any]:
    return {
        "name": step.name,
        "action": step.action,
        "id": record.id if record is not None else None,
        "path": _path(record),
        "differences": list(step.differences),
    }
