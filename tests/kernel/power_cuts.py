"""Power cuts on real disks: our own targets keep what they promise, and so do the samples.

Run as a program, it tries more states of our targets: `--limit 1000`.
"""

import argparse
import os
import runpy
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import until

import pyublk
from pyublk.targets import File, Linear, Mirror, Stripe
from pyublk.testing import Crash, Disk, PowerCut, PowerCutFailed
from pyublk.testing.file_systems import run

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


def use(disk: Disk, name: str, cut: PowerCut) -> Promises:
    """Writes, FUA writes and flushes; a mark after each answer."""
    promises = Promises()
    plan = [
        *(("write", 0, 3), ("write", 100, 2), ("flush", 0, 0), ("write", 1, 1), ("fua", 40, 2)),
        *(("write", 41, 9), ("write", 7, 3), ("flush", 0, 0), ("fua", 0, 4), ("write", 100, 1)),
    ]
    for number, (what, first, count) in enumerate(plan, start=1):
        data = bytes([number]) * (count * BLOCK)
        promises.steps.append((what, first, data))
        if what == "flush":
            disk.flush()
        else:
            disk.pwrite(data, first * BLOCK, fua=what == "fua")
        cut.mark(f"{name} {number}")
    return promises


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


def own_targets(targets: dict[str, tuple[Make, int]], limit: int) -> int:
    """Each target on parts of one disk, which is cut; returns the number of states that were
    tried. Raises PowerCutFailed for a target that breaks a promise."""
    count = sum(files for _, files in targets.values())
    cut = PowerCut(count * PART)
    promises: dict[str, Promises] = {}
    places: dict[str, range] = {}
    with (
        pyublk.Device(cut) as device,
        parts_of(device.path, count) as parts,
        tempfile.TemporaryDirectory() as directory,
        cut.record(),
    ):
        at = 0
        for name, (make, files) in targets.items():
            places[name] = range(at, at + files)
            links = [Path(directory, f"{name}{part}") for part in places[name]]
            for link, part in zip(links, places[name], strict=True):
                link.symlink_to(parts[part])
            with Disk(make(*links)) as disk:
                promises[name] = use(disk, name, cut)
            at += files

    def check(crash: Crash) -> None:
        with crash.disk() as whole, tempfile.TemporaryDirectory() as directory:
            for name, (make, _) in targets.items():
                answered = sum(mark.startswith(f"{name} ") for mark in crash.marks)
                files = [Path(directory, f"{name}{part}") for part in places[name]]
                for file, part in zip(files, places[name], strict=True):
                    file.write_bytes(whole.pread(PART, part * PART))
                with Disk(make(*files)) as disk:
                    for block, allowed in promises[name].allowed(answered).items():
                        found = disk.pread(BLOCK, block * BLOCK)
                        assert found in allowed, (
                            f"{name}: block {block} is {found[0]} after {answered} answers, not "
                            f"{sorted(one[0] for one in allowed)}"
                        )

    return cut.check(check, limit=limit)


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


def load(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


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
    print(own_targets(TARGETS, parser.parse_args().limit), "states, and no promise broken")
