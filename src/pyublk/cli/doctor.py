# SPDX-License-Identifier: MIT
"""`pyublk doctor`."""

import sys
from dataclasses import asdict

import click

from pyublk.cli.failures import ExitCode, message
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import json_option
from pyublk.service.doctor import Check, Status, examine, repair


@click.command()
@click.option("--repair", "repairs", is_flag=True, help="Delete orphaned devices and old records.")
@json_option
def doctor(repairs: bool, as_json: bool) -> None:
    """Find out what keeps this machine from serving disks, and what may go wrong.

    The exit code is 1 when the machine cannot serve disks, and 0 otherwise, also with warnings.
    """
    repaired = list(repair()) if repairs else []
    checks = list(examine())
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "repaired": repaired})
    else:
        for sentence in repaired:
            message(sentence)
        print_table(["CHECK", "STATUS", "FINDING", "WHAT TO DO"], [_row(check) for check in checks])
    if any(check.status is Status.FAILED for check in checks):
        sys.exit(ExitCode.FAILED)


def _row(check: Check) -> list[str]:
    return [check.name, check.status.value, check.finding, check.remedy or ""]
