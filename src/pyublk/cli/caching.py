# SPDX-License-Identifier: MIT
"""`pyublk cache`: what is asked of a disk's cache while it is used."""

from typing import Any

import click

from pyublk.cli.asking import record_of
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import DeviceId, json_option
from pyublk.service.channel import ask
from pyublk.sizes import format_size


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.argument("action", type=click.Choice(["info", "drain", "invalidate"]))
@json_option
def cache(device: int, action: str, as_json: bool) -> None:
    """Show a disk's cache, drain it, or make it forget what it has, while it is used.

    `drain` writes what the target below does not have yet to it, and returns when it is durable
    there. What is still in the kernel's page cache has not reached the disk: sync first.
    `invalidate` forgets everything, so that it is fetched again; it refuses while there is
    something that the target below does not have. Each prints the state afterwards.
    """
    told: dict[str, Any] = ask(record_of(device), "cache", timeout=None, action=action)
    if as_json:
        print_json(told)
        return
    print_table(["WHAT", "VALUE"], [[name, _shown(name, told[name])] for name in told])


def _shown(name: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, int) and (name.endswith("_bytes") or name == "limit"):
        return format_size(value)
    return str(value)
