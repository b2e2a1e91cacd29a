"""Overlays of one process over one base: it is open once, for all of them."""

import gc
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk import overlays
from pyublk.layers.overlay import Overlay
from pyublk.layers.overlay_record import BaseChanged
from pyublk.targets import File
from pyublk.targets.overlay import OverlayFile
from pyublk.testing import Disk

SIZE = 256 << 10

SLOW = """
import threading, time
import pyublk

class Slow(pyublk.Target):
    opened = closed = 0
    hangs = False
    lock = threading.Lock()

    def __init__(self, path):
        super().__init__(size=0, read_only=True)
        self.path = path

    def open(self):
        type(self).opened += 1
        time.sleep(0.3)
        with open(self.path, "rb") as file:
            self.data = file.read()
        self.size = len(self.data)

    def close(self):
        type(self).closed += 1
        self.data = None

    def read(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]
"""

WAIT = """
        if offset == 131072 and self.lock.locked():
            self.hangs = True
            with self.lock:
                pass
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def made(folder: Path, base: str, count: int) -> list[Path]:
    tops = [folder / f"top{number}" for number in range(count)]
    for top in tops:
        overlays.create(top, base)
    return tops


def descriptors() -> list[str]:
    """What is open, by name."""
    gc.collect()
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the directory itself
            continue
    return found


def test_a_file_is_open_once_and_an_overlay_has_two_descriptors(tmp_path: Path, base: Path) -> None:
    tops = made(tmp_path, str(base), 4)
    before = len(descriptors())
    targets = [OverlayFile(top) for top in tops]
    for number, target in enumerate(targets, 1):
        target.open()
        assert descriptors().count(str(base)) == 1
        assert len(descriptors()) == before + 1 + 2 * number
    for number, target in enumerate(targets, 1):
        assert descriptors().count(str(base)) == 1
        with pytest.raises(OSError, match="is in use"):
            File(base).open()  # to write it
        target.close()
        assert descriptors().count(str(base)) == (number < len(targets))
    File(base).open()


def test_a_source_of_python_is_opened_once_by_many_threads(tmp_path: Path, base: Path) -> None:
    module = tmp_path / "slow.py"
    module.write_text(SLOW)
    tops = made(tmp_path, f"{module}:Slow:{base}", 6)
    targets = [OverlayFile(top) for top in tops]
    with ThreadPoolExecutor(len(targets)) as pool:
        list(pool.map(OverlayFile.open, targets))
    below: Any = targets[0].below
    assert {id(target.below) for target in targets} == {id(below)}
    assert type(below).opened == 1
    for target in targets[1:]:
        target.close()
    again = OverlayFile(tops[1])
    again.open()
    assert again.below is below
    assert type(below).opened == 1
    again.close()
    assert type(below).closed == 0
    targets[0].close()
    assert type(below).closed == 1
    with Disk(OverlayFile(tops[0])) as disk:  # anew
        assert disk.pread(SIZE, 0) == base.read_bytes()


def test_disks_over_one_base_read_and_write_at_the_same_time(tmp_path: Path, base: Path) -> None:
    module = tmp_path / "slow.py"
    module.write_text(SLOW.replace("time.sleep(0.3)", "pass"))
    content = base.read_bytes()

    def use(number: int, top: Path) -> None:
        with Disk(OverlayFile(top)) as disk:
            started.wait(10)
            change(random.Random(number), disk)

    def change(dice: random.Random, disk: Disk) -> None:
        expected = bytearray(content)
        for _ in range(60):
            offset = dice.randrange(SIZE // 512) * 512
            length = min(dice.choice([512, 4096, 20480]), SIZE - offset)
            if dice.random() < 0.5:
                expected[offset : offset + length] = data = dice.randbytes(length)
                disk.pwrite(data, offset)
            else:
                assert disk.pread(length, offset) == expected[offset : offset + length]
        assert disk.pread(SIZE, 0) == expected

    for name, source in (("files", str(base)), ("calls", f"{module}:Slow:{base}")):
        folder = tmp_path / name
        folder.mkdir()
        started = threading.Barrier(3)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(use, range(3), made(folder, source, 3)))


def replaced(base: Path, data: bytes) -> None:
    draft = base.with_name("draft")
    draft.write_bytes(data)
    draft.replace(base)


def grown(base: Path, data: bytes) -> None:
    with base.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("change", [replaced, grown])
def test_another_base_of_the_name_is_opened_anew(
    tmp_path: Path, base: Path, change: Callable[[Path, bytes], None]
) -> None:
    """Who has the one before keeps it."""
    before, after = base.read_bytes(), random.Random(2).randbytes(2 * SIZE)
    old, late = made(tmp_path, str(base), 2)
    with Disk(OverlayFile(old)) as disk:
        change(base, after)
        with pytest.raises(BaseChanged):
            OverlayFile(late).open()
        new = tmp_path / "new"
        overlays.create(new, str(base))
        with Disk(OverlayFile(new)) as other:
            assert other.pread(2 * SIZE, 0) == after
            if change is replaced:
                assert disk.pread(SIZE, 0) == before
                assert descriptors().count(f"{base} (deleted)") == 1
            assert descriptors().count(str(base)) == (1 if change is replaced else 2)


def test_a_base_that_cannot_be_opened_is_tried_again(tmp_path: Path, base: Path) -> None:
    (top,) = made(tmp_path, str(base), 1)
    base.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            OverlayFile(top).open()
    (tmp_path / "away").rename(base)
    with Disk(OverlayFile(top)) as disk:
        assert disk.pread(512, 0) == base.read_bytes()[:512]


def test_one_target_below_several_overlays(tmp_path: Path, base: Path) -> None:
    below = File(base)
    with Disk(Overlay(below, tmp_path / "one")) as one:
        with Disk(Overlay(below, tmp_path / "two")) as two:
            assert one.size == two.size == SIZE
            two.pwrite(b"2" * 512, 0)
            assert descriptors().count(str(base)) == 1
        assert one.pread(SIZE, 0) == base.read_bytes()
    with pytest.raises(RuntimeError, match="is not open"):
        _ = below.layout


def test_an_overlay_over_itself_is_told(tmp_path: Path, base: Path) -> None:
    (one,) = made(tmp_path, str(base), 1)
    two = tmp_path / "two"
    overlays.create(two, f"overlay:{one}")
    for suffix in ("", ".map"):
        two.with_name(two.name + suffix).replace(one.with_name(one.name + suffix))
    with pytest.raises(ValueError, match="an overlay cannot lie over itself"):
        OverlayFile(one, read_only=True).open()


def test_a_child_opens_its_own(tmp_path: Path, base: Path) -> None:
    """It has the parent's memory, and none of what that serves."""
    tops = made(tmp_path, str(base), 2)
    with Disk(OverlayFile(tops[0])):
        if not (child := os.fork()):
            code = 1
            try:
                target = OverlayFile(tops[1])
                target.open()
                code = 0 if descriptors().count(str(base)) == 2 else 3
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["file", "overlay", "cache"])
def test_a_target_serves_one_disk(tmp_path: Path, base: Path, kind: str) -> None:
    """Its files would be the other disk's twice over."""
    target: pyublk.Target = File(base, read_only=True)
    if kind == "overlay":
        target = Overlay(target, tmp_path / "over")
    elif kind == "cache":
        target = pyublk.layers.build(f"cache:file={tmp_path / 'cache'}", target)
    with Disk(target) as disk:
        with pytest.raises(ValueError, match=r"is served already: each disk needs a target of its"):
            Disk(target).open()
        assert disk.pread(SIZE, 0) == base.read_bytes()
    with Disk(target) as disk:
        assert disk.pread(SIZE, 0) == base.read_bytes()


def test_what_hangs_below_one_holds_up_no_other(tmp_path: Path, base: Path) -> None:
    module = tmp_path / "slow.py"
    slow = SLOW.replace("time.sleep(0.3)", "pass")
    module.write_text(slow.replace("        buffer[:]", f"{WAIT}        buffer[:]"))
    tops = made(tmp_path, f"{module}:Slow:{base}", 2)
    hanging, other = OverlayFile(tops[0]), OverlayFile(tops[1])
    with Disk(other) as disk, ThreadPoolExecutor(1) as pool:
        below: Any = other.below
        with below.lock:
            late = pool.submit(read, hanging, 131072)
            while not below.hangs:
                time.sleep(0.01)
            assert disk.pread(4096, 0) == base.read_bytes()[:4096]
            assert not late.done()
        assert late.result(10) == base.read_bytes()[131072 : 131072 + 4096]
        assert type(below).opened == 1


def read(target: OverlayFile, offset: int) -> bytes:
    with Disk(target) as disk:
        return disk.pread(4096, offset)
