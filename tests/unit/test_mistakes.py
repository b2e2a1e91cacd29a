"""What a newcomer gets wrong in Python is told at once, in a sentence that says what to do."""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk import Device, InvalidTarget
from pyublk.targets import File, Null, Ram
from pyublk.testing import Disk

SIZE = 1 << 20


class Plain(pyublk.Target):
    def __init__(self, size: Any = SIZE, **options: Any) -> None:
        super().__init__(size=size, **options)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, data: memoryview) -> None:
        pass


class Forgets(Plain):
    def __init__(self) -> None:
        self.data = bytearray(SIZE)


@dataclass
class AsDataclass(Plain):
    key: int = 1


class ReadsTooLittle(Plain):
    def read(self, buffer: memoryview) -> None:  # type: ignore[override]
        pass


class WritesTooMuch(Plain):
    def write(self, offset: int, length: int, data: memoryview) -> None:  # type: ignore[override]
        pass


class NoSelf(Plain):
    def flush() -> None:  # type: ignore[misc]
        pass


class KeywordOnly(Plain):
    def read(self, *, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        pass


class DiscardsAlone(Plain):
    def discard(self, offset: int) -> None:
        pass


class Yields(Plain):
    def read(self, offset: int, buffer: memoryview) -> Iterator[int]:  # type: ignore[override]
        yield 1


class YieldsAsync(Plain):
    async def read(self, offset: int, buffer: memoryview) -> Any:
        yield 1

    async def write(self, offset: int, data: memoryview) -> None:
        pass


class MapsTooLittle(File):
    def map(self, offset: int) -> Any:
        return []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plain, "a disk needs an object, and Plain is a class: call it, as in Plain(...)"),
        (lambda: Null, "Null is a class: call it, as in Null(...)"),
        (lambda: int, "int is a class: call it"),
        (lambda: object(), "object is not a pyublk.Target: subclass it and define read and write"),
        (Forgets, "Forgets lacks block_size, "),
        (Forgets, "its __init__ must call super().__init__(size=...)"),
        (AsDataclass, "its __init__ must call super().__init__(size=...)"),
        (ReadsTooLittle, "does not take what it is given: define read(self, offset, buffer)"),
        (WritesTooMuch, "does not take what it is given: define write(self, offset, data)"),
        (NoSelf, "NoSelf.flush() -> None does not take what it is given: define flush(self)"),
        (KeywordOnly, "define read(self, offset, buffer)"),
        (DiscardsAlone, "define discard(self, offset, length)"),
        (Yields, "Yields.read is a generator, so a call of it runs nothing"),
        (YieldsAsync, "YieldsAsync.read is a generator"),
        (lambda: MapsTooLittle(Path("x")), "define map(self, op, offset, length)"),
    ],
)
@pytest.mark.parametrize("serve", [Device, Disk])
def test_targets_that_cannot_be_served(
    serve: Callable[[Any], object], make: Callable[[], object], words: str
) -> None:
    with pytest.raises(InvalidTarget, match=re.escape(words)):
        serve(make())


class Variadic(Plain):
    def read(self, *arguments: Any) -> None:
        arguments[1][:] = b"v" * len(arguments[1])


class Defaults(Plain):
    def read(self, offset: int, buffer: memoryview, again: bool = False) -> None:
        buffer[:] = b"d" * len(buffer)


class Static(Plain):
    @staticmethod
    def read(offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        buffer[:] = b"s" * len(buffer)


class Partial(Plain):
    def __init__(self) -> None:
        super().__init__()

        def read(letter: bytes, offset: int, buffer: memoryview) -> None:
            buffer[:] = letter * len(buffer)

        self.read = functools.partial(read, b"p")  # type: ignore[assignment, method-assign]


class Builtin(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.flush = self.calls.clear  # written in C


@pytest.mark.parametrize("make", [Variadic, Defaults, Static, Partial])
def test_whatever_can_be_called_is_a_handler(make: Callable[[], Plain]) -> None:
    with Disk(make()) as disk:
        assert disk.pread(512, 0) == make.__name__[0].lower().encode() * 512


def test_a_handler_written_in_c() -> None:
    with Disk(Builtin()) as disk:
        disk.flush()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plain("1G"), "size must be a whole number, not '1G'; pyublk.targets.parse_size("),
        (lambda: Ram(size="64M"), "size must be a whole number, not '64M'"),  # type: ignore[arg-type]
        (lambda: Plain(1e9), "size must be a whole number, not 1000000000.0"),
        (lambda: Plain(True), "size must be a whole number, not True"),
        (lambda: Plain(None), "size must be a whole number, not None"),
        (lambda: Plain(-512), "size must be at least 0, not -512"),
        (lambda: Plain(block_size=512.0), "block_size must be a whole number, not 512.0"),
        (lambda: Plain(block_size=0), "block_size must be at least 1, not 0"),
        (lambda: Plain(io_opt="1M"), "io_opt must be a whole number, not '1M'"),
        (lambda: Plain(max_discard=-1), "max_discard must be at least 0, not -1"),
        (lambda: Device(Plain(), queues=1.5), "queues must be 1 to 4096 or 'max', not 1.5"),
        (lambda: Device(Plain(), queues="all"), "queues must be 1 to 4096 or 'max', not 'all'"),
        (lambda: Device(Plain(), preempt=1), "preempt must be true or false, not 1"),
        (lambda: Device(Plain(), depth="128"), "depth must be a whole number, not '128'"),
        (lambda: Device(Plain(), max_io_size="1M"), "max_io_size must be a whole number, not '1M'"),
        (lambda: Device(Plain(), threads=True), "threads must be a whole number, not True"),
        (lambda: Device(Plain(), workers=0.5), "workers must be at least 0 or None, not 0.5"),
        (lambda: Device(Plain(), deadline=-1), "deadline must be a number of seconds above 0"),
        (lambda: Device(Plain(), deadline="5"), "deadline must be a number of seconds above 0"),
        (lambda: Device(Plain(), stop_timeout=float("nan")), "stop_timeout must be a number"),
        (lambda: Device(Plain(), id="1"), "id must be 0 to 1048575 or None, not '1'"),
        (lambda: Device(Plain(), id=True), "id must be 0 to 1048575 or None, not True"),
        (lambda: Device(Plain(), affinity=5), "affinity must be 'auto', None, or a set of CPUs"),
        (lambda: Device(Plain(), affinity=[0]), "affinity must have a set of CPUs for each queue"),
        (lambda: Device(Plain(), affinity=[["a"]]), "a CPU must be a whole number, not 'a'"),
        (lambda: Device(Plain(), trim_after="1"), "seconds above 0 or None, not '1'"),
        (lambda: Device(Plain(), path="fast"), "path must be one of auto, copy, "),
        (lambda: Device(Plain(), path=None), "path must be one of auto, copy, "),
        (lambda: Disk(Plain(), depth=0), "depth must be at least 1, not 0"),
        (lambda: Disk(Plain(), max_io_size="4K"), "max_io_size must be a whole number, not '4K'"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_a_read_that_is_not_filled_shows() -> None:
    class Short(Plain):
        def read(self, offset: int, buffer: memoryview) -> None:
            buffer[: len(buffer) // 2] = bytes(len(buffer) // 2)

    with Disk(Short(), max_io_size=4096, depth=2) as disk:
        disk.pwrite(b"w" * 16384, 0)  # which the buffers held before
        found = disk.pread(16384, 0)
    assert found == (bytes(2048) + Disk.POISON * 2048) * 4
