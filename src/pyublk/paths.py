# SPDX-License-Identifier: MIT
"""The ways of a request's data between client and target, and the choice of one for a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pyublk.arguments import DEFAULT_DEPTH
from pyublk.errors import FeatureMissing
from pyublk.features import Features, check_together
from pyublk.uapi import Feature


class DataPath(StrEnum):
    """The way of a request's data between client and target; `docs/paths.md` compares them.

    - COPY: the kernel copies between the request and the tag's buffer.
    - GET_DATA: the same, but a write's data is copied only after a second command asks for it. It
      gains nothing, and is there for compatibility.
    - USER_COPY: the target copies the bytes it wants, and no others (`IO.read_into`,
      `IO.write_from`, or `IO.buffer`, which copies when it is first used).
    - ZERO_COPY: a command registers the request's memory with the ring, whose own I/O uses it
      directly. Nothing is copied, and Python cannot see the bytes.
    - AUTO_BUFFER: the same, registered by the kernel before the request arrives.
    """

    COPY = "copy"
    GET_DATA = "get-data"
    USER_COPY = "user-copy"
    ZERO_COPY = "zero-copy"
    AUTO_BUFFER = "auto-buffer"


_NOTHING = Feature(0)
#: ADD_DEV refuses less (EINVAL, seen on 7.3): the tags wait in a kfifo, which holds at least two.
_LEAST_BATCH_DEPTH = 2

_FLAGS: dict[DataPath, Feature] = {
    DataPath.COPY: _NOTHING,
    DataPath.GET_DATA: Feature.NEED_GET_DATA,
    DataPath.USER_COPY: Feature.USER_COPY,
    # With user copy beside it: what is left when a registration fails.
    DataPath.ZERO_COPY: Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY,
    DataPath.AUTO_BUFFER: Feature.AUTO_BUF_REG | Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PathChoice:
    """A device's data path.

    `flags` are the device flags that it needs; `batch` says whether it has batch I/O;
    `reason` says in one sentence why it was chosen.
    """

    path: DataPath
    batch: bool
    flags: Feature
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{', batch I/O' if self.batch else ''} ({self.reason})"


def choose_path(
    able: Sequence[DataPath],
    features: Features,
    *,
    path: DataPath | str = "auto",
    batch: bool | None = None,
    depth: int = DEFAULT_DEPTH,
    needed: Feature = _NOTHING,
    why: str = "",
) -> PathChoice:
    """Picks the data path of a device.

    Args:
        able: the paths that the target can be served by, the best (as measured) first.
        features: what the kernel and the caller's rights allow.
        path: "auto" for the first of `able` that the kernel has, or one of them by name.
        batch: batch I/O: None where the kernel has it, True or False as said.
        depth: of the queues; the driver has no batch I/O for a depth of 1.
        needed: further device flags that the target cannot do without.
        why: what makes the first of `able` the best, for the `reason`.

    Raises:
        ValueError: `path` is none, or not one for this target, or does not go with `batch` or
            `needed`.
        FeatureMissing: the kernel or the rights lack what was asked for, named.
    """
    if path == "auto":
        here = [one for one in able if features.has(_FLAGS[one])]
        if not here:
            features.require(_FLAGS[able[0]])
        chosen = here[0]
        reason = why or "the best for this target as measured"
        if chosen is not able[0]:
            reason = f"{able[0]} {features.reason(_FLAGS[able[0]])}"
    else:
        chosen = named_path(path, able)
        features.require(_FLAGS[chosen])
        reason = "asked for"
    features.require(needed)
    flags = _FLAGS[chosen] | needed
    check_together(flags)
    batch, about_batch = _choose_batch(batch, chosen, features, depth)
    if batch:
        flags |= Feature.BATCH_IO
    return PathChoice(path=chosen, batch=batch, flags=flags, reason=f"{reason}; {about_batch}")


def path_of(flags: Feature) -> PathChoice:
    """The data path of a device that is there, with these flags."""
    all_flags = Feature(0)
    for one in _FLAGS.values():
        all_flags |= one
    (path,) = (one for one, own in _FLAGS.items() if own == flags & all_flags)
    batch = Feature.BATCH_IO in flags
    return PathChoice(path=path, batch=batch, flags=flags, reason="the disk has it already")


def named_path(path: str, able: Sequence[DataPath]) -> DataPath:
    """The path of that name. Raises ValueError when it is none, or not one of `able`."""
    names = [one.value for one in DataPath]
    if path not in names:
        raise ValueError(f"path must be 'auto' or one of {', '.join(names)}, not {path!r}")
    chosen = DataPath(path)
    if chosen not in able:
        raise ValueError(
            f"this target cannot be served by {chosen}: it takes {', '.join(able)} (or 'auto')"
        )
    return chosen


def _choose_batch(
    wish: bool | None, path: DataPath, features: Features, depth: int
) -> tuple[bool, str]:
    if path is DataPath.GET_DATA:
        if wish:
            raise ValueError("batch I/O does not go together with get-data: choose another path")
        return False, "get-data has no batch I/O"
    if depth < _LEAST_BATCH_DEPTH:
        if wish:
            raise ValueError(f"batch I/O needs a depth of 2 or more, not {depth}")
        return False, "batch I/O needs a depth of 2 or more"
    if wish:
        features.require(Feature.BATCH_IO)
        return True, "batch I/O asked for"
    if wish is False:
        return False, "batch I/O switched off"
    try:
        features.require(Feature.BATCH_IO)
    except FeatureMissing as missing:
        return False, f"batch I/O needs {missing.needed}"
    return True, "batch I/O, which costs less for each request"
