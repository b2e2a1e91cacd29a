"""Power cuts, failures and kills at every moment of each command on overlays."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cut_files import Recorder

from pyublk import overlays
from pyublk.backing import Backing
from pyublk.targets.overlay import OverlayFile
from pyublk.testing import Disk

BLOCK = 4096
BLOCKS = 12


def filled(seed: int, blocks: int = BLOCKS) -> bytes:
    """Blocks of which some are zero."""
    chosen = random.Random(seed)
    return b"".join(
        bytes(BLOCK) if chosen.random() < 0.25 else chosen.randbytes(BLOCK) for _ in range(blocks)
    )


def content(file: Path) -> bytes:
    """What a disk of the overlay reads."""
    with Disk(OverlayFile(file, read_only=True)) as disk:
        return disk.pread(disk.size, 0)


def write(file: Path, seed: int, blocks: range) -> None:
    """Some blocks of the disk, then zeroes, then a part of a block."""
    with Disk(OverlayFile(file)) as disk:
        for block in blocks:
            disk.pwrite(random.Random(seed + block).randbytes(BLOCK), block * BLOCK)
        disk.write_zeroes((blocks[-1] + 1) * BLOCK, BLOCK)
        disk.pwrite(b"part".ljust(512), (blocks[-1] + 2) * BLOCK + 1024)
        disk.flush()


@dataclass(frozen=True)
class Command:
    """What is prepared in a directory, what is done there, and what must hold afterwards, however
    far that came; `before` is what the disk read before."""

    prepare: Callable[[Path], None]
    do: Callable[[Path], object]
    check: Callable[[Path, bytes], None]


def one(directory: Path) -> None:
    """top over base"""
    (directory / "base").write_bytes(filled(1))
    overlays.create(directory / "top", str(directory / "base"))
    write(directory / "top", 2, range(2, 5))


def larger(directory: Path) -> None:
    """top over base, and two blocks larger"""
    (directory / "base").write_bytes(filled(1))
    overlays.create(directory / "top", str(directory / "base"), size=(BLOCKS + 2) * BLOCK)
    write(directory / "top", 2, range(7, 11))


def two(directory: Path) -> None:
    """top over base, and another base"""
    one(directory)
    (directory / "other").write_bytes(filled(1, 5) + filled(3, 6))


def three(directory: Path) -> None:
    """top over middle over base"""
    (directory / "base").write_bytes(filled(1))
    overlays.create(directory / "middle", str(directory / "base"))
    write(directory / "middle", 2, range(2, 5))
    overlays.create(directory / "top", f"overlay:{directory / 'middle'}")
    write(directory / "top", 4, range(4, 7))


def base_only(directory: Path) -> None:
    (directory / "base").write_bytes(filled(1))


def check_created(directory: Path, _before: bytes) -> None:
    if not ((directory / "top").exists() and (directory / "top.map").exists()):
        overlays.create(directory / "top", str(directory / "base"))
    assert content(directory / "top") == (directory / "base").read_bytes() == filled(1)


def check_committed(directory: Path, before: bytes) -> None:
    top = directory / "top"
    try:
        assert content(top) == before
    except ValueError as error:
        assert "run `pyublk overlay commit" in str(error)  # noqa: PT017
    overlays.commit(top)
    assert content(top) == before
    assert overlays.info(top).present == 0
    assert overlays.info(top).allocated < 64 << 10
    assert (directory / "base").read_bytes() == before


def check_same(directory: Path, before: bytes) -> None:
    assert content(directory / "top") == before
    assert overlays.info(directory / "top").state == "unchanged"


def check_image(directory: Path, before: bytes) -> None:
    image = directory / "image"
    if image.exists():
        assert image.read_bytes() == before
    check_same(directory, before)


COMMANDS = {
    "create": Command(
        base_only, lambda d: overlays.create(d / "top", str(d / "base")), check_created
    ),
    "commit": Command(one, lambda d: overlays.commit(d / "top"), check_committed),
    "commit larger": Command(larger, lambda d: overlays.commit(d / "top"), check_committed),
    "rebase": Command(two, lambda d: overlays.rebase(d / "top", str(d / "other")), check_same),
    "squash": Command(three, lambda d: overlays.squash(d / "top"), check_same),
    "extract": Command(one, lambda d: overlays.extract(d / "top", d / "image"), check_image),
}


def prepared(directory: Path, command: Command) -> bytes:
    directory.mkdir()
    command.prepare(directory)
    return content(directory / "top") if (directory / "top").exists() else b""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_power_cut_at_any_moment(tmp_path: Path, name: str) -> None:
    command, directory = COMMANDS[name], tmp_path / "d"
    before = prepared(directory, command)
    recorder = Recorder(directory)
    with recorder.recording():
        command.do(directory)
    recorder.close()
    assert len(recorder.states) >= 2
    for state in recorder.states:
        state.restore(directory)
        try:
            command.check(directory, before)
        except Exception as error:
            error.add_note(f"after a power cut at event {state.event}")
            raise


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "commit larger"])
def test_ctrl_c_and_a_full_disk_at_any_moment(tmp_path: Path, name: str) -> None:
    command, directory, kept = COMMANDS[name], tmp_path / "d", tmp_path / "kept"
    before = prepared(directory, command)
    directory.rename(kept)
    at = 0
    while True:
        at += 1
        failure: BaseException = KeyboardInterrupt()
        if at % 2:
            failure = OSError(errno.ENOSPC, "disk full")
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(kept, directory)  # with the files' times
        recorder = Recorder(directory, subsets=0)
        recorder.failure = at, failure
        raised: BaseException | None = None
        try:
            with recorder.recording():
                command.do(directory)
        except (KeyboardInterrupt, OSError) as error:
            raised = error
        recorder.close()
        if raised is None:
            break
        assert type(raised) is type(failure)
        assert getattr(raised, "errno", None) == getattr(failure, "errno", None)
        left = {file.name for file in directory.iterdir()} - {file.name for file in kept.iterdir()}
        assert left in (set(), {"top", "top.map"}, {"image"}), recorder.events[-1]
        try:
            command.check(directory, before)
        except Exception as error:
            error.add_note(f"after {failure!r} at {recorder.events[-1]}")
            raise
    assert at > 5


def until_free(*files: Path) -> None:
    """A ring of a killed process keeps its files for a moment, and their locks."""
    deadline = time.monotonic() + 10
    for file in files:
        while True:
            backing = Backing.open(file)
            try:
                backing.keep([(0, 1)], read_only=False)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            finally:
                backing.close()


def test_a_commit_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """kill -9 at random moments, of a process that commits; whoever serves the disk next, and the
    next commit, find everything."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(filled(1, 1024))
    overlays.create(top, str(base))
    moments = random.Random(1)
    kills = 0
    for turn in range(3):
        write(top, turn, range(0, 1000, 7))
        before = content(top)
        for _ in range(4):
            if (child := os.fork()) == 0:
                try:
                    overlays.commit(top)
                finally:
                    os._exit(0)
            time.sleep(moments.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            until_free(base, top)
        check_committed(tmp_path, before)
    assert kills
