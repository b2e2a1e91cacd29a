"""Disks that outlive their servers: each mode of recovery, `Device.take_over` and `Device.swap`."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve
from files import FILES, AsyncFile, PlainFile
from load import Load
from memory import AsyncMemory, CallbackMemory, DeferredMemory, Memory, ParallelMemory
from needs import needs, only_where
from servers import Server, until
from variations import variations

import pyublk
from pyublk.control import Controller
from pyublk.targets import File, Linear, Mirror, Null, Ram
from pyublk.uapi import DeviceStatus, Feature

MIB = 1 << 20

#: argv: the kind of target, its file, then options of the Device. Serves until it is killed, or
#: stops the disk when it is told to.
SERVE = """
from pathlib import Path
from files import FILES

target = FILES[sys.argv[1]](Path(sys.argv[2]))
options = dict(eval(sys.argv[3]))
with pyublk.Device(target, **options) as disk:
    tell(disk.id)
    sys.stdin.readline()
tell("stopped")
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with path.open("wb") as file:
        file.truncate(MIB)
    return path


@pytest.fixture
def orphans() -> Iterator[ExitStack]:
    """Deletes what the test leaves waiting: by design no helper does."""
    with ExitStack() as stack:
        yield stack


def killed(
    stack: ExitStack,
    kind: str,
    store: Path,
    body: Callable[[int], Any] | None = None,
    **options: Any,
) -> int:
    """A disk whose server was killed by SIGKILL after `body` has run."""
    with Server(SERVE, kind, store, repr(options)) as server:
        device = int(server.line())
        stack.callback(_delete, device)
        if body is not None:
            body(device)
        server.process.kill()
        server.ended()
    return device


def abandoned(stack: ExitStack, target: pyublk.Target, **options: Any) -> int:
    """A disk whose server left it to others, without a process that is started and killed."""
    disk = pyublk.Device(target, recovery="resend", **options)
    disk.start()
    stack.callback(_delete, disk.id)
    disk._life.disk().spared = True
    disk.stop()
    return disk.id


def _delete(device: int) -> None:
    with Controller(deadline=20) as controller, suppress(pyublk.DeviceNotFound):
        controller.delete(device)


def status(device: int) -> DeviceStatus:
    with Controller() as controller:
        return controller.info(device).status


def waits(device: int) -> None:
    """Until the kernel has noticed that the server is gone."""
    states = (DeviceStatus.QUIESCED, DeviceStatus.FAIL_IO)
    until(lambda: status(device) in states, what="the disk waits for a server")


# ---- a server that dies ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("file", {"queues": 2}),
        ("plain", {"queues": 2, "workers": 2}),
        pytest.param("async", {}, marks=pytest.mark.thorough),
    ],
    ids=["mapped", "workers", "async"],
)
def test_no_request_of_a_killed_server_is_lost(
    orphans: ExitStack, store: Path, kind: str, options: dict[str, Any]
) -> None:
    def kill_under_load(device: int) -> None:
        load.append(orphans.enter_context(Load(f"/dev/ublkb{device}")))

    load: list[Load] = []
    device = killed(orphans, kind, store, kill_under_load, recovery="resend", **options)
    with pyublk.Device.take_over(device, FILES[kind](store)) as disk:
        assert (disk.id, disk.info().queues) == (device, options.get("queues", 1))
        load[0].goes_on()
        load[0].__exit__(None, None, None)
        load[0].check()
        assert load[0].failed == 0
        assert disk.stats().total.errors == 0
        assert str(disk.data_path).endswith("(the disk has it already)")
    assert not os.path.exists(f"/dev/ublkb{device}")


