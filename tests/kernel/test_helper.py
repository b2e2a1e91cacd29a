# SPDX-License-Identifier: MIT
"""The helper process: what it costs, whom it outlives, and what still works by it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from memory import Memory
from servers import Server, device_is_gone, helpers_of, run_program, running_children, until
from variations import variations

import pyublk
from pyublk.params import Basic, Params
from pyublk.uapi import DeviceStatus

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20


def pss(pid: int) -> int:
    """Bytes of memory, shared pages in parts."""
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


MANY = """
from pyublk.targets import Null
disks = [pyublk.Device(Null(size=MIB), depth=4, max_io_size=4096) for _ in range(int(sys.argv[1]))]
for disk in disks:
    disk.start()
tell(*(disk.id for disk in disks))
sys.stdin.read()
"""


def test_one_for_all_disks_of_a_process_small_and_without_what_is_its_servers(
    controller: pyublk.Controller,
) -> None:
    program = """
memory = Memory(64 * MIB)
memory.data[:] = os.urandom(4096) * (16 * 1024)
disks = [pyublk.Device(target) for target in (memory, Memory(MIB))]
for disk in disks:
    disk.start()
tell(*(disk.id for disk in disks), disks[0]._life.kernel.controller.helper.pid)
sys.stdin.readline()
memory.data[:] = bytes(len(memory.data))  # whoever had a copy would have one of its own now
tell("written")
sys.stdin.read()
"""
    with Server(program) as server:
        *devices, helper = map(int, server.line().split())
        assert helpers_of(server.pid) == [helper]
        assert pss(helper) < MIB
        server.say("write")
        assert server.line() == "written"
        assert pss(helper) < MIB
        status = Path(f"/proc/{helper}/status").read_text()
        assert "PPid:\t1\n" in status
        assert Path(f"/proc/{helper}/oom_score_adj").read_text() == "-1000\n"
        assert os.getsid(helper) == helper
        assert Path(f"/proc/{helper}/environ").read_bytes() == b""
        open_files = {os.readlink(fd) for fd in Path(f"/proc/{helper}/fd").iterdir()}
        kinds = {re.sub(r":\[\d+\]$", "", name) for name in open_files}
        assert kinds == {
            "socket",
            "anon_inode:[pidfd]",
            "anon_inode:[io_uring]",
            "/dev/ublk-control",
        }
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(helper, number)  # a terminal's and a service manager's are not for it
        server.send(signal.SIGKILL)
        server.ended()
        until(lambda: ended(helper), what="the helper ends")
        assert all(device_is_gone(controller, device) for device in devices)


def test_many_disks_of_a_killed_process(controller: pyublk.Controller) -> None:
    with Server(MANY, 12) as server:
        devices = server.line().split()
        assert len(devices) == 12
        server.send(signal.SIGKILL)
        server.ended()
        until(lambda: controller.devices() == [], what="every device is deleted")


def test_a_disk_whose_deletion_hangs_holds_up_no_other(controller: pyublk.Controller) -> None:
    """A copy of its server that no handler of forks has seen keeps one disk, and its request."""
    program = """
import ctypes

class Hangs(Memory):
    def read(self, offset, buffer):
        if offset == MIB // 2:
            tell("hangs")
            threading.Event().wait()

kept = pyublk.Device(Hangs(MIB))
kept.start()
tell(kept.id)
sys.stdin.readline()
copy = ctypes.CDLL(None).syscall({"x86_64": 56, "aarch64": 220}[os.uname().machine], 17, 0, 0, 0, 0)
if copy == 0:
    while True:
        time.sleep(60)
other = pyublk.Device(Memory(MIB))
other.start()
tell(other.id, copy)
sys.stdin.read()
"""
    with Server(program) as server:
        kept = int(server.line())
        reader = threading.Thread(target=read_beyond_the_start, args=(f"/dev/ublkb{kept}",))
        reader.start()
        assert server.line() == "hangs"
        server.say("copy")
        other, copy = map(int, server.line().split())
        try:
            server.send(signal.SIGKILL)
            server.ended()
            until(lambda: device_is_gone(controller, other), 20, "the other device goes")
        finally:
            os.kill(copy, signal.SIGKILL)
        until(lambda: device_is_gone(controller, kept), what="the kept device goes")
        reader.join(60)
        assert not reader.is_alive()


def read_beyond_the_start(path: str) -> None:
    with open(path, "rb", buffering=0) as disk:
        disk.seek(MIB // 2)
        try:
            disk.read(4096)
        except OSError:
            return


def test_one_that_is_killed_is_replaced(controller: pyublk.Controller) -> None:
    program = """
