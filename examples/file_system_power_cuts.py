# SPDX-License-Identifier: MIT
"""Do files survive a power cut, on ext4 and on xfs? Run it in a kernel with ublk:

    pyublk vm -- python3 examples/file_system_power_cuts.py            # ext4, then xfs
    pyublk vm -- python3 examples/file_system_power_cuts.py --limit 200 ext4

It needs root, e2fsprogs and xfsprogs. A program replaces a settings file again and again. After
each cut the file must have the settings that were saved last, or the next ones, and the file
system's own tool must find no fault. The program that forgets to fsync must be caught, in both.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyublk
from pyublk.targets import File
from pyublk.testing import Crash, PowerCut, PowerCutFailed

MIB = 1 << 20
#: How each is made, how large (xfs wants 300 MiB at least), and how it is mounted: ext4 helps
#: programs that forget the fsync before a rename, unless it is told not to.
MAKE = {
    "ext4": (["mkfs.ext4", "-q", "-F", "-J", "size=1", "-b", "1024"], 4 * MIB, "noauto_da_alloc"),
    "xfs": (["mkfs.xfs", "-q", "-f", "-d", "agcount=2"], 300 * MIB, "defaults"),
}
VERSIONS = 2


def contents(number: int) -> bytes:
    return b"setting = %d\n" % number * 300


def save(path: Path, data: bytes) -> None:
    """Replaces the file: it has the old content or the new one, and the new one on return."""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)


def save_without_fsync(path: Path, data: bytes) -> None:
    """The same without the first fsync: the new name may be there before the new content."""
    beside = path.with_suffix(".new")
    beside.write_bytes(data)
    beside.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


Save = Callable[[Path, bytes], None]


def record(file_system: str, save: Save, directory: Path) -> PowerCut:
    """A disk with a file system on which the program ran."""
    image, mounted = directory / "disk.img", directory / "mounted"
    make, size, options = MAKE[file_system]
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*make, image], check=True)
    mounted.mkdir()
    cut = PowerCut(File(image), atomic=4096)  # ext4's superblock may not be torn
    with pyublk.Device(cut) as disk:
        subprocess.run(["mount", "-t", file_system, "-o", options, disk.path, mounted], check=True)
        try:
            (mounted / "settings").write_bytes(contents(0))
            os.sync()
            with cut.record():
                for number in range(1, VERSIONS + 1):
                    save(mounted / "settings", contents(number))
                    cut.mark(f"saved {number}")
        finally:
            subprocess.run(["umount", mounted], check=True)
    return cut


def check(crash: Crash) -> None:
    """The file is read; then the file system is unmounted, and checked by its own tool."""
    saved = sum(crash.reached(f"saved {number}") for number in range(1, VERSIONS + 1))
    with crash.mounted() as mounted:
        found = (mounted / "settings").read_bytes()
    assert found in [contents(saved), contents(saved + 1)], (
        f"version {saved} was saved, and {len(found)} bytes are there: {found[:20]!r}..."
    )


def run(file_system: str, save: Save, limit: int) -> str | None:
    """The failure that was found, in words, or None."""
    with tempfile.TemporaryDirectory() as directory:
        cut = record(file_system, save, Path(directory))
        try:
            cut.check(check, limit=limit)
        except PowerCutFailed as failed:
            return str(failed)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file_systems", nargs="*", choices=[[], *MAKE], metavar="ext4|xfs")
    parser.add_argument("--limit", type=int, default=3, help="states of each program")
    chosen = parser.parse_args()
    wrong = 0
    for file_system in chosen.file_systems or MAKE:
        for program, careful in ((save, True), (save_without_fsync, False)):
            failure = run(file_system, program, chosen.limit)
            wrong += (failure is None) != careful
            print(f"{file_system}, {program.__name__}: {failure or 'no failure'}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
