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

    `drain` brings all that was written to the disk so far to the target below, durably, and
    returns when it is there. What the kernel's page cache has was not written yet: sync first.
    `invalidate` lets go of everything: it is fetched again when it is wanted. It refuses while
    something is not below yet. Each prints the state that there is then.
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
