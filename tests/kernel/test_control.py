"""Every control command on a real device: what it does, and the sentence when it cannot."""

import errno
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from memory import Memory
from needs import needs, only_where
from servers import Server, run_program, running_children, start_recovery, until
from test_queue_by_hand import ByHand, Bytes, by_hand

import pyublk
from pyublk import Controller
from pyublk.control import CONTROL_NODE, new_cookie
from pyublk.params import Basic, Discard, DmaAlign, Params, Segment
from pyublk.uapi import DeviceStatus, Feature

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))
NOBODY = 65534

SIMPLE = Params(basic=Basic(size=MIB, max_io_size=65536))


@pytest.fixture
def added(controller: Controller) -> Iterator[pyublk.DeviceInfo]:
    """A device that was never started."""
    info = controller.add(depth=8, max_io_size=65536)
    yield info
    controller.delete(info.id)


@pytest.fixture
def disk(controller: Controller) -> Iterator[ByHand]:
    """A live disk, served by this process."""
    with by_hand(controller) as made:
        made.configure()
        made.live(Bytes().serve)
        yield made


def has(controller: Controller, feature: Feature) -> bool:
    return controller.features().has(feature)


@contextmanager
def refused(number: int, command: str, cause: str, whose: str, remedy: str) -> Iterator[None]:
    """The body is refused with this errno, in these words."""
    with pytest.raises(OSError, match=rf"^\[Errno {number}\] {command}: ") as caught:
        yield
    assert caught.value.errno == number
    assert f"({errno.errorcode[number]}): " in str(caught.value)
    assert cause in str(caught.value)
    assert caught.value.__notes__[0] == f"Cause: {whose}."
    assert remedy in caught.value.__notes__[1]


# ---- add, info, delete ----


def test_a_device_as_it_was_granted(controller: Controller) -> None:
    cookie = new_cookie()
    info = controller.add(
        queues=1, depth=3, max_io_size=10000, id=17, cookie=cookie, flags=Feature.USER_COPY
    )
    try:
        assert (info.id, info.path, info.char_path) == (17, "/dev/ublkb17", "/dev/ublkc17")
        assert (info.queues, info.depth, info.status) == (1, 3, DeviceStatus.DEAD)
        assert info.max_io_size == 10000 // mmap.PAGESIZE * mmap.PAGESIZE
        assert Feature.USER_COPY | Feature.CMD_IOCTL_ENCODE in info.flags
        assert info.server_pid is None
        assert (info.cookie, info.ours) == (cookie, True)
        assert (info.owner_uid, info.owner_gid) == (os.geteuid(), os.getegid())
        assert controller.info(17) == controller.info2(17) == info
        assert Path(info.char_path).is_char_device()
        assert not Path(info.path).exists()
    finally:
        controller.delete(17)
    assert not Path(info.char_path).exists()


def test_a_device_of_somebody_else_is_not_ours(controller: Controller) -> None:
    info = controller.add(depth=1, cookie=4711)
    assert (info.cookie, info.ours) == (4711, False)
    controller.delete(info.id)


def test_devices_are_listed_in_order(controller: Controller) -> None:
    assert controller.devices() == []
    ids = [12, 3, 101]
    made = {number: controller.add(depth=1, id=number) for number in ids}
    assert controller.devices() == [made[number] for number in sorted(ids)]
    for number in ids:
        controller.delete(number)
    assert controller.devices() == []


def test_delete_without_waiting(controller: Controller, added: pyublk.DeviceInfo) -> None:
    """While the char device is open the id stays taken, and the call returns all the same."""
    info = controller.add(depth=1)
    fd = os.open(info.char_path, os.O_RDWR | os.O_CLOEXEC)
    controller.delete(info.id, wait=False)
    assert not Path(info.char_path).exists()
    assert info.id in {device.id for device in controller.devices()} or info.id != added.id
    os.close(fd)
    until(lambda: [device.id for device in controller.devices()] == [added.id], what="it goes")


def test_an_id_in_use(controller: Controller, added: pyublk.DeviceInfo) -> None:
    with refused(
        errno.EEXIST,
        f"ADD_DEV on device {added.id}",
        "the id is in use",
        "the caller",
        "choose another id",
    ):
        controller.add(id=added.id)