disk = pyublk.Device(Memory(MIB))
disk.start()
tell(disk.id, disk._life.kernel.controller.helper.pid)
sys.stdin.readline()
tell(disk.info().status.name, disk._life.kernel.controller.helper.pid)
sys.stdin.read()
"""
    with Server(program) as server:
        device, first = map(int, server.line().split())
        os.kill(first, signal.SIGKILL)
        # Without a command that would need it.
        until(lambda: len(set(helpers_of(server.pid)) - {first}) == 1, 20, "there is another")
        server.say("look")
        status, second = server.line().split()
        assert status == "LIVE"
        assert int(second) in helpers_of(server.pid)
        server.send(signal.SIGKILL)
        server.ended()
        until(lambda: device_is_gone(controller, device), what="the second deletes the device")
        assert f"the helper process was killed; process {second} takes its place" in server.errors()


def test_one_that_is_killed_under_a_command(
    controller: pyublk.Controller, caplog: pytest.LogCaptureFixture
) -> None:
    added = controller.add(depth=1)
    controller.set_params(added.id, Params(basic=Basic(size=MIB, max_io_size=65536)))
    helper = controller.helper.pid
    failures: list[BaseException] = []

    def start() -> None:
        try:
            controller.start(added.id, os.getpid())  # waits for queues that nobody serves
        except BaseException as error:
            failures.append(error)

    starter = threading.Thread(target=start)
    starter.start()
    try:
        until(lambda: "ublk_ctrl_start_dev" in stacks(helper), what="the kernel waits")
        assert controller.info(added.id).status is DeviceStatus.DEAD  # beside the one that waits
        os.kill(helper, signal.SIGKILL)
        starter.join(20)
        [failure] = failures
        assert isinstance(failure, ChildProcessError)
        assert "was killed before it told the outcome" in str(failure)
    finally:
        controller.delete(added.id)
    assert controller.helper.pid != helper
    assert running_children() == set()
    assert "the helper process was killed" in caplog.text


def stacks(pid: int) -> str:
    found = ""
    for stack in Path(f"/proc/{pid}/task").glob("*/stack"):
        found += stack.read_text()
    return found


#: Each takes something away after the start; then the disk is used, and stopped.
TAKEN_AWAY = {
    "io_uring": "Path('/proc/sys/kernel/io_uring_disabled').write_text('2')",
    "descriptors": "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))",
    "proc": "libc.unshare(0x20000) and fail(); libc.mount(b'none', b'/', None, 0x44000, None) and "
    "fail(); libc.umount2(b'/proc', 2) and fail()",
    "capabilities": "libc.prctl(24, 21, 0, 0, 0) and fail(); os.setresuid(65534, 65534, 65534)",
    "exec": "forbid(59 if os.uname().machine == 'x86_64' else 221); forbid(425)",
    "program": "os.rename(HELPER_PROGRAM, HELPER_PROGRAM + '.away')",
}


@pytest.mark.parametrize("what", variations(TAKEN_AWAY, ["io_uring", "descriptors", "exec"]))
def test_a_stop_after_something_was_taken_away(controller: pyublk.Controller, what: str) -> None:
    program = f"""
import ctypes
import resource
import struct
from pathlib import Path
from pyublk._native import HELPER_PROGRAM
libc = ctypes.CDLL(None, use_errno=True)

def fail():
    raise OSError(ctypes.get_errno(), "setting the test up")

def forbid(number):
    "A filter that refuses a system call with EPERM."
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]
    raw = b"".join(struct.pack("<HBBI", *one) for one in code)
    buffer = ctypes.create_string_buffer(raw)
    filter = struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(buffer))
    libc.prctl(38, 1, 0, 0, 0) and fail()
    libc.prctl(22, 2, filter, 0, 0) and fail()

disk = pyublk.Device(Memory(MIB))
disk.start()
tell(disk.id)
{TAKEN_AWAY[what]}
disk.stop()
tell(disk.state)
"""
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    program_file = Path(pyublk._native.HELPER_PROGRAM)
    try:
        with Server(program) as server:
            device = int(server.line())
            assert server.line() == "stopped"
            assert server.ended() == 0, server.errors()
    finally:
        switch.write_text("0")
        away = program_file.with_name(program_file.name + ".away")
        if away.exists():
            away.rename(program_file)
    assert device_is_gone(controller, device)


@pytest.mark.thorough
def test_looking_without_io_uring(controller: pyublk.Controller) -> None:
    """`list` and `info` tell what can be known; `list` also that there is nothing."""
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    command = [sys.executable, "-m", "pyublk"]

    def told(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=60, check=False
        )

    with pyublk.Device(Memory(MIB), depth=16) as disk:
        switch.write_text("2")
        try:
            [listed] = json.loads(told("list", "--json").stdout)
            found = told("info", str(disk.id))
            missing = told("info", str(disk.id + 1))
        finally:
            switch.write_text("0")
        assert (listed["id"], listed["size"], listed["state"]) == (disk.id, MIB, "live")
        assert (listed["queues"], listed["depth"]) == (1, 16)
        assert found.returncode == 0
        assert "io_uring is forbidden: this comes from sysfs and the records" in found.stderr
        assert f"there is no device {disk.id + 1}" in missing.stderr
        assert missing.returncode == 5


def test_a_memory_limit_beyond_which_nothing_could_be_copied() -> None:
    """A start beside memory of which a copy would be too much."""
    program = """
