"""Power cuts on real disks: our own targets keep what they promise, and so do the samples.

Run as a program, it tries more states of our targets: `--limit 1000`. With `--record FILE` the
disk is recorded in a virtual machine, and its states are tried anywhere, which is much quicker.
"""

import argparse
import os
import runpy
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from blocks import Blocks
from needs import Module, Program, needs
from servers import until

import pyublk
from pyublk.targets import File, IntegrityFile, Linear, Mirror, Slice, Stripe, Zoned
from pyublk.testing import CheckFailed, Crash, Disk, PowerCut, PowerCutFailed, ZonedPowerCut
from pyublk.testing.file_systems import run
from pyublk.uapi import Feature

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCK = 512
#: Bytes of each part of the disk; each file of a target is one part.
PART = 128 << 10

Make = Callable[..., pyublk.Target]


def mirror(*files: Path) -> Mirror:
    return Mirror(*files, state=files[0].with_name(f"{files[0].name}-{os.getpid()}.mirror"))


#: How each is made of its files, and how many it has.
TARGETS: dict[str, tuple[Make, int]] = {
    "file": (File, 1),
    "direct": (lambda file: File(file, direct=True), 1),
    "linear": (Linear, 2),
    "stripe": (lambda *files: Stripe(*files, chunk=4096), 2),
    "mirror": (mirror, 2),
    "integrity": (IntegrityFile, 2),
    "slice": (lambda file: Slice(file, offset=8192), 1),
}