def test_flags_that_do_not_go_together(controller: Controller) -> None:
    with refused(
        errno.EINVAL,
        "ADD_DEV on a new device",
        "the kernel refused queues, depth, or a combination of flags",
        "the caller",
        "pyublk features",
    ):
        controller.add(flags=Feature.ZONED)


def test_a_flag_that_was_dropped_is_told(controller: Controller) -> None:
    """Root's devices are never unprivileged: the kernel clears the flag without a word."""
    with pytest.raises(OSError, match="flags of device 6: asked for UNPRIVILEGED_DEV") as dropped:
        controller.add(id=6, flags=Feature.UNPRIVILEGED_DEV)
    assert dropped.value.errno == errno.EOPNOTSUPP
    assert "the kernel granted none of them without saying so" in str(dropped.value)
    assert dropped.value.__notes__[0] == "Cause: the driver."
    with pytest.raises(OSError, match="NEED_GET_DATA, the kernel granted only the others"):
        controller.add(id=6, flags=Feature.NEED_GET_DATA | Feature.USER_COPY)
    assert controller.devices() == []


def test_a_flag_that_this_kernel_does_not_know(controller: Controller) -> None:
    known = controller.features().mask or 0
    missing = [feature for feature in Feature if not known & feature]
    missing = [feature for feature in missing if feature not in (Feature.INTEGRITY,)]
    only_where(bool(missing), "this kernel knows them all")
    youngest = max(missing)
    with pytest.raises(OSError, match=f"asked for {youngest.name}, the kernel granted"):
        controller.add(flags=youngest)
    assert not has(controller, youngest)
    assert "here is Linux" in str(controller.features().reason(youngest))


