# SPDX-License-Identifier: MIT
"""`pyublk stop` and `pyublk del`."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import click

from pyublk.cli.failures import ExitCode, Failure, NoDriver, exit_code, open_controller, raise_all
from pyublk.cli.listing import find
from pyublk.cli.output import print_json
from pyublk.cli.parameters import DeviceId, Seconds, json_option
from pyublk.control import Controller, DeviceInfo
from pyublk.nbdkit import disks as nbd
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
@click.argument(
    "ids",
    metavar="ID...",
    nargs=-1,
    required=True,
    type=DeviceId(all_allowed=True, nbd_allowed=True),
)
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

    ID is a number, a node such as /dev/ublkb0 or /dev/nbd0, or `all` for every disk made by pyublk,
    those that lie on others first. A disk in use is left as it is, and its users are named: one
    that is mounted, used as swap or by another device, opened exclusively by a program, or open for
    writing; with --safe also one that is only open for reading.

    A server started by `pyublk add` that does not end is killed after the timeout: the disk is
    deleted, and the command ends with the exit code of a timeout.
    """
    if safe and force:
        raise click.UsageError("--safe and --force exclude each other")
    _each(
        ids,
        lambda c, d: stop(c, d, timeout=timeout, force=force, safe=safe),
        lambda disk: nbd.stop(disk, timeout=timeout, force=force),
        as_json=as_json,
    )


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
    by_nbd: Callable[[nbd.NBDDisk], None] | None = None,
    *,
    as_json: bool,
) -> None:
    """Does it to each device; one that fails does not keep the others from their turn."""
    done: list[int | str] = []
    failures: list[Failure] = []
    with ExitStack() as held:
        steps = _steps(ids, action, held)
        if by_nbd is not None:
            disks = nbd.disks() if "all" in ids else [nbd.find(one) for one in _names(ids)]
            steps |= {disk.name: partial(by_nbd, disk) for disk in disks}
        for one, step in steps.items():
            try:
                step()
                done.append(one)
            except Exception as error:
                if one not in ids and exit_code(error) is ExitCode.NO_DEVICE:
                    continue  # one of `all`, and somebody else was faster
                if len(steps) == 1:
                    raise
                failures.append(Failure(error))
    if as_json:
        print_json({"done": done})
    raise_all(failures)


def _names(ids: tuple[int | str, ...]) -> list[str]:
    """Those of the nbd driver's devices."""
    return [one for one in ids if isinstance(one, str) and one != "all"]


def _steps(
    ids: tuple[int | str, ...],
    action: Callable[[Controller, DeviceInfo], None],
    held: ExitStack,
) -> dict[int | str, Callable[[], None]]:
    """What is to be done to the devices of ublk, those below others last."""
    if len(_names(ids)) == len(ids):
        return {}
    try:
        controller = held.enter_context(open_controller())
    except NoDriver:
        if "all" in ids and nbd.disks():
            return {}
        raise
    wanted: list[int] = []
    for one in ids:
        if one == "all":
            ours = [device for device in controller.devices() if device.ours]
            wanted += [device.id for device in top_first(ours)]
        elif isinstance(one, int):
            wanted.append(one)

    def step(number: int) -> None:
        action(controller, find(controller, number))

    return {number: partial(step, number) for number in wanted}