def test_requests_fail_while_nobody_serves(orphans: ExitStack, store: Path) -> None:
    needs(Feature.USER_RECOVERY_FAIL_IO)

    def kill_under_load(device: int) -> None:
        load.append(orphans.enter_context(Load(f"/dev/ublkb{device}", may_fail=True)))

    load: list[Load] = []
    device = killed(orphans, "file", store, kill_under_load, recovery="fail", queues=2)
    waits(device)
    with Blocks(f"/dev/ublkb{device}") as client, pytest.raises(OSError, match="I/O error"):
        client.write(b"x" * 4096, 0)
    until(lambda: load[0].failed, what="a client's request fails")
    with pyublk.Device.take_over(device, File(store)):
        load[0].goes_on()
        load[0].__exit__(None, None, None)
        load[0].check()


def test_fail_needs_a_newer_kernel(controller: Controller) -> None:
    only_where(
        not controller.features().has(Feature.USER_RECOVERY_FAIL_IO), "this kernel has that mode"
    )
    with pytest.raises(pyublk.FeatureMissing, match=r"USER_RECOVERY_FAIL_IO .* needs Linux 6\.13"):
        pyublk.Device(Null(size=MIB), recovery="fail").start()


def test_without_recovery_the_disk_of_a_killed_server_goes(orphans: ExitStack, store: Path) -> None:
    device = killed(orphans, "file", store, recovery="none")
    until(lambda: not os.path.exists(f"/dev/ublkb{device}"), what="the helper deletes it")


def test_a_disk_is_taken_over_again_and_again(orphans: ExitStack, store: Path) -> None:
    """Also by other kinds of target, on threads and loops of others."""
    device = abandoned(orphans, File(store), path="copy", queues=2)
    path = f"/dev/ublkb{device}"
    program = SERVE.replace("pyublk.Device(target,", f"pyublk.Device.take_over({device}, target,")
    for number, kind in enumerate(("plain", "async")):
        with Server(program, kind, store, "{}") as server:
            assert server.line() == str(device)
            with Blocks(path) as client:
                client.write(bytes([number + 1]) * 4096, 8192)
            server.process.kill()
            server.ended()
    with pyublk.Servers(threads=2) as servers:
        disk = pyublk.Device.take_over(device, PlainFile(store), on=servers)
        with disk, Blocks(path) as client:
            assert client.read(4096, 8192) == b"\x02" * 4096

    async def on_a_loop() -> None:
        device = await asyncio.to_thread(abandoned, orphans, AsyncFile(store))
        async with pyublk.Device.take_over(device, AsyncFile(store)) as disk:
            assert await asyncio.to_thread(first_bytes, disk.path) == bytes(4)

    asyncio.run(on_a_loop())


def first_bytes(path: str) -> bytes:
    with Blocks(path, os.O_RDONLY) as client:
        return client.read(4096, 0)[:4]


def test_what_the_page_cache_has_is_written_at_the_stop(serve: Serve, store: Path) -> None:
    """The kernel would throw it away."""
    disk = serve(File(store), recovery="resend")
    with Blocks(disk.path, direct=False) as client:
        os.pwrite(client.fd, b"cached" * 1000, 65536)
        disk.stop()
    assert store.read_bytes()[65536:71536] == b"cached" * 1000


# ---- what cannot be taken over ----


def refused(device: int, target: pyublk.Target, **options: Any) -> Exception:
    """What the start of a take-over says."""
    disk = pyublk.Device.take_over(device, target, **options)
    with pytest.raises((OSError, ValueError, pyublk.UblkError)) as refusal:
        disk.start()
    assert disk.state is pyublk.DeviceState.STOPPED
    return refusal.value


def test_who_cannot_be_taken_over(serve: Serve, controller: Controller, tmp_path: Path) -> None:
    disk = serve(Ram(size=MIB), recovery="resend")
    error = refused(disk.id, Ram(size=MIB))
    assert isinstance(error, pyublk.DeviceBusy)
    assert f"device {disk.id} is served by process {os.getpid()} " in str(error)
    plain = serve(Ram(size=MIB))
    error = refused(plain.id, Ram(size=MIB))
    assert isinstance(error, ValueError)
    assert "was made without recovery" in str(error)
    foreign = controller.add(flags=Feature.USER_RECOVERY)
    error = refused(foreign.id, Ram(size=MIB))
    controller.delete(foreign.id)
    assert str(error).startswith(f"device {foreign.id} was not made by pyublk")
    disk.stop()
    assert isinstance(refused(disk.id, Ram(size=MIB)), pyublk.DeviceNotFound)
    with pytest.raises(TypeError, match="queues is device 3's, and stays as it is: leave it out"):
        pyublk.Device.take_over(3, Ram(size=MIB), queues=2)
    assert first_bytes(plain.path) == bytes(4)


