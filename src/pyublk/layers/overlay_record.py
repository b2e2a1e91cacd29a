# SPDX-License-Identifier: MIT
"""What an overlay's map says of the base: where it is, and by what it is known again."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pyublk.errors import UblkError
from pyublk.layers.identity import Identity


class BaseChanged(UblkError):
    """The base is not as it was when the overlay was made over it."""


@dataclass(frozen=True, slots=True)
class OverlayRecord:
    """The base of an overlay.

    Args:
        base: as text (`pyublk.targets.sources`); None of an overlay that is used as a layer, and
            lies over whatever is below it.
        identity: None until there was a base.
        committing: a commit into the base was begun, and has not ended.
    """

    base: str | None = None
    identity: Identity | None = None
    committing: bool = False

    @classmethod
    def of(cls, metadata: dict[str, Any], file: Path) -> Self:
        """From what the map has. Raises ValueError when that is no overlay's."""
        try:
            if metadata["overlay"] != 1:
                raise ValueError(metadata["overlay"])
            base, identity = metadata["base"], metadata["identity"]
            return cls(
                None if base is None else str(base),
                None if identity is None else Identity.from_record(identity),
                bool(metadata["committing"]),
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{file} is not an overlay of this version: its map says {metadata!r}"
            ) from None

    def metadata(self) -> dict[str, Any]:
        """For the map to keep."""
        identity = None if self.identity is None else self.identity.to_record()
        return {
            "overlay": 1,
            "base": self.base,
            "identity": identity,
            "committing": self.committing,
        }

    def over(self, identity: Identity) -> Self:
        """The same base as it is now, nothing being committed."""
        return replace(self, identity=identity, committing=False)

    def check(self, now: Identity, file: Path) -> None:
        """Raises BaseChanged unless the base is what it was."""
        if self.identity is not None and (why := self.identity.difference(now)) is not None:
            raise BaseChanged(
                f"the base of {file}, {self.name}, has changed: {why}; bring the old base back, or "
                f"see `pyublk overlay rebase --help`"
            )

    def check_whole(self, file: Path) -> None:
        """Raises ValueError when a commit is to be ended first."""
        if self.committing:
            raise ValueError(
                f"a commit of {file} into {self.name} has not ended: "
                f"run `pyublk overlay commit {file}` again"
            )

    @property
    def name(self) -> str:
        """The base, for a sentence."""
        return self.base or "what is below it"
