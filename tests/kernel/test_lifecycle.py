"""A disk's life: from start to stop, however it is stopped, and what it leaves behind: nothing."""

import asyncio
import ctypes
import gc
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve, existing
from memory import AsyncMemory, CallbackMemory, HandleMemory, Memory
from needs import CPUs, needs
from servers import Server, device_is_gone, run_program, until
from variations import variations

import pyublk
from pyublk import Device, DeviceState
from pyublk.session import Session
from pyublk.targets import Null, Ram
from pyublk.uapi import DeviceStatus, Feature, Op

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def round_trip(path: str, byte: bytes = b"r") -> None:
    with Blocks(path) as client:
        client.write(byte * 8192, 4096)
        assert client.read(8192, 4096) == byte * 8192


# ---- many lives ----


@pytest.mark.thorough
@pytest.mark.timeout(600)  # forty of what others do once
def test_many_lives_leave_nothing() -> None:
    """Devices, threads, descriptors and processes are counted by the fixture around every test;
    here also memory, which must not grow with the number of lives."""
    threads, sizes = threading.active_count(), []
    for life in range(24):
        disk = Device(Memory(64 * 1024), depth=32, max_io_size=65536, id=7)
        with disk, Blocks(disk.path) as client:
            client.write(bytes([life]) * 65536, 0)
            assert client.read(512, 512) == bytes([life]) * 512
        assert disk.state is DeviceState.STOPPED
        if life % 8 == 7:
            gc.collect()
            sizes.append(resident())
    assert threading.active_count() == threads
    # The first lives warm the allocator up; after them, a leak of 32 KiB a life is seen, and that
    # of one tag's buffer would be 1 MiB by now.
    assert sizes[-1] - sizes[0] < MIB // 2, sizes


# ---- states ----


class Watched(Device):
    """Writes down every state it comes into."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_state":
            self.__dict__.setdefault("seen", []).append(value)
        super().__setattr__(name, value)

    seen: list[DeviceState]


def test_states_come_in_order() -> None:
    disk = Watched(Null(size=MIB))
    with disk:
        assert disk.state is DeviceState.LIVE
        assert disk.info().status is DeviceStatus.LIVE
        assert repr(disk) == f"<Device {disk.path} live target Null>"
    assert list(map(str, disk.seen)) == [
        "created",
        "configured",
        "starting",
        "live",
        "stopping",
        "stopped",
    ]


class Told(Memory):
    """Knows its device, and in which state that was when a method was called."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.device: Device | None = None
        self.states: list[tuple[str, DeviceState]] = []

    def note(self, method: str) -> None:
        assert self.device is not None
        self.states.append((method, self.device.state))

    def open(self) -> None:
        self.note("open")

    def close(self) -> None:
        self.note("close")

    def write(self, offset: int, data: memoryview) -> None:
        self.note("write")
        super().write(offset, data)


def test_what_the_page_cache_holds_is_written_while_stopping() -> None:
    target = Told(MIB)
    target.device = disk = Device(target)
    disk.start()
    with open(disk.path, "r+b", buffering=0) as cached:
        cached.seek(4096)
        cached.write(b"dirty" * 1024)
        # Open while it stops: closing it would write the pages back already.
        assert ("write", DeviceState.LIVE) not in target.states
        disk.stop()
    assert bytes(target.data[4096 : 4096 + 5120]) == b"dirty" * 1024
    assert target.states[0] == ("open", DeviceState.CREATED)
    assert ("write", DeviceState.STOPPING) in target.states
    assert target.states[-1] == ("close", DeviceState.STOPPED)
    assert [method for method, _ in target.states].count("close") == 1


def test_a_device_starts_once(serve: Serve) -> None:
    disk = serve(Null(size=MIB))
    message = "the device is live: a Device starts once, make a new one"
    with pytest.raises(pyublk.DeviceClosed, match=message):
        disk.start()
    info = disk.info()
    assert (info.status, info.server_pid) == (DeviceStatus.LIVE, os.getpid())
    disk.stop()
    with pytest.raises(pyublk.DeviceClosed, match="the device is stopped: a Device starts once"):
        disk.start()
    with pytest.raises(pyublk.DeviceClosed, match="the device is stopped"):
        disk.info()
    with pytest.raises(pyublk.DeviceClosed, match="is stopped, only a live one is resized"):
        disk.resize(2 * MIB)
    assert disk.wait(0) is True


