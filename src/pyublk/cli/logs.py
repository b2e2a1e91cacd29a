# SPDX-License-Identifier: MIT
"""`pyublk logs`."""

import errno
import os

import click

from pyublk.cli.parameters import DeviceId, Whole
from pyublk.errors import DeviceNotFound
from pyublk.service.logs import follow, last_lines
from pyublk.service.processes import unit_of
from pyublk.service.records import Record, log_place


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.option("-f", "--follow", "follows", is_flag=True,
              help="Go on printing until the server ends.")  # fmt: skip
@click.option("-n", "--lines", type=Whole(min=0), default=50, show_default=True,
              metavar="N", help="Print only the last N lines.")  # fmt: skip
def logs(device: int, follows: bool, lines: int) -> None:
    """Print the log of a disk's server, also of a server that died.

    A server of several disks has one log for all of them. When a log grows too long, its older
    lines are removed.
    """
    try:
        log, last = last_lines(log_place(device), lines)
    except FileNotFoundError:
        record = Record.read(device)
        if record is not None and record.log is None:
            unit = unit_of(record.server.pid)
            where = f"the journal: journalctl -u {unit}" if unit else "its terminal"
            raise DeviceNotFound(
                errno.ENODEV, f"the server of {record.path} writes to {where}"
            ) from None
        raise DeviceNotFound(
            errno.ENODEV,
            f"there is no log of disk {device}: it was not made by `pyublk add`, or it has ended "
            "without an error",
        ) from None
    try:
        click.echo("".join(last), nl=False)
        for text in follow(log) if follows else ():
            click.echo(text, nl=False)
    finally:
        os.close(log)