import resource
taken = bytearray(b"x") * (300 * MIB)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * MIB, used + 200 * MIB))
with pyublk.Device(Memory(MIB), depth=8) as disk:
    tell(disk.info().status.name)
"""
    assert run_program(program) == "LIVE\n"


def test_a_program_that_changes_its_surroundings(tmp_path: Path) -> None:
    """No directory, strangers' libraries in the environment, no standard descriptors."""
    program = f"""
os.mkdir({str(tmp_path / "gone")!r})
os.chdir({str(tmp_path / "gone")!r})
os.rmdir(os.getcwd())
os.umask(0o777)
os.environ["LD_PRELOAD"] = os.environ["LD_LIBRARY_PATH"] = "/nonexistent"
out = os.fdopen(os.dup(1), "w")
os.closerange(0, 3)
with pyublk.Device(Memory(MIB)) as disk:
    print(disk.info().status.name, file=out, flush=True)
"""
    assert run_program(program) == "LIVE\n"


def test_an_addition_that_nobody_waits_for_any_more_is_undone(
    controller: pyublk.Controller,
) -> None:
    """It waits for another device's deletion, which holds a lock of the driver's."""
    program = """
class Hangs(Memory):
    def write(self, offset, data):
        tell("hangs")
        release.wait()

release = threading.Event()
disk = pyublk.Device(Hangs(MIB))
disk.start()
tell(disk.id)
sys.stdin.readline()
release.set()
sys.stdin.read()
"""
    with Server(program) as server:
        device = int(server.line())
        writer = threading.Thread(target=write_a_block, args=(f"/dev/ublkb{device}",))
        writer.start()
        assert server.line() == "hangs"
        with pytest.raises(TimeoutError, match="DEL_DEV"):
            controller.delete(device, deadline=0.5)
        with pytest.raises(TimeoutError, match="ADD_DEV"):
            controller.add(depth=1, deadline=0.5)
        server.say("go on")
        writer.join(30)
        until(lambda: controller.devices() == [], what="both are gone")
        time.sleep(0.2)
        assert controller.devices() == []


def write_a_block(path: str) -> None:
    with open(path, "r+b", buffering=0) as disk:
        try:
            os.write(disk.fileno(), bytes(4096))
            os.fsync(disk.fileno())
        except OSError:
            return


GUARD = """
with pyublk.Controller() as controller:
    info = controller.add(guarded=%s, cookie=77)
    controller.%s(info.id)
    tell(info.id)
    sys.stdin.read()
"""


@pytest.mark.parametrize("replaced", variations([False, True], [True]), ids=["", "replaced"])
@pytest.mark.parametrize("guarded", [False, True], ids=["unguard", "guard"])
def test_a_program_decides_whether_its_device_is_kept(
    controller: pyublk.Controller, guarded: bool, replaced: bool
) -> None:
    with Server(GUARD % (not guarded, "guard" if guarded else "unguard")) as server:
        device = int(server.line())
        if replaced:  # the next one knows what the first was told
            [first] = helpers_of(server.pid)
            os.kill(first, signal.SIGKILL)
            if guarded:
                until(lambda: set(helpers_of(server.pid)) - {first}, 20, "there is another")
        helpers = helpers_of(server.pid)
        server.send(signal.SIGKILL)
        server.ended()
        until(lambda: all(ended(helper) for helper in helpers), what="the helper ends")
        if guarded:
            until(lambda: device_is_gone(controller, device), what="it is deleted")
        else:
            assert controller.info(device).cookie == 77
            controller.delete(device)


def test_a_disk_that_outlives_its_program_is_left_alone(controller: pyublk.Controller) -> None:
    program = """
disk = pyublk.Device(Memory(MIB))
disk.start()
with pyublk.Controller() as controller:
    controller.unguard(disk.id)
tell(disk.id)
sys.stdin.read()
"""
    with Server(program) as server:
        device = int(server.line())
        server.send(signal.SIGKILL)
        server.ended()
        until(lambda: controller.info(device).status is DeviceStatus.DEAD, 60, "its server ended")
        controller.delete(device)


def test_a_device_that_is_not_there_is_not_guarded(controller: pyublk.Controller) -> None:
    with pytest.raises(pyublk.DeviceNotFound):
        controller.guard(77)
    with pytest.raises(pyublk.DeviceNotFound):
        controller.unguard(77)


def test_as_many_queues_as_there_are_cpus(controller: pyublk.Controller) -> None:
    info = controller.add(queues=4096, depth=1, max_io_size=4096, clamp_queues=True)
    try:
        assert os.cpu_count() <= info.queues < 4096
    finally:
        controller.delete(info.id)
    with pytest.raises(OSError, match="asked for 4096"):
        controller.add(queues=4096, depth=1, max_io_size=4096)
