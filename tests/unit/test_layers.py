"""Layers: targets over targets of every kind, on disks without a kernel."""

import asyncio
import dataclasses
import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk.targets import File, Linear, Mirror, Null, Ram, Stripe, Zoned
from pyublk.testing import Disk, Shadow

SIZE = 1 << 20


class Memory(pyublk.Target):
    def __init__(self, **options: Any) -> None:
        super().__init__(size=SIZE, **options)
        self.data = bytearray(SIZE)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


class Slow(Memory):
    """With coroutines."""

    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().read(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        super().write(offset, data)


class Turned(pyublk.MappedTarget):
    """The two halves of a file, the last one first; says so for each request."""

    def map(self, op: int, offset: int, length: int) -> object:  # type: ignore[override]
        half = SIZE // 2
        first = min(length, half - offset % half)
        parts = [(0, (offset + half) % SIZE, first)]
        if first < length:
            parts.append((0, (offset + first + half) % SIZE, length - first))
        return parts


def files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"file{number}" for number in range(count)]
    for path in paths:
        path.write_bytes(bytes(SIZE // count))
    return paths


def legs(folder: Path) -> list[Path]:
    paths = [folder / "one", folder / "two"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    return paths


TARGETS: dict[str, Callable[[Path], pyublk.Target]] = {
    "plain": lambda _: Memory(block_size=1024, physical_block_size=4096, io_opt=65536),
    "async": lambda _: Slow(rotational=True),
    "ram": lambda _: Ram(size=SIZE),
    "file": lambda folder: File(folder / "file", size=SIZE),
    "direct": lambda folder: File(folder / "file", size=SIZE, direct=True),
    "linear": lambda folder: Linear(*files(folder, 4)),
    "stripe": lambda folder: Stripe(*files(folder, 4), chunk=4096),
    "mirror": lambda folder: Mirror(*legs(folder)),
    "map": lambda folder: Turned([folder / "file"], size=SIZE),
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> pyublk.Target:
    try:
        return TARGETS[request.param](tmp_path)
    except OSError as error:  # no direct I/O on this file system
        pytest.skip(str(error))


def test_a_layer_that_does_nothing_is_the_disk_below(target: pyublk.Target) -> None:
    with Disk(target) as disk:
        plain = disk.params
        disk.pwrite(b"before" * 1024, 4096)
    layer = pyublk.Layer(pyublk.Layer(target))
    with Disk(layer, max_io_size=65536, depth=4) as disk:
        again = dataclasses.replace(plain.basic, max_io_size=65536)
        assert disk.params == dataclasses.replace(plain, basic=again)
        assert disk.pread(6144, 4096) == b"before" * 1024
        shadow = Shadow(disk)
        shadow.write_zeroes(0, SIZE)
        shadow.write(1024, b"unaligned?" * 1024)
        shadow.write(SIZE // 2 - 4096, bytes(range(256)) * 512, fua=True)
        shadow.write_zeroes(8192, 20480, unmap=False)
        if disk.params.discard is not None and disk.params.discard.max_discard_size:
            shadow.discard(65536, 65536)
        disk.flush()
        shadow.check()
    with Disk(target) as disk:  # it is all there
        shadow.disk = disk
        shadow.check()


def test_a_layer_says_what_is_said_below(target: pyublk.Target) -> None:
    layer = pyublk.Layer(target)
    with Disk(layer):
        below, said = target.profile(), layer.profile()
        methods = (pyublk.DataPath.COPY, pyublk.DataPath.USER_COPY, pyublk.DataPath.GET_DATA)
        assert said.kind == ("async" if below.kind == "async" else "sync")
        assert said.paths
        assert set(said.paths) <= set(methods) & set(below.paths)
        assert said.dma_alignment is None
        assert layer.size == target.size
        same = dataclasses.replace(
            said,
            kind=below.kind,
            paths=below.paths,
            dma_alignment=below.dma_alignment,
            recoverable=below.recoverable,
        )
        assert not said.recoverable
        assert same == below


def test_whatever_a_target_may_say_passes_through(target: pyublk.Target) -> None:
    layer = pyublk.Layer(target)
    own = {"announces", "close", "dispatch", "open", "profile", "recoverable"}
    with Disk(layer):
        for name in {*vars(pyublk.Target), *vars(target)} - own:
            if not name.startswith("_") and name != "status_changed":
                assert getattr(layer, name) == getattr(target, name), name


class Counting(pyublk.Layer):
    """Counts, and takes discards whether or not they are taken below."""

    def __init__(self, below: pyublk.Target) -> None:
        super().__init__(below)
        self.calls: list[str] = []

    def read(self, offset: int, buffer: memoryview) -> None:
        self.calls.append("read")
        self.below.read(offset, buffer)

    def discard(self, offset: int, length: int) -> None:
        self.calls.append("discard")


@pytest.mark.parametrize("kind", ["plain", "ram", "file", "map"])
def test_a_layer_does_what_it_defines(kind: str, tmp_path: Path) -> None:
    layer = Counting(TARGETS[kind](tmp_path))
    with Disk(layer) as disk:
        disk.pwrite(b"kept" * 1024, 0)
        disk.discard(0, 4096)
        assert disk.pread(4096, 0) == b"kept" * 1024
        assert layer.calls == ["discard", "read"]
        assert "discard" in layer.profile().operations


def test_what_is_written_does_not_go_past_a_layer(tmp_path: Path) -> None:
    class Changed(pyublk.Layer):
        def write(self, offset: int, data: memoryview) -> None:
            self.below.write(offset, memoryview(bytes(one ^ 1 for one in data)))

    class Durable(Changed):
        def write_fua(self, offset: int, data: memoryview) -> None:
            self.below.write_fua(offset, memoryview(bytes(one ^ 2 for one in data)))

    target = File(tmp_path / "file", size=SIZE)
    assert "write_fua" in pyublk.Layer(target).below.methods
    with Disk(Changed(target)) as disk:
        disk.pwrite(b"\0" * 512, 0, fua=True)
        disk.write_zeroes(512, 512)
        assert disk.pread(1024, 0) == b"\1" * 1024
        assert disk.target.profile().operations == {"read", "write", "flush", "discard"}
    with Disk(Durable(target)) as disk:
        disk.pwrite(b"\0" * 512, 0, fua=True)
        assert disk.pread(512, 0) == b"\2" * 512


def test_a_layer_changes_the_profile() -> None:
    class Half(pyublk.Layer):
        def profile(self) -> pyublk.Profile:
            below = super().profile()
            return dataclasses.replace(below, size=below.size // 2, read_only=True)

    with Disk(Half(Memory())) as disk:
        assert disk.size == SIZE // 2
        assert disk.params.basic.read_only


def test_what_takes_every_request_by_handle_does_so_below_a_layer() -> None:
    zone = 64 * 1024
    layer = pyublk.Layer(Zoned(size=4 * zone, zone_size=zone))
    with Disk(layer) as disk:
        assert layer.profile().zones is not None
        assert layer.profile().needs is pyublk.uapi.Feature.ZONED
        assert disk.zone_append(b"z" * 4096, 2 * zone) == 2 * zone
        assert disk.report_zones()[2].pointer == 2 * zone + 4096


def test_a_layer_that_takes_every_request_itself() -> None:
    class Upside(pyublk.Layer):
        """Every block is where it is not expected."""

        def handle(self, io: pyublk.IO) -> None:
            offset = SIZE - io.offset - io.length
            if io.op == pyublk.uapi.Op.READ:
                self.below.read(offset, io.buffer)
            else:
                self.below.write(offset, io.buffer)

    target = Ram(size=SIZE)
    with Disk(Upside(target)) as disk:
        disk.pwrite(b"last" * 128, 0)
    with Disk(target) as disk:
        assert disk.pread(512, SIZE - 512) == b"last" * 128


def test_a_target_takes_no_more_below_than_on_a_disk() -> None:
    layer = pyublk.Layer(Memory())
    with pytest.raises(AttributeError, match="Memory takes no 'flush': it takes read, write"):
        layer.below.flush()
    assert not hasattr(layer, "flush")
    assert not hasattr(pyublk.Layer(Null(size=SIZE)), "write_fua")
    with pytest.raises(pyublk.InvalidTarget, match="has no read method"):
        pyublk.Layer(pyublk.Target(size=SIZE))


def test_the_status_comes_through() -> None:
    class Telling(Memory):
        def status(self) -> dict[str, Any]:
            return {"mood": "good"}

    target = Telling()
    layer = pyublk.Layer(pyublk.Layer(target))
    assert layer.status() == {"mood": "good"}


@pytest.mark.parametrize("kind", ["ram", "file", "stripe", "map"])
def test_workers_call_below_at_once(kind: str, tmp_path: Path) -> None:
    layer = pyublk.Layer(TARGETS[kind](tmp_path))
    with Disk(layer, workers=4, max_io_size=8192) as disk:
        data = bytes(range(256)) * (SIZE // 256)
        disk.pwrite(data, 0)
        assert disk.pread(SIZE, 0) == data


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["file", "stripe", "map"])
def test_threads_that_end_leave_no_queue(kind: str, tmp_path: Path) -> None:
    """Nor has the target to wait for the collector, to be closed and opened again."""
    target = TARGETS[kind](tmp_path)
    assert isinstance(target, pyublk.MappedTarget)
    layer = pyublk.Layer(target)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            before = descriptors()
            layer.open()
            layer.below.read(0, memoryview(bytearray(4096)))
            opened = descriptors()
            for _ in range(2):
                one = threading.Thread(
                    target=layer.below.read, args=(0, memoryview(bytearray(4096)))
                )
                one.start()
                one.join()
            assert descriptors() == opened
            with ThreadPoolExecutor(1) as pool:  # whose thread is there yet when it is closed
                pool.submit(layer.below.write, 0, memoryview(bytes(4096))).result()
                assert descriptors() > opened
                layer.close()
                assert descriptors() == before
    finally:
        gc.enable()


def test_a_long_transfer_goes_below_in_pieces(tmp_path: Path) -> None:
    size = 4 << 20
    layer = pyublk.Layer(File(tmp_path / "file", size=size))
    with Disk(layer, max_io_size=size, depth=1) as disk:
        data = bytes(range(256)) * (size // 256)
        disk.pwrite(data, 0)
        assert disk.pread(size, 0) == data
        assert disk.stats().total.requests == 2


def test_a_mirrors_legs_fail_below_a_layer(tmp_path: Path) -> None:
    mirror = Mirror(*legs(tmp_path))
    with Disk(pyublk.Layer(mirror)) as disk:
        mirror.layout.fail_leg(1)
        disk.pwrite(b"alone" * 1024, 0)
        assert disk.pread(5120, 0) == b"alone" * 1024
        assert mirror.degraded


def test_what_fails_below_fails_above(tmp_path: Path) -> None:
    class Lost(pyublk.MappedTarget):
        def map(self, op: int, offset: int, length: int) -> object:  # type: ignore[override]
            raise OSError(errno.ENOSPC, "no place for it")

    with Disk(pyublk.Layer(Lost([tmp_path / "file"], size=SIZE))) as disk:
        with pytest.raises(OSError, match="READ at 0 failed") as failed:
            disk.pread(512, 0)
        assert failed.value.errno == errno.ENOSPC


def test_params_is_no_longer_asked() -> None:
    class Old(Memory):
        def params(self, max_io_size: int) -> None:
            pass

    with pytest.raises(pyublk.InvalidTarget, match=r"Old defines params, .* define profile\(self"):
        Disk(Old())


@pytest.mark.parametrize("kind", ["plain", "ram", "file"])
def test_a_layer_that_nobody_has_goes_at_once_with_what_is_below(kind: str, tmp_path: Path) -> None:
    target = TARGETS[kind](tmp_path)
    below = weakref.ref(target)
    layer = pyublk.Layer(target)
    layer.open()
    layer.below.write(0, memoryview(b"x" * 512))
    layer.close()
    del layer, target
    assert below() is None
