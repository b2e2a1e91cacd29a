# SPDX-License-Identifier: MIT
"""File systems after a power cut: mounted, and checked by their own tools on the way."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
def _mount(device: str, place: Path, kind: str, options: str) -> Iterator[None]:
    mount(kind, device, place, KINDS[kind].options, options)
    try:
        yield
    except BaseException:
        subprocess.run(["umount", "--lazy", place], timeout=TIMEOUT, check=False)
        raise
    run(["umount", place])


@contextmanager
def mounted(target: Target, file_system: str | None, options: str = "") -> Iterator[Path]:
    """The target as a device, its file system checked and mounted; see `Crash.mounted`."""
    kind = file_system or file_system_of(target)
    checked = kind_named(kind)
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
