# SPDX-License-Identifier: MIT
"""`pyublk trace`: what was recorded of a disk."""

import sys
from dataclasses import asdict

import click

from pyublk import traces
from pyublk.cli.failures import message
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import json_option
from pyublk.cli.recording import record
from pyublk.sizes import format_size, short_seconds, short_size
from pyublk.traces.exports import FORMATS
from pyublk.traces.plots import PLOTS
from pyublk.traces.summary import QUANTILES, OperationSummary, Summary

#: How many of the most frequent sizes are told of each operation.
_SIZES = 5

_name = click.argument("name", metavar="NAME", type=click.Path())


@click.group()
def trace() -> None:
    """Record the requests of a disk, and read what was recorded.

    A trace NAME is in the files NAME.blktrace.0, NAME.blktrace.1 and so on, one for each queue.
    They have the format of blktrace: blkparse, btt and fio read them too.
    """


trace.add_command(record)


def read(name: str) -> traces.Trace:
    """The trace; tells on standard error what is missing from it."""
    found = traces.read(name)
    if found.lost:
        message(f"{found.lost} records are missing from {name}")
    if found.orphans:
        message(f"{found.orphans} requests were answered in {name} that began before it")
    return found


@trace.command()
@_name
@json_option
def summary(name: str, as_json: bool) -> None:
    """Print the numbers of a trace.

    It prints the requests by operation with their sizes and latencies, the queue depth, the share
    of sequential reads and writes, and the ranges of the disk with the most traffic. A read or
    write is sequential if it begins where one of the 16 before it ended.
    """
    found = traces.summarize(read(name))
    if as_json:
        print_json(asdict(found))
        return
    print_table(["TRACE", found.name], _lines(found))
    click.echo()
    latencies = [f"P{share * 100:g}" for share in QUANTILES]
    print_table(
        ["OPERATION", "REQUESTS", "DATA", "ERRORS", "UNANSWERED", *latencies, "LONGEST"],
        [_row(one) for one in found.operations],
    )
    click.echo()
    print_table(["OPERATION", "SIZE", "REQUESTS"], _sizes(found))
    if found.busiest:
        click.echo()
        print_table(
            ["BUSIEST RANGE", "LENGTH", "REQUESTS", "DATA"],
            [
                [
                    f"{one.offset:#x}",
                    format_size(one.length),
                    str(one.requests),
                    short_size(one.bytes),
                ]
                for one in found.busiest
            ],
        )


def _lines(found: Summary) -> list[tuple[str, str]]:
    total = sum(one.requests for one in found.operations)
    rate = f" ({total / found.duration:.0f} a second)" if found.duration else ""
    lines = [
        ("device", found.device),
        ("duration", short_seconds(found.duration)),
        ("requests", f"{total}{rate}"),
        ("queue depth", f"{found.mean_depth:.1f} on average, at most {found.largest_depth}"),
    ]
    if found.sequential is not None:
        lines.append(("sequential", f"{found.sequential:.1%} of reads and writes"))
    return lines


def _row(one: OperationSummary) -> list[str]:
    times = [one.latency.get(share) for share in QUANTILES]
    return [
        one.operation,
        str(one.requests),
        short_size(one.bytes),
        str(one.errors),
        str(one.unanswered),
        *("-" if time is None else short_seconds(time) for time in (*times, one.longest)),
    ]


def _sizes(found: Summary) -> list[list[str]]:
    rows = []
    for one in found.operations:
        if not any(one.sizes):  # flushes have none
            continue
        frequent = sorted(one.sizes.items(), key=lambda each: -each[1])
        rows += [[one.operation, format_size(size), str(n)] for size, n in frequent[:_SIZES]]
        if others := frequent[_SIZES:]:
            rows.append([one.operation, f"{len(others)} others", str(sum(n for _, n in others))])
    return rows


@trace.command(short_help="Draw a trace.")
@_name
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(),
    help="The picture, .png or .svg.  [default: NAME.png]",
)
@click.option(
    "--only",
    type=click.Choice(list(PLOTS)),
    multiple=True,
    help="Draw this plot only; may be repeated.",
)
def plot(name: str, output: str | None, only: tuple[str, ...]) -> None:
    """Draw a trace: offsets, latencies, sizes and queue depth.

    This needs matplotlib: pip install 'pyublk[plot]'.
    """
    output = output or f"{name}.png"
    traces.plot(read(name), output, plots=only or tuple(PLOTS))
    click.echo(output)


@trace.command(short_help="Convert a trace.")
@_name
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    required=True,
    help="fio: an iolog for `fio --read_iolog`; chrome: for ui.perfetto.dev; csv: a table.",
)
@click.option(
    "--output",
    "-o",
    default="-",
    metavar="FILE",
    type=click.Path(allow_dash=True),
    help="Write to a file.  [default: standard output]",
)
def export(name: str, form: str, output: str) -> None:
    """Print a trace in the form of another program.

    An iolog names the disk `disk`; `fio --replay_redirect=PATH` names another. Requests that fio
    does not know are left out, and counted on standard error.
    """
    found = read(name)
    if output == "-":
        left_out = FORMATS[form](found, sys.stdout)
    else:
        with open(output, "w") as file:
            left_out = FORMATS[form](found, file)
    if left_out:
        message(f"{left_out} requests have no form in {form} and were left out")
