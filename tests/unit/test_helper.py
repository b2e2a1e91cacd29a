# SPDX-License-Identifier: MIT
"""The helper process, without a driver: its start, its end, and who has a part in it."""

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import pyublk
from pyublk import _native
from pyublk._native import CharDevice, Helper, open_private, process
from pyublk.testing import Disk

GET_DEV_INFO = 0x80207502


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def over(pid: int) -> bool:
    """Whether it has ended; init reaps it when it likes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def asked(helper: Helper) -> None:
    """It answers: on a file that is no control node, that there is no such command."""
    assert helper.control(GET_DEV_INFO, 0) == ("command", -errno.EOPNOTSUPP)


@pytest.fixture
def node() -> int:
    fd = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def run(program: str) -> str:
    """A process of its own, whose state is not the tests'."""
    prelude = "import ctypes, os, time\nfrom pyublk import _native\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_one_for_all_who_ask_and_none_afterwards(node: int) -> None:
    before = os.listdir("/proc/self/fd")
    first, second = Helper(node), Helper(node)
    pid = first.pid
    assert second.pid == pid
    del first
    asked(second)
    assert not over(pid)
    del second
    until(lambda: over(pid))
    assert os.listdir("/proc/self/fd") == before


def test_it_answers_when_it_is_told_whom_to_guard(node: int) -> None:
    helper = Helper(node)
    pid = helper.pid
    assert helper.guard(7, 77, True, deadline=20) == 0
    assert helper.guard(7, 77, False, deadline=20) == 0
    assert helper.guard(8, 77, False, deadline=20) == 0
    assert helper.pid == pid
    del helper
    until(lambda: over(pid))


def test_nobody_meets_it_in_a_wait() -> None:
    program = """
seen = []
signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
helper = _native.Helper()
pid = helper.pid
os.kill(pid, signal.SIGKILL)
while helper.pid in (0, pid):
    time.sleep(0.01)
del helper
try:
    os.wait()
except ChildProcessError:
    print("no child", seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import os, signal, time\nfrom pyublk import _native\n" + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "no child []\n"
    assert "the helper process was killed; process" in done.stderr


def test_where_orphans_are_ours_it_is_reaped() -> None:
    """As the first process of a container."""
    program = """
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
for _ in range(3):
    helper = _native.Helper()
    del helper
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("reaped")
"""
    assert run(program) == "reaped\n"


def test_nothing_of_ours_is_in_it(node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nonexistent")
    helper = Helper(node)
    asked(helper)
    place = Path(f"/proc/{helper.pid}")
    assert (place / "environ").read_bytes() == b""
    assert os.readlink(place / "cwd") == "/"
    kinds = sorted(os.readlink(fd).partition(":[")[0] for fd in (place / "fd").iterdir())
    assert len(kinds) == 4, kinds  # socket, pidfd, ring, node
    assert os.getsid(helper.pid) == helper.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        os.kill(helper.pid, number)
    asked(helper)


def test_a_program_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "HELPER_PROGRAM", "/nonexistent/pyublk-helper")
    with pytest.raises(FileNotFoundError, match="cannot be started: it is missing") as missing:
        Helper()
    assert missing.value.__notes__[1] == "What to do: install pyublk anew."


def test_a_program_that_may_not_be_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pyublk-helper"
    copy.write_bytes(Path(_native.HELPER_PROGRAM).read_bytes())
    monkeypatch.setattr(_native, "HELPER_PROGRAM", str(copy))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PermissionError, match="it may not be executed here") as refused:
        Helper()
    assert "mounted noexec" in refused.value.__notes__[1]
    copy.write_text("no program")
    copy.chmod(stat.S_IRWXU)
    with pytest.raises(OSError, match="it was built for another kind of machine"):
        Helper()
    assert os.listdir("/proc/self/fd") == before


def test_it_keeps_the_rights_that_it_was_started_with() -> None:
    """Capabilities of a process that is root no more; later it may drop them."""
    if os.geteuid():
        pytest.skip("needs root")
    program = """
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
os.setresuid(65534, 65534, 65534)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(header, sets)
sets[0], sets[3] = sets[1], sets[4]
assert libc.capset(header, sets) == 0
def effective(pid):
    return [l for l in open(f"/proc/{pid}/status").read().splitlines() if "CapEff" in l]
ours = effective("self")
helper = _native.Helper()
while open(f"/proc/{helper.pid}/comm").read() != "pyublk-helper\\n":
    time.sleep(0.01)
assert effective(helper.pid) == ours, (effective(helper.pid), ours)
"""
    run(program)


# ---- forks ----


def in_child(act: Callable[[], object], fork: Callable[[], int] = os.fork) -> int:
    """The exit code of a child that does it: 0, or 1 and its traceback."""
    child = fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(call: Callable[[], object], parent: int) -> None:
    with pytest.raises(pyublk.DeviceClosed, match=f"made in process {parent}, from which this one"):
        call()


FORKS = pytest.mark.parametrize("fork", [os.fork, ctypes.CDLL(None).fork], ids=["python", "c"])


@FORKS
def test_a_child_has_no_part_in_it(node: int, fork: Callable[[], int]) -> None:
    helper, parent = Helper(node), os.getpid()

    def child() -> None:
        refused(lambda: helper.pid, parent)
        refused(lambda: helper.control(GET_DEV_INFO, 0), parent)
        own = Helper(node)
        asked(own)
        pid = own.pid
        del own
        until(lambda: over(pid))

    assert in_child(child, fork) == 0
    asked(helper)


def test_a_child_of_a_child(node: int) -> None:
    helper, parent = Helper(node), os.getpid()
    assert in_child(lambda: in_child(lambda: refused(lambda: helper.pid, parent))) == 0
    asked(helper)


@FORKS
def test_a_private_descriptor_is_let_go_of_in_a_child(
    tmp_path: Path, fork: Callable[[], int]
) -> None:
    place = tmp_path / "file"
    place.write_text("")
    fd = open_private(str(place), os.O_RDWR)
    ring = pyublk.Ring(4)

    def child() -> None:
        assert process() == os.getpid()
        names = []
        for one in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one by which they are listed
                names.append(os.readlink(f"/proc/self/fd/{one}"))
        assert str(place) not in names
        assert not any("io_uring" in name for name in names)
        os.fstat(fd)  # the number is taken: no later file gets it under its owner's hands

    try:
        assert in_child(child, fork) == 0
        assert os.readlink(f"/proc/self/fd/{fd}") == str(place)
        ring.nop()
        assert ring.submit(1) == 1
    finally:
        CharDevice(fd).close()
    ring.close()


def test_the_files_of_a_private_open_that_fails() -> None:
    with pytest.raises(FileNotFoundError) as missing:
        open_private("/nonexistent/node", os.O_RDWR)
    assert missing.value.filename == "/nonexistent/node"


def test_a_disk_without_a_kernel_is_its_process_s_own() -> None:
    class Zero(pyublk.Target):
        def read(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer))

    parent = os.getpid()
    with Disk(Zero(size=1 << 20, read_only=True)) as disk:
        assert in_child(lambda: refused(lambda: disk.pread(4096, 0), parent)) == 0
        assert disk.pread(4096, 0) == bytes(4096)
