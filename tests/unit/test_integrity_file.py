"""The target integrity without a kernel, where no request has metadata."""

import os
from pathlib import Path
from typing import Any

import pytest

from pyublk import targets
from pyublk.params import Integrity
from pyublk.targets import IntegrityFile
from pyublk.testing import Disk
from pyublk.uapi import Checksum

MIB = 1 << 20


def made(place: Path, **options: Any) -> IntegrityFile:
    return IntegrityFile(place / "disk.img", place / "disk.meta", **options)


def test_data_is_kept_and_metadata_has_its_room(tmp_path: Path) -> None:
    data = os.urandom(8192)
    with Disk(made(tmp_path, size=MIB)) as disk:
        assert disk.params.integrity == Integrity(
            metadata_size=8, checksum=Checksum.T10DIF, ref_tag=True
        )
        disk.pwrite(data, 4096)
        assert disk.pread(8192, 4096) == data
        disk.flush()
    assert (tmp_path / "disk.img").read_bytes()[4096:12288] == data
    assert (tmp_path / "disk.meta").stat().st_size == MIB // 512 * 8
    with Disk(made(tmp_path, read_only=True)) as disk:
        assert disk.pread(8192, 4096) == data


def test_options_as_text(tmp_path: Path) -> None:
    words = {"checksum": "nvme", "metadata_size": "64", "interval": "4096", "ref_tag": "no"}
    places = (str(tmp_path / "disk.img"), str(tmp_path / "disk.meta"))
    target = targets.build(targets.resolve("integrity"), words, places, size=MIB, block_size=4096)
    assert target.integrity == Integrity(
        metadata_size=64, interval=4096, pi_offset=48, checksum=Checksum.NVME
    )
    with Disk(target):
        assert (tmp_path / "disk.meta").stat().st_size == MIB // 4096 * 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checksum": Checksum.NONE}, "metadata without a checksum needs a metadata_size of 1"),
        ({"metadata_size": 4}, "integrity.metadata_size must be at least 8 for the checksum"),
        ({"metadata_size": "8"}, "metadata_size must be a whole number, not '8'"),
        ({"interval": 100}, "integrity.interval must be a power of two"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        made(tmp_path, size=MIB, **options)


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1000 bytes: a disk needs a positive multiple of"):
        made(tmp_path, size=1000).open()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    with pytest.raises(FileNotFoundError, match=r"disk\.meta does not exist"):
        made(tmp_path, read_only=True).open()
    (tmp_path / "disk.meta").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"size 16384 is more than .*disk\.meta has"):
        made(tmp_path, read_only=True).open()


def test_nobody_else_gets_the_files(tmp_path: Path) -> None:
    with Disk(made(tmp_path, size=MIB)):
        other = IntegrityFile(tmp_path / "other", tmp_path / "disk.meta", size=MIB)
        with pytest.raises(OSError, match="this process serves it already"):
            other.open()
        assert not (tmp_path / "other").exists()
        same = IntegrityFile(tmp_path / "one", tmp_path / "one", size=MIB)
        with pytest.raises(OSError, match="this process serves it already"):
            same.open()
