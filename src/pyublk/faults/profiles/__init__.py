# SPDX-License-Identifier: MIT
"""Disk profiles: rules that make a fast disk behave as a slow or a bad one, each in a TOML file."""

import tomllib
from dataclasses import dataclass
from importlib import resources

from pyublk.faults.filters import near


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
    places = resources.files(__name__).iterdir()
    return sorted(one.name.removesuffix(".toml") for one in places if one.name.endswith(".toml"))


def load(name: str) -> DiskProfile:
    """The profile of that name. Raises ValueError when there is none."""
    if name not in names():
        raise ValueError(
            f"there is no disk profile {name!r}{near(name, names())}: there are "
            f"{', '.join(names())}"
        )
    table = tomllib.loads((resources.files(__name__) / f"{name}.toml").read_text())
    return DiskProfile(
        name=name,
        about=table["about"],
        rules=tuple(table["rules"]),
        sources=tuple((source["name"], source["says"]) for source in table["sources"]),
    )