def test_a_queue_count_that_was_lowered_is_told(controller: Controller) -> None:
    with pytest.raises(OSError, match="queues of device 6: asked for 4096, the kernel") as lowered:
        controller.add(id=6, queues=4096, depth=1)
    assert "one for each CPU of this machine" in lowered.value.__notes__[1]
    assert controller.devices() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queues": 0}, "queues must be 1 to 4096, not 0"),
        ({"depth": 5000}, "depth must be 1 to 4096, not 5000"),
        ({"id": -1}, "device id must be 0 to 1048575, not -1"),
        ({"id": 1 << 20}, "device id must be 0 to 1048575, not 1048576"),
    ],
)
def test_wishes_out_of_range(controller: Controller, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controller.add(**options)


ON_A_DEVICE: dict[str, Callable[[Controller, int], object]] = {
    "DEL_DEV": lambda c, n: c.delete(n),
    "DEL_DEV_ASYNC": lambda c, n: c.delete(n, wait=False),
    "START_DEV": lambda c, n: c.start(n, os.getpid()),
    "STOP_DEV": lambda c, n: c.stop(n),
    "TRY_STOP_DEV": lambda c, n: c.safe_stop(n),
    "SET_PARAMS": lambda c, n: c.set_params(n, SIMPLE),
    "GET_PARAMS": lambda c, n: c.get_params(n),
    "GET_DEV_INFO": lambda c, n: c.info(n),
    "GET_DEV_INFO2": lambda c, n: c.info2(n),
    "GET_QUEUE_AFFINITY": lambda c, n: c.queue_affinity(n, 0),
    "START_USER_RECOVERY": lambda c, n: c.start_recovery(n),
    "END_USER_RECOVERY": lambda c, n: c.end_recovery(n, os.getpid()),
    "QUIESCE_DEV": lambda c, n: c.quiesce(n),
    "REG_BUF": lambda c, n: c.register_buffer(n, mmap.PAGESIZE, mmap.PAGESIZE),
    "UNREG_BUF": lambda c, n: c.unregister_buffer(n, 0),
}


@pytest.mark.parametrize("command", ON_A_DEVICE)
def test_a_device_that_is_not_there(controller: Controller, command: str) -> None:
    match = rf"^\[Errno 19\] {command} on device 77: "
    with pytest.raises(pyublk.DeviceNotFound, match=match) as missing:
        ON_A_DEVICE[command](controller, 77)
    assert missing.value.errno == errno.ENODEV
    assert "there is no such device" in str(missing.value)
    assert missing.value.__notes__[0] == "Cause: the caller."
    assert "pyublk list" in missing.value.__notes__[1]
    with pytest.raises(ValueError, match="device id must be 0 to 1048575, not 1048576"):
        ON_A_DEVICE[command](controller, 1 << 20)


def test_update_size_of_a_device_that_is_not_there(controller: Controller) -> None:
    with pytest.raises(OSError, match=r"GET_DEV_INFO on device 77: .*there is no such device"):
        controller.update_size(77, MIB)


# ---- parameters ----


def test_parameters_come_back_as_they_were_set(
    controller: Controller, added: pyublk.DeviceInfo
) -> None:
    basic = Basic(
        size=3 * MIB,
        logical_block_size=1024,
        physical_block_size=4096,
        io_min=8192,
        io_opt=65536,
        max_io_size=32768,
        chunk_size=131072,
        read_only=True,
        rotational=True,
        volatile_cache=True,
        fua=True,
        virt_boundary_mask=4095,
    )
    discard = Discard(
        granularity=4096, alignment=1024, max_discard_size=MIB, max_write_zeroes_size=2 * MIB
    )
    wish = Params(basic=basic, discard=discard)
    controller.set_params(added.id, wish)
    got = controller.get_params(added.id)
    assert (got.basic, got.discard) == (basic, discard)
    assert wish.difference(got) == []
    assert got.devt is not None
    assert got.devt.char_minor == os.minor(os.stat(added.char_path).st_rdev)
    assert got.devt.disk_major == 0
    # A second wish replaces all of the first one.
    controller.set_params(added.id, SIMPLE)
    got = controller.get_params(added.id)
    assert (got.basic, got.discard) == (SIMPLE.basic, None)


def test_parameters_that_an_older_kernel_drops(
    controller: Controller, added: pyublk.DeviceInfo
) -> None:
    wish = Params(
        basic=SIMPLE.basic,
        dma_align=DmaAlign(alignment=4096),
        segment=Segment(boundary=4096, max_segment_size=4096, max_segments=16),
    )
    controller.set_params(added.id, wish)
    dropped = wish.difference(controller.get_params(added.id))
    if has(controller, Feature.AUTO_BUF_REG):
        assert dropped == []
    else:
        assert dropped == ["no dma_align", "no segment"]


def test_parameters_that_were_never_set(controller: Controller, added: pyublk.DeviceInfo) -> None:
    with pytest.raises(ValueError, match="the device has no parameters: none were ever set"):
        controller.get_params(added.id)


def test_parameters_beyond_the_buffer(controller: Controller, added: pyublk.DeviceInfo) -> None:
    wish = Params(basic=Basic(size=MIB, max_io_size=2 * added.max_io_size))
    with refused(
        errno.EINVAL,
        f"SET_PARAMS on device {added.id}",
        "the kernel refused a parameter that passed our checks",
        "the driver",
        "compare block sizes, request size and device size",
    ):
        controller.set_params(added.id, wish)


def test_parameters_of_a_started_device(controller: Controller, disk: ByHand) -> None:
    with refused(
        errno.EACCES,
        f"SET_PARAMS on device {disk.info.id}",
        "the device is started already",
        "the caller",
        "between adding and starting",
    ):
        controller.set_params(disk.info.id, SIMPLE)


# ---- start ----


def test_start_makes_it_live(controller: Controller, disk: ByHand) -> None:
    info = controller.info(disk.info.id)
    assert (info.status, info.server_pid) == (DeviceStatus.LIVE, os.getpid())
    devt = controller.get_params(disk.info.id).devt
    assert devt is not None
    assert os.makedev(devt.disk_major, devt.disk_minor) == os.stat(disk.path).st_rdev
    controller.stop(disk.info.id)
    assert controller.info(disk.info.id).status is DeviceStatus.DEAD
    assert not Path(disk.path).exists()


def test_start_without_parameters(controller: Controller, added: pyublk.DeviceInfo) -> None:
    with refused(
        errno.EINVAL,
        f"START_DEV on device {added.id}",
        "the parameters were never set",
        "the caller",
        "set the parameters first",
    ):
        controller.start(added.id, os.getpid())


def test_start_without_fetches_ends_at_its_deadline(
    controller: Controller, added: pyublk.DeviceInfo
) -> None:
    controller.set_params(added.id, SIMPLE)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"START_DEV on device {added.id}: ") as late:
        controller.start(added.id, os.getpid(), deadline=0.5)
    assert 0.5 <= time.monotonic() - began < 10
    assert late.value.errno == errno.ETIMEDOUT
    assert "not answered within 0.5 s; it waits until every tag of every queue was fetched" in str(
        late.value
    )
    assert late.value.__notes__ == [
        "Cause: the device's server.",
        "What to do: start all the queues that the kernel granted, and serve them during the "
        "start.",
    ]


