# SPDX-License-Identifier: MIT
"""`pyublk upgrade`."""

import click

from pyublk.cli.adding import LayerText, target_options
from pyublk.cli.parameters import DeviceId, json_option
from pyublk.cli.recovering import give_servers
from pyublk.service.records import Record
from pyublk.service.upgrading import upgrade


@click.command("upgrade")
@click.argument("device", metavar="ID", type=DeviceId(all_allowed=True))
@target_options
@click.option(
    "--layer",
    "layers",
    multiple=True,
    type=LayerText(),
    metavar="NAME:KEY=VALUE,...",
    help="Other options of a layer that the disk has; may be repeated.",
)
@json_option
def upgrade_(
    device: int | str, options: dict[str, str], layers: tuple[str, ...], as_json: bool
) -> None:
    """Serve a disk by a new server process while it is used.

    ID is a number, a node such as /dev/ublkb0, or `all` for every disk of `pyublk add`. The disk
    must have --recovery resend, which is the default where its server may be restarted. Its new
    server has the environment of this command, and the class of the target and pyublk as they are
    now; --option changes parameters of the class, and --layer those of a layer.

    Clients wait for a moment, and no request fails (Linux 6.16). If the new server cannot serve
    the disk, the old one serves on.
    """
    if device == "all" and (options or layers):
        given = "--option" if options else "--layer"
        raise click.UsageError(f"{given} is for one disk: upgrade them one at a time")
    give_servers(
        device,
        lambda one: Record.of(one) is not None,
        lambda controller, one: upgrade(controller, one, options, layers),
        as_json=as_json,
    )
