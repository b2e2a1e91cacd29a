# SPDX-License-Identifier: MIT
"""`pyublk top`: what all disks do, live."""

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import click

from pyublk.cli.failures import message, open_controller
from pyublk.cli.keys import GONE, SUSPEND, Keys
from pyublk.cli.output import print_json, print_table
from pyublk.cli.parameters import Seconds, json_option
from pyublk.cli.watching import Row, View, described
from pyublk.service.observing import Observer, Sample, activity

#: Seconds between looks at the clock while samples are on their way.
_TICK = 0.05


@click.command()
@click.option(
    "--interval",
    type=Seconds(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print what happened in one interval, and end.")
@json_option
def top(interval: float, once: bool, as_json: bool) -> None:
    """Watch what all disks do.

    It shows requests and bytes a second, the latencies that half, 99 % and 99.9 % of the requests
    did not exceed, the requests in flight, and failed requests and restarts so far. For disks of
    other programs, which have only the kernel's counters, there are no latencies and errors.

    Keys: i, r, w, l, d, e and n sort by requests, reads, writes, latency (99 %), depth, errors and
    number; the space bar pauses; arrows scroll; q ends. Where the output is no terminal, and with
    --json, a table or a line of JSON is printed for each interval.
    """
    patience = min(3.0, max(interval, 1.0))
    with open_controller() as controller, Observer(controller, patience=patience) as observer:
        if once or as_json or not sys.stdout.isatty():
            _print(observer, interval, once=once, as_json=as_json)
        else:
            _watch(observer, interval)


def rows(before: list[Sample], now: list[Sample]) -> list[Row]:
    """Each disk of now, with what it did since before."""
    known = {one.id: one for one in before}
    return [Row(one, activity(known.get(one.id), one)) for one in now]


def _print(observer: Observer, interval: float, *, once: bool, as_json: bool) -> None:
    before = observer.samples()
    while True:
        time.sleep(interval)
        now = observer.samples()
        found = rows(before, now)
        if as_json:
            print_json([described(row) for row in found])
        elif found:
            print_table(*View().table(found))
        else:
            message("there are no disks")
        for row in found:
            if row.sample.silence and not as_json:
                message(f"{row.sample.path} does not tell: {row.sample.silence}")
        if once:
            return
        before = now
        if not as_json:
            click.echo()


def _watch(observer: Observer, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    view = View()
    console = Console()
    with (
        ThreadPoolExecutor(1, "pyublk-top") as sampler,
        Keys() as keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        before: list[Sample] = []
        waiting: Future[list[Sample]] | None = sampler.submit(observer.samples)
        due = time.monotonic() + min(interval, 0.5)  # the first numbers come soon
        drawn: object = None
        while True:
            if drawn != (seen := (view.changes, console.size)):
                live.update(view.frame(*console.size), refresh=True)
                drawn = seen
            key = keys.read(_TICK if waiting else max(0.0, min(0.5, due - time.monotonic())))
            if key in ("q", GONE):
                return
            if key == SUSPEND:
                live.stop()
                keys.suspend()
                live.start(refresh=True)
            elif key is not None:
                view.press(key)
            if waiting is None and time.monotonic() >= due:
                due = time.monotonic() + interval
                waiting = sampler.submit(observer.samples)
            elif waiting is not None and waiting.done():
                now = waiting.result()
                waiting = None
                view.show(rows(before, now))
                before = now