def test_the_controllers_own_deadline(added: pyublk.DeviceInfo) -> None:
    with Controller(deadline=0.3) as hasty:
        hasty.set_params(added.id, SIMPLE, deadline=20)
        with pytest.raises(TimeoutError, match=r"not answered within 0\.3 s"):
            hasty.start(added.id, os.getpid())


def test_start_for_another_process(controller: Controller) -> None:
    needs(Feature.UPDATE_SIZE)  # the same release: older ones take any pid
    with by_hand(controller) as disk:
        disk.configure()
        disk.serve(Bytes().serve)
        with refused(
            errno.EINVAL,
            f"START_DEV on device {disk.info.id}",
            "the pid is not that of the process that opened the char device",
            "the caller",
            "open the char device in the process that serves",
        ):
            controller.start(disk.info.id, 1)


def test_start_twice(controller: Controller, disk: ByHand) -> None:
    with refused(
        errno.EEXIST,
        f"START_DEV on device {disk.info.id}",
        "the device is live already",
        "the caller",
        "delete the device and add it again: a device starts once",
    ):
        controller.start(disk.info.id, os.getpid())


def test_start_after_stop(controller: Controller, added: pyublk.DeviceInfo) -> None:
    """Sent to the kernel, it would be the end of this machine."""
    controller.set_params(added.id, SIMPLE)
    controller.stop(added.id)
    with pytest.raises(pyublk.DeviceClosed, match=f"device {added.id} was stopped, and kernels"):
        controller.start(added.id, os.getpid())
    controller.delete(added.id)
    again = controller.add(id=added.id, depth=1)
    controller.set_params(again.id, SIMPLE)
    with pytest.raises(TimeoutError):  # this one may: it waits for the fetches
        controller.start(again.id, os.getpid(), deadline=0.3)


# ---- stop ----


