"""`open` and `close` that are coroutines, of targets and of layers over each other."""

import asyncio
import errno
import threading
from collections.abc import Awaitable
from typing import Any

import pytest

import pyublk
from pyublk.testing import Disk

SIZE = 1 << 16


class Remote(pyublk.Target):
    """With coroutines; notes what is done to it, and on which loop and thread."""

    concurrency = "parallel"

    def __init__(self, *, fails: str = "") -> None:
        super().__init__(size=SIZE)
        self.calls: list[str] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.threads: set[int] = set()
        self.data = bytearray(SIZE)
        self.fails = fails

    async def note(self, call: str) -> None:
        self.loops.add(asyncio.get_running_loop())
        self.threads.add(threading.get_ident())
        await asyncio.sleep(0)
        self.calls.append(call)
        if call == self.fails:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")

    async def open(self) -> None:  # type: ignore[override]
        await self.note("open")

    async def close(self) -> None:  # type: ignore[override]
        await self.note("close")

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self.note("read")
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        await self.note("write")
        self.data[offset : offset + len(data)] = data


class Local(pyublk.Target):
    """With plain methods, and the same notes."""

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.calls: list[str] = []

    def open(self) -> None:
        self.calls.append("open")

    def close(self) -> None:
        self.calls.append("close")

    def read(self, offset: int, buffer: memoryview) -> None:
        self.calls.append("read")

    def write(self, offset: int, data: memoryview) -> None:
        self.calls.append("write")


