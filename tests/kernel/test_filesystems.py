"""ext4 and xfs live on our disks: many files, synced, unmounted, checked, mounted again."""

import os
import random
from pathlib import Path

import pytest
from conftest import Serve
from filesystems import SIZES, check_file_system, checksums, make_file_system, mounted
from memory import device_options, make

EMULATED = "QEMU TCG" in Path("/proc/cpuinfo").read_text()
FILES = 150 if EMULATED else 3000


def fill(tree: Path, count: int, seed: int) -> None:
    """Files of many sizes in many directories, with links; every tenth is synced by itself."""
    chance = random.Random(seed)
    for number in range(count):
        directory = tree / f"d{number % 17}" / f"e{number % 5}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"file {number}"
        length = chance.choice([0, 1, 511, 4096, 5000, chance.randrange(60_000)])
        with path.open("wb") as file:
            file.write(chance.randbytes(length))
            if number % 10 == 0:
                file.flush()
                os.fsync(file.fileno())
        if number % 25 == 0:
            (directory / f"link {number}").symlink_to(path.name)
            (directory / f"second {number}").hardlink_to(path)


@pytest.mark.parametrize(
    ("file_system", "kind"),
    [
        ("ext4", "file"),
        ("ext4", "async"),
        ("xfs", "ram"),
        ("xfs", "workers"),
    ],
)
def test_files_survive(serve: Serve, tmp_path: Path, file_system: str, kind: str) -> None:
    target = make(kind, SIZES[file_system], tmp_path)
    queues = 2 if kind == "ram" else 1
    disk = serve(target, queues=queues, **device_options(kind))
    make_file_system(file_system, disk.path)
    place = tmp_path / "mounted"
    with mounted(disk.path, place):
        fill(place, FILES, 1)
        os.sync()
        before = checksums(place)
    assert sum(1 for name in before if "file" in name) == FILES
    check_file_system(file_system, disk.path)
    with mounted(disk.path, place):
        assert checksums(place) == before
        for number in range(0, FILES, 2):
            (place / f"d{number % 17}" / f"e{number % 5}" / f"file {number}").unlink()
        fill(place / "again", FILES // 3, 2)
        before = checksums(place)
    check_file_system(file_system, disk.path)
    with mounted(disk.path, place, "-o", "ro"):
        assert checksums(place) == before
    assert disk.stats().total.errors == 0


@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_block_size_4096(serve: Serve, tmp_path: Path, file_system: str) -> None:
    target = make("ram", SIZES[file_system], tmp_path, block_size=4096)
    disk = serve(target)
    make_file_system(file_system, disk.path)
    place = tmp_path / "mounted"
    with mounted(disk.path, place):
        fill(place, 40, 3)
        before = checksums(place)
    check_file_system(file_system, disk.path)
    with mounted(disk.path, place):
        assert checksums(place) == before


def test_file_system_after_a_restart(serve: Serve, tmp_path: Path) -> None:
    """The same file, served again by another device, has the file system as it was left."""
    target = make("file", SIZES["ext4"], tmp_path)
    first = serve(target)
    make_file_system("ext4", first.path)
    place = tmp_path / "mounted"
    with mounted(first.path, place):
        fill(place, 60, 4)
        before = checksums(place)
    first.stop()
    second = serve(make("file", SIZES["ext4"], tmp_path))
    check_file_system("ext4", second.path)
    with mounted(second.path, place):
        assert checksums(place) == before