def test_the_last_counters_outlive_the_disk(serve: Serve) -> None:
    disk = serve(Memory(MIB))
    with Blocks(disk.path) as client:
        for _ in range(7):
            client.write(bytes(8192), 0)
    disk.stop()
    last = disk.stats().total
    assert (last.writes, last.bytes_written, last.errors) == (7, 7 * 8192, 0)
    assert disk.stats() == disk.stats()


def test_a_fresh_device_has_what_was_asked_for(serve: Serve) -> None:
    disk = serve(Memory(MIB), queues=2, depth=5, max_io_size=65536, id=9)
    info = disk.info()
    assert (disk.id, disk.path, disk.char_path) == (9, "/dev/ublkb9", "/dev/ublkc9")
    assert (info.queues, info.depth, info.max_io_size) == (2, 5, 65536)
    assert info.ours
    assert (info.owner_uid, info.owner_gid) == (os.geteuid(), os.getegid())
    assert disk.params.basic.size == MIB
    assert len(disk.stats().queues) == 2


def test_several_disks_at_once(serve: Serve) -> None:
    targets = [Memory(MIB) for _ in range(4)]
    disks = [serve(target, depth=8) for target in targets]
    assert len({disk.path for disk in disks}) == 4
    for number, disk in enumerate(disks):
        round_trip(disk.path, bytes([number + 1]))
    disks[1].stop()
    for number, (target, disk) in enumerate(zip(targets, disks, strict=True)):
        assert bytes(target.data[4096 : 4096 + 8192]) == bytes([number + 1]) * 8192
        if number != 1:
            round_trip(disk.path)
    again = serve(Memory(MIB), id=disks[1].id)  # which the kernel frees a moment after the stop
    assert again.id == disks[1].id


# ---- stops ----


def in_thread(job: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=job)
    thread.start()
    return thread


def test_stopped_from_another_thread(serve: Serve) -> None:
    disk = serve(Null(size=MIB))
    thread = in_thread(disk.stop)
    assert disk.wait(60) is True
    thread.join(60)
    assert disk.state is DeviceState.STOPPED
    assert not Path(disk.path).exists()


def test_stopped_by_several_threads_at_once(serve: Serve) -> None:
    disk = serve(Null(size=MIB))
    failures: list[BaseException] = []
    together = threading.Barrier(4)

    def stop() -> None:
        try:
            together.wait(60)
            disk.stop()
            assert disk.state is DeviceState.STOPPED
            assert not Path(disk.char_path).exists()
        except BaseException as error:
            failures.append(error)

    threads = [in_thread(stop) for _ in range(4)]
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


class _Stopping:
    """Stops its device when the last block is read."""

    device: Device | None = None

    def look(self, offset: int) -> None:
        if offset == MIB - 4096 and self.device is not None:
            self.device.stop()


class SyncStopping(_Stopping, Memory):
    def read(self, offset: int, buffer: memoryview) -> None:
        self.look(offset)
        super().read(offset, buffer)


class ParallelStopping(SyncStopping):
    concurrency = "parallel"


class AsyncStopping(_Stopping, AsyncMemory):
    async def read(self, offset: int, buffer: memoryview) -> None:
        self.look(offset)
        await super().read(offset, buffer)


class HandleStopping(_Stopping, HandleMemory):
    def handle(self, io: pyublk.IO) -> None:
        if io.op is Op.READ:
            self.look(io.offset)
        super().handle(io)


class CallbackStopping(_Stopping, CallbackMemory):
    def _handle(
        self, context: int, op: int, flags: int, offset: int, length: int, buffer: int
    ) -> int:
        if op == Op.READ:
            self.look(offset)
        return super()._handle(context, op, flags, offset, length, buffer)


