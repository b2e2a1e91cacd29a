"""A file's bytes belong to one disk: in this process, and beside other processes."""

import errno
import fcntl
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyublk import MappedTarget, Target, keeping
from pyublk.targets import File, Linear, Mirror, Slice, Stripe
from pyublk.testing import Disk

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return path


def other_name(image: Path, kind: str) -> Path:
    if kind == "the same":
        return image
    if kind == "of a descriptor":
        return Path(f"/proc/self/fd/{os.open(image, os.O_RDONLY)}")
    other = image.with_name(kind)
    if kind == "hard link":
        os.link(image, other)
    else:
        other.symlink_to(image.name)
    return other


NAMES = pytest.mark.parametrize("name", ["the same", "hard link", "symbolic link"])


def serve(*disks: Target) -> None:
    with ExitStack() as stack:
        for disk in disks:
            stack.enter_context(Disk(disk))


def refused(*disks: Target) -> str:
    with pytest.raises(OSError, match="is in use: ") as error:
        serve(*disks)
    assert error.value.errno == errno.EBUSY
    return str(error.value.strerror)


# ---- in this process ----


@NAMES
@pytest.mark.parametrize("read_only", [False, True])
def test_two_disks(image: Path, name: str, read_only: bool) -> None:
    other = other_name(image, name)
    told = refused(File(image), File(other, read_only=read_only))
    assert told.endswith("is in use: this process serves it already")
    assert str(other) in told
    assert str(image) in told
    refused(File(image, read_only=True), File(other))
    serve(File(image, read_only=True), File(other, read_only=True))
    serve(File(other))  # nothing was left by what was refused


def test_the_name_of_a_descriptor(image: Path) -> None:
    other = other_name(image, "of a descriptor")
    try:
        refused(File(image), File(other))
    finally:
        os.close(int(other.name))


@NAMES
@pytest.mark.parametrize("kind", [Mirror, Stripe, Linear])
def test_two_parts_of_a_disk(
    image: Path, name: str, kind: Callable[..., MappedTarget], tmp_path: Path
) -> None:
    other = other_name(image, name)
    between = tmp_path / "between"
    between.write_bytes(bytes(MIB))
    with pytest.raises(ValueError, match="no byte of it can be in two places of a disk") as error:
        serve(kind(image, between, other))
    assert str(other) in str(error.value)
    assert not list(tmp_path.glob("*.mirror"))
    serve(File(image), File(between))


