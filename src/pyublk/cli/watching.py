# SPDX-License-Identifier: MIT
"""How `pyublk top` shows what disks do: columns for any width, in an order that keys choose."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from pyublk.service.observing import Activity, Sample
from pyublk.sizes import short_count, short_seconds, short_size

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text


class Row(NamedTuple):
    """A disk, and what it did in the last interval, if that is known."""

    sample: Sample
    activity: Activity | None

    def quantile(self, share: float) -> float | None:
        """Of the latencies, in seconds."""
        if self.activity is None or not self.activity.latency.count:
            return None
        return self.activity.latency.quantile(share)

    @property
    def condition(self) -> str | None:
        """What is wrong with it, in a word."""
        if self.sample.state != "live":
            return self.sample.state
        return "silent" if self.sample.silence else None


def described(row: Row) -> dict[str, Any]:
    """For programs. Times are in seconds; what is not known is null."""
    sample, activity = row
    rates = {} if activity is None else asdict(activity)
    latency = {f"p{share:g}": row.quantile(share / 100) for share in (50, 99, 99.9)}
    return {
        "id": sample.id,
        "path": sample.path,
        "target": sample.target,
        "state": sample.state,
        "size": sample.size,
        "server_pid": sample.server_pid,
        "answers": sample.answers,
        "silence": sample.silence,
        "interval": rates.get("seconds"),
        "iops": rates.get("iops"),
        "read_iops": rates.get("read_iops"),
        "write_iops": rates.get("write_iops"),
        "bytes_read_per_second": rates.get("bytes_read"),
        "bytes_written_per_second": rates.get("bytes_written"),
        "latency": latency,
        "in_flight": sample.counters.held,
        "errors": sample.counters.errors if sample.answers else None,
        "restarts": sample.restarts,
        "counters": asdict(sample.counters),
    }


def _known(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _rate(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: "-" if row.activity is None else form(getattr(row.activity, name))


def _latency(share: float) -> Callable[[Row], str]:
    return lambda row: _known(row.quantile(share), short_seconds)


class Column(NamedTuple):
    """A column of the table. Those of the highest `rank` go first where there is no room."""

    title: str
    width: int
    rank: int
    text: Callable[[Row], str]


_TARGET = "TARGET"
COLUMNS = (
    Column("ID", 4, 0, lambda row: str(row.sample.id)),
    Column(_TARGET, 10, 6, lambda row: row.condition or row.sample.target or "-"),
    Column("IOPS", 6, 1, _rate("iops", short_count)),
    Column("READ/S", 7, 2, _rate("bytes_read", short_size)),
    Column("WRITE/S", 7, 3, _rate("bytes_written", short_size)),
    Column("P50", 7, 9, _latency(0.5)),
    Column("P99", 7, 4, _latency(0.99)),
    Column("P99.9", 7, 8, _latency(0.999)),
    Column("DEPTH", 5, 5, lambda row: str(row.sample.counters.held)),
    Column(
        "ERRORS",
        6,
        7,
        lambda row: short_count(row.sample.counters.errors) if row.sample.answers else "-",
    ),
    Column("RST", 3, 10, lambda row: _known(row.sample.restarts, str)),
)

#: Key -> (what is sorted by, its value); the largest is first.
ORDERS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "i": ("requests", lambda row: row.activity.iops if row.activity else -1),
    "r": ("reads", lambda row: row.activity.bytes_read if row.activity else -1),
    "w": ("writes", lambda row: row.activity.bytes_written if row.activity else -1),
    "l": ("latency", lambda row: row.quantile(0.99) or -1),
    "d": ("depth", lambda row: row.sample.counters.held),
    "e": ("errors", lambda row: row.sample.counters.errors),
    "n": ("number", lambda row: -row.sample.id),
}
_HELP = "q quit  space pause  sort: i iops r read w write l p99 d depth e errors n id"
#: How many silent servers are explained below the disks.
_EXPLAINED = 3


def columns_for(width: int) -> list[Column]:
    """Those that a line of so many characters has room for."""
    chosen: list[Column] = []
    for column in sorted(COLUMNS, key=lambda one: one.rank):
        if sum(one.width + 1 for one in (*chosen, column)) - 1 > width:
            break
        chosen.append(column)
    return [one for one in COLUMNS if one in chosen]


class View:
    """What is seen: the disks in their order, from one on, unless paused.

    `changes` counts what may have changed it.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._rows: list[Row] | None = None
        self._latest: list[Row] = []
        self._order = "n"
        self._paused = False
        self._first = 0
        self._page = 1
        self._time = time.time()

    def show(self, rows: list[Row]) -> None:
        """New numbers; while paused, they wait."""
        self._latest = rows
        if not self._paused:
            self.changes += 1
            self._rows = rows
            self._time = time.time()

    def press(self, key: str) -> None:
        """What a key changes; others change nothing."""
        self.changes += 1
        if key in ORDERS:
            self._order, self._first = key, 0
        elif key == " ":
            self._paused = not self._paused
            self.show(self._latest)
        steps = {"up": -1, "down": 1, "page up": -self._page, "page down": self._page}
        self._first = max(0, self._first + steps.get(key, 0))

    def ordered(self, rows: list[Row]) -> list[Row]:
        """By the order that was chosen, those that are equal by number."""
        value = ORDERS[self._order][1]
        return sorted(rows, key=lambda row: (-value(row), row.sample.id))

    def table(self, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
        """Titles and cells of all columns, for an output of any width."""
        cells = [[column.text(row) for column in COLUMNS] for row in self.ordered(rows)]
        return [column.title for column in COLUMNS], cells

    def frame(self, width: int, height: int) -> "Group":
        """A whole screen."""
        from rich.console import Group
        from rich.text import Text

        rows = self.ordered(self._rows or [])
        silent = [row.sample for row in rows if row.sample.silence][:_EXPLAINED]
        self._page = max(1, height - 4 - len(silent))
        self._first = max(0, min(self._first, len(rows) - self._page))
        shown = rows[self._first : self._first + self._page]
        lines = [Text(self._title(rows), style="bold"), *self._lines(shown, width)]
        if not rows:
            lines.append(Text("looking for disks" if self._rows is None else "there are no disks"))
        lines += [Text("")] * (height - len(lines) - len(silent) - 1)
        lines += [Text(f"{one.path} does not tell: {one.silence}", "red") for one in silent]
        lines.append(Text(_HELP, style="dim"))
        for line in lines:
            line.truncate(width)
            line.no_wrap = True
        return Group(*lines[:height])

    def _title(self, rows: Sequence[Row]) -> str:
        known = [row.activity for row in rows if row.activity]
        total = (
            f"{short_count(sum(one.iops for one in known))} IOPS, "
            f"read {short_size(sum(one.bytes_read for one in known))}/s, "
            f"write {short_size(sum(one.bytes_written for one in known))}/s"
        )
        paused = "PAUSED  " if self._paused else ""
        clock = time.strftime("%H:%M:%S", time.localtime(self._time))
        return f"{paused}{clock}  disks: {len(rows)}  {total}"

    def _lines(self, rows: Sequence[Row], width: int) -> "list[Text]":
        from rich.text import Text

        columns = columns_for(width)
        widths = {one.title: one.width for one in columns}
        if _TARGET in widths:  # has what is left over
            longest = max((len(row.sample.target or "") for row in rows), default=0)
            free = width - sum(widths.values()) - len(widths) + 1
            widths[_TARGET] += max(0, min(free, longest - widths[_TARGET]))

        def line(cells: dict[str, str], style: str) -> Text:
            padded = [
                _target(cells[name], room) if name == _TARGET else cells[name].rjust(room)
                for name, room in widths.items()
            ]
            return Text(" ".join(padded), style=style)

        titles = {one.title: one.title for one in columns}
        lines = [line(titles, "reverse")]
        for row in rows:
            bad = row.condition or row.sample.counters.errors
            cells = {one.title: one.text(row) for one in columns}
            lines.append(line(cells, "red" if bad else ""))
        return lines


def _target(name: str, room: int) -> str:
    """As much of it as there is room for; of a class, its own name first."""
    if len(name) > room:
        name = name.rpartition(":")[2]
    return name[:room].ljust(room)