def read_end(path: str) -> bytes:
    """Not for the thread of a loop that serves: the open would wait for it, beyond signals."""
    with Blocks(path, os.O_RDONLY) as client:
        return client.read(4096, MIB - 4096)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SyncStopping, {}),
        (SyncStopping, {"queues": 2}),
        (ParallelStopping, {"workers": 2}),
        (AsyncStopping, {}),
        (HandleStopping, {}),
        (CallbackStopping, {}),
    ],
    ids=["sync", "two-queues", "workers", "async", "handle", "callback"],
)
def test_stopped_from_a_handler(
    serve: Serve, make: Callable[..., Any], options: dict[str, Any]
) -> None:
    target = make(MIB)
    disk = serve(target, **options)
    target.device = disk
    target.data[-4096:] = b"l" * 4096
    assert read_end(disk.path) == b"l" * 4096
    assert disk.wait(60) is True
    disk.stop()  # returns when the other one has
    assert disk.state is DeviceState.STOPPED
    assert disk.stats().total.errors == 0


def test_stopped_from_a_coroutine_on_the_users_loop() -> None:
    async def main() -> Device:
        target = AsyncStopping(MIB)
        async with Device(target) as disk:
            target.device = disk
            assert await asyncio.to_thread(read_end, disk.path) == bytes(4096)
            assert await asyncio.to_thread(disk.wait, 30) is True
        assert disk.state is DeviceState.STOPPED
        return disk

    started = time.monotonic()
    assert asyncio.run(main()).stats().total.errors == 0
    assert time.monotonic() - started < 60


def is_io_flusher() -> bool:
    """Of the calling thread."""
    pr_get_io_flusher = 58
    return bool(ctypes.CDLL(None).prctl(pr_get_io_flusher, 0, 0, 0, 0) == 1)


class Flushing(Memory):
    concurrency = "parallel"

    def read(self, offset: int, buffer: memoryview) -> None:
        self.flushers.add(is_io_flusher())
        super().read(offset, buffer)


class AsyncFlushing(AsyncMemory):
    async def read(self, offset: int, buffer: memoryview) -> None:
        self.flushers.add(is_io_flusher())
        self.flushers.add(await asyncio.to_thread(is_io_flusher))
        await super().read(offset, buffer)


@pytest.mark.parametrize(
    ("make", "options"),
    [(Flushing, {}), (Flushing, {"workers": 2}), (AsyncFlushing, {})],
    ids=["queue", "workers", "loop"],
)
def test_threads_that_serve_do_not_wait_for_what_only_they_can_write(
    serve: Serve, make: Any, options: dict[str, Any]
) -> None:
    pr_set_io_flusher = 57
    # Which the test's own thread may be since it served a disk by itself, and threads inherit.
    assert ctypes.CDLL(None).prctl(pr_set_io_flusher, 0, 0, 0, 0) == 0
    target = make(MIB)
    target.flushers = set()
    read_end(serve(target, **options).path)
    assert target.flushers == {True}
    assert not is_io_flusher()


class Scoped(AsyncMemory):
    """Notes what is there while it opens and closes, and on which loop."""

    def __init__(self, size: int, *, fails: bool = False) -> None:
        super().__init__(size)
        self.events: list[tuple[str, int]] = []
        self.loops: set[object] = set()
        self.fails = fails

    async def note(self, event: str) -> None:
        await asyncio.sleep(0)
        self.events.append((event, len(list(Path("/sys/class/ublk-char").glob("*")))))
        self.loops.add(asyncio.get_running_loop())

    async def open(self) -> None:
        await self.note("open")
        self.task = asyncio.create_task(asyncio.Event().wait())
        if self.fails:
            self.block_size = 4096 << 4  # which no kernel takes

    async def close(self) -> None:
        await self.note("close")
        assert not self.task.done()

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.loops.add(asyncio.get_running_loop())
        await super().read(offset, buffer)


