# SPDX-License-Identifier: MIT
"""`pyublk stop` and `pyublk del`."""

from collections.abc import Callable

import click

from pyublk.cli.failures import ExitCode, Failure, exit_code, open_controller, raise_all
from pyublk.cli.listing import find
from pyublk.cli.output import print_json
from pyublk.cli.parameters import DeviceId, Seconds, json_option
from pyublk.control import Controller, DeviceInfo
from pyublk.service.stacking import top_first
from pyublk.service.stopping import delete, stop

force_option = click.option(
    "--force", is_flag=True, help="Even if it is in use, or cannot be flushed."
)
timeout_option = click.option(
    "--timeout",
    type=Seconds(min=0.1),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a server may answer nothing before it is given up.",
)


@click.command("stop")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, type=DeviceId(all_allowed=True))
@force_option
@click.option(
    "--safe", is_flag=True, help="Only if nobody has it open, not even to read (Linux 7.0)."
)
@timeout_option
@json_option
def stop_(
    ids: tuple[int | str, ...], force: bool, safe: bool, timeout: float, as_json: bool
) -> None:
    """Flush disks and stop them; those made by pyublk are deleted as well.

    ID is a number, a node such as /dev/ublkb0, or `all` for every disk made by pyublk, those that
    lie on others first. A disk in use is left as it is, and its users are named: one that is
    mounted, used as swap or by another device, opened exclusively by a program, or open for
    writing; with --safe also one that is only open for reading.

    A server started by `pyublk add` that does not end is killed after the timeout: the disk is
    deleted, and the command ends with the exit code of a timeout.
    """
    if safe and force:
        raise click.UsageError("--safe and --force exclude each other")
    _each(ids, lambda c, d: stop(c, d, timeout=timeout, force=force, safe=safe), as_json=as_json)


@click.command("del")
@click.argument("ids", metavar="ID...", nargs=-1, required=True, type=DeviceId(all_allowed=True))
@force_option
@timeout_option
@json_option
def del_(ids: tuple[int | str, ...], force: bool, timeout: float, as_json: bool) -> None:
    """Stop and delete devices: as `stop`, but of any server, even one that is gone.

    ID is a number, a node such as /dev/ublkb0, or `all` for every device made by pyublk.
    """
    _each(ids, lambda c, d: delete(c, d, timeout=timeout, force=force), as_json=as_json)


def _each(
    ids: tuple[int | str, ...],
    action: Callable[[Controller, DeviceInfo], None],
    *,
    as_json: bool,
) -> None:
    """Does it to each device; one that fails does not keep the others from their turn."""
    done: list[int] = []
    failures: list[Failure] = []
    with open_controller() as controller:
        wanted: list[int] = []
        for one in ids:
            if isinstance(one, str):
                ours = [device for device in controller.devices() if device.ours]
                wanted += [device.id for device in top_first(ours)]
            else:
                wanted.append(one)
        for number in dict.fromkeys(wanted):
            try:
                action(controller, find(controller, number))
                done.append(number)
            except Exception as error:
                if number not in ids and exit_code(error) is ExitCode.NO_DEVICE:
                    continue  # one of `all`, and somebody else was faster
                if len(wanted) == 1:
                    raise
                failures.append(Failure(error))
    if as_json:
        print_json({"done": done})
    raise_all(failures)