def test_slices(image: Path) -> None:
    serve(*(Slice(image, offset=start, size=65536) for start in (0, 65536, 131072)))
    refused(Slice(image, size=65536), Slice(image, offset=65024, size=65536))
    refused(Slice(image, offset=65536), File(image))
    refused(File(image, size=MIB // 2), Slice(image, offset=MIB // 2 - 512))
    serve(File(image, size=MIB // 2), Slice(image, offset=MIB // 2))


def test_stripes_and_mirrors_have_only_what_they_serve(image: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.write_bytes(bytes(MIB // 2))
    for first in (Stripe(image, second, chunk=4096), Mirror(image, second)):
        serve(first, Slice(image, offset=MIB // 2))
        refused(first, Slice(image, offset=MIB // 2 - 512))


def test_extents(image: Path) -> None:
    class Aliased(MappedTarget):
        def extents(self) -> Iterable[tuple[int, int, int]]:
            return [(0, 4096, 8192), (0, 0, 8192)]

    with pytest.raises(ValueError, match=r"extents at 0 and at 4096 in .* overlap"):
        serve(Aliased([image]))
    serve(Aliased([image], read_only=True))


def test_extents_too_many_to_be_kept_one_by_one(image: Path) -> None:
    class Scattered(MappedTarget):
        def extents(self) -> Iterable[tuple[int, int, int]]:
            return [(0, start, 512) for start in range(0, 128 * 1024, 1024)]

    serve(Scattered([image]), Slice(image, offset=128 * 1024))
    refused(Scattered([image]), Slice(image, offset=512, size=512))


def test_what_is_refused_is_left_as_it_is(image: Path, tmp_path: Path) -> None:
    refused(File(image), File(image, size=2 * MIB))
    assert image.stat().st_size == MIB
    with pytest.raises(ValueError, match="positive multiple of its block size"):
        serve(File(image, size=2 * MIB + 1))
    assert image.stat().st_size == MIB
    with pytest.raises(ValueError, match="is named twice"):
        serve(Linear(image, image))
    serve(File(image, size=2 * MIB))
    assert image.stat().st_size == 2 * MIB


def test_a_leg_comes_from_no_other_disk(image: Path, tmp_path: Path) -> None:
    legs = [tmp_path / name for name in "ab"]
    for leg in legs:
        leg.write_bytes(bytes(MIB))
    mirror = Mirror(*legs)
    with Disk(mirror), Disk(File(image)) as other:
        assert mirror.wait_in_step(10)
        mirror.leg_failed(1, errno.EIO)
        for taken in (image, legs[0]):
            with pytest.raises(OSError, match="is in use: this process serves it already"):
                mirror.replace(1, taken)
        other.close()
        mirror.replace(1, image)
        assert mirror.wait_in_step(10)
        refused(File(image))
        serve(File(legs[1]))  # which it does not have any more
        mirror.leg_failed(1, errno.EIO)
        mirror.replace(1, image)  # the same again, by its name
        assert mirror.wait_in_step(10)
        refused(File(image))
    serve(*map(File, legs), File(image))


# ---- other processes ----


@contextmanager
def program(text: str, **options: object) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has said that it is ready, until the block ends."""
    whole = f"{text}\nprint('ready', flush=True)\nimport time\ntime.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", whole],
        stdout=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def opened(path: Path, more: str = "") -> str:
    return f"from pyublk.targets import *\ntarget = Slice({str(path)!r}{more})\ntarget.open()"


@pytest.mark.parametrize("read_only", [False, True])
def test_another_process(image: Path, read_only: bool) -> None:
    with program(opened(image, ", offset=65536, read_only=True")) as process:
        comm = Path(f"/proc/{process.pid}/comm").read_text().strip()
        told = refused(File(image))
        assert told == f"{image} is in use: {comm} (process {process.pid}) has locked it"
        serve(File(image, read_only=True), Slice(image, offset=MIB // 2, read_only=True))
        serve(Slice(image, size=65536))
    with program(opened(image)):
        refused(File(image, read_only=read_only))
    serve(File(image))


def test_programs_that_lock_by_themselves(image: Path) -> None:
    """QEMU, for one, locks bytes from 100 on for reading."""
    with open(image, "r+b") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        refused(File(image))
        serve(File(image, read_only=True))


def test_a_child_that_inherited_the_file_does_not_keep_it(image: Path) -> None:
    target = File(image)
    with Disk(target):
        descriptor = target.backing[0].fd
        child = program("", pass_fds=[descriptor])
        child.__enter__()
    try:
        serve(File(image))
    finally:
        child.__exit__(None, None, None)


def test_a_request_that_is_not_over_keeps_the_file(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = File(image)
    monkeypatch.setattr(target, "written_late", lambda _file: True)
    with Disk(target):
        late = os.dup(target.backing[0].fd)
    try:
        assert "a request to it that was given up is not over yet" in refused(File(image))
    finally:
        os.close(late)
    until = time.monotonic() + 20  # the queue's ring, which had it as well, goes in its own time
    while True:
        try:
            serve(File(image))
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_file_systems_without_locks(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(keeping, "_set_lock", unlockable)
    with caplog.at_level(logging.WARNING):
        refused(File(image), File(image))
    assert caplog.messages == [
        f"{image} cannot be locked (No locks available): other processes can use it at the "
        "same time"
    ]