@pytest.mark.parametrize("where", ["own", "own, inside a running one", "callers"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_coroutines_open_and_close(where: str, fails: bool) -> None:
    target = Scoped(MIB, fails=fails)

    def serve() -> None:
        with Device(target, queues=2) as disk:
            read_end(disk.path)

    async def serve_in_a_loop() -> None:
        serve()

    async def serve_by_the_loop() -> None:
        async with Device(target) as disk:
            assert await disk.wait_async(0.01) is False
            await asyncio.to_thread(read_end, disk.path)
            await asyncio.to_thread(disk.stop)
            assert await disk.wait_async() is True
        assert target.loops == {asyncio.get_running_loop()}

    run = {
        "own": serve,
        "own, inside a running one": lambda: asyncio.run(serve_in_a_loop()),
        "callers": lambda: asyncio.run(serve_by_the_loop()),
    }[where]
    with pytest.raises(ValueError, match="block") if fails else nullcontext():
        run()
    assert target.events == [("open", 0), ("close", 0)]
    assert len(target.loops) == 1


def test_an_open_that_waits_is_called_off_with_its_start() -> None:
    class Waits(AsyncMemory):
        async def open(self) -> None:
            await asyncio.Event().wait()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), Device(Waits(MIB)):
                pass

    asyncio.run(main())


class OpensSlowly(Memory):
    """Opens when it is told to."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.opening, self.go_on = threading.Event(), threading.Event()

    def open(self) -> None:
        self.opening.set()
        assert self.go_on.wait(60)


def test_a_stop_during_the_start_comes_after_it() -> None:
    """START_DEV after STOP_DEV would crash some kernels."""
    target = OpensSlowly(MIB)
    disk = Watched(target)
    starting = in_thread(disk.start)
    assert target.opening.wait(60)
    with pytest.raises(pyublk.DeviceClosed, match="a Device starts once"):
        disk.start()
    stopping = in_thread(disk.stop)
    stopping.join(0.2)
    assert stopping.is_alive()
    assert disk.state is DeviceState.CREATED
    target.go_on.set()
    starting.join(60)
    stopping.join(60)
    assert not stopping.is_alive()
    assert list(map(str, disk.seen[-3:])) == ["live", "stopping", "stopped"]


class StopsEverywhere(Memory):
    """As a signal's handler does that comes in the middle of a start, or of a stop."""

    device: Device

    def open(self) -> None:
        self.device.stop()

    def close(self) -> None:
        self.device.stop()


def test_a_stop_on_top_of_a_start_or_a_stop() -> None:
    target = StopsEverywhere(MIB)
    target.device = disk = Watched(target)
    disk.start()
    assert disk.wait(60) is True
    disk.stop()
    assert list(map(str, disk.seen[-3:])) == ["live", "stopping", "stopped"]
    assert not Path(disk.path).exists()


def test_a_stop_in_the_middle_of_a_start_on_a_loop() -> None:
    target = StopsEverywhere(MIB)

    async def main() -> None:
        target.device = disk
        async with disk:
            assert await asyncio.to_thread(disk.wait, 60) is True

    disk = Watched(target)
    asyncio.run(main())
    assert list(map(str, disk.seen[-3:])) == ["live", "stopping", "stopped"]


def test_a_start_on_a_loop_that_is_cancelled() -> None:
    """It ends when the step under way has ended, and leaves nothing."""
    target = OpensSlowly(MIB)
    disk = Device(target)

    async def main() -> None:
        async def enter() -> None:
            async with disk:
                pytest.fail("it was cancelled")

        start = asyncio.ensure_future(enter())
        await asyncio.to_thread(target.opening.wait, 60)
        start.cancel()
        await asyncio.sleep(0.1)
        assert not start.done()
        target.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await start

    asyncio.run(main())
    assert no_trace_of(disk)


def test_a_start_on_a_loop_that_fails_at_its_end() -> None:
    """The loop has to take part in the stop, which must have ended when the failure is told."""

    async def main() -> None:
        async with Device(AsyncMemory(MIB), io_scheduler="cfq"):
            pytest.fail("it started")

    with pytest.raises(ValueError, match="io_scheduler must be one of"):
        asyncio.run(main())
    assert existing() == set()


def test_a_disk_that_somebody_stops_while_it_starts(
    monkeypatch: pytest.MonkeyPatch, controller: pyublk.Controller
) -> None:
    """START_DEV is not sent any more."""
    primed = Session.primed

    def stop_then(session: Session, timeout: float) -> bool:
        assert primed(session, timeout)
        for device in controller.devices():
            controller.stop(device.id)
        until(session.all_ended, what="the queues end")
        return True

    monkeypatch.setattr(Session, "primed", stop_then)
    disk = Device(Memory(MIB))
    with pytest.raises(pyublk.DeviceLost, match=r"device \d+ was stopped while it was started"):
        disk.start()
    assert no_trace_of(disk)


def test_an_interrupt_that_comes_as_the_device_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    add = pyublk.Controller.add

    def interrupted(controller: pyublk.Controller, **wish: Any) -> None:
        add(controller, **wish)
        raise KeyboardInterrupt

    monkeypatch.setattr(pyublk.Controller, "add", interrupted)
    disk = Device(Memory(MIB))
    with pytest.raises(KeyboardInterrupt):
        disk.start()
    assert no_trace_of(disk)


EXTERNAL = """
with pyublk.Controller() as controller:
    getattr(controller, sys.argv[1])(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("command", "make"),
    variations(
        [("stop", Memory), ("delete", AsyncMemory), ("stop", CallbackMemory)],
        [("delete", AsyncMemory)],
    ),
)
def test_stopped_by_another_process(serve: Serve, command: str, make: type[pyublk.Target]) -> None:
    disk = serve(make(size=MIB))
    round_trip(disk.path)
    assert disk.wait(0) is False
    with Server(EXTERNAL, command, disk.id) as other:
        assert disk.wait(60) is True
        assert disk.wait(60) is True  # however often
        disk.stop()
        assert other.ended() == 0
        assert other.errors() == ""
    assert disk.state is DeviceState.STOPPED
    assert disk.stats().total.errors == 0


def test_a_scope_that_is_left_by_an_exception() -> None:
    with pytest.raises(LookupError, match="mine"), Device(Memory(MIB)) as disk:
        raise LookupError("mine")
    assert disk.state is DeviceState.STOPPED
    assert not Path(disk.path).exists()

    async def main() -> None:
        async with Device(AsyncMemory(MIB)) as disk:
            raise LookupError(disk.path)

    with pytest.raises(LookupError, match="/dev/ublkb") as left:
        asyncio.run(main())
    assert not Path(str(left.value)).exists()


def test_wait_ends_on_signals_and_puts_the_handlers_back(serve: Serve) -> None:
    disk = serve(Null(size=MIB))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    main = threading.main_thread().ident
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM):

        def send(number: int = number) -> None:
            until(lambda: signal.getsignal(number) not in before, what="wait takes signals")
            signal.pthread_kill(main, number)

        thread = in_thread(send)
        assert disk.wait(60) is True
        thread.join(60)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert disk.state is DeviceState.LIVE
    round_trip(disk.path, b"\0")


# ---- event loops ----


def test_several_disks_on_one_loop() -> None:
    targets = [AsyncMemory(MIB) for _ in range(3)]

    async def main() -> None:
        async with (
            Device(targets[0], depth=8) as one,
            Device(targets[1], depth=8, queues=min(2, len(CPUS))) as two,
            Device(targets[2], depth=8) as three,
        ):
            disks = (one, two, three)
            before = threading.active_count()
            await asyncio.gather(
                *(
                    asyncio.to_thread(round_trip, disk.path, bytes([number + 1]))
                    for number, disk in enumerate(disks)
                )
            )
            served = [thread.name for thread in threading.enumerate()]
            assert not [name for name in served if name.startswith("ublk")], before
            await asyncio.to_thread(two.stop)
            await asyncio.to_thread(round_trip, three.path, b"3")

    asyncio.run(main())
    for number, target in enumerate(targets[:2]):
        assert bytes(target.data[4096 : 4096 + 8192]) == bytes([number + 1]) * 8192
    assert bytes(targets[2].data[4096 : 4096 + 8192]) == b"3" * 8192


def test_a_plain_target_in_an_async_scope() -> None:
    async def main() -> None:
        async with Device(Memory(MIB)) as disk:
            round_trip(disk.path)  # served by a thread: the loop may be blocked

    asyncio.run(main())


# ---- shapes ----


@pytest.mark.parametrize("depth", [1, 128, 4096])
def test_depths(serve: Serve, depth: int) -> None:
    disk = serve(Memory(MIB), depth=depth, max_io_size=4096)
    assert disk.info().depth == depth
    round_trip(disk.path)


@pytest.mark.parametrize("queues", [1, 2, 4])
def test_queues_have_a_thread_each(serve: Serve, queues: int) -> None:
    needs(CPUs(queues))
    disk = serve(Memory(MIB), queues=queues)
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name.startswith("ublk")] == [
        f"ublk{disk.id}-q{queue}" for queue in range(queues)
    ]
    assert disk.info().queues == queues


def test_more_queues_than_cpus_are_refused_by_name() -> None:
    target = Memory(MIB)
    disk = Device(target, queues=64, id=5)
    with pytest.raises(OSError, match="asked for 64, the kernel granted") as refused:
        disk.start()
    granted = re.search(r"granted (\d+)", str(refused.value))
    assert granted is not None
    count = int(granted[1])
    assert len(CPUS) <= count < 64
    assert str(refused.value).startswith("[Errno 95] queues of device 5: ")
    assert refused.value.__notes__[1] == (
        f"What to do: ask for at most {count}: one for each CPU of this machine."
    )
    assert disk.state is DeviceState.STOPPED
    assert existing() == set()


# ---- affinity ----


def allowed_cpus(disk: Device) -> list[set[int]]:
    """By queue: the CPUs that the kernel lets its thread run on."""
    found = {}
    for thread in threading.enumerate():
        if match := re.fullmatch(rf"ublk{disk.id}-q(\d+)", thread.name):
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            [ranges] = re.findall(r"Cpus_allowed_list:\s*(\S+)", status)
            found[int(match[1])] = {
                cpu
                for one in ranges.split(",")
                for cpu in range(int(one.split("-")[0]), int(one.split("-")[-1]) + 1)
            }
    return [found[queue] for queue in sorted(found)]


def test_affinity_follows_the_kernels_queues(serve: Serve, controller: pyublk.Controller) -> None:
    queues = min(2, len(CPUS))
    disk = serve(Null(size=MIB), queues=queues)
    kernels = [controller.queue_affinity(disk.id, queue) & set(CPUS) for queue in range(queues)]
    assert allowed_cpus(disk) == kernels
    assert set().union(*kernels) == set(CPUS)


def test_affinity_as_given(serve: Serve) -> None:
    queues = min(2, len(CPUS))
    wish = [{cpu} for cpu in reversed(CPUS[:queues])]
    assert allowed_cpus(serve(Null(size=MIB), queues=queues, affinity=wish)) == wish


def test_affinity_off(serve: Serve) -> None:
    queues = min(2, len(CPUS))
    disk = serve(Null(size=MIB), queues=queues, affinity=None)
    assert allowed_cpus(disk) == [set(CPUS)] * queues
    assert os.sched_getaffinity(0) == set(CPUS)


def test_affinity_to_a_cpu_that_is_not_there() -> None:
    disk = Device(Null(size=MIB), affinity=[{1023}])
    message = r"a queue's thread cannot be kept to CPUs \[1023\]: Invalid argument; this process "
    with pytest.raises(OSError, match=message):
        disk.start()
    assert disk.state is DeviceState.STOPPED


# ---- drops and exits ----


def test_a_dropped_disk_warns_and_goes() -> None:
    disk = Device(Memory(MIB))  # the place that is told
    disk.start()
    path = disk.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del disk
        gc.collect()
    [warning] = [one for one in caught if one.category is ResourceWarning]
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "the place that is told" in text
    )
    assert str(warning.message) == (
        f"<Device {path} live target Memory>, made at {__file__}:{line}, was dropped while open: "
        "use `with` or stop()"
    )
    assert not Path(path).exists()


ENDS_WITHOUT_STOP = """
from pyublk.targets import File
disk = pyublk.Device(File(sys.argv[1], size=MIB))
disk.start()
keep = open(disk.path, "r+b", buffering=0)
keep.write(b"cached" * 1000)
tell(disk.id)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    variations(
        [("", 0), ("sys.exit(3)", 3), ("raise SystemError('by hand')", 1)],
        [("raise SystemError('by hand')", 1)],
    ),
    ids=["falls off", "exits", "raises"],
)
def test_a_program_that_ends_without_a_stop(
    controller: pyublk.Controller, tmp_path: Path, end: str, code: int
) -> None:
    """Its page cache has reached the target all the same."""
    kept = tmp_path / "kept"
    with Server(ENDS_WITHOUT_STOP.format(end=end), kept) as program:
        number = int(program.line())
        assert program.ended() == code
        assert "warning" not in program.errors().lower()
    assert device_is_gone(controller, number)
    assert kept.read_bytes()[:6000] == b"cached" * 1000


