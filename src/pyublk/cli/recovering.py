# SPDX-License-Identifier: MIT
"""`pyublk recover`."""

from collections.abc import Callable

import click

from pyublk.cli.adding import TargetName, layer_options, target_options
from pyublk.cli.failures import Failure, open_controller, raise_all
from pyublk.cli.listing import find
from pyublk.cli.output import print_json
from pyublk.cli.parameters import DeviceId, json_option
from pyublk.control import Controller, DeviceInfo
from pyublk.service.plan import DiskSpec
from pyublk.service.records import Record
from pyublk.service.recovering import recover


@click.command("recover")
@click.argument("device", metavar="ID", type=DeviceId(all_allowed=True))
@click.argument("target", type=TargetName(), required=False)
@click.argument("arguments", metavar="[ARGUMENT]...", nargs=-1, type=click.Path())
@target_options
@layer_options
@click.option("--server", metavar="NAME",
              help="Serve it in the server process NAME, which disks can share.")  # fmt: skip
@json_option
def recover_(
    device: int | str,
    target: str | None,
    arguments: tuple[str, ...],
    options: dict[str, str],
    layers: tuple[str, ...],
    server: str | None,
    as_json: bool,
) -> None:
    """Serve a disk whose server is gone; it was made with --recovery, or by other software.

    ID is a number, a node such as /dev/ublkb0, or `all` for every disk that waits for a server. It
    is served as it was added; or by another TARGET, with ARGUMENTs as for `pyublk add`, which must
    have the disk's size and all else that clients know of it. Disks of other software (ublksrv,
    kublk) are served by a TARGET only.
    """
    if target is None and (options or layers):
        given = "--option" if options else "--layer"
        raise click.UsageError(f"{given} is for another TARGET, which is not named")
    if device == "all" and target is not None:
        raise click.UsageError("several disks cannot have the same TARGET: recover one at a time")
    spec = None
    if target is not None:
        spec = DiskSpec(target=target, arguments=arguments, options=options, layers=layers)
    give_servers(
        device,
        lambda one: one.ours and one.status.awaits_server,
        lambda controller, one: recover(controller, one, spec, server=server),
        as_json=as_json,
    )


def give_servers(
    device: int | str,
    in_all: Callable[[DeviceInfo], bool],
    give: Callable[[Controller, DeviceInfo], Record],
    *,
    as_json: bool,
) -> None:
    """Gives the device another server by `give`, or each of `all` that is `in_all`, and prints
    those that have one. Raises for those that have not, once each was tried."""
    done: list[Record] = []
    failures: list[Failure] = []
    with open_controller() as controller:
        if isinstance(device, int):
            wanted = [find(controller, device)]
        else:
            wanted = [one for one in controller.devices() if in_all(one)]
        for one in wanted:
            try:
                done.append(give(controller, one))
            except Exception as error:
                if len(wanted) == 1:
                    raise
                failures.append(Failure(error, of=one.path))
    if as_json:
        print_json([{"id": one.id, "path": one.path, "server_pid": one.server.pid} for one in done])
    else:
        for record in done:
            click.echo(record.path)
    raise_all(failures)
