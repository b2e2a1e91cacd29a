# SPDX-License-Identifier: MIT
"""Metadata beside the data: the kernel makes protection information and checks it, the target of
examples/protected.py keeps it."""

import errno
import os
import runpy
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve
from filesystems import make_file_system, mounted
from needs import needs

import pyublk
from pyublk.params import Integrity
from pyublk.targets import IntegrityFile
from pyublk.uapi import Checksum, Feature

MIB = 1 << 20
EXAMPLE = Path(__file__).parents[2] / "examples" / "protected.py"

T10 = Integrity(metadata_size=8, checksum=Checksum.T10DIF, ref_tag=True)
NVME = Integrity(metadata_size=64, pi_offset=48, checksum=Checksum.NVME)
BARE = Integrity(metadata_size=16)

#: What sysfs calls the profiles.
FORMATS = {"t10": (T10, "T10-DIF-TYPE1-CRC"), "nvme": (NVME, "EXT-DIF-TYPE3-CRC64")}


@pytest.fixture(autouse=True)
def the_kernel_has_integrity() -> None:
    needs(Feature.INTEGRITY)


BATCH = pytest.mark.parametrize("batch", [False, None], ids=["single", "batch where there is"])


def protected(integrity: Integrity) -> Any:
    return runpy.run_path(str(EXAMPLE))["Protected"](2 * MIB, integrity)


def attribute(disk: pyublk.Device, name: str) -> str:
    return Path(f"/sys/block/{Path(disk.path).name}/integrity/{name}").read_text().strip()