@pytest.mark.thorough
def test_a_program_whose_main_thread_ends_in_wait(controller: pyublk.Controller) -> None:
    """The documented shape: `with`, then `wait`, until a signal comes."""
    program = """
with pyublk.Device(Memory(MIB)) as disk:
    tell_when_waiting(disk.id)
    disk.wait()
tell(disk.state)
"""
    for number in (signal.SIGINT, signal.SIGTERM):
        with Server(program) as server:
            device = int(server.line())
            server.send(number)
            assert server.line() == "stopped"
            assert server.ended() == 0
            assert server.errors() == ""
        assert device_is_gone(controller, device)


# ---- starts that fail half-way ----


class FailsToOpen(Memory):
    closed = 0

    def open(self) -> None:
        raise PermissionError(13, "the vault is closed")

    def close(self) -> None:
        self.closed += 1


class NoHandler(pyublk.NativeTarget):
    """Forgot to set its pointer."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


class Closing(Memory):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def no_trace_of(disk: Device) -> bool:
    return disk.state is DeviceState.STOPPED and existing() == set()


def test_a_target_that_fails_to_open() -> None:
    target = FailsToOpen(MIB)
    disk = Device(target)
    with pytest.raises(PermissionError, match="the vault is closed"):
        disk.start()
    assert no_trace_of(disk)
    assert target.closed == 0  # it was never open


def test_parameters_that_no_kernel_takes() -> None:
    target = Closing(MIB)
    target.size = 1000
    disk = Device(target)
    with pytest.raises(ValueError, match="size must be a multiple of the logical block size"):
        disk.start()
    assert no_trace_of(disk)
    assert target.closed == 1


def test_an_id_in_use(serve: Serve) -> None:
    first = serve(Memory(MIB))
    target = Closing(MIB)
    disk = Device(target, id=first.id)
    with pytest.raises(FileExistsError, match=f"ADD_DEV on device {first.id}: .*id is in use"):
        disk.start()
    assert disk.state is DeviceState.STOPPED
    assert target.closed == 1
    round_trip(first.path)  # the other's disk was left alone


def test_a_file_in_the_place_of_the_disk() -> None:
    """What a program leaves that writes to a disk which is gone: writes would go there."""
    stray = Path("/dev/ublkb77")
    stray.write_bytes(b"not a disk")
    try:
        target = Closing(MIB)
        disk = Device(target, id=77)
        with pytest.raises(pyublk.DeviceLost, match=r"ublkb77 is not the disk.*remove"):
            disk.start()
        assert no_trace_of(disk)
        assert target.closed == 1
        assert stray.read_bytes() == b"not a disk"
    finally:
        stray.unlink()
    with Device(Memory(MIB), id=77) as disk:
        round_trip(disk.path)


def test_a_pointer_that_was_not_set() -> None:
    target = NoHandler(size=MIB)
    disk = Device(target)
    with pytest.raises(pyublk.InvalidTarget, match=r"NoHandler\.handler is 0: set it before open"):
        disk.start()
    assert no_trace_of(disk)
    assert target.closed == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_a_queue_that_cannot_be_primed(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Descriptors run out for one of two queues, whichever it is."""
    queues = min(2, len(CPUS))
    needs(CPUs(failing + 1))

    def queue(fd: int, number: int, **options: Any) -> pyublk.Queue:
        # The other one takes part in nothing but the map of a queue that is not there.
        return pyublk.Queue(fd, number + 100 if number == failing else number, **options)

    monkeypatch.setattr("pyublk.engines.base.Queue", queue)
    target = Closing(MIB)
    disk = Device(target, queues=queues)
    with pytest.raises(OSError, match=f"queue {failing + 100}: Invalid argument") as refused:
        disk.start()
    assert "use the depth and the queues that the device was granted" in refused.value.__notes__[1]
    assert no_trace_of(disk)
    assert target.closed == 1


