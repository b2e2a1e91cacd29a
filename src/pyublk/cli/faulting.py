# SPDX-License-Identifier: MIT
"""`pyublk fault` and `pyublk limit`: what a disk's server does to its requests."""

from typing import Any

import click

from pyublk.cli.asking import record_of
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import DeviceId, Seconds, Size, json_option
from pyublk.faults import BURST
from pyublk.faults.texts import parse, split
from pyublk.service.channel import ask


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.argument("action", type=click.Choice(["add", "list", "clear", "release"]))
@click.argument("arguments", metavar="[RULE|NUMBER]...", nargs=-1)
@json_option
def fault(device: int, action: str, arguments: tuple[str, ...], as_json: bool) -> None:
    """Make requests of a disk fail, wait, or go wrong, while it is used.

    `add` adds rules, and `list` shows them with their NUMBERs. `clear` removes all rules, or those
    with a NUMBER; `release` lets the requests that they hold go on. Each prints the rules that
    there are then, and how often each fired. A RULE says what happens, then to which requests:

    \b
    pyublk fault 0 add fail:op=write,range=4K-8K,times=1
    pyublk fault 0 add delay:op=read,seconds=10ms,jitter=5ms
    pyublk fault 0 add hang:op=flush,nth=3
    pyublk fault 0 add profile:sd-card
    pyublk fault 0 clear 2

    A rule does one of these, with the arguments in parentheses: fail (errno), delay (seconds,
    jitter, distribution), hang, drop, tear (sectors), misdirect (offset), rot (bits), stale, full,
    read_only, limit (iops, bandwidth, burst). It fires for the requests that these choose: op
    (operations, with `+` between several, or all), range (bytes), nth (with every: each nth),
    probability and seed, jumps (only requests that do not follow the last one), times (at most).
    Profiles are hdd-7200, sd-card, cloud-gp2 and dying-hdd.
    """
    record = record_of(device)
    told: dict[str, Any]
    if action == "add":
        told = ask(record, "faults", add=_rules(arguments))
    elif action == "list":
        if arguments:
            raise click.UsageError("list takes no arguments")
        told = ask(record, "faults")
    else:
        asked: dict[str, bool] = {action: True}
        told = ask(record, "faults") if arguments else ask(record, "faults", **asked)
        for number in _numbers(arguments):
            told = ask(record, "faults", number=number, **asked)
    _show(told, as_json)


def _rules(texts: tuple[str, ...]) -> str:
    """In one text. Those that are written wrongly are wrong usage."""
    if not texts:
        raise click.UsageError("add needs a rule, such as fail:op=write")
    for text in split(";".join(texts)):
        try:
            parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="'RULE'") from None
    return ";".join(texts)


def _numbers(texts: tuple[str, ...]) -> list[int]:
    for text in texts:
        if not text.isdecimal():
            raise click.BadParameter(f"{text!r} is not the number of a rule", param_hint="'NUMBER'")
    return [int(text) for text in texts]


def _show(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(told)
        return
    rows = [
        [str(rule["number"]), rule["rule"], str(rule["matched"]), str(rule["fired"])]
        for rule in told["faults"]
    ]
    if rows:
        print_table(["NUMBER", "RULE", "MATCHED", "FIRED"], rows)
    else:
        click.echo("there are no rules")


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.option("--iops", type=click.FloatRange(min=0, min_open=True), metavar="N",
              help="Requests a second.")  # fmt: skip
@click.option("--bandwidth", type=Size(), metavar="SIZE", help="Bytes a second, such as 10M.")
@click.option("--burst", type=Seconds(min=0), metavar="SECONDS", default=BURST, show_default=True,
              help="Seconds of the limit that an idle disk saves up.")  # fmt: skip
@click.option("--off", is_flag=True, help="No limit any more.")
@json_option
def limit(
    device: int,
    iops: float | None,
    bandwidth: int | None,
    burst: float,
    off: bool,
    as_json: bool,
) -> None:
    """Limit the requests and bytes a second of a disk, while it is used.

    Prints the limit; without options, the one that it has.
    """
    some = iops is not None or bandwidth is not None
    if off and some:
        raise click.UsageError("--off and a limit exclude each other")
    record = record_of(device)
    told: dict[str, Any]
    if some:
        told = ask(record, "limit", iops=iops, bandwidth=bandwidth, burst=burst)
    else:
        told = ask(record, "limit" if off else "faults")
    if as_json:
        print_json(told["limit"])
    elif (now := told["limit"]) is None:
        click.echo("there is no limit")
    else:
        click.echo(f"{now['rule'].partition(',')[2]}: {now['fired']} requests waited")