class Holding(Bytes):
    """Holds the read of one place until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.holds, self.release = threading.Event(), threading.Event()

    def answer(self, io: pyublk.IO) -> None:
        if io.offset == MIB // 2:
            self.holds.set()
            self.release.wait()
        super().answer(io)


def test_stop_ends_at_its_deadline_and_goes_on_without_us(controller: Controller) -> None:
    held = Holding()
    with by_hand(controller) as disk:
        disk.configure()
        disk.live(held.serve)
        found: list[bytes] = []

        def read() -> None:
            with Blocks(disk.path, os.O_RDONLY) as client:
                found.append(client.read(4096, MIB // 2))

        client = threading.Thread(target=read)
        client.start()
        try:
            assert held.holds.wait(20)
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=f"STOP_DEV on device {disk.info.id}: ") as late:
                controller.stop(disk.info.id, deadline=0.5)
            assert time.monotonic() - began < 10
            assert (
                "not answered within 0.5 s; the kernel still works on it, in a process that was "
                "left behind; it waits for requests that the server holds"
            ) in str(late.value)
            assert "kill it: that releases the device" in late.value.__notes__[1]
        finally:
            held.release.set()
        client.join(20)
        assert found == [bytes(4096)]
        disk.ended()  # by the stop that we gave up
        assert disk.failures == []
    until(lambda: not running_children(), what="what was left behind ends")


def test_stop_of_a_device_that_never_started(
    controller: Controller, added: pyublk.DeviceInfo
) -> None:
    controller.stop(added.id)
    assert controller.info(added.id).status is DeviceStatus.DEAD


def test_safe_stop(controller: Controller, disk: ByHand) -> None:
    number = disk.info.id
    if not has(controller, Feature.SAFE_STOP_DEV):
        with refused(
            errno.EOPNOTSUPP,
            f"TRY_STOP_DEV on device {number}",
            "this kernel is older than Linux 7.0",
            "the driver",
            "make sure that nobody uses the device, then stop it by STOP_DEV",
        ):
            controller.safe_stop(number)
        return
    with (
        Blocks(disk.path, os.O_RDONLY),
        refused(
            errno.EBUSY,
            f"TRY_STOP_DEV on device {number}",
            "somebody has the block device open",
            "another process",
            "unmount it, or wait",
        ),
    ):
        controller.safe_stop(number)
    with Blocks(disk.path, os.O_RDONLY) as client:
        assert client.read(512, 0) == bytes(512)
    controller.safe_stop(number)
    assert controller.info(number).status is DeviceStatus.DEAD
    with refused(
        errno.ENODEV,
        f"TRY_STOP_DEV on device {number}",
        "there is no such device, or it is not started",
        "the caller",
        "pyublk list",
    ):
        controller.safe_stop(number)


# ---- features, affinity, sizes ----


def test_features_are_those_of_the_kernel(controller: Controller) -> None:
    features = controller.features()
    assert features.mask is not None
    assert Feature.USER_RECOVERY | Feature.CMD_IOCTL_ENCODE in Feature(features.mask)
    assert features.kernel_release == os.uname().release
    assert features.privileged
    by_name = {one.name: one for one in features}
    assert by_name["USER_RECOVERY"].available
    for one in features:
        assert one.available == (one.reason is None)
        if one.feature not in (Feature.UNPRIVILEGED_DEV, Feature.SUPPORT_ZERO_COPY):
            assert one.available == bool(features.mask & one.feature), one.name


def test_the_queues_share_the_cpus(controller: Controller) -> None:
    queues = min(2, len(CPUS))
    info = controller.add(queues=queues, depth=1)
    sets = [controller.queue_affinity(info.id, queue) for queue in range(queues)]
    assert all(sets)
    assert sum(map(len, sets)) == len(frozenset[int]().union(*sets))
    assert frozenset[int]().union(*sets) >= set(CPUS)
    with refused(
        errno.EINVAL,
        f"GET_QUEUE_AFFINITY on device {info.id}",
        "the device has no such queue",
        "the caller",
        "the number of queues that the device was granted",
    ):
        controller.queue_affinity(info.id, queues)
    controller.delete(info.id)


def test_update_size_needs_a_live_device(controller: Controller, added: pyublk.DeviceInfo) -> None:
    """Refused before the kernel sees it: one of them crashes."""
    controller.set_params(added.id, SIMPLE)
    with refused(
        errno.ENODEV,
        f"UPDATE_SIZE on device {added.id}",
        "the device is DEAD, and only a LIVE one can be resized",
        "the caller",
        "pyublk list",
    ):
        controller.update_size(added.id, 2 * MIB)
    for size in (0, -512, 1000):
        with pytest.raises(ValueError, match=f"positive multiple of 512 bytes, not {size}"):
            controller.update_size(added.id, size)


def test_update_size(controller: Controller, disk: ByHand) -> None:
    if not has(controller, Feature.UPDATE_SIZE):
        with refused(
            errno.EOPNOTSUPP,
            f"UPDATE_SIZE on device {disk.info.id}",
            "this kernel is older than Linux 6.16",
            "the driver",
            "add it with the new size",
        ):
            controller.update_size(disk.info.id, 2 * MIB)
        return
    controller.update_size(disk.info.id, MIB // 2)
    assert controller.get_params(disk.info.id).basic.size == MIB // 2
    with Blocks(disk.path, os.O_RDONLY) as client:
        assert client.size == MIB // 2


# ---- shared memory ----


def test_shared_buffers(controller: Controller) -> None:
    if not has(controller, Feature.SHMEM_ZC):
        info = controller.add(depth=1)
        for command, use in (
            ("REG_BUF", lambda: controller.register_buffer(info.id, 4096, 4096)),
            ("UNREG_BUF", lambda: controller.unregister_buffer(info.id, 0)),
        ):
            with refused(
                errno.EOPNOTSUPP,
                f"{command} on device {info.id}",
                "the device was added without SHMEM_ZC, or this kernel is older than Linux 7.1",
                "the caller",
                "pyublk features",
            ):
                use()
        controller.delete(info.id)
        return
    with by_hand(controller, flags=Feature.SHMEM_ZC) as disk:
        number = disk.info.id
        disk.configure()
        disk.live(Bytes().serve)
        refusals: list[OSError] = []

        def share(address: int, length: int) -> None:
            first = controller.register_buffer(number, address, length)
            try:
                controller.register_buffer(number, address, length)
            except OSError as error:
                refusals.append(error)
            controller.unregister_buffer(number, first)
            try:
                controller.unregister_buffer(number, first)
            except OSError as error:
                refusals.append(error)

        memory = os.memfd_create("shared")
        os.ftruncate(memory, 65536)
        with mmap.mmap(memory, 65536) as pages:
            pages[:] = b"s" * 65536
            import ctypes

            anchor = ctypes.c_char.from_buffer(pages)
            share(ctypes.addressof(anchor), 65536)
            del anchor
        os.close(memory)
        assert [refusal.errno for refusal in refusals] == [errno.EEXIST, errno.ENOENT]
        assert "a page of it is registered already" in str(refusals[0])
        assert "no buffer is registered under that index" in str(refusals[1])


# ---- recovery ----

#: Serves one queue by hand, with its bytes in a file; argv: device, "start" or "recover", file.
BY_HAND = """
import mmap
from pyublk.uapi import Op

