# SPDX-License-Identifier: MIT
"""`pyublk serve` and `pyublk service`: disks as services of systemd's."""

import shlex
from pathlib import Path

import click

from pyublk.cli.defining import files_argument, named_files
from pyublk.cli.failures import ExitCode, open_controller
from pyublk.cli.output import print_json
from pyublk.cli.parameters import json_option
from pyublk.service import definitions, installing, managed
from pyublk.service.installing import Change
from pyublk.service.records import Record

_WORDS = {Change.WRITE: "write", Change.KEEP: "unchanged", Change.REMOVE: "remove"}


@click.command()
@click.argument("name")
@files_argument
def serve(name: str, places: tuple[Path, ...]) -> None:
    """Serve the disk that files define as NAME, in this process.

    This is what systemd runs (pyublk@NAME.service). FILE defines disks, or is a directory of such
    files; /etc/pyublk by default. A disk that waits for a server (`recovery`) is taken over. It is
    stopped by SIGTERM; one that is in use then, and has `recovery`, waits for its next server
    instead.

    The service manager is told when the disk can be read, and its watchdog is fed while the disk's
    queues answer.
    """
    definition = managed.find(name, named_files(places))
    open_controller().close()  # no driver, no rights: said in a sentence
    managed.log_to_stderr()

    def show(record: Record) -> None:
        click.echo(record.path)

    if managed.serve_defined(definition, show) is None:
        click.get_current_context().exit(ExitCode.INTERRUPTED)


@click.command()
@click.argument("action", type=click.Choice(["install", "uninstall"]))
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@click.option("--users", metavar="GROUP",
              help="Let members of GROUP have disks without being root, by a udev "
              "rule.")  # fmt: skip
@json_option
def service(action: str, dry_run: bool, users: str | None, as_json: bool) -> None:
    """Install the units by which systemd serves disks, or remove them.

    pyublk@NAME.service serves the disk that /etc/pyublk/*.toml define as NAME; pyublk.service all
    of them, by `pyublk up`. Nothing is started or enabled: that is for `systemctl`. The units also
    have the order that definitions give by `after`: install again when that has changed. Installing
    twice does no harm.
    """
    if action == "install":
        place = definitions.DIRECTORY
        found = definitions.read(definitions.files_of([place])) if place.is_dir() else []
        work = installing.installation(found, users=users)
    else:
        work = installing.removal()
    if as_json:
        print_json(
            {
                "files": [{"change": step.change, "path": str(step.path)} for step in work.files],
                "commands": [*work.before, *work.after],
            }
        )
    else:
        for command in work.before:
            click.echo(f"run        {shlex.join(command)}")
        for step in work.files:
            click.echo(f"{_WORDS[step.change]:<10} {step.path}")
        for command in work.after:
            click.echo(f"run        {shlex.join(command)}")
    if not dry_run:
        installing.carry_out(work)
