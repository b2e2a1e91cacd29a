# SPDX-License-Identifier: MIT
"""What the group `trace` of the command records; the rest of that group reads what was recorded."""

import os
from contextlib import suppress
from typing import Any

import click

from pyublk.cli.asking import record_of
from pyublk.cli.failures import message
from pyublk.cli.output import print_json
from pyublk.cli.parameters import DeviceId, Seconds, Whole, json_option
from pyublk.service.channel import CHANGE, connect
from pyublk.tracing import DEFAULT_MEGABYTES


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.option("-o", "--output", "name", metavar="NAME", type=click.Path(), required=True,
              help="Write to NAME.blktrace.0 and so on, one file for each queue.")  # fmt: skip
@click.option("--seconds", type=Seconds(min=0, min_open=True), metavar="N",
              help="End after N seconds; else Ctrl-C ends it.")  # fmt: skip
@click.option("--megabytes", type=Whole(min=1), default=DEFAULT_MEGABYTES, show_default=True,
              metavar="N", help="Memory for the records: 7,000 requests for each.")  # fmt: skip
@json_option
def record(device: int, name: str, seconds: float | None, megabytes: int, as_json: bool) -> None:
    """Record the requests of a disk while it is used.

    The disk's server keeps the records in memory, and writes the files at the end. When the memory
    is full, the rest is counted as lost. The end of the disk ends the recording, too.
    """
    with connect(record_of(device), timeout=CHANGE) as client:
        begun: dict[str, Any] = client.ask(
            "trace", timeout=CHANGE, path=os.path.abspath(name), megabytes=megabytes
        )
        if seconds is None and not as_json:
            message(f"recording /dev/ublkb{device}: Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            if client.ends_within(seconds):
                raise OSError(
                    f"the server of /dev/ublkb{device} ended; {begun['files'][0]} and so on have "
                    "what it recorded, if it was stopped, and nothing, if it was killed"
                )
        told: dict[str, Any] = client.ask("end_trace", timeout=CHANGE)
    if as_json:
        print_json(told)
        return
    lost = f", {told['lost']} lost: use a larger --megabytes" if told["lost"] else ", none lost"
    click.echo(f"{told['events']} records in {', '.join(told['files'])}{lost}")
