# SPDX-License-Identifier: MIT
"""New files that are there whole or not at all, and that take no other file's place."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyublk.files import draft_of, inode_at, sync_directory

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


def refuse_existing(path: Path) -> None:
    """Raises OSError EEXIST when something has this name, and ENOENT when it has no directory."""
    if os.path.lexists(path):
        raise OSError(errno.EEXIST, f"{path} exists already: choose another name, or remove it")
    if not path.parent.is_dir():
        raise OSError(
            errno.ENOENT,
            f"{path.parent}, where {path.name} is to be made, does not exist",
        )


@contextmanager
def placed(path: Path) -> Iterator[int]:
    """The descriptor of a new file without a name, which has it, durably, once the context has
    ended well. When it has not, or the process was killed, there is no such file."""
    refuse_existing(path)
    draft: Path | None = None
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:  # some file systems have no files without a name
        if error.errno not in _NO_TMPFILE:
            raise
        draft = draft_of(path)
        fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        os.fsync(fd)
        try:
            _link(draft or Path(f"/proc/self/fd/{fd}"), path)
            sync_directory(path.parent)
        except BaseException:
            made = os.fstat(fd)
            if inode_at(path) == (made.st_dev, made.st_ino):
                path.unlink()
            raise
    finally:
        os.close(fd)
        if draft is not None:
            with suppress(OSError):
                draft.unlink()


def _link(file: Path, path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a directory, Python follows the link that stands for the descriptor.
        os.link(file, path.name, dst_dir_fd=directory)
    except FileExistsError:
        refuse_existing(path)  # somebody else was faster
        raise
    finally:
        os.close(directory)
