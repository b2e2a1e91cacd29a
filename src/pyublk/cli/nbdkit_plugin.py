# SPDX-License-Identifier: MIT
"""`pyublk nbdkit-plugin`."""

import click

from pyublk.nbdkit import PLUGIN


@click.command("nbdkit-plugin")
def nbdkit_plugin() -> None:
    """Print the path of the plugin by which nbdkit serves any target.

    \b
    nbdkit python "$(pyublk nbdkit-plugin)" \\
        target=file arguments=disk.img
    """
    click.echo(PLUGIN)
