# SPDX-License-Identifier: MIT
"""File systems on a test's disk: made, mounted, checked, and unmounted whatever happens."""

import os
import subprocess
from pathlib import Path
from typing import Protocol

from pyublk.pytest_plugin import needs
from pyublk.service.usage import opened, uses
from pyublk.testing.file_systems import CheckFailed, kind_named, mount, run

#: Seconds that an unmount may take: a disk that hangs is given up by its own stop.
PATIENCE = 60


def needs_of(name: str) -> list[needs.Need]:
    """What a test of this file system needs of the machine."""
    kind = kind_named(name)
    return [needs.Tool(kind.make[0]), needs.Tool(kind.check[0]), needs.FileSystem(name)]


class _OnDisk(Protocol):
    @property
    def path(self) -> str: ...


class FileSystem:
    """A file system on a disk, mounted at `path`. It belongs to the test: what the test left
    mounted is unmounted after it.

    Attributes:
        kind: such as "ext4".
        disk: the `pyublk.Device` below it.
        path: where it is mounted, a `pathlib.Path`.
    """

    def __init__(self, kind: str, disk: _OnDisk, path: Path) -> None:
        self.kind = kind
        self.disk = disk
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        """A path in it."""
        return self.path / name

    def make(self) -> None:
        """Makes it anew. Raises CheckFailed."""
        run([*kind_named(self.kind).make, self.disk.path])

    def mount(self, *options: str) -> None:
        """Mounts it, with options of mount(8) such as "ro". Raises CheckFailed."""
        mount(self.kind, self.disk.path, self, *options)

    def sync(self) -> None:
        """Makes everything in it durable, as syncfs(2) does. Raises CheckFailed."""
        run(["sync", "--file-system", self.path])

    def unmount(self) -> None:
        """Unmounts it, with everything written. Raises CheckFailed when it is in use."""
        run(["umount", self.path])

    def check(self) -> None:
        """Has fsck look at it, which must be unmounted. Raises CheckFailed, with what fsck says,
        unless it is clean."""
        run([*kind_named(self.kind).check, self.disk.path])


def unmount_all(name: str) -> str | None:
    """Unmounts a disk (``ublkb0``) wherever it is mounted; one that is in use, lazily. Returns what
    kept it in use; None: nothing."""
    in_use = []
    for place in [use.by for use in uses(name) if use.how == "mounted"][::-1]:
        try:
            run(["umount", place], timeout=PATIENCE)
        except CheckFailed as error:
            by = ", ".join(use.by for use in opened(name) if use.how == "files") or str(error)
            in_use.append(f"{place} was still in use and is unmounted lazily: {by}")
            run(["umount", "--lazy", place], timeout=PATIENCE)
    return "\n".join(in_use) or None


#: Reads a line that says that all is done. At the end of the input instead, the test's process has
#: died: what is mounted of the disk would stay, and keep it, so that it is unmounted here. In
#: /proc/self/mountinfo the source stands after the dash.
_WATCH = r"""
read -r done && exit
while read -r _ _ _ _ place _ rest; do
    case " $rest " in
    *" - "*" $1 "* | *" - "*" $1p"[0-9]*) umount -l "$(printf %b "$place")" ;;
    esac
done </proc/self/mountinfo
"""


class Watch:
    """A process that unmounts a disk when this one dies without having done so: killed, or ended by
    a timeout. (That the disk itself is deleted then is the business of its helper.)"""

    def __init__(self, path: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "pyublk-unmount", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the whole job must not end it
        )

    def done(self) -> None:
        """Nothing is mounted any more."""
        try:
            self._process.communicate(b"done\n", timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