def test_who_differs_from_the_disk_is_refused_and_it_waits(orphans: ExitStack, store: Path) -> None:
    device = abandoned(orphans, File(store), path="copy")
    waits(device)
    other = store.with_name("other")
    other.write_bytes(bytes(2 * MIB))
    for target, words in (
        (File(other), "basic.size 1048576, and the target has 2097152"),
        (File(store, block_size=4096), "basic.logical_block_size 512, and the target has 4096"),
        (File(store, read_only=True), "basic.read_only False, and the target has True"),
        (Memory(MIB), "basic.volatile_cache True, and the target has False"),
        (Memory(MIB), "discard, which the target has not"),
    ):
        error = refused(device, target)
        assert isinstance(error, ValueError)
        assert f"cannot serve /dev/ublkb{device}: the disk has " in str(error)
        assert words in str(error)
        assert status(device) is DeviceStatus.QUIESCED
    missing = refused(device, File(store.with_name("missing"), size=MIB))
    assert isinstance(missing, FileNotFoundError)
    assert not store.with_name("missing").exists()
    with pyublk.Device.take_over(device, File(store)) as disk:
        assert first_bytes(disk.path) == bytes(4)


def test_a_stopped_one_is_refused(orphans: ExitStack, store: Path, controller: Controller) -> None:
    device = abandoned(orphans, File(store))
    waits(device)
    controller.stop(device)
    error = refused(device, File(store))
    assert isinstance(error, pyublk.DeviceLost)
    assert f"device {device} is stopped" in str(error)


@pytest.mark.parametrize(
    "step",
    variations(
        ["start_recovery", "open_char_device", "begin_serving", "end_recovery", "refresh"],
        ["open_char_device", "end_recovery"],
    ),
)
def test_a_take_over_that_fails_leaves_the_disk_waiting(
    orphans: ExitStack, store: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    device = abandoned(orphans, PlainFile(store), queues=2)
    with monkeypatch.context() as patch:
        fail_once(patch, step)
        if step == "refresh":  # it serves by then: the start has succeeded for the kernel
            with pytest.raises(OSError, match="injected"):
                pyublk.Device.take_over(device, PlainFile(store)).start()
            until(lambda: not os.path.exists(f"/dev/ublkb{device}"), what="it is stopped")
            return
        assert "injected" in str(refused(device, PlainFile(store)))
    waits(device)
    with pyublk.Device.take_over(device, PlainFile(store), stop_timeout=5) as disk:
        assert first_bytes(disk.path) == bytes(4)


def fail_once(patch: pytest.MonkeyPatch, step: str, times: int = 1) -> None:
    """Makes a step fail, where it begins to change something."""
    from pyublk.kernel_disk import KernelDisk
    from pyublk.lifecycle import Lifecycle

    owner: Any = Lifecycle if hasattr(Lifecycle, step) else KernelDisk
    real = getattr(owner, step)
    calls: list[None] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) <= times:
            raise OSError(errno.ENOMEM, "injected")
        return real(*arguments, **options)

    patch.setattr(owner, step, failing)


