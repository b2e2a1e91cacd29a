"""The examples of disks made of others: encryption, deduplication, a log, a zip file."""

import os
import random
import runpy
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk.targets import File, Ram
from pyublk.testing import Crash, Disk, PowerCut

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCK = 4096
#: Disks that a power cut may leave, of which each is checked.
STATES = int(os.environ.get("LOG_STATES", "400"))


def load(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def content(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


# ---- encrypted ----


@pytest.fixture
def encrypted() -> Any:
    pytest.importorskip("cryptography")
    return load("encrypted").Encrypted


def test_encryption_is_the_standards(encrypted: Any, tmp_path: Path) -> None:
    """IEEE 1619-2007, annex B, vector 4: AES-128, data unit 0."""
    key = "27182818284590452353602874713526" + "31415926535897932384626433832795"
    (tmp_path / "key").write_bytes(bytes.fromhex(key))
    memory = Ram(size=1 << 20)
    with Disk(encrypted(memory, tmp_path / "key")) as disk:
        disk.pwrite(bytes(range(256)) * 2, 0)
        assert disk.pread(512, 0) == bytes(range(256)) * 2
        secret = disk.target.below.target
        buffer = memoryview(bytearray(512))
        disk.target.below.read(0, buffer)
        assert secret is memory
    assert buffer[:16].hex() == "27a7479befa1d476489f308cd4cfa6e2"


def test_what_is_encrypted_is_read_again_and_not_below(encrypted: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(os.urandom(64))
    file = tmp_path / "disk.img"
    data = b"secret".ljust(512) * 64
    with Disk(encrypted(File(file, size=1 << 20), tmp_path / "key")) as disk:
        disk.pwrite(data, 8192)
        disk.write_zeroes(0, 4096)  # by writing, since it would go past the layer
        assert disk.pread(4096, 0) == bytes(4096)
        assert disk.target.profile().recoverable
    with Disk(encrypted(File(file), tmp_path / "key")) as disk:
        assert disk.pread(len(data), 8192) == data
    assert b"secret" not in file.read_bytes()
    assert file.read_bytes()[:4096].count(0) < 100
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes: AES-XTS takes a key of 32 or 64"):
        encrypted(File(file), tmp_path / "key")


# ---- deduplicated ----


@pytest.fixture
def deduplicated(tmp_path: Path) -> Callable[..., pyublk.Target]:
    made = load("deduplicated").Deduplicated
    return lambda place="store": made(tmp_path / place, size=1 << 20)


def test_each_block_is_kept_once(
    deduplicated: Callable[..., pyublk.Target], tmp_path: Path
) -> None:
    shadow = bytearray(1 << 20)
    numbers = random.Random(1)
    for _ in range(2):
        with Disk(deduplicated()) as disk:
            assert disk.pread(1 << 20, 0) == shadow
            for _ in range(150):
                at = numbers.randrange(256) * BLOCK
                if numbers.random() < 0.2:
                    disk.discard(at, BLOCK)
                    shadow[at : at + BLOCK] = bytes(BLOCK)
                else:
                    data = content(numbers.randrange(6))
                    disk.pwrite(data, at)
                    shadow[at : at + BLOCK] = data
                if numbers.random() < 0.1:
                    disk.flush()
    # Six contents; a few more slots were needed until a flush freed those before.
    assert (tmp_path / "store/blocks").stat().st_size <= 12 * BLOCK


def test_a_killed_store_has_what_was_flushed(
    deduplicated: Callable[..., pyublk.Target], tmp_path: Path
) -> None:
    target = deduplicated()
    assert not target.recoverable
    with Disk(target) as disk:
        disk.pwrite(content(1) + content(2), 0)
        disk.flush()
        disk.pwrite(content(3), 0)
        for number in range(20):  # slots that the flushed index still names are not used again
            disk.pwrite(content(10 + number), 8192)
        shutil.copytree(tmp_path / "store", tmp_path / "killed")
    with Disk(deduplicated("killed")) as disk:
        assert disk.pread(2 * BLOCK, 0) == content(1) + content(2)
        assert disk.pread(BLOCK, 8192) == bytes(BLOCK)
    with Disk(deduplicated()) as disk:
        assert disk.pread(2 * BLOCK, 0) == content(3) + content(2)


# ---- log-structured ----


@pytest.fixture
def log_structured() -> Any:
    return load("log_structured").LogStructured


def test_a_log_is_a_disk(log_structured: Any) -> None:
    memory = Ram(size=12 * 64 * BLOCK)
    layer = log_structured(memory)
    shadow: bytearray | None = None
    numbers = random.Random(2)
    memory.keep()  # what is written stays when it is closed
    for _ in range(2):
        with Disk(layer) as disk:
            size = layer.size
            shadow = shadow or bytearray(size)
            assert disk.pread(size // BLOCK * BLOCK, 0) == shadow
            for _ in range(1500):
                at = numbers.randrange(size // BLOCK) * BLOCK
                data = content(numbers.randrange(50))
                disk.pwrite(data, at)
                shadow[at : at + BLOCK] = data
                if numbers.random() < 0.02:
                    disk.flush()
            told = layer.status()
            assert told["moved"] > 0
            assert told["write_amplification"] > 1
            assert disk.pread(size, 0) == shadow


@pytest.mark.parametrize("every", [4, 25])
def test_what_was_flushed_is_in_the_log_after_a_power_cut(log_structured: Any, every: int) -> None:
    log_structured.open.__globals__["SEGMENT"] = 8
    cut = PowerCut(10 * 8 * BLOCK, block_size=BLOCK)
    history: dict[int, list[bytes]] = {}
    flushed: list[dict[int, int]] = []
    numbers = random.Random(3)
    layer = log_structured(cut, spare=0.4)
    with Disk(layer) as disk:
        blocks = layer.size // BLOCK
        for step in range(blocks + 150):  # so many that segments are freed and used again
            block = step if step < blocks else numbers.randrange(blocks)
            data = content(1000 + step)
            disk.pwrite(data, block * BLOCK)
            history.setdefault(block, []).append(data)
            if step % every == every - 1:
                disk.flush()
                flushed.append({one: len(writes) for one, writes in history.items()})
                cut.mark(f"flush {len(flushed)}")
        assert layer.status()["moved"] > 0

    def check(crash: Crash) -> None:
        least = flushed[len(crash.marks) - 1] if crash.marks else {}
        with Disk(log_structured(crash.target(), spare=0.4)) as disk:
            for block in range(blocks):
                kept = disk.pread(BLOCK, block * BLOCK)
                writes = history.get(block, [])
                allowed = writes[max(0, least.get(block, 0) - 1) :]
                assert kept in allowed or (block not in least and kept == bytes(BLOCK)), block

    assert cut.check(check, limit=STATES) == STATES


def test_a_log_that_is_too_small_is_told(log_structured: Any) -> None:
    with pytest.raises(ValueError, match="the log needs at least 1572864 bytes"):
        Disk(log_structured(Ram(size=4 * 64 * BLOCK))).__enter__()
    with pytest.raises(ValueError, match=r"spare is 0\.01: it must be from 0\.05 to 0\.9"):
        log_structured(Ram(size=1 << 20), spare=0.01)


def test_less_is_moved_where_more_is_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    plot = load("log_structured_plot")
    plot.amplification.__globals__["SEGMENTS"] = 12
    little, much = (plot.amplification(plot.uniform, spare, 1) for spare in (0.1, 0.5))
    assert 1 < much < little


# ---- a zip file ----


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zips_member_is_a_disk(kind: int, tmp_path: Path) -> None:
    zip_disk = load("zip_disk")
    zip_disk.ZipDisk.open.__globals__["STEP"] = 64 << 10
    data = b"".join(content(number % 40)[:1000] for number in range(1000)) + b"end"
    with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as archive:
        archive.writestr("readme", "first")
        archive.writestr("disk.img", data)
    target = zip_disk.ZipDisk(tmp_path / "a.zip", "disk.img")
    with Disk(target) as disk:
        padded = data.ljust(target.size, b"\0")
        assert 0 < len(padded) - len(data) < 512
        numbers = random.Random(4)
        for _ in range(60):
            at = numbers.randrange(target.size // 512) * 512
            length = min(target.size - at, numbers.randrange(1, 200) * 512)
            assert disk.pread(length, at) == padded[at : at + length]
        assert disk.pread(1 << 19, 0) == padded[: 1 << 19]
        with pytest.raises(OSError, match="the disk is read-only"):
            disk.pwrite(bytes(512), 0)


def test_what_is_no_disk_in_a_zip_is_told(tmp_path: Path) -> None:
    zip_disk = load("zip_disk").ZipDisk
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.img", bytes(4096))
        archive.writestr("two.img", bytes(4096))
    with pytest.raises(ValueError, match=r"needs the name of a member; it has one\.img, two"):
        Disk(zip_disk(tmp_path / "a.zip")).__enter__()
    with pytest.raises(ValueError, match=r"has no 'three\.img'; it has one\.img, two"):
        Disk(zip_disk(tmp_path / "a.zip", "three.img")).__enter__()
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("one.img", bytes(4096))
    with pytest.raises(ValueError, match="packed in a way that only whole members are read from"):
        Disk(zip_disk(tmp_path / "b.zip")).__enter__()
    # Cut short, the last part cannot be read.
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("one.img", bytes(1 << 20))
    with Disk(zip_disk(tmp_path / "c.zip")) as disk:
        os.truncate(tmp_path / "c.zip", 1 << 19)
        assert disk.pread(4096, 0) == bytes(4096)
        with pytest.raises(OSError, match="READ at 1044480 failed"):
            disk.pread(4096, (1 << 20) - 4096)
