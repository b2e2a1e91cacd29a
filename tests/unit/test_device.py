"""What Device says before a kernel is asked: arguments, targets, states, a missing driver."""

import asyncio
import errno
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import pyublk
from pyublk import Device, DeviceState
from pyublk.engines import dispatch_of
from pyublk.targets import Null, Ram
from pyublk.testing import Disk

MIB = 1 << 20

needs_no_driver = pytest.mark.skipif(
    os.path.exists("/dev/ublk-control"), reason="this machine has the ublk driver"
)


class Plain(pyublk.Target):
    """Counts how often it was opened and closed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(size=MIB, **options)
        self.opened = self.closed = 0

    def open(self) -> None:
        self.opened += 1

    def close(self) -> None:
        self.closed += 1

    def read(self, offset: int, buffer: memoryview) -> None:
        pass

    def write(self, offset: int, data: memoryview) -> None:
        pass


class Parallel(Plain):
    concurrency = "parallel"


class Coroutines(pyublk.Target):
    concurrency = "parallel"

    async def read(self, offset: int, buffer: memoryview) -> None:
        pass

    async def write(self, offset: int, data: memoryview) -> None:
        pass


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_io_size": 4097},
            "max_io_size must be a multiple of 4096 from 4096 to 33554432, not 4097",
        ),
        (
            {"max_io_size": 0},
            "max_io_size must be a multiple of 4096 from 4096 to 33554432, not 0",
        ),
        (
            {"max_io_size": 64 * MIB},
            "max_io_size must be a multiple of 4096 from 4096 to 33554432, not 67108864",
        ),
        ({"queues": 0}, "queues must be 1 to 4096 or 'max', not 0"),
        ({"queues": 4097}, "queues must be 1 to 4096 or 'max', not 4097"),
        ({"depth": 0}, "depth must be 1 to 4096, not 0"),
        ({"depth": 4097}, "depth must be 1 to 4096, not 4097"),
        ({"id": -1}, "id must be 0 to 1048575 or None, not -1"),
        ({"id": 1 << 20}, "id must be 0 to 1048575 or None, not 1048576"),
        ({"workers": -1}, "workers must be at least 0 or None, not -1"),
        (
            {"workers": 2},
            "workers=2 needs a target with plain methods and concurrency 'parallel'; "
            "Plain is sync and 'serial'",
        ),
        (
            {"affinity": [{0}, {1}]},
            "affinity must be 'auto', None, or a set of CPUs for each of the 1 queues",
        ),
        (
            {"affinity": [set()]},
            "affinity must name at least one CPU for queue 0",
        ),
        (
            {"affinity": "none"},
            "affinity must be 'auto', None, or a set of CPUs for each queue",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Device(Plain(), **options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Coroutines(size=MIB), "Coroutines is async and 'parallel'"),
        (Null(size=MIB), "Null is native and 'parallel'"),
    ],
)
def test_workers_are_for_plain_methods(target: pyublk.Target, said: str) -> None:
    with pytest.raises(ValueError, match=f"workers=1 needs a target with plain methods.*; {said}$"):
        Device(target, workers=1)
    Device(Parallel(), workers=1)


def test_a_target_says_how_many_workers_it_wants() -> None:
    class Waiting(Parallel):
        workers = 2

        def read(self, offset: int, buffer: memoryview) -> None:
            ran_on.add(threading.current_thread().name)

    for asked, name in ((None, "disk-w"), (0, threading.current_thread().name)):
        ran_on: set[str] = set()
        with Disk(Waiting(), workers=asked) as disk:
            disk.pread(512, 0)
        assert [one.rstrip("01") for one in ran_on] == [name]


# ---- targets that cannot be served ----


class NoRead(pyublk.Target):
    def write(self, offset: int, data: memoryview) -> None:
        pass


class NoWrite(pyublk.Target):
    def read(self, offset: int, buffer: memoryview) -> None:
        pass


class OnlyFua(NoWrite):
    def write_fua(self, offset: int, data: memoryview) -> None:
        pass


class Both(Plain):
    def handle(self, io: pyublk.IO) -> None:
        pass


class Mixed(Plain):
    async def flush(self) -> None:
        pass


class NotAMethod(Plain):
    flush = True


class Odd(Plain):
    concurrency = "sometimes"  # type: ignore[assignment]


class NotATarget:
    size = MIB


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NotATarget, "NotATarget is not a pyublk.Target: subclass it and define read and write"),
        (
            lambda: NoRead(size=MIB),
            "NoRead has no read method: define read(self, offset, buffer)",
        ),
        (
            lambda: NoWrite(size=MIB),
            "NoWrite has no write method: define write(self, offset, data), or pass read_only=True",
        ),
        (
            Both,
            "Both defines handle and read, write: handle gets every request, define either it or "
            "the others",
        ),
        (
            Mixed,
            "Mixed mixes async methods (flush) with plain ones (read, write): make all of them "
            "async, or none",
        ),
        (NotAMethod, "NotAMethod.flush is True, not a method: rename it"),
        (
            Odd,
            "Odd.concurrency is 'sometimes': use 'serial', 'per_queue' or 'parallel'",
        ),
    ],
)
def test_a_target_that_cannot_be_served(make: Callable[[], pyublk.Target], message: str) -> None:
    with pytest.raises(pyublk.InvalidTarget) as refused:
        Device(make())
    assert str(refused.value) == message
    assert isinstance(refused.value, TypeError)


def test_how_a_target_is_served_follows_from_it() -> None:
    assert dispatch_of(Plain()) == "sync"
    assert dispatch_of(NoWrite(size=MIB, read_only=True)) == "sync"
    assert dispatch_of(Coroutines(size=MIB)) == "async"
    assert dispatch_of(Ram(size=MIB)) == "native"


# ---- states ----


def test_before_the_start() -> None:
    device = Device(Plain(), queues=2)
    assert device.state is DeviceState.CREATED
    assert f"{device.state}" == "created"
    assert repr(device) == "<Device no node yet created target Plain>"
    for name in ("id", "path", "char_path", "params"):
        with pytest.raises(pyublk.DeviceClosed, match="does not exist before it is started"):
            getattr(device, name)
    with pytest.raises(pyublk.DeviceClosed, match=r"^the device is created$"):
        device.info()
    with pytest.raises(pyublk.DeviceClosed, match=r"^the device is created: start it first$"):
        device.wait()
    with pytest.raises(pyublk.DeviceClosed, match="is created, only a live one is resized"):
        device.resize(2 * MIB)
    assert device.stats().queues == ()


@pytest.mark.parametrize("size", [0, -512, 513])
def test_a_new_size_is_whole_blocks(size: int) -> None:
    message = f"^size must be a positive multiple of 512, not {size}$"
    with pytest.raises(ValueError, match=message):
        Device(Plain()).resize(size)


def test_a_device_stopped_before_its_start_stays_stopped() -> None:
    target = Plain()
    device = Device(target)
    device.stop()
    device.stop()
    assert device.state is DeviceState.STOPPED
    assert device.wait(0) is True
    with pytest.raises(pyublk.DeviceClosed, match="is stopped: a Device starts once, make a new"):
        device.start()
    assert (target.opened, target.closed) == (0, 0)


def test_a_device_never_started_is_dropped_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device = Device(Plain())
        del device
        gc.collect()


# ---- no driver ----


def check_no_driver(error: OSError) -> None:
    assert isinstance(error, FileNotFoundError)
    assert str(error).startswith(f"[Errno {errno.ENOENT}] /dev/ublk-control does not exist: ")
    assert os.uname().release in str(error) or "driver is" in str(error)
    whose, what = error.__notes__
    assert whose == "Cause: this machine's set-up."
    assert what.startswith("What to do: ")


@needs_no_driver
def test_without_the_driver_one_sentence_says_so() -> None:
    target = Plain()
    device = Device(target)
    with pytest.raises(FileNotFoundError) as missing:
        device.start()
    check_no_driver(missing.value)
    assert device.state is DeviceState.STOPPED
    assert (target.opened, target.closed) == (0, 0)
    with pytest.raises(pyublk.DeviceClosed, match="a Device starts once"):
        device.start()
    device.stop()
    with pytest.raises(FileNotFoundError) as missing:
        pyublk.Controller()
    check_no_driver(missing.value)


@needs_no_driver
def test_without_the_driver_on_a_loop() -> None:
    async def main() -> None:
        async with Device(Coroutines(size=MIB)):
            raise AssertionError("it started")

    with pytest.raises(FileNotFoundError) as missing:
        asyncio.run(main())
    check_no_driver(missing.value)


@needs_no_driver
def test_a_program_that_fails_to_start_ends_in_silence() -> None:
    program = """
import pyublk
from pyublk.targets import Null
disk = pyublk.Device(Null(size=4096))
try:
    disk.start()
except FileNotFoundError:
    print("no driver")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "no driver\n", "")


@pytest.mark.parametrize(
    ("affinity", "words"),
    [
        ("all", "affinity must be 'auto', None, or a set of CPUs for each queue"),
        ([[0], [1]], "affinity must be 'auto', None, or a set of CPUs for each of the 1 queues"),
        ([[]], "affinity must name at least one CPU for queue 0"),
    ],
)
def test_an_affinity_that_says_nothing(affinity: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pyublk.Device(Null(size=1 << 30), affinity=affinity)  # type: ignore[arg-type]
