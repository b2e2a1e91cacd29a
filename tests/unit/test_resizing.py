"""Another size for a mapped target in use: what its files are then, and that a failure changes
nothing."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyublk import MappedTarget
from pyublk.keeping import keep, let_go
from pyublk.targets import File, Linear, Mirror, Ram, Slice, Stripe
from pyublk.testing import Disk

MIB = 1 << 20

TARGETS: dict[str, Callable[[list[Path]], MappedTarget]] = {
    "file": lambda files: File(files[0]),
    "linear": lambda files: Linear(*files),
    "stripe": lambda files: Stripe(*files, chunk=65536),
    "mirror": lambda files: Mirror(*files),
    "slice": lambda files: Slice(files[0], offset=MIB // 2),
}


def make(folder: Path) -> list[Path]:
    files = [folder / "a", folder / "b"]
    for file in files:
        file.write_bytes(os.urandom(MIB))
    return files


def lengths(files: list[Path]) -> list[int]:
    return [file.stat().st_size for file in files]


def refuse(_size: int) -> None:
    raise OSError(errno.EIO, "the kernel refuses")


@pytest.mark.parametrize("kind", TARGETS)
def test_it_grows_with_its_files_and_shrinks_again(kind: str, tmp_path: Path) -> None:
    files = make(tmp_path)
    target = TARGETS[kind](files)
    with Disk(target) as disk:
        before = target.size
        was = lengths(files)
        disk.resize(before * 2)
        assert disk.size == target.size == target.layout.size == before * 2
        if isinstance(target, Mirror):
            assert target.wait_in_step(30)
        assert disk.pread(MIB // 4, before) == bytes(MIB // 4)
        content = os.urandom(before)
        disk.pwrite(content, before)
        assert disk.pread(before, before) == content
        disk.resize(before)
        assert lengths(files) == ([3 * MIB // 2, MIB] if kind == "slice" else was)
        with pytest.raises(OSError, match="reach past the end"):
            disk.pread(4096, before)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_kernel_that_refuses_leaves_all_as_it_was(kind: str, tmp_path: Path) -> None:
    files = make(tmp_path)
    target = TARGETS[kind](files)
    with Disk(target):
        was, size = lengths(files), target.size
        if isinstance(target, Mirror):
            assert target.wait_in_step(30)
        for other in (size * 2, size * 3 // 4):
            with pytest.raises(OSError, match="the kernel refuses"):
                target.resize(other, refuse)
            assert (lengths(files), target.size, target.layout.size) == (was, size, size)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_disk_that_was_resized_is_served_anew(kind: str, tmp_path: Path) -> None:
    target = TARGETS[kind](make(tmp_path))
    with Disk(target) as disk:
        size = target.size * 2
        disk.resize(size)
        if isinstance(target, Mirror):
            assert target.wait_in_step(30)
        disk.pwrite(b"end" * 1024 + bytes(1024), size - 4096)
    with Disk(target) as disk:
        assert target.size == size
        assert disk.pread(3072, size - 4096) == b"end" * 1024


def test_what_another_has_is_not_taken(tmp_path: Path) -> None:
    files = make(tmp_path)
    first = Slice(files[0], size=MIB // 2)
    second = Slice(files[0], offset=MIB // 2)
    with Disk(first), Disk(second):
        with pytest.raises(OSError, match="is in use: this process serves it already"):
            first.resize(MIB, refuse)
        assert first.size == MIB // 2
        second.resize(MIB, lambda _: None)
        assert lengths(files) == [3 * MIB // 2, MIB]


def test_a_new_part_is_kept_from_others_and_an_old_one_no_more(tmp_path: Path) -> None:
    (file, _) = make(tmp_path)
    other = os.open(file, os.O_RDWR)
    target = File(file)
    with Disk(target):
        target.resize(2 * MIB, lambda _: None)
        with pytest.raises(OSError, match="is in use"):
            keep(other, file, [(2 * MIB - 1, 2 * MIB)], read_only=False)
        target.resize(MIB // 2, lambda _: None)
        keep(other, file, [(MIB // 2, MIB)], read_only=False)
        let_go(other)
        with pytest.raises(OSError, match="is in use"):
            keep(other, file, [(0, MIB)], read_only=False)
    os.close(other)


def test_bytes_that_were_never_the_disks_are_not_cut_off(tmp_path: Path) -> None:
    (file, _) = make(tmp_path)
    content = file.read_bytes()
    target = Slice(file, size=MIB // 2)
    with Disk(target):
        target.resize(MIB // 4, lambda _: None)
    assert file.read_bytes() == content
    cut_off = Linear(file, size=MIB // 2)
    with Disk(cut_off):
        cut_off.resize(MIB // 4, lambda _: None)
    assert file.read_bytes() == content


def test_a_leg_that_is_longer_already_is_made_the_same(tmp_path: Path) -> None:
    files = make(tmp_path)
    with files[1].open("ab") as longer:
        longer.write(os.urandom(MIB))
    mirror = Mirror(*files)
    with Disk(mirror) as disk:
        assert mirror.wait_in_step(30)
        disk.resize(2 * MIB)
        assert disk.pread(MIB, MIB) == bytes(MIB)
        assert mirror.wait_in_step(30)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_mirror_is_resized_when_it_is_whole(tmp_path: Path) -> None:
    mirror = Mirror(*make(tmp_path))
    with Disk(mirror):
        assert mirror.wait_in_step(30)
        mirror.leg_failed(1, errno.EIO)
        with pytest.raises(ValueError, match=r"leg 1 \(.*b\) has failed, and a mirror with a"):
            mirror.resize(2 * MIB, refuse)


def test_writes_go_on_in_a_mirror_with_more_regions_than_counters(tmp_path: Path) -> None:
    """Regions share counters then: none of them is copied while another is written."""
    files = make(tmp_path)
    mirror = Mirror(*files)
    far = 1 << 40
    with Disk(mirror) as disk:
        assert mirror.wait_in_step(30)
        disk.resize(far)
        mirror.layout.block_writes(0)
        order: list[str] = []

        def unblock() -> None:
            order.append("unblocked")
            mirror.layout.block_writes(None)
            disk._queue.wake()

        timer = threading.Timer(0.2, unblock)
        timer.start()
        disk.pwrite(b"x" * 4096, 65536 * MIB)
        order.append("written")
        timer.join()
        assert order == ["unblocked", "written"]
        assert mirror.layout.is_drained(65536)
        disk.resize(MIB)


@pytest.mark.parametrize(
    ("make_target", "size", "said"),
    [
        (lambda files: Linear(*files), MIB, "b begins at 1048576; stop it, and serve it without"),
        (lambda files: Linear(*files, size=MIB // 2), 2 * MIB, "was cut off in .*a, and cannot"),
        (lambda files: Stripe(*files), 2 * MIB + 4096, "rows of 131072 bytes: to 2097152 or"),
        (lambda files: File(files[0], read_only=True), 2 * MIB, "enlarge it first"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    make_target: Callable[[list[Path]], MappedTarget], size: int, said: str, tmp_path: Path
) -> None:
    files = make(tmp_path)
    target = make_target(files)
    with Disk(target):
        with pytest.raises(ValueError, match=said):
            target.resize(size, refuse)
        assert lengths(files) == [MIB, MIB]


def test_memory_does_not_grow_beyond_what_it_began_with() -> None:
    ram = Ram(size=MIB)
    with Disk(ram), pytest.raises(ValueError, match="grows to at most the 1048576 bytes"):
        ram.resize(2 * MIB, refuse)
