# SPDX-License-Identifier: MIT
"""File systems after a power cut: mounted, and checked by their own tools on the way."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyublk.device import Device
from pyublk.target import Target
from pyublk.testing.disk import Disk

#: Seconds that each step may take.
TIMEOUT = 300
#: The lines of a tool's output that are shown.
LINES = 20


class CheckFailed(AssertionError):
    """A disk is not as it must be after a power cut."""


@dataclass(frozen=True, slots=True)
class FileSystem:
    """`magic`: (offset, bytes) of which one is there. `check`: its tool's command, which gets the
    device; `passed`: its exit codes that are good. `replays`: a mount brings it in order, so that
    the tool must find nothing after one. `options`: what mount(8) needs while the disk that the
    copy is of may be mounted too."""

    magic: tuple[tuple[int, bytes], ...]
    check: tuple[str, ...]
    passed: tuple[int, ...] = (0,)
    replays: bool = True
    options: str = ""


FILE_SYSTEMS = {
    "ext4": FileSystem(((0x438, b"\x53\xef"),), ("e2fsck", "-f", "-n")),
    "xfs": FileSystem(((0, b"XFSB"),), ("xfs_repair", "-n"), options="nouuid"),
    "btrfs": FileSystem(((0x10040, b"_BHRfS_M"),), ("btrfs", "check", "--readonly")),
    "vfat": FileSystem(
        ((54, b"FAT"), (82, b"FAT")), ("fsck.vfat", "-a"), passed=(0, 1), replays=False
    ),
}


def file_system_of(target: Target) -> str:
    """The name of the one that is on the disk. Raises CheckFailed when there is none."""
    with Disk(target) as disk:
        block = disk.block_size
        for name, one in FILE_SYSTEMS.items():
            for offset, magic in one.magic:
                start = offset // block * block
                if start + block > disk.size:
                    continue
                if disk.pread(block, start)[offset - start :].startswith(magic):
                    return name
    raise CheckFailed(
        f"there is no file system on the disk: none of {', '.join(FILE_SYSTEMS)} begins there"
    )


def run(command: Sequence[object], passed: Sequence[int] = (0,)) -> str:
    """Runs a command, and returns its output. Raises CheckFailed with that when it fails."""
    words = list(map(str, command))
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise RuntimeError(f"the program {words[0]!r} is not installed") from None
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{' '.join(words)} takes more than {TIMEOUT} seconds") from None
    if done.returncode not in passed:
        said = "\n".join(done.stdout.rstrip().splitlines()[-LINES:])
        raise CheckFailed(f"{' '.join(words)}: exit code {done.returncode}\n{said}".rstrip())
    return done.stdout


@contextmanager
def _mount(device: str, place: Path, kind: str, options: str) -> Iterator[None]:
    chosen = ",".join(filter(None, [FILE_SYSTEMS[kind].options, options])) or "defaults"
    run(["mount", "-t", kind, "-o", chosen, device, place])
    try:
        yield
    except BaseException:
        subprocess.run(["umount", "--lazy", place], timeout=TIMEOUT, check=False)
        raise
    run(["umount", place])


@contextmanager
def mounted(target: Target, file_system: str | None, options: str = "") -> Iterator[Path]:
    """The target as a device, its file system checked and mounted; see `Crash.mounted`."""
    if file_system is not None and file_system not in FILE_SYSTEMS:
        raise ValueError(
            f"file_system must be one of {', '.join(FILE_SYSTEMS)}, not {file_system!r}"
        )
    kind = file_system or file_system_of(target)
    checked = FILE_SYSTEMS[kind]
    with Device(target) as device, tempfile.TemporaryDirectory(prefix="pyublk-") as directory:
        place = Path(directory, "mnt")
        place.mkdir()
        if checked.replays:
            with _mount(device.path, place, kind, options):
                pass
        run([*checked.check, device.path], checked.passed)
        with _mount(device.path, place, kind, options):
            yield place


@contextmanager
def extracted(write_image: Callable[[Path], object]) -> Iterator[Path]:
    """The files of an ext4 image, which is written into a file first; see `Crash.extracted`."""
    with tempfile.TemporaryDirectory(prefix="pyublk-") as directory:
        disk, files = Path(directory, "disk.img"), Path(directory, "files")
        write_image(disk)
        files.mkdir()
        run(["e2fsck", "-f", "-p", disk], passed=(0, 1))
        run(["debugfs", "-R", f"rdump / {files}", disk])
        yield files
