# SPDX-License-Identifier: MIT
"""`pyublk features`."""

import click

from pyublk.cli.failures import message, open_controller
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import json_option
from pyublk.defects import defects_of


@click.command()
@json_option
def features(as_json: bool) -> None:
    """Show which features this kernel's ublk has, what each is for, and why one is missing.

    It also lists the known defects of this kernel's ublk.
    """
    with open_controller() as controller:
        found = controller.features()
    rows = list(found)
    defects = list(defects_of(found.kernel_release))
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
                "defects": [
                    {"what": one.what, "remedy": one.remedy, "source": one.source}
                    for one in defects
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
    for one in defects:
        message(f"{found.kernel_release}: {one.what} [{one.source}]", one.remedy)
