"""What gcov counted in the C that Cython made, as counts of Cython's own lines.

Cython's tracing would slow down what it measures, and knows nothing of code that runs without the
GIL. But Cython writes before the C of each statement which line it is of. So the counts are the
compiler's: a statement ran as often as the first line of its C did. What a statement does
when one of its parts fails is more C, after the first line, and is not asked for.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

_MARKER = re.compile(r'^\s*/\* "([^"]+\.(?:pyx|pxi|pxd))":(\d+)$')

Counts = dict[str, dict[int, int]]
"""How often a file's lines ran, by the file's name and the line's number."""


def _statements(generated: Iterable[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yield each piece of a statement's C: its source and line, its first and last line of C."""
    name, line, first, number = "", 0, 0, 0
    for number, text in enumerate(generated, 1):
        marker = _MARKER.match(text)
        if marker or text.startswith("}"):
            if name:
                yield name, line, first, number - 1
            name = ""
        if marker:
            name, line, first = marker[1], int(marker[2]), number + 1
    if name:
        yield name, line, first, number


def map_back(generated: Iterable[str], counted: Mapping[int, int]) -> Counts:
    """Return how often the statements of Cython's sources ran.

    Args:
        generated: the lines of the C that Cython made.
        counted: how often lines of it ran, by their numbers; only those that are code.
    """
    found: Counts = {}
    for name, line, first, last in _statements(generated):
        number = next((n for n in range(first, last + 1) if n in counted), None)
        if number is not None:
            lines = found.setdefault(name, {})
            # A line may be in several places: a finally, or a property that is read and written.
            lines[line] = max(lines.get(line, 0), counted[number])
    return found
