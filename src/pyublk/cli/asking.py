# SPDX-License-Identifier: MIT
"""`pyublk stats`, `resize` and `replace`: what is asked of a disk's server while it is used."""

import errno
import os
from typing import Any

import click

from pyublk.cli.failures import open_controller
from pyublk.cli.listing import find
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import DeviceId, Size, Whole, json_option
from pyublk.service.channel import CHANGE, ask
from pyublk.service.records import Record, record_trouble
from pyublk.sizes import format_size
from pyublk.stats import Histogram


def record_of(number: int) -> Record:
    """The record of a disk of `pyublk add`; raises what keeps its server from being asked."""
    with open_controller() as controller:
        device = find(controller, number)
    record = Record.of(device)
    if record is None:
        trouble = record_trouble(number)
        raise OSError(
            errno.EOPNOTSUPP,
            trouble
            or f"{device.path} was not made by `pyublk add`: only its own server can do that",
        )
    return record


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@json_option
def stats(device: int, as_json: bool) -> None:
    """Print a disk's counters, in total and for each queue, and its latencies.

    `errors` counts requests that failed, `enters` calls of io_uring_enter, and `fallbacks` how
    often a request had to take another data path. `largest_batch` is the largest number of requests
    that one io_uring_enter returned, `held` how many requests are not answered yet.

    A latency is the time from a request's arrival at the server to its answer. P50 is
    the median, and so on; these may be up to 25 % too large.
    """
    told: dict[str, Any] = ask(record_of(device), "stats", timeout=CHANGE)
    if as_json:
        print_json(told)
        return
    queues = told["queues"]
    columns = ["COUNTER", "TOTAL", *(f"QUEUE {number}" for number in range(len(queues)))]
    rows = [
        [name, str(value), *(str(queue[name]) for queue in queues)]
        for name, value in told["total"].items()
    ]
    print_table(columns, rows)
    # A server of an older version tells of none.
    latency = {name: Histogram.from_told(one) for name, one in told.get("latency", {}).items()}
    if rows := [_latency_row(name, one) for name, one in latency.items() if one.count]:
        click.echo()
        print_table(["OPERATION", "REQUESTS", "MEAN", "P50", "P99", "P99.9"], rows)


def _latency_row(name: str, histogram: Histogram) -> list[str]:
    seconds = [histogram.total / histogram.count, *map(histogram.quantile, (0.5, 0.99, 0.999))]
    return [name, str(histogram.count), *(f"{value * 1e6:.1f} µs" for value in seconds)]


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.argument("size", type=Size())
@click.option("--shrink", is_flag=True, help="Allow a smaller size; data beyond it is lost.")
@json_option
def resize(device: int, size: int, shrink: bool, as_json: bool) -> None:
    """Change the size of a disk while it is used (Linux 6.16).

    SIZE is such as 2G. The files of `file`, `linear`, `stripe` and `mirror` are extended, or cut
    when the disk shrinks; a block device must be large enough. Then enlarge a file system on the
    disk by its own tool (resize2fs, xfs_growfs). Before a shrink, make the file system smaller.
    """
    told: dict[str, Any] = ask(
        record_of(device), "resize", timeout=CHANGE, size=size, shrink=shrink
    )
    if as_json:
        print_json(told)
    else:
        click.echo(f"/dev/ublkb{device} now has {format_size(told['size'])}")


@click.command()
@click.argument("device", metavar="ID", type=DeviceId())
@click.argument("leg", type=Whole(min=0))
@click.argument("path", required=False, type=click.Path())
@json_option
def replace(device: int, leg: int, path: str | None, as_json: bool) -> None:
    """Replace a mirror's failed LEG by the file PATH, and begin to resync it.

    LEG is its number, from 0. Without PATH, the same file is used again. `pyublk info` shows the
    progress.
    """
    wanted = None if path is None else os.path.abspath(path)
    told: dict[str, Any] = ask(record_of(device), "replace", timeout=CHANGE, leg=leg, path=wanted)
    if as_json:
        print_json(told)
    else:
        state = told["target_status"]["legs"][leg]
        click.echo(f"leg {leg} is {state['path']}, {state['state']}")