device, how, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
controller = pyublk.Controller()
info = controller.info(device)
with open(store, "r+b") as file:
    data = mmap.mmap(file.fileno(), 0)
while True:
    try:
        char = os.open(info.char_path, os.O_RDWR | os.O_CLOEXEC)
        break
    except OSError as error:
        if error.errno != 16:
            raise
        time.sleep(0.01)
primed = threading.Event()

def serve():
    with pyublk.Queue(char, 0, depth=info.depth, buffer_size=info.max_io_size) as queue:
        queue.fetch()
        primed.set()
        for io in queue:
            span = slice(io.offset, io.offset + io.length)
            if io.op is Op.READ:
                io.buffer[:] = data[span]
            else:
                data[span] = io.buffer
            io.complete()
    os.close(char)
    tell("ended")

server = threading.Thread(target=serve)
server.start()
primed.wait()
if how == "recover":
    controller.end_recovery(device, os.getpid())
else:
    controller.start(device, os.getpid())
tell("live")
server.join()
"""


@contextmanager
def recoverable(controller: Controller, tmp_path: Path, flags: Feature) -> Iterator[Any]:
    store = tmp_path / "store"
    store.write_bytes(bytes(MIB))
    info = controller.add(depth=8, max_io_size=65536, flags=flags)
    try:
        controller.set_params(info.id, SIMPLE)
        yield info, lambda how: Server(BY_HAND, info.id, how, store)
    finally:
        controller.delete(info.id, deadline=20)


def read_in_thread(path: str, found: list[bytes]) -> threading.Thread:
    def read() -> None:
        with Blocks(path, os.O_RDONLY) as client:
            found.append(client.read(4096, 8192))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_a_killed_server_is_replaced(controller: Controller, tmp_path: Path) -> None:
    found: list[bytes] = []
    with recoverable(controller, tmp_path, Feature.USER_RECOVERY) as (info, server):
        with server("start") as first:
            assert first.line() == "live"
            with Blocks(info.path) as client:
                client.write(b"o" * 4096, 8192)
            with refused(
                errno.EBUSY,
                f"START_USER_RECOVERY on device {info.id}",
                "the old server still has the char device open",
                "the device's server",
                "wait for the state QUIESCED",
            ):
                controller.start_recovery(info.id)
            with refused(
                errno.EBUSY,
                f"END_USER_RECOVERY on device {info.id}",
                "the device is not in recovery",
                "the caller",
                "start the recovery first",
            ):
                controller.end_recovery(info.id, first.pid, deadline=5)
            first.process.kill()
            first.ended()
        assert controller.wait_for_status(info.id, DeviceStatus.QUIESCED).server_pid in (
            None,
            first.pid,  # Linux before 6.16 keeps it
        )
        waiting = read_in_thread(info.path, found)
        start_recovery(controller, info.id)
        with server("recover") as second:
            assert second.line() == "live"
            live = controller.info(info.id)
            assert (live.status, live.server_pid) == (DeviceStatus.LIVE, second.pid)
            waiting.join(20)
            assert found == [b"o" * 4096]
            controller.stop(info.id)
            assert second.line() == "ended"
            assert second.ended() == 0


@pytest.mark.parametrize(
    "feature", [Feature.USER_RECOVERY_FAIL_IO, Feature.QUIESCE], ids=["fail", "quiesce"]
)
def test_what_an_older_kernel_leaves_out_of_a_device_is_told(
    controller: Controller, feature: Feature
) -> None:
    only_where(not has(controller, feature), f"this kernel has {feature.name}")
    with pytest.raises(OSError, match=f"asked for {feature.name}, the kernel granted"):
        controller.add(flags=Feature.USER_RECOVERY | feature)


def test_no_recovery_without_its_flag(controller: Controller, disk: ByHand) -> None:
    number = disk.info.id
    with refused(
        errno.EINVAL,
        f"START_USER_RECOVERY on device {number}",
        "the device was added without USER_RECOVERY",
        "the caller",
        "add it again with that flag",
    ):
        controller.start_recovery(number)
    with refused(
        errno.EINVAL,
        f"END_USER_RECOVERY on device {number}",
        "the device has no recovery",
        "the caller",
        "open the char device in the new server",
    ):
        controller.end_recovery(number, os.getpid(), deadline=5)
    with refused(
        errno.EOPNOTSUPP,
        f"QUIESCE_DEV on device {number}",
        "the device was added without QUIESCE, or this kernel is older than Linux 6.16",
        "the caller",
        "add the device with USER_RECOVERY and QUIESCE",
    ):
        controller.quiesce(number)


def test_waiting_for_a_status_ends(controller: Controller, added: pyublk.DeviceInfo) -> None:
    message = f"device {added.id} is DEAD, not LIVE or QUIESCED, after 0.1 s"
    with pytest.raises(TimeoutError, match=re.escape(message)):
        controller.wait_for_status(added.id, DeviceStatus.LIVE, DeviceStatus.QUIESCED, timeout=0.1)
    assert controller.wait_for_status(added.id, DeviceStatus.DEAD) == added


# ---- rights ----

AS_NOBODY = f"""
import errno
from pyublk.uapi import ControlCommand, Feature
from pyublk.params import Basic, Params
device = int(sys.argv[1])
params = Params(basic=Basic(size=MIB, max_io_size=65536))
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})

