"""Ring on the host's kernel: NOPs, timeouts, files and messages need no driver."""

import ctypes
import errno
import gc
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyublk
from pyublk import Ring
from pyublk.uring import RECOMMENDED, Completion, Opcode, RingFeature, SetupFlag

PLAIN = SetupFlag.SUBMIT_ALL


def io_uring_works() -> bool:
    try:
        Ring(1).close()
    except PermissionError:
        return False
    return True


needs_io_uring = pytest.mark.skipif(
    not io_uring_works(), reason="io_uring is forbidden here (see `pyublk doctor`)"
)


def drain(ring: Ring, count: int) -> list[Completion]:
    """Takes `count` completions; fails when they do not come within seconds."""
    found: list[Completion] = []
    for _ in range(count + 5):
        if len(found) >= count:
            break
        ring.submit(1, timeout=10)
        found += ring.completions()
    assert len(found) == count
    return found


# ---- shapes and set-up ----


@needs_io_uring
@pytest.mark.parametrize("wanted", [PLAIN, RECOMMENDED], ids=["plain", "recommended"])
@pytest.mark.parametrize(
    "shape",
    [SetupFlag(0), SetupFlag.SQE128, SetupFlag.CQE32, SetupFlag.SQE128 | SetupFlag.CQE32],
    ids=["64-16", "128-16", "64-32", "128-32"],
)
def test_every_shape_round_trips(shape: SetupFlag, wanted: SetupFlag) -> None:
    with Ring(8, required=shape, wanted=wanted) as ring:
        assert ring.flags & shape == shape
        for first in range(0, 100, 5):  # several times round the ring
            for number in range(first, first + 5):
                ring.nop(number)
            assert ring.unsubmitted == 5
            assert ring.submit(5) == 5
            assert (ring.unsubmitted, ring.ready) == (0, 5)
            extra = bytes(16) if SetupFlag.CQE32 & shape else b""
            assert ring.completions() == [
                Completion(number, 0, 0, extra) for number in range(first, first + 5)
            ]
        assert ring.enters == 20
        assert ring.overflows == 0


@needs_io_uring
def test_default_flags_are_the_recommended_ones() -> None:
    with Ring() as ring:
        assert ring.entries == 64
        assert ring.cq_entries == 128
        assert ring.flags & ~RECOMMENDED == 0
        assert ring.flags & PLAIN  # older than every kernel with ublk
        assert RingFeature.NODROP & ring.features
    with Ring(5, cq_entries=100) as ring:
        assert (ring.entries, ring.cq_entries) == (8, 128)


@needs_io_uring
def test_a_wanted_flag_that_is_refused_is_dropped() -> None:
    """DEFER_TASKRUN without SINGLE_ISSUER is refused by every kernel."""
    with Ring(8, wanted=SetupFlag.DEFER_TASKRUN) as ring:
        assert ring.flags & SetupFlag.DEFER_TASKRUN == 0
        ring.nop(3)
        assert drain(ring, 1) == [Completion(3, 0, 0)]


@needs_io_uring
def test_a_required_flag_that_is_refused_is_an_error() -> None:
    with pytest.raises(OSError, match="lacks a required io_uring set-up flag") as refused:
        Ring(8, required=1 << 31)
    assert refused.value.errno == errno.EINVAL
    assert refused.value.__notes__ == [
        "Cause: the caller.",
        "What to do: pass the flag as `wanted` instead of `required`.",
    ]


@pytest.mark.parametrize("entries", [0, 32769])
def test_entries_out_of_range(entries: int) -> None:
    with pytest.raises(ValueError, match=rf"^entries must be 1 to 32768, not {entries}$"):
        Ring(entries)


# ---- where io_uring is forbidden ----

#: What a process gives itself as its seccomp filter, `rules` (struct sock_filter).
SECCOMP = """
import ctypes
import struct

code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
filter = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, filter, 0, 0) == 0, "PR_SET_SECCOMP"
"""

