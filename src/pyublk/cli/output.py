# SPDX-License-Identifier: MIT
"""Results go to the standard output, as a table or as JSON; everything else to standard error."""

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: object) -> None:
    """Prints JSON and nothing else, indented for a reader at a terminal."""
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; where the output is no terminal, plain, a line a row whatever its length."""
    lines = [columns, *rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            click.echo("  ".join(cells).rstrip())
        return
    from rich.console import Console  # takes longer to import than most commands take
    from rich.table import Table
    from rich.text import Text

    console = Console()
    words = [max(_longest_word(cell) for cell in column) for column in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gaps = 2 * len(columns) - 2
    if sum(words) + gaps <= console.width:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, width in zip(columns, _shared(words, widths, console.width - gaps), strict=True):
            table.add_column(name, width=width)  # rich's own choice cuts words
        for row in lines[1:]:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    # Beside each other, they would cut words: the last columns go below.
    beside = len(columns) - 1
    while beside > 1 and sum(widths[:beside]) + 2 * beside - 2 > console.width:
        beside -= 1
    for place, row in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(row, widths[:beside], strict=False)]
        console.print(Text("  ".join(cells).rstrip(), style="" if place else "bold"))
        for name, cell in zip(columns[beside:], row[beside:], strict=True):
            if place and cell:
                _print_below(console, f"{name}: {cell}")


def _shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """A width for each column, the narrow ones first as wide as they like to be."""
    widths = list(least)
    while sum(widths) < room and widths != list(most):
        column = min((n for n in range(len(widths)) if widths[n] < most[n]), key=widths.__getitem__)
        widths[column] += 1
    return widths


def _print_below(console: "Console", text: str) -> None:
    """Prints what did not fit beside, in lines of whole words."""
    lines = textwrap.wrap(
        text,
        console.width,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)
