# SPDX-License-Identifier: MIT
"""Another size for the files of a disk in use: every one has it in the end, or none."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from pyublk.backing import Backing
from pyublk.keeping import keep_also, keep_no_more

log = logging.getLogger("pyublk.resizing")

#: The end of a disk in each file that has one: bytes from the file's first.
Ends = Mapping[int, int]


def extend(
    backing: list[Backing],
    before: Ends,
    after: Ends,
    use: Callable[[bool], None],
    *,
    read_only: bool,
) -> None:
    """Makes room from one end to the other in each file, keeps it from others, and calls `use`.

    `use` is told whether all of the new bytes are fresh: they read as zeroes. When it raises, or a
    file cannot have the room, every file is as before, and the error is raised.
    """
    fresh = True
    with ExitStack() as copies, ExitStack() as undo:
        for file, end in after.items():
            one = backing[file] = backing[file].measured()
            if one.is_device or read_only:
                _check_room(one, end)
            keep_also(one.fd, before[file], end)
            undo.callback(keep_no_more, one.fd, before[file], end, of=one.path)
            fresh = fresh and one.size == before[file] and not one.is_device
            if one.size < end:
                copy = os.dup(one.fd)  # which a stop meanwhile does not close
                copies.callback(os.close, copy)
                undo.callback(_shorten, backing, file, replace(one, fd=copy))
                backing[file] = _set_length(one, end)
        use(fresh)
        undo.pop_all()


def cut(backing: list[Backing], before: Ends, after: Ends, *, files: bool) -> set[int]:
    """Lets others have what is beyond the new ends. `files`: those files are cut there that the
    disk had to their ends; returns which.

    Raises OSError when the first file cannot be cut: then all are as before.
    """
    were_cut: set[int] = set()
    for file, end in after.items():
        one = backing[file] = backing[file].measured()
        if files and not one.is_device and one.size == before[file] and end < one.size:
            try:
                backing[file] = _set_length(one, end)
                were_cut.add(file)
            except OSError as error:
                if not were_cut:
                    raise
                # That it is longer than the others, which are cut already, does no harm.
                log.warning("%s", error.strerror)
        keep_no_more(one.fd, end, before[file], of=one.path)
    return were_cut


def cut_again(one: Backing, end: int) -> None:
    """A write that was under way when the file was cut may have made it longer."""
    if one.measured().size > end:
        _set_length(one, end)


def _shorten(backing: list[Backing], file: int, before: Backing) -> None:
    _set_length(before, before.size)
    if backing:  # else: the target was closed meanwhile
        backing[file] = replace(backing[file], size=before.size)


def _check_room(one: Backing, end: int) -> None:
    if one.size < end:
        raise ValueError(
            f"{one.path} has {one.size} bytes, and the disk would need {end}: enlarge it first"
        )


def _set_length(one: Backing, size: int) -> Backing:
    try:
        os.ftruncate(one.fd, size)
    except OSError as error:
        raise OSError(
            error.errno, f"{one.path} cannot be given {size} bytes: {error.strerror}"
        ) from None
    return replace(one, size=size)