def refusal(attempt):
    try:
        attempt()
    except OSError as error:
        tell(type(error).__name__, error, *error.__notes__, sep="|")
    else:
        tell("allowed")
"""


@contextmanager
def control_node_for_all() -> Iterator[None]:
    mode = os.stat(CONTROL_NODE).st_mode & 0o777
    os.chmod(CONTROL_NODE, 0o666)
    try:
        yield
    finally:
        os.chmod(CONTROL_NODE, mode)


def test_a_control_node_that_is_closed_to_us() -> None:
    only_where(not os.stat(CONTROL_NODE).st_mode & 0o006, "this machine opens it to everybody")
    said = run_program(AS_NOBODY + "refusal(pyublk.Controller)", 0)
    assert said.split("|") == [
        "PermissionError",
        f"[Errno 13] {CONTROL_NODE} is closed to user {NOBODY}",
        "Cause: the caller.",
        "What to do: run as root, or have the node's rights changed.\n",
    ]


def test_commands_without_rights(controller: Controller, added: pyublk.DeviceInfo) -> None:
    """The node is open to all: now it is the kernel that refuses."""
    program = """
with pyublk.Controller() as controller:
    assert controller.features().has(Feature.UNPRIVILEGED_DEV)
    assert not controller.features().privileged
    refusal(controller.add)
    refusal(lambda: controller.info(device))
    refusal(lambda: controller.set_params(device, params))
    refusal(lambda: controller.start(device, os.getpid()))
    refusal(lambda: controller.delete(device))
"""
    with control_node_for_all():
        said = run_program(AS_NOBODY + program, added.id).splitlines()
    commands = ["GET_DEV_INFO", "SET_PARAMS", "START_DEV", "DEL_DEV"]
    subjects = ["ADD_DEV on a new device"]
    subjects += [f"{command} on device {added.id}" for command in commands]
    assert len(said) == len(subjects)
    for line, subject in zip(said, subjects, strict=True):
        kind, message, whose, remedy = line.split("|")
        assert kind == "PermissionError"
        assert message.startswith(f"[Errno 1] {subject}: Operation not permitted (EPERM): ")
        assert "it needs CAP_SYS_ADMIN, unless" in message
        assert whose == "Cause: the caller."
        assert remedy.startswith("What to do: run as root")
    assert controller.info(added.id) == added


def test_a_device_of_an_unprivileged_user(controller: Controller) -> None:
    """Its commands must name its node, whose rights decide who may command it."""
    added = """
