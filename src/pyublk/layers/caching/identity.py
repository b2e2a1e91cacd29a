# SPDX-License-Identifier: MIT
"""What a cache notes of the target below it, so that it can be served without it, and knows it
again."""

from typing import Any

from pyublk.target import Target

#: What the map's file is of.
KIND = "cache"

#: Those that a source and its disk share.
PROPERTIES = ("size", "block_size", "physical_block_size", "io_min", "read_only", "rotational")


def described(target: Target) -> dict[str, Any]:
    """What is noted of an open target. Its identity is None when it does not tell one."""
    profile = target.profile()
    asked = getattr(target, "identity", None)
    return {
        "kind": KIND,
        **{name: getattr(profile, name) for name in PROPERTIES},
        "identity": asked() if callable(asked) else None,
    }


def check_kind(record: dict[str, Any], file: object) -> None:
    """Raises ValueError for the map of something else."""
    if record.get("kind") != KIND:
        raise ValueError(f"{file} is not the file of a cache: its map was made by something else")


def difference(known: dict[str, Any], found: dict[str, Any]) -> str | None:
    """In what the source that was found is not the one that is known; None: it is that one.

    Identities are compared when both are told: while writes go below, the old one is not noted.
    """
    if known["size"] != found["size"]:
        return f"it has {found['size']} bytes, not {known['size']}"
    if known["block_size"] < found["block_size"]:
        return f"its blocks have {found['block_size']} bytes, not {known['block_size']}"
    if found["read_only"] and not known["read_only"]:
        return "it is read-only now"
    before, now = known.get("identity"), found["identity"]
    if before is not None and now is not None and before != now:
        return f"its bytes are others (its identity is {now}, not {before})"
    return None
