# SPDX-License-Identifier: MIT
"""The file systems that tests make on disks, and the commands by which they are made, mounted and
checked."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20
#: Seconds that a command may take.
TIMEOUT = 300
#: The lines of a command's output that are shown: the first ones (mkfs.xfs says why, and then how
#: it is used) and the last ones.
FIRST, LAST = 6, 14


class CheckFailed(AssertionError):
    """A disk is not as it must be, or a file system's command failed; the message is what that
    printed."""


@dataclass(frozen=True, slots=True)
class FileSystemKind:
    """How a file system is made, recognized and checked.

    Attributes:
        make, check: its tools' commands, which get the device.
        passed: the exit codes of `check` that are good.
        magic: (offset, bytes), of which one is on every disk with it.
        replays: a mount brings it in order, so that `check` must find nothing after one.
        options: what mount(8) needs while the disk that this one is a copy of may be mounted too.
        size: of the smallest disk that its tools take, rounded up; bytes.
    """

    make: tuple[str, ...]
    check: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...]
    size: int
    passed: tuple[int, ...] = (0,)
    replays: bool = True
    options: str = ""


KINDS = {
    "ext4": FileSystemKind(
        # Else the kernel goes on writing tables long after mkfs.
        make=("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
        check=("e2fsck", "-f", "-n"),
        magic=((0x438, b"\x53\xef"),),
        size=64 * MIB,
    ),
    "xfs": FileSystemKind(
        make=("mkfs.xfs", "-q", "-f"),
        check=("xfs_repair", "-n"),
        magic=((0, b"XFSB"),),
        size=320 * MIB,
        options="nouuid",
    ),
    "btrfs": FileSystemKind(
        make=("mkfs.btrfs", "-q", "-f"),
        check=("btrfs", "check", "--readonly"),
        magic=((0x10040, b"_BHRfS_M"),),
        size=128 * MIB,
    ),
    "vfat": FileSystemKind(
        make=("mkfs.vfat",),
        check=("fsck.vfat", "-a"),
        magic=((54, b"FAT"), (82, b"FAT")),
        size=64 * MIB,
        passed=(0, 1),
        replays=False,
    ),
}

#: Commands that cannot be killed, since a disk below them hangs. They end with the disk.
_abandoned: list["subprocess.Popen[bytes]"] = []


def kind_named(name: str) -> FileSystemKind:
    """Raises ValueError for one that is not known."""
    if name not in KINDS:
        raise ValueError(f"file_system must be one of {', '.join(KINDS)}, not {name!r}")
    return KINDS[name]


def run(
    command: Sequence[object], passed: Sequence[int] = (0,), *, timeout: float = TIMEOUT
) -> str:
    """Runs a command, and returns its output. It never waits longer than `timeout` seconds, even if
    the command cannot be killed.

    Raises CheckFailed when it takes longer, or ends with another exit code than `passed`;
    RuntimeError when its program is not installed.
    """
    __tracebackhide__ = True  # pytest shows who called it
    words = list(map(str, command))
    # A user's PATH often lacks the directories of what is root's.
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                words,
                env={**os.environ, "PATH": places, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError:
            raise RuntimeError(f"the program {words[0]!r} is not installed") from None
        try:
            code = process.wait(timeout)
        except BaseException as error:
            process.kill()
            _abandoned.append(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said = f"{' '.join(words)} takes more than {timeout:g} seconds"
            raise CheckFailed(said) from None
        output.seek(0)
        printed = output.read().decode(errors="replace")
    if code not in passed:
        shown = "\n".join(_ends_of(printed.rstrip().splitlines()))
        raise CheckFailed(f"{' '.join(words)}: exit code {code}\n{shown}".rstrip())
    return printed


def _ends_of(lines: list[str]) -> list[str]:
    if len(lines) <= FIRST + LAST:
        return lines
    left_out = f"... {len(lines) - FIRST - LAST} more lines ..."
    return [*lines[:FIRST], left_out, *lines[-LAST:]]


def mount(kind: str, device: str, place: os.PathLike[str], *options: str) -> None:
    """Mounts it, with options of mount(8). Raises CheckFailed."""
    chosen = ",".join(filter(None, options)) or "defaults"
    run(["mount", "-t", kind, "-o", chosen, device, os.fspath(place)])
