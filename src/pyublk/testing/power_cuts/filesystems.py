# SPDX-License-Identifier: MIT
"""File systems after a power cut: mounted, and checked by their own tools."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pyublk.device import Device
from pyublk.target import Target
from pyublk.testing.disk import Disk
from pyublk.testing.file_systems import KINDS, TIMEOUT, CheckFailed, kind_named, mount, run


def file_system_of(target: Target) -> str:
    """The name of the one that is on the disk. Raises CheckFailed when there is none."""
    with Disk(target) as disk:
        block = disk.block_size
        for name, one in KINDS.items():
            for offset, magic in one.magic:
                start = offset // block * block
                if start + block > disk.size:
                    continue
                if disk.pread(block, start)[offset - start :].startswith(magic):
                    return name
    raise CheckFailed(
        f"there is no file system on the disk: none of {', '.join(KINDS)} begins there"
    )


@contextmanager
def mounted(target: Target, file_system: str | None, options: str = "") -> Iterator[Path]:
    """The target as a device, its file system mounted and checked; see `Crash.mounted`."""
    kind = file_system or file_system_of(target)
    known = kind_named(kind)
    with Device(target) as device, tempfile.TemporaryDirectory(prefix="pyublk-") as directory:
        place = Path(directory, "mnt")
        place.mkdir()
        check = partial(run, [*known.check, device.path], known.passed)
        if not known.replays:
            check()
        mount(kind, device.path, place, known.options, options)
        try:
            yield place
        except BaseException as error:
            if _unmounted(place) and known.replays and isinstance(error, Exception):
                _check_after(error, check)
            raise
        run(["umount", place])
        if known.replays:
            check()


def _unmounted(place: Path) -> bool:
    """Unmounts it; returns whether it is gone, and not only out of sight."""
    for lazy in ((), ("--lazy",)):
        command = ["umount", *lazy, place]
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
        if done.returncode == 0:
            return not lazy
    return False


def _check_after(error: Exception, check: Callable[[], object]) -> None:
    """What its tool finds may be why something has failed on the file system."""
    try:
        check()
    except CheckFailed as found:
        said = f"{type(error).__name__}: {error}"
        raise CheckFailed(f"{found}\non this file system, the check failed: {said}") from error


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