NO_DESCRIPTORS = """
import errno
import resource

with pyublk.Controller() as controller:
    for spare in range(30):
        disk = pyublk.Device(Memory(MIB))
        used = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + spare))
        try:
            disk.start()
        except OSError as error:
            assert error.errno == errno.EMFILE, error
        else:
            disk.stop()
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
        assert disk.state == "stopped"
        assert controller.devices() == [], spare
tell(spare)
"""


@pytest.mark.thorough
def test_descriptors_that_run_out_at_any_step() -> None:
    """One descriptor more each time, until it starts: every failure on the way leaves nothing."""
    assert 0 < int(run_program(NO_DESCRIPTORS)) < 29


class FailsDuringTheScan(pyublk.Target):
    def __init__(self, error: BaseException) -> None:
        super().__init__(size=MIB)
        self.error = error
        self.armed = True

    def read(self, offset: int, buffer: memoryview) -> None:
        if self.armed:
            raise self.error

    def write(self, offset: int, data: memoryview) -> None:
        pass


@pytest.mark.parametrize("error", [OSError(5, "no"), RuntimeError("no"), KeyboardInterrupt()])
def test_a_partition_scan_that_fails(serve: Serve, error: BaseException) -> None:
    """The disk is there all the same: what it holds is the client's business."""
    target = FailsDuringTheScan(error)
    disk = serve(target)
    assert disk.state is DeviceState.LIVE
    until(lambda: disk.stats().total.errors, what="the scan has met the failure")
    target.armed = False
    with Blocks(disk.path) as client:
        assert len(client.read(4096, 65536)) == 4096


