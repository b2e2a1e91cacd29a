# SPDX-License-Identifier: MIT
"""Disk profiles: rules that make a fast disk behave as a slow or a bad one, each in a TOML file."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from pyublk.faults.filters import near

_PLACE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """A kind of disk, and the rules that imitate it.

    `rules` are texts as `Faults.add` takes them; `sources` say where their numbers come from: the
    name of a source, and what it says.
    """

    name: str
    about: str
    rules: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]


def names() -> list[str]:
    """The profiles that there are."""
    return sorted(place.stem for place in _PLACE.glob("*.toml"))


def load(name: str) -> DiskProfile:
    """The profile of that name. Raises ValueError when there is none."""
    if name not in names():
        raise ValueError(
            f"there is no disk profile {name!r}{near(name, names())}: there are "
            f"{', '.join(names())}"
        )
    table = tomllib.loads((_PLACE / f"{name}.toml").read_text())
    return DiskProfile(
        name=name,
        about=table["about"],
        rules=tuple(table["rules"]),
        sources=tuple((source["name"], source["says"]) for source in table["sources"]),
    )