with pyublk.Controller() as controller:
    info = controller.add(depth=1, flags=Feature.UNPRIVILEGED_DEV)
    tell(info.id)
    refusal(lambda: controller.info(info.id))
    refusal(lambda: controller.delete(info.id))
"""
    commanded = """
with pyublk.Controller() as controller:
    tell(controller.info(device).owner_uid)
    controller.set_params(device, params)
    tell(controller.get_params(device).basic.size == params.basic.size)
    refusal(lambda: controller.delete(device, wait=False))
    controller.stop(device)
    controller.delete(device)
"""
    with control_node_for_all():
        number, *closed = run_program(AS_NOBODY + added, 0).splitlines()
        for command, words in zip(("GET_DEV_INFO", "DEL_DEV"), closed, strict=True):
            assert f"{command} on device {number}: Permission denied (EACCES): " in words
            assert "the device's node is closed to you" in words
        [info] = controller.devices()
        assert Feature.UNPRIVILEGED_DEV in info.flags
        assert (info.id, info.owner_uid, info.owner_gid) == (int(number), NOBODY, NOBODY)
        os.chown(info.char_path, NOBODY, NOBODY)  # as a rule of udev's would
        owner, stored, at_once = run_program(AS_NOBODY + commanded, number).splitlines()
    assert (owner, stored) == (str(NOBODY), "True")
    assert "an unprivileged device cannot be deleted without waiting" in at_once
    assert controller.devices() == []


def test_root_commands_a_device_of_an_unprivileged_user(controller: Controller) -> None:
    program = """
with pyublk.Controller() as controller:
    tell(controller.add(depth=1, flags=Feature.UNPRIVILEGED_DEV).id)
"""
    with control_node_for_all():
        number = int(run_program(AS_NOBODY + program, 0))
    assert controller.info(number).owner_uid == NOBODY
    controller.delete(number)
    assert controller.devices() == []


def test_io_uring_that_is_forbidden_to_users() -> None:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    before = switch.read_text()
    program = """
refusal(pyublk.Ring)
refusal(lambda: pyublk.Controller().features())
"""
    switch.write_text("1")
    try:
        with control_node_for_all():
            said = run_program(AS_NOBODY + program, 0).splitlines()
    finally:
        switch.write_text(before)
    expected = (
        "PermissionError|[Errno 1] io_uring is forbidden: the sysctl kernel.io_uring_disabled is 1"
        "|Cause: this machine's set-up.|What to do: set it to 0, or run with CAP_SYS_ADMIN "
        "or in the group kernel.io_uring_group."
    )
    assert said == [expected, expected]


# ---- the controller itself ----


def test_a_closed_controller_says_so() -> None:
    controller = Controller()
    controller.close()
    controller.close()
    for use in (controller.features, lambda: controller.info(0)):
        with pytest.raises(pyublk.DeviceClosed, match="this Controller is closed"):
            use()


def test_threads_share_a_controller(controller: Controller, added: pyublk.DeviceInfo) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(controller.info(added.id))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [added] * 8


def test_a_command_leaves_no_process_and_no_descriptor(controller: Controller) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        controller.features()
    assert running_children() == set()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_of_the_program_is_not_reaped(controller: Controller) -> None:
    """Commands run in children of ours: the program's own are left for it to wait for."""
    with Server("tell('here')") as server:
        assert server.line() == "here"
        controller.features()
        assert server.ended() == 0


def test_signals_are_handled_while_a_command_waits(
    controller: Controller, added: pyublk.DeviceInfo
) -> None:
    import signal

    class Alarmed(Exception):
        pass

    def alarm(_number: int, _frame: object) -> None:
        raise Alarmed

    controller.set_params(added.id, SIMPLE)
    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Alarmed):
            controller.start(added.id, os.getpid(), deadline=40)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert running_children() == set()
    assert controller.info(added.id).status is DeviceStatus.DEAD


def test_memory_of_a_device_goes_with_its_target(controller: Controller) -> None:
    """Nothing of a stopped Device holds what the caller made."""
    import gc
    import weakref

    target = Memory(MIB)
    watched = weakref.ref(target)
    device = pyublk.Device(target)
    device.start()
    device.stop()
    del target, device
    gc.collect()
    assert watched() is None