class Awaiting(pyublk.Layer):
    """With coroutines, and an open and a close of its own."""

    def __init__(self, below: pyublk.Target) -> None:
        super().__init__(below)
        self.bottom: Any = pyublk.layers.stack(self)[-1]

    async def _pass(self, method: str, *arguments: Any) -> None:
        outcome = self.below.methods[method](*arguments)
        if outcome is not None:
            await outcome

    async def open(self) -> None:  # type: ignore[override]
        await super().open()  # type: ignore[misc]
        self.bottom.calls.append("open above")

    async def close(self) -> None:  # type: ignore[override]
        self.bottom.calls.append("close above")
        await super().close()  # type: ignore[misc]

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._pass("read", offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._pass("write", offset, data)


class Plain(pyublk.Layer):
    """With a plain method, and a plain open and close of its own."""

    def open(self) -> None:
        assert super().open() is None
        pyublk.layers.stack(self)[-1].calls.append("open above")  # type: ignore[attr-defined]

    def close(self) -> None:
        pyublk.layers.stack(self)[-1].calls.append("close above")  # type: ignore[attr-defined]
        assert super().close() is None

    def read(self, offset: int, buffer: memoryview) -> None:
        self.below.read(offset, buffer)


ORDER = ["open", "open above", "write", "read", "close above", "close"]


def use(disk: Disk) -> None:
    disk.pwrite(b"kept" * 128, 512)
    disk.pread(512, 512)


@pytest.mark.parametrize("above", [None, pyublk.Layer, Awaiting, Plain])
def test_each_is_awaited_in_order_on_one_loop(above: type[pyublk.Layer] | None) -> None:
    remote = Remote()
    target = remote if above is None else above(remote)
    for _ in range(2):  # and opened again
        with Disk(target) as disk:
            use(disk)
        assert remote.data[512:516] == b"kept"
        plain = [call for call in ORDER if " " not in call]
        assert remote.calls == (plain if above in (None, pyublk.Layer) else ORDER)
        assert len(remote.loops) == 1
        assert len(remote.threads) == 1
        assert (threading.get_ident() in remote.threads) == (above is not Plain)
        remote.calls.clear()
        remote.loops.clear()
        remote.threads.clear()


@pytest.mark.parametrize("middle", [pyublk.Layer, Awaiting, Plain])
def test_layers_over_layers(middle: type[pyublk.Layer]) -> None:
    remote = Remote()
    with Disk(Plain(middle(remote))) as disk:
        use(disk)
    assert remote.data[512:516] == b"kept"
    assert [call for call in remote.calls if "above" not in call] == ORDER[:1] + ORDER[2:4] + [
        "close"
    ]
    assert len(remote.threads) == 1


@pytest.mark.parametrize("above", [Awaiting, Plain, pyublk.Layer])
def test_over_plain_methods(above: type[pyublk.Layer]) -> None:
    local = Local()
    with Disk(above(local)) as disk:
        use(disk)
    plain = [call for call in ORDER if " " not in call]
    assert local.calls == (plain if above is pyublk.Layer else ORDER)


@pytest.mark.parametrize("above", [pyublk.Layer, Awaiting, Plain])
@pytest.mark.parametrize("fails", ["open", "read", "close"])
def test_what_fails_is_told_and_nothing_is_left(above: type[pyublk.Layer], fails: str) -> None:
    threads = {*threading.enumerate()}
    remote = Remote(fails=fails)
    disk = Disk(above(remote))
    if fails == "open":
        with pytest.raises(ConnectionRefusedError, match="nobody is there"):
            disk.__enter__()
        assert remote.calls == ["open"]
    elif fails == "read":
        with disk, pytest.raises(OSError, match="READ at 512 failed"):
            use(disk)
        assert remote.calls[-1] == "close"
    else:
        with pytest.raises(ConnectionRefusedError, match="nobody is there"), disk:
            use(disk)
    assert not {*threading.enumerate()} - threads  # those of tests before may end


def test_on_the_callers_loop() -> None:
    async def main() -> None:
        for above in (pyublk.Layer, Awaiting):
            remote = Remote()
            async with Disk(above(remote)) as disk:
                await disk.pwrite(b"kept" * 128, 512)
            assert remote.loops == {asyncio.get_running_loop()}
        remote = Remote()
        async with Disk(Plain(remote)) as disk:
            await disk.pwrite(b"kept" * 128, 512)
        assert asyncio.get_running_loop() not in remote.loops
        assert remote.data[512:516] == b"kept"

    asyncio.run(main())


def test_calls_from_several_threads_wait_at_once() -> None:
    """What one call waits for another one brings: both must be under way on the loop."""

    class Meeting(Remote):
        async def read(self, offset: int, buffer: memoryview) -> None:
            if offset == 0:
                self.met = asyncio.Event()
                self.waits.set()
                await asyncio.wait_for(self.met.wait(), 20)
            else:
                self.met.set()

    target = Meeting()
    target.waits = threading.Event()  # type: ignore[attr-defined]
    layer = Plain(target)
    with Disk(layer):
        buffer = memoryview(bytearray(512))
        other = threading.Thread(target=layer.below.read, args=(0, buffer))
        other.start()
        assert target.waits.wait(20)  # type: ignore[attr-defined]
        layer.below.read(512, buffer)
        other.join(20)
        assert not other.is_alive()


def test_a_call_before_it_is_open_is_told() -> None:
    layer = Plain(Remote())
    with pytest.raises(RuntimeError, match="the target below is not open"):
        layer.below.read(0, memoryview(bytearray(512)))


def test_what_is_returned_is_no_answer() -> None:
    class Returning(Remote):
        async def read(self, offset: int, buffer: memoryview) -> bytes:  # type: ignore[override]
            return bytes(512)

    with Disk(Plain(Returning())) as disk, pytest.raises(OSError, match="READ at 0 failed"):
        disk.pread(512, 0)


def test_an_open_that_gives_something_to_await_needs_a_loop() -> None:
    class Half(Local):
        def open(self) -> Awaitable[None]:  # type: ignore[override]
            return asyncio.sleep(0)

    for target in (Half(), pyublk.Layer(Half()), Plain(Half())):
        with pytest.raises(pyublk.InvalidTarget, match=r"Half.open returned something to await"):
            Disk(target).__enter__()
