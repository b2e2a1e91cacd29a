"""Lines that ran, added up by the rooms of the house."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PACKAGE = "src/pyublk/"


@dataclass(frozen=True)
class Lines:
    """How many lines of code there are, and how many of them ran."""

    all: int = 0
    ran: int = 0

    def __add__(self, other: "Lines") -> "Lines":
        return Lines(self.all + other.all, self.ran + other.ran)

    @property
    def percent(self) -> str:
        """Rounded down, so that 100 means all of them."""
        return f"{self.ran * 100 // self.all}" if self.all else "-"


def room_of(path: str) -> tuple[str, str]:
    """Return the language and the room of a file of the package.

    Raises:
        ValueError: it is none of the package's.
    """
    if not path.startswith(PACKAGE):
        raise ValueError(f"{path} is not a file of the package")
    first, _, rest = path.removeprefix(PACKAGE).partition("/")
    if path.endswith((".c", ".h")):
        return "C", first + "/"
    if path.endswith((".pyx", ".pxi")):
        return "Cython", "_native"
    return "Python", first + "/" if rest else first.removesuffix(".py")


def by_room(files: Mapping[str, Lines]) -> dict[tuple[str, str], Lines]:
    """Return the sums of files by their room, in the order of names."""
    sums: dict[tuple[str, str], Lines] = {}
    for path, lines in files.items():
        key = room_of(path)
        sums[key] = sums.get(key, Lines()) + lines
    return dict(sorted(sums.items()))


def table(files: Mapping[str, Lines]) -> Iterator[str]:
    """Yield the lines of a table: each room, each language, and all of it."""
    form = "{:<8}{:<18}{:>8}{:>8}{:>6}".format
    yield form("", "room", "lines", "ran", "%")
    languages: dict[str, Lines] = {}
    for (language, room), lines in by_room(files).items():
        yield form(language, room, lines.all, lines.ran, lines.percent)
        languages[language] = languages.get(language, Lines()) + lines
    yield ""
    for language, lines in languages.items():
        yield form(language, "all", lines.all, lines.ran, lines.percent)
    total = sum(languages.values(), Lines())
    yield form("total", "", total.all, total.ran, total.percent)