def crc_t10dif(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x8BB7 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


@pytest.mark.parametrize("profile", FORMATS)
def test_the_kernel_shows_the_profile(serve: Serve, profile: str) -> None:
    integrity, name = FORMATS[profile]
    disk = serve(protected(integrity))
    assert attribute(disk, "format") == name
    assert int(attribute(disk, "protection_interval_bytes")) == 512
    assert attribute(disk, "read_verify") == "1"
    assert attribute(disk, "write_generate") == "1"
    assert disk.params.integrity == integrity


@BATCH
def test_the_kernel_makes_what_the_target_keeps(serve: Serve, batch: bool | None) -> None:
    target = protected(T10)
    disk = serve(target, batch=batch, queues=2)
    data = os.urandom(8192)
    with Blocks(disk.path) as client:
        client.write(data, 64 * 512)
        assert client.read(8192, 64 * 512) == data
        assert client.read(4096, MIB) == bytes(4096), "what was never written is not checked"
    assert bytes(target.data[64 * 512 : 64 * 512 + 8192]) == data
    for block in range(16):
        guard, _, place = struct.unpack(">HHI", target.metadata_at((64 + block) * 512, 512))
        assert guard == crc_t10dif(data[block * 512 : block * 512 + 512])
        assert place == 64 + block
    assert set(target.metadata_at(0, 64 * 512)) == {0xFF}


@BATCH
@pytest.mark.parametrize("profile", FORMATS)
def test_corruption_is_found(serve: Serve, profile: str, batch: bool | None) -> None:
    target = protected(FORMATS[profile][0])
    disk = serve(target, batch=batch)
    data = os.urandom(65536)
    pi = target.integrity.pi_offset
    with Blocks(disk.path) as client:
        client.write(data, 0)
        assert client.read(65536, 0) == data
        for memory in (target.metadata_at(4096, 512)[pi:], target.data[4096:4608]):
            memory[0] ^= 1
            with pytest.raises(OSError) as caught:  # noqa: PT011 -- the errno is looked at
                client.read(65536, 0)
            assert caught.value.errno == errno.EILSEQ
            assert client.read(4096, 8192) == data[8192:12288]
            memory[0] ^= 1
            assert client.read(65536, 0) == data


def test_metadata_without_a_checksum(serve: Serve) -> None:
    disk = serve(protected(BARE))
    assert attribute(disk, "format") == "nop"
    with Blocks(disk.path) as client:
        data = os.urandom(16384)
        client.write(data, 0)
        assert client.read(16384, 0) == data


# ---- the target integrity ----


def in_files(place: Path, **options: Any) -> IntegrityFile:
    return IntegrityFile(place / "disk.img", place / "disk.meta", size=2 * MIB, **options)


@BATCH
def test_metadata_outlives_the_server(serve: Serve, tmp_path: Path, batch: bool | None) -> None:
    disk = serve(in_files(tmp_path), batch=batch, queues=2)
    assert attribute(disk, "format") == "T10-DIF-TYPE1-CRC"
    data = os.urandom(65536)
    with Blocks(disk.path) as client:
        client.write(data, 64 * 512)
        assert client.read(4096, MIB) == bytes(4096), "what was never written is not checked"
    disk.stop()
    kept = (tmp_path / "disk.meta").read_bytes()
    for block in range(128):
        inverted = kept[(64 + block) * 8 : (65 + block) * 8]
        guard, _, place = struct.unpack(">HHI", bytes(byte ^ 0xFF for byte in inverted))
        assert guard == crc_t10dif(data[block * 512 : block * 512 + 512])
        assert place == 64 + block
    disk = serve(in_files(tmp_path), batch=batch)
    with Blocks(disk.path) as client:
        assert client.read(65536, 64 * 512) == data


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ref_tag": False},
        {"checksum": Checksum.IP},
        {"checksum": Checksum.NVME, "metadata_size": 64},
        {"block_size": 4096, "interval": 4096},
    ],
    ids=["t10", "no ref_tag", "ip", "nvme", "4096"],
)
def test_what_was_changed_below_the_disk_is_found(
    serve: Serve, tmp_path: Path, options: dict[str, Any]
) -> None:
    target = in_files(tmp_path, **options)
    disk = serve(target)
    data = os.urandom(65536)
    assert target.integrity is not None
    with Blocks(disk.path) as client:
        client.write(data, 0)
        for path, place in ((target.path, 0), (target.metadata, target.integrity.pi_offset)):
            below = os.open(path, os.O_RDWR)
            there = os.pread(below, 1, place)
            os.pwrite(below, bytes([there[0] ^ 1]), place)
            with pytest.raises(OSError) as caught:  # noqa: PT011 -- the errno is looked at
                client.read(65536, 0)
            assert caught.value.errno == errno.EILSEQ
            assert client.read(4096, 8192) == data[8192:12288]
            os.pwrite(below, there, place)
            os.close(below)
            assert client.read(65536, 0) == data


def test_a_block_and_its_metadata_change_together(serve: Serve, tmp_path: Path) -> None:
    disk = serve(in_files(tmp_path), queues=2)
    over = time.monotonic() + 5

    def writer(at: int) -> None:
        with Blocks(disk.path) as client:
            while time.monotonic() < over:
                client.write(os.urandom(32768), at)

    def reader() -> None:
        with Blocks(disk.path) as client:
            while time.monotonic() < over:
                client.read(65536, 0)  # EILSEQ, where it got one of them from before

    with ThreadPoolExecutor(4) as pool:
        for done in [
            pool.submit(writer, 0),
            pool.submit(writer, 16384),
            pool.submit(reader),
            pool.submit(reader),
        ]:
            done.result()


def test_a_file_system_on_protected_blocks(serve: Serve, tmp_path: Path) -> None:
    disk = serve(
        IntegrityFile(tmp_path / "disk.img", tmp_path / "disk.meta", size=64 * MIB), queues=2
    )
    make_file_system("ext4", disk.path)
    with mounted(disk.path, tmp_path / "mnt") as place:
        (place / "file").write_bytes(b"x" * MIB)
    with mounted(disk.path, tmp_path / "mnt") as place:
        assert (place / "file").read_bytes() == b"x" * MIB