@dataclass
class Promises:
    """What a disk may have in each block, by what was answered; one request at a time."""

    steps: list[tuple[str, int, bytes]] = field(default_factory=list)

    def allowed(self, answered: int) -> dict[int, set[bytes]]:
        """By block: after the first so many answers; the next request may have been begun."""
        stable: dict[int, bytes] = {}
        newer: dict[int, set[bytes]] = {}
        for number, (what, first, data) in enumerate(self.steps[: answered + 1]):
            for index in range(len(data) // BLOCK):
                piece = data[index * BLOCK : (index + 1) * BLOCK]
                newer.setdefault(first + index, set()).add(piece)
                if what == "fua" and number < answered:
                    stable[first + index] = piece
                    newer[first + index] = set()
            if what == "flush" and number < answered:
                stable = self.written(number)
                newer = {}
        return {
            block: newer.get(block, set()) | {stable.get(block, bytes(BLOCK))}
            for block in {*stable, *newer}
        }

    def written(self, count: int) -> dict[int, bytes]:
        found = {}
        for _, first, data in self.steps[:count]:
            for index in range(len(data) // BLOCK):
                found[first + index] = data[index * BLOCK : (index + 1) * BLOCK]
        return found


def planned() -> Promises:
    """Writes, FUA writes and flushes, and so what each target promises."""
    plan = [
        *(("write", 0, 3), ("write", 100, 2), ("flush", 0, 0), ("write", 1, 1), ("fua", 40, 2)),
        *(("write", 41, 9), ("write", 7, 3), ("flush", 0, 0), ("fua", 0, 4), ("write", 100, 1)),
    ]
    return Promises(
        [
            (what, first, bytes([number]) * (count * BLOCK))
            for number, (what, first, count) in enumerate(plan, start=1)
        ]
    )


def use(disk: Disk, name: str, cut: PowerCut) -> None:
    """Does what is planned, with a mark after each answer."""
    for number, (what, first, data) in enumerate(planned().steps, start=1):
        if what == "flush":
            disk.flush()
        else:
            disk.pwrite(data, first * BLOCK, fua=what == "fua")
        cut.mark(f"{name} {number}")


@contextmanager
def parts_of(path: str, count: int) -> Iterator[list[Path]]:
    """Partitions of a disk, without a table on it."""
    for number in range(1, count + 1):
        start = (number - 1) * PART // 512
        run(["addpart", path, number, start, PART // 512])
    try:
        yield [Path(f"{path}p{number}") for number in range(1, count + 1)]
    finally:
        for number in range(1, count + 1):
            until(partial(deleted, path, number), what=f"partition {number} can be deleted")


def deleted(path: str, number: int) -> bool:
    """A ring that has just been closed may have the partition open for a moment yet."""
    return subprocess.run(["delpart", path, str(number)], check=False).returncode == 0


def places_of(targets: dict[str, tuple[Make, int]]) -> dict[str, range]:
    """The parts of the disk that are each target's files."""
    places, at = {}, 0
    for name, (_, files) in targets.items():
        places[name] = range(at, at + files)
        at += files
    return places


def record(targets: dict[str, tuple[Make, int]]) -> PowerCut:
    """A disk on whose parts each target was used."""
    count = sum(files for _, files in targets.values())
    cut = PowerCut(count * PART)
    with (
        pyublk.Device(cut) as device,
        parts_of(device.path, count) as parts,
        tempfile.TemporaryDirectory() as directory,
        cut.record(),
    ):
        for name, place in places_of(targets).items():
            links = [Path(directory, f"{name}{part}") for part in place]
            for link, part in zip(links, place, strict=True):
                link.symlink_to(parts[part])
            with Disk(targets[name][0](*links)) as disk:
                use(disk, name, cut)
    return cut


def keep_their_promises(crash: Crash, targets: dict[str, tuple[Make, int]]) -> None:
    promises = planned()
    with crash.disk() as whole, tempfile.TemporaryDirectory() as directory:
        for name, place in places_of(targets).items():
            answered = sum(mark.startswith(f"{name} ") for mark in crash.marks)
            files = [Path(directory, f"{name}{part}") for part in place]
            for file, part in zip(files, place, strict=True):
                file.write_bytes(whole.pread(PART, part * PART))
            with Disk(targets[name][0](*files)) as disk:  # whose blocks may be larger than those
                data = disk.pread(disk.size, 0)
            for block, allowed in promises.allowed(answered).items():
                found = data[block * BLOCK : (block + 1) * BLOCK]
                assert found in allowed, (
                    f"{name}: block {block} is {found[0]} after {answered} answers, not "
                    f"{sorted(one[0] for one in allowed)}"
                )


def own_targets(targets: dict[str, tuple[Make, int]], limit: int, kept: Path | None = None) -> int:
    """Tries that many states of them, and returns how many there were. `kept`: the file of the
    record, if it is to be saved, or was. Raises PowerCutFailed for a target that breaks a promise.
    """
    if kept is not None and kept.exists():
        cut = PowerCut.load(kept)
    else:
        cut = record(targets)
        if kept is not None:
            cut.save(kept)
    return cut.check(lambda crash: keep_their_promises(crash, targets), limit=limit)


def test_our_targets_keep_what_they_promise() -> None:
    assert own_targets(TARGETS, limit=20) == 20


class ForgetsToFlush(pyublk.Layer):
    """Planted: it answers a flush, and does nothing."""

    def flush(self) -> None:
        pass


def test_a_target_that_does_not_is_caught() -> None:
    planted = {"planted": (lambda file: ForgetsToFlush(File(file, direct=True)), 1)}
    with pytest.raises(PowerCutFailed, match="planted: block 101 is 0 after 3 answers"):
        own_targets(planted, limit=100)


# ---- zoned disks ----

ZONE = 4 << 20


def test_a_zoned_disk() -> None:
    """The kernel's flushes and FUA writes are those of the record, and it takes what is left."""
    needs(Feature.ZONED)
    cut = ZonedPowerCut(Zoned(size=8 * ZONE, zone_size=ZONE))
    with pyublk.Device(cut) as device, Blocks(device.path) as client, cut.record():
        for zone, letter in ((1, b"a"), (2, b"b")):
            client.write(letter * 8192, zone * ZONE)
        client.sync()
        cut.mark("synced")
        client.write(b"c" * 8192, ZONE + 8192)
        client.write(b"f" * 4096, 2 * ZONE + 8192, os.RWF_DSYNC)
        cut.mark("forced")

    def check(crash: Crash) -> None:
        with crash.disk() as disk:
            zones = disk.report_zones()
            first = disk.pread(16384, ZONE)
        written = zones[1].pointer - ZONE
        assert first == (b"a" * 8192 + b"c" * 8192)[:written].ljust(16384, b"\0")
        assert written >= 8192 * crash.reached("synced")
        (least,) = crash.allowed({"synced": [8192], "forced": [12288]}, before=[0])
        assert zones[2].pointer - 2 * ZONE >= least

    assert cut.check(check, limit=200) > 50
    with pyublk.Device(cut.cut().target()) as device, Blocks(device.path) as client:
        assert client.read(12288, 2 * ZONE) == b"b" * 8192 + b"f" * 4096
        client.write(b"n" * 4096, 2 * ZONE + 12288)
        with pytest.raises(OSError, match="Input/output error"):
            client.write(b"n" * 4096, 2 * ZONE)


def test_btrfs_on_a_zoned_disk() -> None:
    needs(Feature.ZONED, Program("mkfs.btrfs"), Module("btrfs"))
    cut = ZonedPowerCut(Zoned(size=64 * ZONE, zone_size=ZONE))
    contents = [os.urandom(40_000) for _ in range(2)]
    with pyublk.Device(cut) as device, tempfile.TemporaryDirectory() as place:
        run(["mkfs.btrfs", "-q", "-O", "zoned", "-d", "single", "-m", "single", device.path])
        run(["mount", "-t", "btrfs", device.path, place])
        try:
            with cut.record():
                for number, data in enumerate(contents):
                    write_durably(Path(place, f"file{number}"), data)
                    cut.mark(f"written {number}")
        finally:
            run(["umount", place])

    def check(crash: Crash) -> None:
        with crash.mounted("btrfs") as mounted:
            for number, data in enumerate(contents):
                if crash.reached(f"written {number}"):
                    assert (mounted / f"file{number}").read_bytes() == data

    assert cut.check(check, limit=3) == 3


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# ---- file systems that are broken ----


def a_crash(folder: Path, *, broken: bool) -> Crash:
    """An ext4 as it was made, or with a wrong count that only e2fsck looks at."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    run(["mkfs.ext4", "-q", "-F", "-J", "size=1", "-b", "1024", image])
    if broken:
        run(["debugfs", "-w", "-R", "set_inode_field <11> links_count 7", image])
    cut = PowerCut(File(image))
    with Disk(cut):
        return cut.cut()


def test_a_broken_file_system_is_told_whatever_else_fails(tmp_path: Path) -> None:
    crash = a_crash(tmp_path, broken=True)
    with pytest.raises(CheckFailed, match="e2fsck -f -n"), crash.mounted():
        pass
    both = r"e2fsck -f -n[\s\S]*on this file system, the check failed: KeyError: 'lost'"
    with pytest.raises(CheckFailed, match=both), crash.mounted():
        raise KeyError("lost")


def test_what_fails_on_a_sound_file_system_is_told_as_it_is(tmp_path: Path) -> None:
    crash = a_crash(tmp_path, broken=False)
    with pytest.raises(KeyError, match="lost"), crash.mounted():
        raise KeyError("lost")
    with ExitStack() as kept:
        with pytest.raises(KeyError, match="busy"), crash.mounted() as place:
            raise KeyError("busy", kept.enter_context((place / "kept").open("w")))
        assert not place.exists()


# ---- the examples ----


def load(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def deduplicated(make: Callable[..., pyublk.Target], limit: int) -> int:
    """The example's store in a directory of an ext4, which is cut."""
    size, block = 64 << 10, 4096
    flushed: list[list[int]] = []
    cut = PowerCut(8 << 20, atomic=4096)
    with pyublk.Device(cut) as device, tempfile.TemporaryDirectory() as place:
        run(["mkfs.ext4", "-q", "-J", "size=1", "-b", "1024", device.path])
        run(["mount", "-t", "ext4", device.path, place])
        try:
            with cut.record(), Disk(make(Path(place, "store"), size=size)) as disk:
                now = [0] * (size // block)
                for step in range(1, 25):
                    number, letter = step * 7 % len(now), step % 5 + 1
                    disk.pwrite(bytes([letter]) * block, number * block)
                    now[number] = letter
                    if step % 6 == 0:
                        disk.flush()
                        flushed.append(now.copy())
                        cut.mark(str(step))
        finally:
            run(["umount", place])

    def check(crash: Crash) -> None:
        if not crash.marks:
            return
        done = len(crash.marks)
        allowed = [flushed[done - 1], *flushed[done : done + 1]]
        with crash.extracted() as files, Disk(make(files / "store", size=size)) as disk:
            data = disk.pread(size, 0)
        assert data == b"".join(bytes([byte]) * block for byte in data[::block]), "torn"
        assert list(data[::block]) in allowed

    return cut.check(check, limit=limit)


def test_deduplicated() -> None:
    assert deduplicated(load("deduplicated").Deduplicated, limit=20) == 20


def test_a_store_whose_index_is_committed_too_early_is_caught() -> None:
    class Early(load("deduplicated").Deduplicated):  # type: ignore[misc]
        def flush(self) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fdatasync", lambda file: None)
                super().flush()

    with pytest.raises(PowerCutFailed, match="the check fails"):
        deduplicated(Early, limit=60)


def test_sqlite() -> None:
    sample = load("sqlite_power_cuts")
    assert sample.run("delete", "EXTRA", 3) == 3
    assert "AssertionError: told 1, but found []" in sample.run("delete", "OFF", 3)


def test_ext4() -> None:
    sample = load("file_system_power_cuts")
    assert sample.run("ext4", sample.save, 2) is None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--record", type=Path, help="a file: saved there, or taken from there")
    chosen = parser.parse_args()
    print(own_targets(TARGETS, chosen.limit, chosen.record), "states, and no promise broken")