def test_a_disk_of_other_software_is_taken_over_on_request(
    orphans: ExitStack, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it told its clients, and the target does as well, may differ from what ours would."""
    told = pyublk.Profile.params

    def of_another(profile: pyublk.Profile, *sizes: int, **options: bool) -> pyublk.Params:
        params = told(profile, *sizes, **options)
        return replace(params, basic=replace(params.basic, io_opt=65536), discard=None)

    with monkeypatch.context() as patch:
        patch.setattr("pyublk.kernel_disk.new_cookie", lambda: 0)
        patch.setattr("pyublk.Profile.params", of_another)
        device = abandoned(orphans, File(store), path="copy")
    assert "was not made by pyublk" in str(refused(device, File(store)))
    small = refused(device, Null(size=2 * MIB), foreign=True)
    assert "the disk has basic.size 1048576, and the target has 2097152" in str(small)
    with pyublk.Device.take_over(device, File(store), foreign=True) as disk:
        assert disk.params.basic.io_opt == 65536
        assert first_bytes(disk.path) == bytes(4)
    assert not os.path.exists(f"/dev/ublkb{device}")


def test_two_who_take_over_at_once(orphans: ExitStack, store: Path) -> None:
    device = abandoned(orphans, PlainFile(store))
    waits(device)
    started: list[pyublk.Device] = []
    refusals: list[Exception] = []

    def take() -> None:
        disk = pyublk.Device.take_over(device, PlainFile(store), deadline=3)
        try:
            disk.start()
        except Exception as error:
            refusals.append(error)
        else:
            started.append(disk)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        assert (len(started), len(refusals)) == (1, 1), refusals
        assert isinstance(refusals[0], pyublk.DeviceBusy)
        assert first_bytes(f"/dev/ublkb{device}") == bytes(4)
    finally:
        for disk in started:
            disk.stop()


#: argv: a file. Its writes hang.
HANGS = """
import time
from pathlib import Path
from files import PlainFile

class Hangs(PlainFile):
    def write(self, offset, data):
        tell("writes")
        time.sleep(1000)

with pyublk.Device(Hangs(Path(sys.argv[1])), depth=1, recovery="resend") as disk:
    tell(disk.id)
    sys.stdin.readline()
"""


@pytest.mark.thorough
def test_a_server_that_had_every_request_is_replaced(orphans: ExitStack, store: Path) -> None:
    """Linux before 6.16 takes half a minute to notice its end, longer than a command may take."""
    written: list[int] = []

    def write() -> None:
        with Blocks(f"/dev/ublkb{device}") as client:
            written.append(client.write(b"a" * 4096, 0))

    with Server(HANGS, store) as server:
        device = int(server.line())
        orphans.callback(_delete, device)
        client = threading.Thread(target=write, daemon=True)
        client.start()
        assert server.line() == "writes"
        server.process.kill()
        server.ended()
    with pyublk.Device.take_over(device, PlainFile(store), deadline=5):
        client.join(30)
        assert written == [4096]
    assert store.read_bytes()[:4096] == b"a" * 4096


# ---- another target ----


def sharing(old: Any, make: Callable[..., Any]) -> Any:
    """A target of another kind with the bytes of the old one."""
    new = make(MIB)
    new.data = old.data
    if isinstance(new, CallbackMemory):
        new._bytes, new.context = old._bytes, old.context
    return new


def test_a_target_is_swapped_under_load(serve: Serve) -> None:
    needs(Feature.QUIESCE)
    first = CallbackMemory(MIB)
    disk = serve(first, queues=2, recovery="resend", max_io_size=65536)
    assert first_bytes(disk.path) == bytes(4)
    with Load(disk.path) as load:
        target: Any = first
        for make in (Memory, AsyncMemory, ParallelMemory, CallbackMemory, AsyncMemory, Memory):
            if make is CallbackMemory:
                new: Any = CallbackMemory(MIB)
                new.data, new._bytes, new.context = first.data, first._bytes, first.context
            else:
                new = sharing(target, make)
            disk.swap(new)
            assert disk.target is new
            load.goes_on()
            target = new
    load.check()
    assert load.failed == 0
    assert disk.stats().total.errors == 0
    assert disk.stats().total.requests >= sum(load.done)


@pytest.mark.parametrize(
    "options",
    [
        {"queues": 2},
        pytest.param({"path": "user-copy"}, marks=pytest.mark.thorough),
        pytest.param({"path": "zero-copy"}, marks=pytest.mark.thorough),
    ],
    ids=["best path", "user copy", "zero copy"],
)
def test_a_file_is_swapped_for_itself_under_load(
    serve: Serve, controller: Controller, store: Path, options: dict[str, Any]
) -> None:
    """And no other process can have it meanwhile."""
    needs(Feature.QUIESCE)
    disk = serve(File(store), recovery="resend", **options)
    with Load(disk.path) as load:
        for _ in range(3):
            old = disk.target
            disk.swap(File(store))
            assert isinstance(old, File)
            assert not old.backing
            load.goes_on()
            with pytest.raises(OSError, match="in use: this process serves it already"):
                pyublk.Device(File(store)).start()
    load.check()
    disk.stop()
    with pyublk.Device(File(store)) as again:
        assert again.id >= 0


def test_a_mapped_target_is_swapped_for_others(serve: Serve, store: Path) -> None:
    needs(Feature.QUIESCE)
    disk = serve(File(store), recovery="resend", path="copy", queues=2)
    with Load(disk.path, clients=2) as load:
        for kind in ("layer", "plain", "async", "file"):
            disk.swap(FILES[kind](store))
            load.goes_on()
        disk.swap(Linear(store))
        load.goes_on()
    load.check()
    assert load.failed == 0


def test_a_swap_with_workers_and_with_answers_from_elsewhere(serve: Serve) -> None:
    needs(Feature.QUIESCE)
    first = ParallelMemory(MIB)
    disk = serve(first, recovery="resend", workers=2, max_io_size=65536)
    with Load(disk.path) as load:
        disk.swap(sharing(first, ParallelMemory))
        load.goes_on()
        with pytest.raises(ValueError, match="workers=2 needs a target with plain methods"):
            disk.swap(Null(size=MIB))
        load.goes_on()
    load.check()
    later = DeferredMemory(MIB)
    disk = serve(later, recovery="resend", max_io_size=65536)
    with Load(disk.path) as load:
        disk.swap(sharing(later, DeferredMemory))
        load.goes_on()
    load.check()


def test_a_swap_on_shared_servers_and_on_a_loop(store: Path) -> None:
    needs(Feature.QUIESCE)
    with pyublk.Servers(threads=2) as servers:
        disk = pyublk.Device(PlainFile(store), on=servers, recovery="resend", queues=2, path="copy")
        with disk, Load(disk.path) as load:
            for kind in ("async", "file", "plain"):
                disk.swap(FILES[kind](store))
                load.goes_on()
        assert load.failed == 0

    async def on_a_loop() -> None:
        async with pyublk.Device(AsyncFile(store), recovery="resend") as disk:
            with pytest.raises(RuntimeError, match="nor on its loop"):
                disk.swap(AsyncFile(store))
            await disk.swap_async(AsyncFile(store))
            await asyncio.to_thread(first_bytes, disk.path)
            assert not await disk.wait_async(0.2)

    asyncio.run(on_a_loop())


def test_where_a_swap_is_refused(serve: Serve, controller: Controller) -> None:
    features = controller.features()
    if features.has(Feature.BATCH_IO):
        disk = serve(Memory(MIB), recovery="resend", batch=True)
        with pytest.raises(ValueError, match=r"needs a device without batch I/O"):
            disk.swap(Memory(MIB))
    else:
        disk = serve(Memory(MIB), recovery="resend")
        if features.has(Feature.QUIESCE):
            disk.swap(Memory(MIB))
        else:
            with pytest.raises(pyublk.FeatureMissing, match=r"QUIESCE .* needs Linux 6\.16"):
                disk.swap(Memory(MIB))
    assert first_bytes(disk.path) == bytes(4)


def test_a_swap_ends_no_wait(serve: Serve) -> None:
    needs(Feature.QUIESCE)
    first = Memory(MIB)
    disk = serve(first, recovery="resend")
    ended: list[bool] = []
    waiting = threading.Thread(target=lambda: ended.append(disk.wait()))
    waiting.start()
    disk.swap(sharing(first, Memory))
    assert not disk.wait(0.3)
    assert not ended
    disk.stop()
    waiting.join(20)
    assert ended == [True]


class Hangs(Memory):
    """Whose reads at 64 KiB return when they are released."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.released = threading.Event()
        self.hangs = threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        if offset == 65536:
            self.hangs.set()
            self.released.wait(60)
        super().read(offset, buffer)


def test_a_handler_that_hangs_is_given_up_by_a_swap(serve: Serve) -> None:
    needs(Feature.QUIESCE)
    target = Hangs(MIB)
    disk = serve(target, recovery="resend", stop_timeout=1, queues=1)
    outcomes: list[object] = []

    def read() -> None:
        with Blocks(disk.path, os.O_RDONLY) as client:
            try:
                outcomes.append(client.read(4096, 65536))
            except OSError as error:
                outcomes.append(error.errno)

    client = threading.Thread(target=read)
    client.start()
    assert target.hangs.wait(30)
    try:
        with pytest.raises(pyublk.HandlerTimeout) as told:
            disk.swap(sharing(target, Memory))
        words = f"every request it held was failed, and {disk.path} is now served by Memory"
        assert f"a handler of Hangs never returned: {words}" in str(told.value)
        assert first_bytes(disk.path) == bytes(4)
        client.join(30)
        # Where it was not failed in time, the kernel has sent it to the new target.
        assert outcomes in ([errno.EIO], [bytes(4096)])
    finally:
        target.released.set()


def test_who_cannot_be_swapped(serve: Serve, store: Path, tmp_path: Path) -> None:
    needs(Feature.QUIESCE)
    plain = serve(Memory(MIB))
    with pytest.raises(ValueError, match='made with recovery="resend"'):
        plain.swap(Memory(MIB))
    disk = serve(File(store), recovery="resend")
    with pytest.raises(ValueError, match=r"the disk has basic\.size 1048576, and the target has"):
        disk.swap(Null(size=2 * MIB))
    (tmp_path / "leg").write_bytes(bytes(MIB))
    with pytest.raises(OSError, match="in use: this process serves it already"):
        disk.swap(Mirror(store, tmp_path / "leg", size=MIB))
    with pytest.raises(FileNotFoundError):
        disk.swap(File(tmp_path / "missing"))
    assert isinstance(disk.target, File)
    assert first_bytes(disk.path) == bytes(4)
    disk.stop()
    with pytest.raises(pyublk.DeviceClosed, match="the device is stopped, only a live one"):
        disk.swap(File(store))


@pytest.mark.parametrize(
    "step",
    variations(
        ["_end_serving", "start_recovery", "open_char_device", "begin_serving", "end_recovery"],
        ["begin_serving", "end_recovery"],
    ),
)
def test_a_swap_that_fails_leaves_the_old_target(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    needs(Feature.QUIESCE)
    first = Memory(MIB)
    disk = serve(first, recovery="resend", queues=2)
    with Load(disk.path) as load:
        with monkeypatch.context() as patch:
            fail_once(patch, step)
            with pytest.raises(OSError, match="injected"):
                disk.swap(sharing(first, Memory))
        assert disk.target is first
        load.goes_on()
        disk.swap(sharing(first, AsyncMemory))
        load.goes_on()
    load.check()
    assert load.failed == 0


def test_a_swap_that_cannot_be_undone_leaves_a_disk_that_waits(
    orphans: ExitStack, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(Feature.QUIESCE)
    disk = pyublk.Device(File(store), recovery="resend")
    disk.start()
    device = disk.id
    orphans.callback(_delete, device)
    with monkeypatch.context() as patch:
        fail_once(patch, "end_recovery", times=2)
        with pytest.raises(pyublk.DeviceLost, match=f"/dev/ublkb{device} has no server any more"):
            disk.swap(File(store))
    assert disk.state is pyublk.DeviceState.STOPPED
    waits(device)
    with pyublk.Device.take_over(device, File(store)) as again:
        assert first_bytes(again.path) == bytes(4)