#: io_uring_setup answers with EPERM, as containers' filters have it.
FORBIDDEN = """
# load the system call's number; is it io_uring_setup?; then EPERM; else allowed
rules = ((0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000))
"""

#: io_uring_enter answers with an errno when it is to wait for nothing: an enter that waits for a
#: completion, which is when a kernel that was short of something has it again, goes through.
REFUSING = """
import errno
import sys

error = int(sys.argv[1])
# load the system call's number; is it io_uring_enter?; load min_complete; is it 0?; then the errno
rules = (
    (0x20, 0, 0, 0),
    (0x15, 0, 3, 426),
    (0x20, 0, 0, 32 if sys.byteorder == "little" else 36),
    (0x15, 0, 1, 0),
    (0x06, 0, 0, 0x50000 | error),
    (0x06, 0, 0, 0x7FFF0000),
)
"""


def run_filtered(
    rules: str, program: str, *arguments: object
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", rules + SECCOMP + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_forbidden(program: str) -> "subprocess.CompletedProcess[str]":
    return run_filtered(FORBIDDEN, program)


def test_a_seccomp_filter_gives_one_clear_sentence() -> None:
    done = run_forbidden(
        """
import pyublk
try:
    pyublk.Ring()
except PermissionError as error:
    print(error, *error.__notes__, sep="\\n")
"""
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[Errno 1] io_uring is forbidden, most likely by the seccomp filter of a container",
        "Cause: this machine's set-up.",
        "What to do: run outside the container, or with a profile that allows io_uring_setup.",
    ]


def test_a_disk_without_a_kernel_needs_no_io_uring() -> None:
    done = run_forbidden(
        """
from pyublk.targets import Ram
from pyublk.testing import Disk
with Disk(Ram(size=1 << 20)) as disk:
    disk.pwrite(b"x" * 4096, 8192)
    assert disk.pread(8192, 4096) == bytes(4096) + b"x" * 4096
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- full queues ----


@needs_io_uring
def test_a_full_submission_queue_is_submitted_by_itself() -> None:
    with Ring(4, cq_entries=64) as ring:
        for number in range(30):
            ring.nop(number)
            assert 1 <= ring.unsubmitted <= 4
        assert [done.user_data for done in drain(ring, 30)] == list(range(30))


@needs_io_uring
@pytest.mark.parametrize("wanted", [PLAIN, RECOMMENDED], ids=["plain", "recommended"])
def test_overflown_completions_are_all_delivered(wanted: SetupFlag) -> None:
    with Ring(4, cq_entries=4, wanted=wanted) as ring:
        for number in range(40):
            ring.nop(number)
            ring.submit()
        assert ring.ready <= 4
        assert [done.user_data for done in drain(ring, 40)] == list(range(40))
        assert ring.overflows == 0


@needs_io_uring
@pytest.mark.parametrize(
    "wanted", [SetupFlag(0), PLAIN, RECOMMENDED], ids=["stops", "plain", "recommended"]
)
def test_a_refused_entry_does_not_stop_the_batch(wanted: SetupFlag) -> None:
    """Without SUBMIT_ALL the kernel stops behind it, a short submission: submit goes on."""
    with Ring(8, wanted=wanted) as ring:
        ring.nop(0)
        ring.prepare(250, user_data=1)  # no such operation
        ring.nop(2)
        assert ring.submit(3) == 3
        results = {done.user_data: done.result for done in ring.completions()}
    assert results == {0: 0, 1: -errno.EINVAL, 2: 0}


# ---- a kernel that takes nothing for now ----


@needs_io_uring
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EBUSY], ids=["EAGAIN", "EBUSY"])
def test_what_the_kernel_refuses_for_now_is_submitted_later(error: int) -> None:
    """EAGAIN is a kernel short of memory, EBUSY one that wants its completions taken first."""
    done = run_filtered(
        REFUSING,
        """
from pyublk import Ring

ring = Ring(4)
for number in range(4):
    ring.nop(number)
for attempt in range(2):
    try:
        ring.submit()
    except OSError as refused:
        print(refused, ring.unsubmitted)
for use in (ring.nop, lambda number: ring.timeout(60, number)):
    try:
        use(4)
    except BlockingIOError as full:
        print(full, ring.unsubmitted)
assert ring.submit(4, timeout=10) == 4
ring.nop(4)  # the number is free: the time-out that found no room is not held for it
assert ring.submit(1, timeout=10) == 1
print([(done.user_data, done.result) for done in ring.completions()])
""",
        error,
    )
    assert done.stderr == ""
    refusal = f"[Errno {error}] io_uring_enter: {os.strerror(error)} 4"
    full = (
        f"[Errno {errno.EAGAIN}] the submission queue is full and the kernel takes nothing: "
        "take completions first 4"
    )
    expected = [(number, 0) for number in range(5)]
    assert done.stdout.splitlines() == [refusal, refusal, full, full, str(expected)]


@needs_io_uring
def test_a_full_submission_queue_that_cannot_be_submitted_tells_why() -> None:
    """Another thread's refusal is not the sentence about taking completions."""
    with Ring(4) as ring:
        if not ring.flags & SetupFlag.SINGLE_ISSUER:
            pytest.skip("this kernel has no SINGLE_ISSUER")
        for number in range(4):
            ring.nop(number)
        refusals: list[OSError] = []

        def fill() -> None:
            try:
                ring.nop(4)
            except OSError as error:
                refusals.append(error)

        thread = threading.Thread(target=fill)
        thread.start()
        thread.join(30)
        assert str(refusals[0]) == "[Errno 17] io_uring_enter: File exists"
        assert [done.user_data for done in drain(ring, 4)] == list(range(4))


# ---- waiting ----


@needs_io_uring
def test_waits_end_in_time() -> None:
    with Ring(4) as ring:
        assert ring.submit(1, timeout=0.01) == 0
        ring.timeout(0.01, user_data=5)
        assert drain(ring, 1) == [Completion(5, -errno.ETIME, 0)]
        ring.nop()
        assert ring.submit(0, timeout=0) == 1
        for wait in ({"timeout": -1}, {"min_wait": -0.5}):
            with pytest.raises(ValueError, match="timeout must not be negative, not -"):
                ring.submit(1, **wait)


@needs_io_uring
@pytest.mark.parametrize("limit", [None, 60])
def test_a_timeout_that_fires_does_not_end_a_wait_for_more(limit: float | None) -> None:
    with Ring(4) as ring:  # the kernel itself wakes a waiter for each
        for number in range(1, 4):
            ring.timeout(0.01 * number, user_data=number)
        assert ring.submit(3, timeout=limit) == 3
        assert [done.user_data for done in ring.completions()] == [1, 2, 3]


@needs_io_uring
def test_after_the_minimum_wait_one_completion_is_enough() -> None:
    with Ring(4) as ring:
        ring.nop(7)
        if RingFeature.MIN_TIMEOUT & ring.features:
            assert ring.submit(2, timeout=60, min_wait=0.001) == 1
            assert ring.completions() == [Completion(7, 0, 0)]
        else:
            with pytest.raises(pyublk.FeatureMissing, match=r"needs Linux 6\.12"):
                ring.submit(2, timeout=60, min_wait=0.001)


@needs_io_uring
def test_a_signal_ends_a_wait_and_its_handler_runs() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: came.append(number))
    try:
        with Ring(4) as ring:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            assert ring.submit(1, timeout=30) == 0
            assert came == [signal.SIGALRM]
            ring.nop(1)  # the ring is whole
            assert drain(ring, 1) == [Completion(1, 0, 0)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Alarmed(Exception):
    pass


@needs_io_uring
def test_what_a_signal_handler_raises_comes_out_of_the_wait() -> None:
    def alarm(_number: int, _frame: object) -> None:
        raise Alarmed

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with Ring(4) as ring:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(Alarmed):
                ring.submit(1, timeout=30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- files ----


@needs_io_uring
def test_files_are_read_and_written(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b", buffering=0) as file, Ring(8) as ring:
        ring.write(file.fileno(), b"0123456789", 4096, user_data=1)
        assert drain(ring, 1) == [Completion(1, 10, 0)]
        buffer = bytearray(8)
        ring.read(file.fileno(), memoryview(buffer)[2:6], 4098, user_data=2)
        assert drain(ring, 1) == [Completion(2, 4, 0)]
        assert buffer == b"\0\0" + b"2345" + b"\0\0"
        ring.prepare(Opcode.FSYNC, fd=file.fileno(), user_data=3)
        assert drain(ring, 1) == [Completion(3, 0, 0)]
        ring.read(file.fileno(), buffer, 8192, user_data=2)
        assert drain(ring, 1) == [Completion(2, 0, 0)]  # the end of the file


@needs_io_uring
def test_a_buffer_is_kept_until_its_completion(tmp_path: Path) -> None:
    class Pages(mmap.mmap):
        """One that can be watched."""

    reader, writer = os.pipe()
    try:
        with Ring(8) as ring:
            pages = Pages(-1, 4096)
            watched = weakref.ref(pages)
            ring.read(reader, pages, 0, user_data=1)
            del pages
            ring.submit()
            gc.collect()
            assert watched() is not None
            os.write(writer, b"there")
            assert drain(ring, 1) == [Completion(1, 5, 0)]
            gc.collect()
            assert watched() is None
    finally:
        os.close(reader)
        os.close(writer)


@needs_io_uring
@pytest.mark.parametrize(
    "again",
    [
        lambda ring: ring.nop(1),
        lambda ring: ring.timeout(0, user_data=1),
        lambda ring: ring.read(0, bytearray(1), 0, user_data=1),
        lambda ring: ring.prepare(Opcode.NOP, user_data=1),
        lambda ring: ring.msg_ring(0, target_user_data=2, user_data=1),
    ],
    ids=["nop", "timeout", "read", "prepare", "msg_ring"],
)
def test_the_user_data_of_a_kept_buffer_is_taken(again: Callable[[Ring], None]) -> None:
    """Another completion of that name would let go of memory that the kernel still writes."""
    reader, writer = os.pipe()
    try:
        with Ring(8) as ring:
            ring.read(reader, bytearray(4), 0, user_data=1)
            with pytest.raises(ValueError, match=r"^user_data 1 is in flight: choose another"):
                again(ring)
            os.write(writer, b"1234")
            assert drain(ring, 1) == [Completion(1, 4, 0)]
            ring.nop(1)
            assert drain(ring, 1) == [Completion(1, 0, 0)]
    finally:
        os.close(reader)
        os.close(writer)


@needs_io_uring
def test_a_buffer_that_cannot_be_filled() -> None:
    with Ring(8) as ring:
        with pytest.raises(ValueError, match="must be writable, such as a bytearray"):
            ring.read(0, b"1234", 0)
        with pytest.raises(TypeError):
            ring.read(0, "1234", 0)  # type: ignore[arg-type]
        assert ring.unsubmitted == 0


@needs_io_uring
def test_a_command_longer_than_its_entry() -> None:
    for shape, room in ((SetupFlag(0), 16), (SetupFlag.SQE128, 80)):
        with Ring(8, required=shape) as ring:
            message = f"^command has {room + 1} bytes, this ring's entries hold {room}$"
            with pytest.raises(ValueError, match=message):
                ring.prepare(Opcode.URING_CMD, command=bytes(room + 1))


@needs_io_uring
def test_registered_files_and_ring(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"fixed")
    with Ring(8) as ring:
        with open(tmp_path / "file", "rb") as file:
            ring.register_files([file.fileno()])
        ring.register_self()
        buffer = ctypes.create_string_buffer(5)
        place = ctypes.addressof(buffer)
        ring.prepare(Opcode.READ, fd=0, sqe_flags=1, address=place, length=5, user_data=4)
        assert drain(ring, 1) == [Completion(4, 5, 0)]
        assert buffer.raw == b"fixed"
        ring.unregister_files()
        with pytest.raises(OSError, match="io_uring_register: "):
            ring.unregister_files()


@needs_io_uring
def test_an_eventfd_tells_of_completions() -> None:
    with Ring(8) as ring:
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            ring.register_eventfd(event)
            assert select.select([event], [], [], 0)[0] == []
            ring.timeout(0.01, user_data=1)
            ring.submit()
            assert select.select([event], [], [], 30)[0] == [event]
            assert drain(ring, 1) == [Completion(1, -errno.ETIME, 0)]
        finally:
            os.close(event)


# ---- messages, threads ----


@needs_io_uring
def test_a_message_wakes_another_thread() -> None:
    with Ring(8) as ring:
        failures: list[BaseException] = []

        def send() -> None:
            try:
                with Ring(8) as sender:
                    sender.msg_ring(ring.fileno(), target_user_data=4711, result=42, user_data=1)
                    assert drain(sender, 1) == [Completion(1, 0, 0)]
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        assert drain(ring, 1) == [Completion(4711, 42, 0)]
        thread.join(30)
        assert failures == []


@needs_io_uring
def test_only_its_maker_may_submit() -> None:
    with Ring(8) as ring:
        if not ring.flags & SetupFlag.SINGLE_ISSUER:
            pytest.skip("this kernel has no SINGLE_ISSUER")
        refusals: list[OSError] = []

        def submit() -> None:
            try:
                ring.submit()
            except OSError as error:
                refusals.append(error)

        ring.nop(1)
        thread = threading.Thread(target=submit)
        thread.start()
        thread.join(30)
        assert [refusal.errno for refusal in refusals] == [errno.EEXIST]
        assert str(refusals[0]) == "[Errno 17] io_uring_enter: File exists"
        assert drain(ring, 1) == [Completion(1, 0, 0)]


# ---- callbacks ----


@needs_io_uring
def test_for_each_calls_and_takes() -> None:
    with Ring(8) as ring:
        for number in range(5):
            ring.nop(number)
        ring.submit(5)
        seen: list[tuple[int, int]] = []
        assert ring.for_each(lambda user_data, result: seen.append((user_data, result))) == 5
        assert seen == [(number, 0) for number in range(5)]
        assert ring.ready == 0


@needs_io_uring
def test_an_exception_stops_for_each_and_the_rest_stays() -> None:
    with Ring(8) as ring:
        for number in range(5):
            ring.nop(number)
        ring.submit(5)

        def picky(user_data: int, _result: int) -> None:
            if user_data == 2:
                raise LookupError

        with pytest.raises(LookupError):
            ring.for_each(picky)
        assert [done.user_data for done in ring.completions()] == [3, 4]


# ---- closing ----


def rings_open() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "io_uring" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # listdir's own
            continue
    return found


@needs_io_uring
def test_a_closed_ring_says_so() -> None:
    before = rings_open()
    ring = Ring(8)
    assert rings_open() == before + 1
    ring.close()
    ring.close()
    assert rings_open() == before
    for use in (
        ring.fileno,
        ring.submit,
        ring.completions,
        ring.nop,
        ring.unregister_files,
        ring.register_self,
        lambda: ring.ready,
        lambda: ring.unsubmitted,
        lambda: ring.overflows,
        lambda: ring.read(0, bytearray(1), 0),
        lambda: ring.for_each(print),
    ):
        with pytest.raises(ValueError, match=r"^the ring is closed$"):
            use()


@needs_io_uring
def test_a_dropped_ring_is_closed() -> None:
    before = rings_open()
    ring = Ring(8)
    ring.register_self()
    del ring
    gc.collect()
    assert rings_open() == before


def is_kept(buffer: bytearray) -> bool:
    """Whether somebody still has its address."""
    try:
        buffer.append(0)
    except BufferError:
        return True
    return False


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def finish_by_close(ring: Ring) -> None:
    ring.close()


def finish_by_with(ring: Ring) -> None:
    with ring:
        pass


@needs_io_uring
@pytest.mark.parametrize("wanted", [PLAIN, RECOMMENDED], ids=["plain", "recommended"])
@pytest.mark.parametrize("finish", [finish_by_close, finish_by_with, None])
def test_what_is_in_flight_is_cancelled_and_let_go(
    pipe: tuple[int, int], finish: Callable[[Ring], None] | None, wanted: SetupFlag
) -> None:
    ring = Ring(8, wanted=wanted)
    buffers = [bytearray(4096) for _ in range(3)]
    for number, buffer in enumerate(buffers):
        ring.read(pipe[0], buffer, 0, user_data=number)
    ring.timeout(1000, user_data=7)
    ring.submit()
    ring.read(pipe[0], late := bytearray(4096), 0, user_data=8)
    if finish is not None:
        finish(ring)
    del ring
    assert not any(is_kept(buffer) for buffer in [*buffers, late])
    os.write(pipe[1], b"for nobody")
    assert os.read(pipe[0], 100) == b"for nobody"


@needs_io_uring
def test_a_ring_in_a_cycle_lets_go_of_its_buffers_last(pipe: tuple[int, int]) -> None:
    class Owner(bytearray):
        ring: Ring

    before = rings_open()
    owner = Owner(64)
    watched = weakref.ref(owner)
    owner.ring = Ring(8)
    owner.ring.read(pipe[0], owner, 0, user_data=1)
    owner.ring.submit()
    del owner
    gc.collect()
    assert rings_open() == before
    assert watched() is None


@needs_io_uring
def test_what_was_not_submitted_is_not_done_by_a_close(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    with Ring(8) as ring:
        ring.write(pipe[1], b"one", 0, user_data=1)
        ring.write(pipe[1], data := bytearray(b"two"), 0, user_data=2)
    assert not is_kept(data)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 10)


@needs_io_uring
@pytest.mark.parametrize("drop", [False, True], ids=["closed", "dropped"])
def test_what_another_thread_cannot_end_is_kept(pipe: tuple[int, int], drop: bool) -> None:
    """The kernel lets only the thread that made the ring wait for what it began."""
    rings = [Ring(8)]
    buffer = bytearray(64)
    rings[0].read(pipe[0], buffer, 0, user_data=1)
    rings[0].submit()
    told: list[warnings.WarningMessage] = []

    def end() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ring = rings.pop()
            if not drop:
                ring.close()
            del ring
        told.extend(caught)

    thread = threading.Thread(target=end)
    thread.start()
    thread.join(10)
    assert [warning.category for warning in told] == [ResourceWarning]
    assert str(told[0].message) == (
        "the ring was closed with 1 operation(s) that the kernel still carries out: "
        "their buffers are kept until the process ends"
    )
    gc.collect()
    assert is_kept(buffer)


@needs_io_uring
def test_another_thread_closes_a_ring_that_any_thread_may_use(pipe: tuple[int, int]) -> None:
    ring = Ring(8, wanted=PLAIN)
    buffer = bytearray(64)
    ring.read(pipe[0], buffer, 0, user_data=1)
    ring.submit()
    thread = threading.Thread(target=ring.close)
    thread.start()
    thread.join(10)
    assert not is_kept(buffer)


@needs_io_uring
def test_a_thread_that_has_ended_has_nothing_in_flight(pipe: tuple[int, int]) -> None:
    made: list[Ring] = []
    buffer = bytearray(64)

    def begin() -> None:
        made.append(Ring(8))
        made[0].read(pipe[0], buffer, 0, user_data=1)
        made[0].submit()

    thread = threading.Thread(target=begin)
    thread.start()
    task = Path(f"/proc/self/task/{thread.native_id}")
    thread.join(10)
    for _ in range(500):  # what the kernel does behind a join
        if not task.exists():
            break
        time.sleep(0.01)
    made[0].close()
    assert not is_kept(buffer)


@needs_io_uring
def test_a_ring_is_not_closed_under_a_call(pipe: tuple[int, int]) -> None:
    message = "the ring is in use: close it when submit, completions or for_each has returned"
    with Ring(8) as ring:
        refused: list[BaseException] = []

        def close() -> None:
            try:
                ring.close()
            except RuntimeError as error:
                refused.append(error)
            os.write(pipe[1], b"come back")

        ring.read(pipe[0], bytearray(16), 0, user_data=1)
        timer = threading.Timer(0.05, close)
        timer.start()
        ring.submit(1, timeout=10)
        timer.join(10)
        assert [str(error) for error in refused] == [message]
        for take in (ring.close, ring.completions, lambda: ring.for_each(print)):
            ring.nop(2)
            ring.submit(1)
            with pytest.raises(RuntimeError, match=r"has returned$|must return first$"):
                ring.for_each(lambda _user_data, _result, take=take: take())
        ring.completions()
        ring.nop(3)
        assert drain(ring, 1) == [Completion(3, 0, 0)]


@needs_io_uring
def test_a_forked_child_leaves_the_ring_to_its_parent(pipe: tuple[int, int]) -> None:
    """Neither its use nor its close, nor the end of a thread, nor its exit touches it."""
    program = """if True:
        import gc, os, sys, threading
        from pyublk import Ring

        reader, writer = os.pipe()
        ring, buffer = Ring(8), bytearray(8)
        ring.register_self()
        ring.read(reader, buffer, 0, user_data=1)
        ring.submit()
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            for use in (ring.nop, ring.submit, ring.completions, lambda: ring.ready):
                try:
                    use()
                except ValueError as error:
                    assert "the process that made it" in str(error)
                else:
                    os._exit(1)
            ring.close()
            buffer.append(1)  # the child's copy is its own
            with Ring(8) as own:
                own.nop(1)
                own.submit(1)
                assert own.completions()[0].user_data == 1
            del ring
            gc.collect()
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os.write(writer, b"parent")
        ring.submit(1, timeout=10)
        print(ring.completions()[0].result, bytes(buffer[:6]))
        """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("0\n6 b'parent'\n", "")


@needs_io_uring
def test_a_ring_that_is_there_at_the_exit_is_ended() -> None:
    program = """if True:
        import os
        from pyublk import Ring

        reader, writer = os.pipe()
        ring = Ring(8)
        ring.read(reader, bytearray(64), 0, user_data=1)
        ring.submit()
        """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_io_uring
def test_no_other_completion_lets_go_of_a_buffer(pipe: tuple[int, int]) -> None:
    """Neither an entry before it that has its number, nor another ring's message."""
    with Ring(8) as ring, Ring(8) as other:
        buffer = bytearray(16)
        ring.nop(5)
        ring.read(pipe[0], buffer, 0, user_data=5)
        other.msg_ring(ring.fileno(), target_user_data=5, result=42, user_data=1)
        other.submit(1)
        ring.submit(2, timeout=10)
        assert sorted(done.result for done in ring.completions()) == [0, 42]
        assert is_kept(buffer)
        os.write(pipe[1], b"now")
        assert drain(ring, 1) == [Completion(5, 3, 0)]
        assert not is_kept(buffer)


@needs_io_uring
def test_an_operation_is_cancelled_by_its_user_data(pipe: tuple[int, int]) -> None:
    timeout_remove = 12
    with Ring(8) as ring:
        ring.read(pipe[0], bytearray(16), 0, user_data=5)
        ring.timeout(1000, user_data=6)
        ring.prepare(Opcode.ASYNC_CANCEL, address=5, user_data=7)
        ring.prepare(timeout_remove, address=6, user_data=8)
        assert {done.user_data: done.result for done in drain(ring, 4)} == {
            5: -errno.ECANCELED,
            6: -errno.ECANCELED,
            7: 0,
            8: 0,
        }


@needs_io_uring
def test_a_ring_is_opened_once() -> None:
    with Ring(8) as ring, pytest.raises(RuntimeError, match="this ring is open already"):
        ring.__init__(8)