class HangsDuringTheScan(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=MIB)
        self.release = threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        self.release.wait()

    def write(self, offset: int, data: memoryview) -> None:
        pass


@pytest.mark.leaves_threads
def test_a_partition_scan_that_hangs() -> None:
    """Where the scan is part of the start, the deadline ends it; else stop does. The disk goes."""
    target = HangsDuringTheScan()
    disk = Device(target, deadline=2, stop_timeout=1)
    try:
        try:
            disk.start()
        except TimeoutError as error:
            assert "START_DEV" in str(error)  # noqa: PT017
        else:
            with pytest.raises(pyublk.HandlerTimeout):
                disk.stop()
        assert no_trace_of(disk)
    finally:
        target.release.set()


# ---- what it costs to be there ----


def test_an_idle_server_is_small() -> None:
    """Its buffers, of 512 MiB, take memory when requests come."""
    program = """
from pathlib import Path
from pyublk.targets import Null
target = Null(size=1 << 30)
queues = min(4, len(os.sched_getaffinity(0)))
with pyublk.Device(target, queues=queues, depth=128, max_io_size=MIB, path="copy"):
    status = Path("/proc/self/status").read_text()
tell(int(status.partition("VmRSS:")[2].split()[0]) * 1024)
"""
    assert int(run_program(program)) < 60 * MIB


