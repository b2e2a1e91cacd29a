"""The Python blocks of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"(?:^<!-- test: (\w+) -->\n)?^```python\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> list[tuple[str | None, str]]:
    """(what it needs, source) of each block, in order; a page's blocks share their names.

    A block needs nothing, a "kernel" with ublk, or a "machine" that can be started.
    """
    text = page.read_text()
    return [
        # As many empty lines as stand above it, so that a traceback tells the page's line.
        (match[1], "\n" * text[: match.start(2)].count("\n") + match[2])
        for match in _BLOCK.finditer(text)
    ]


def pages_that_need(what: str | None) -> list[Path]:
    return [page for page in PAGES if any(needs == what for needs, _ in blocks(page))]


def run(page: Path, *, available: str | None = None) -> int:
    """Runs the blocks of a page that need nothing, or what is available; returns how many."""
    names: dict[str, object] = {"__name__": "page"}
    ran = 0
    for needs, source in blocks(page):
        if needs in (None, available):
            exec(compile(source, str(page), "exec"), names)
            ran += 1
    return ran
