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
import weakref
from collections.abc import Callable
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
        "Whose doing: the caller.",
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
        "Whose doing: this machine's set-up.",
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


@needs_io_uring
def test_a_ring_is_opened_once() -> None:
    with Ring(8) as ring, pytest.raises(RuntimeError, match="this ring is open already"):
        ring.__init__(8)
