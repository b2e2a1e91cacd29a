# SPDX-License-Identifier: MIT
"""File systems on a test's disk: made, mounted, checked, and unmounted whatever happens."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyublk.pytest_plugin import needs
from pyublk.service.usage import opened, uses

MIB = 1 << 20
#: Seconds that mkfs, fsck, mount or umount may take.
PATIENCE = 60


@dataclass(frozen=True, slots=True)
class Kind:
    """How a file system is made and checked, and the smallest disk that its tools take, in bytes
    and rounded up."""

    make: tuple[str, ...]
    check: tuple[str, ...]
    size: int


KINDS = {
    "ext4": Kind(
        # Else the kernel goes on writing tables long after mkfs.
        ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
        ("e2fsck", "-f", "-n"),
        64 * MIB,
    ),
    "xfs": Kind(("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n"), 320 * MIB),
    "btrfs": Kind(("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly"), 128 * MIB),
    "vfat": Kind(("mkfs.vfat",), ("fsck.vfat", "-n"), 64 * MIB),
}


def kind_named(name: str) -> Kind:
    """Raises ValueError for one that is not known."""
    if name not in KINDS:
        raise ValueError(f"there is no file system {name!r} here; there are {', '.join(KINDS)}")
    return KINDS[name]


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
        """Makes it anew. Raises CommandFailed."""
        run(*kind_named(self.kind).make, self.disk.path)

    def mount(self, *options: str) -> None:
        """Mounts it, with options of mount(8) such as "ro". Raises CommandFailed."""
        run("mount", "-t", self.kind, "-o", ",".join(["nodev", *options]), self.disk.path, self)

    def sync(self) -> None:
        """Makes everything in it durable, as syncfs(2) does. Raises CommandFailed."""
        run("sync", "--file-system", self)

    def unmount(self) -> None:
        """Unmounts it, with everything written. Raises CommandFailed when it is in use."""
        run("umount", self)

    def check(self) -> None:
        """Has fsck look at it, which must be unmounted. Raises CommandFailed, with what fsck says,
        unless it is clean."""
        run(*kind_named(self.kind).check, self.disk.path)


class CommandFailed(AssertionError):
    """A command of a file system failed; the message is what it printed."""


#: Commands that cannot be killed, since a disk below them hangs. They end with the disk.
_abandoned: list["subprocess.Popen[bytes]"] = []


def run(*command: str | os.PathLike[str]) -> None:
    """Runs a command of root's; raises CommandFailed when it fails, or takes too long."""
    words = [os.fspath(word) for word in command]
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words,
            env={**os.environ, "PATH": os.pathsep.join(places), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            how = f"ended with {process.wait(PATIENCE)}"
        except subprocess.TimeoutExpired:
            process.kill()
            _abandoned.append(process)
            how = f"did not end within {PATIENCE} s"
        except BaseException:
            process.kill()
            _abandoned.append(process)
            raise
        if process.returncode != 0:
            output.seek(0)
            printed = output.read().decode(errors="replace")
            raise CommandFailed(f"{' '.join(words)} {how}:\n{printed}")


def unmount_all(name: str) -> str | None:
    """Unmounts a disk (``ublkb0``) wherever it is mounted; one that is in use, lazily. Returns what
    kept it in use; None: nothing."""
    in_use = []
    for place in [use.by for use in uses(name) if use.how == "mounted"][::-1]:
        try:
            run("umount", place)
        except CommandFailed as error:
            by = ", ".join(use.by for use in opened(name) if use.how == "files") or str(error)
            in_use.append(f"{place} was still in use and is unmounted lazily: {by}")
            run("umount", "--lazy", place)
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