def test_a_sparse_tebibyte_takes_no_memory(serve: Serve) -> None:
    target = Ram(size=1 << 40)
    disk = serve(target)
    with Blocks(disk.path) as client:
        assert client.size == 1 << 40
        client.write(b"e" * 4096, (1 << 40) - 4096)
        assert client.read(4096, (1 << 40) - 4096) == b"e" * 4096
    assert target.resident() < 4 * MIB


# ---- new sizes ----


def test_a_new_size(serve: Serve, controller: pyublk.Controller) -> None:
    target = Memory(2 * MIB)
    target.size = MIB
    disk = serve(target)
    if not controller.features().has(Feature.UPDATE_SIZE):
        with pytest.raises(OSError, match=f"UPDATE_SIZE on device {disk.id}: ") as refused:
            disk.resize(2 * MIB)
        assert "older than Linux 6.16" in str(refused.value)
        assert "delete the device and add it with the new size" in refused.value.__notes__[1]
        return
    with Blocks(disk.path) as client:
        assert client.size == MIB
        disk.resize(2 * MIB)
        assert client.size == 2 * MIB
        client.write(b"n" * 4096, 2 * MIB - 4096)
        assert bytes(target.data[-4096:]) == b"n" * 4096
        assert disk.params.basic.size == 2 * MIB
        with pytest.raises(ValueError, match=r"loses the data beyond.*shrink=True"):
            disk.resize(MIB)
        disk.resize(MIB, shrink=True)
        assert client.size == MIB
    assert Path(f"/sys/block/{Path(disk.path).name}/size").read_text() == f"{MIB // 512}\n"
