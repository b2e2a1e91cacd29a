"""A disk that gets another size while it is used: what clients see, and what its files are then."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from fio import verified
from needs import needs
from servers import until
from variations import variations

import pyublk
from pyublk.targets import File, Linear, Mirror, Ram, Slice, Stripe
from pyublk.uapi import Feature

MIB = 1 << 20
SIZE = 16 * MIB

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(autouse=True)
def able() -> None:
    needs(Feature.UPDATE_SIZE)


KINDS: dict[str, Callable[[Path], pyublk.MappedTarget]] = {
    "file": lambda folder: File(folder / "a", size=SIZE),
    "linear": lambda folder: Linear(*make(folder, "ab", SIZE // 2)),
    "stripe": lambda folder: Stripe(*make(folder, "abcd", SIZE // 4)),
    "mirror": lambda folder: Mirror(*make(folder, "ab", SIZE)),
    "slice": lambda folder: Slice(*make(folder, "a", SIZE + MIB), offset=MIB),
}


def make(folder: Path, names: str, size: int) -> list[Path]:
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return [folder / name for name in names]


@pytest.mark.parametrize("kind", variations(KINDS, ["file", "stripe", "mirror"]))
def test_clients_go_on_while_a_disk_grows_and_shrinks(
    kind: str, serve: Serve, tmp_path: Path
) -> None:
    """What is written inside the smaller size is right all the time; what was beyond is gone."""
    target = KINDS[kind](tmp_path)
    disk = serve(target, queues=2)
    if isinstance(target, Mirror):
        assert target.wait_in_step(60)
    over = threading.Event()
    failures: list[BaseException] = []
    loads = 0

    def load() -> None:
        nonlocal loads
        try:
            while not over.is_set():
                verified(disk.path, rw="randwrite", bs="4k-64k", iodepth=8, size=f"{SIZE // 2}",
                         io_size="4M")  # fmt: skip
                loads += 1
        except BaseException as error:
            failures.append(error)

    client = threading.Thread(target=load)
    client.start()
    try:
        with Blocks(disk.path) as blocks:
            for turn in range(6):
                disk.resize(2 * SIZE)
                assert blocks.size == 2 * SIZE
                blocks.write(b"%4d" % turn * 1024, 2 * SIZE - 4096)
                assert blocks.read(4096, 2 * SIZE - 4096) == b"%4d" % turn * 1024
                if isinstance(target, Mirror):
                    assert target.wait_in_step(60)
                disk.resize(SIZE, shrink=True)
                assert blocks.size == disk.params.basic.size == SIZE
                disk.resize(2 * SIZE)
                if kind != "slice":  # whose file is not cut
                    assert blocks.read(4096, 2 * SIZE - 4096) == bytes(4096)
                disk.resize(SIZE, shrink=True)
            until(lambda: loads >= 2 or failures, timeout=100)
    finally:
        over.set()
        client.join(60)
    assert failures == []
    disk.stop()
    if kind != "slice":
        assert sum(file.stat().st_size for file in target.files) == SIZE * (
            2 if kind == "mirror" else 1
        )


@pytest.mark.parametrize("kind", variations(KINDS, ["file", "linear", "mirror"]))
def test_writes_beyond_the_cut_leave_the_files_short(
    kind: str, serve: Serve, tmp_path: Path
) -> None:
    """Those that are under way when it comes may make a file longer once more."""
    target = KINDS[kind](tmp_path)
    disk = serve(target)
    if isinstance(target, Mirror):
        assert target.wait_in_step(60)
    over = threading.Event()

    def write() -> None:
        with Blocks(disk.path) as blocks:
            while not over.is_set():
                try:
                    blocks.write(b"b" * MIB, SIZE)
                except OSError as error:
                    assert error.errno in (errno.EIO, errno.ENOSPC)  # noqa: PT017

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(10):
            disk.resize(2 * SIZE)
            if isinstance(target, Mirror):
                assert target.wait_in_step(60)
            disk.resize(SIZE, shrink=True)
    finally:
        over.set()
        writer.join(60)
    disk.stop()
    with_first = SIZE * len(target.files) if kind == "mirror" else SIZE
    if kind != "slice":
        assert sum(file.stat().st_size for file in target.files) == with_first


def test_a_file_system_grows_with_its_disk(serve: Serve, tmp_path: Path) -> None:
    disk = serve(File(tmp_path / "image", size=64 * MIB))
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", disk.path], check=True, timeout=60)
    subprocess.run(["mount", disk.path, place], check=True, timeout=60)
    try:
        (place / "kept").write_bytes(b"k" * MIB)
        disk.resize(128 * MIB)
        subprocess.run(["resize2fs", disk.path], check=True, timeout=60, capture_output=True)
        about = os.statvfs(place)
        assert about.f_blocks * about.f_frsize > 100 * MIB
        (place / "more").write_bytes(b"m" * 80 * MIB)
        assert (place / "kept").read_bytes() == b"k" * MIB
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)
    disk.stop()
    done = subprocess.run(
        ["e2fsck", "-fn", tmp_path / "image"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_block_device_grows_as_far_as_it_goes(serve: Serve) -> None:
    below = serve(Ram(size=2 * SIZE))
    disk = serve(Slice(Path(below.path), size=SIZE))
    with pytest.raises(
        ValueError, match=r"has 33554432 bytes, and the disk would need 67108864: enl"
    ):
        disk.resize(4 * SIZE)
    disk.resize(2 * SIZE)
    with Blocks(disk.path) as blocks:
        blocks.write(b"e" * 4096, 2 * SIZE - 4096)
    disk.stop()
    with Blocks(below.path) as blocks:
        assert blocks.read(4096, 2 * SIZE - 4096) == b"e" * 4096


def test_a_disk_that_is_stopped_meanwhile_keeps_its_size(serve: Serve, tmp_path: Path) -> None:
    """UPDATE_SIZE never comes to a device that is not live, which crashes kernels."""
    target = File(tmp_path / "image", size=SIZE)
    disk = serve(target)
    update = disk._update_size

    def stopped_before(size: int) -> None:
        disk.stop()
        update(size)

    disk._update_size = stopped_before  # type: ignore[method-assign]
    with pytest.raises(pyublk.DeviceClosed, match="the device is stopped meanwhile"):
        disk.resize(2 * SIZE)
    assert (tmp_path / "image").stat().st_size == target.size == SIZE
