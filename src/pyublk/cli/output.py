# SPDX-License-Identifier: MIT
"""Results go to the standard output, as a table or as JSON; everything else to standard error."""

import json
import sys
from collections.abc import Iterable, Sequence

import click


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

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in lines[1:]:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
