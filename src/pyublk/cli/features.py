# SPDX-License-Identifier: MIT
"""`pyublk features`."""

import click

from pyublk.cli.failures import open_controller
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import json_option


@click.command()
@json_option
def features(as_json: bool) -> None:
    """Show which features this kernel's ublk has, what each is for, and why one is missing."""
    with open_controller() as controller:
        found = controller.features()
    rows = list(found)
    if as_json:
        print_json(
            {
                "kernel": found.kernel_release,
                "mask": found.mask,
                "features": [
                    {
                        "name": row.name,
                        "available": row.available,
                        "since": row.since,
                        "buys": row.buys,
                        "reason": row.reason,
                    }
                    for row in rows
                ],
            }
        )
        return
    print_table(
        ["FEATURE", "HERE", "SINCE", "FOR", "WHY NOT"],
        [
            [
                row.name,
                "yes" if row.available else "no",
                row.since,
                row.buys,
                row.reason or "",
            ]
            for row in rows
        ],
    )
