"""The command with real disks: what it prints, what it ends with, and what it leaves behind."""

import json
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMAND, added, run, run_here
from conftest import Serve
from memory import Memory
from servers import end_recorded_servers, helpers_of
from variations import variations

import pyublk
from pyublk.cli.failures import ExitCode
from pyublk.control import DeviceInfo
from pyublk.openers import start_time
from pyublk.service import inventory, logs, stopping
from pyublk.service.processes import Process, ProcessId
from pyublk.service.records import Record, recorded_ids, run_directory
from pyublk.uapi import DeviceStatus, Feature

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20

TARGETS = '''\
import os
import threading

import pyublk


class Xor(pyublk.Target):
    """Keeps its bytes xored with a key: what it keeps shows which options arrived."""

    def __init__(self, size: int = 1 << 20, *, key: int, keep: str):
        super().__init__(size=size)
        self.key, self.keep = key, keep

    def open(self):
        self.file = open(self.keep, "w+b")
        self.file.truncate(self.size)

    def close(self):
        self.file.close()

    def read(self, offset, buffer):
        data = os.pread(self.file.fileno(), len(buffer), offset)
        buffer[:] = bytes(byte ^ self.key for byte in data)

    def write(self, offset, data):
        os.pwrite(self.file.fileno(), bytes(byte ^ self.key for byte in data), offset)


class Raises(pyublk.Target):
    def __init__(self):
        super().__init__(size=1 << 20)

    def read(self, offset, buffer):
        raise KeyError("lost")

    def write(self, offset, data):
        pass


class FailsToOpen(Raises):
    def open(self):
        raise PermissionError(13, "the vault is closed")


class NoRead(pyublk.Target):
    def __init__(self):
        super().__init__(size=1 << 20)


class Shares(pyublk.Target):
    """Tells by what it reads whether the client's own memory is asked for."""

    def __init__(self):
        super().__init__(size=1 << 20, read_only=True)

    def handle(self, io):
        shared = io.flags & pyublk.uapi.IOFlag.SHMEM_ZC
        io.buffer[:] = (b"shared" if shared else b"copied").ljust(len(io.buffer))
        io.complete()


class HangsAt(pyublk.Target):
    """Never answers a read at `place`; tells of it through a pipe with a name."""

    def __init__(self, place: int, told: str):
        super().__init__(size=1 << 20)
        self.place, self.told = place, os.path.abspath(told)

    def read(self, offset, buffer):
        if offset == self.place:
            with open(self.told, "w") as pipe:
                pipe.write("hanging")
            threading.Event().wait()

    def write(self, offset, data):
        pass
'''


SIGNALS = variations([signal.SIGINT, signal.SIGHUP], [signal.SIGINT])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the classes above and a run directory; no server outlives the test."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", "run")  # relative to the directory below
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disks.py").write_text(TARGETS)
    yield tmp_path
    end_recorded_servers()


@pytest.mark.parametrize(
    ("where", "options"),
    variations(
        [("full", []), ("pipe", ["--json"]), ("full", ["--foreground"])], [("pipe", ["--json"])]
    ),
)
def test_a_disk_that_cannot_be_told_of_is_stopped_again(
    where: str, options: list[str], place: Path
) -> None:
    if where == "full":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, "add", "null", *options],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(output)
    assert done.returncode == ExitCode.FAILED
    assert "was made, but that could not be printed: " in done.stderr
    assert "Traceback" not in done.stderr
    assert recorded_ids() == []
    assert list((place / "run").glob("*.log")) == []
    with pyublk.Controller() as controller:
        assert list(controller.devices()) == []


@pytest.mark.thorough
@pytest.mark.parametrize("closed", variations(["0 1 2", "1"], ["0 1 2"]))
def test_a_disk_added_with_closed_standard_descriptors(closed: str, serve: Serve) -> None:
    script = 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, "add", "null", "--size", "1M"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    (number,) = recorded_ids()
    record = Record.read(number)
    assert record is not None
    opened = {fd: os.readlink(f"/proc/{record.server.pid}/fd/{fd}") for fd in (0, 1, 2)}
    assert opened[0] == "/dev/null"
    assert opened[1] == opened[2] == str(record.log)
    assert run_here("stop", str(number)).exit_code == 0


def test_a_program_without_standard_descriptors_serves_a_disk() -> None:
    program = (
        "import os\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "import pyublk\n"
        "from pyublk.targets import Null\n"
        "with pyublk.Device(Null(size=1 << 20)):\n"
        "    places = {os.readlink(f'/proc/self/fd/{n}') for n in range(3)}\n"
        "os._exit(places != {'/dev/null'})"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def process(pid: int) -> Process:
    started = start_time(pid)
    assert started is not None
    handle = ProcessId(pid, started).open()
    assert handle is not None
    return handle


def left(place: Path) -> list[str]:
    """What is in the run directory."""
    run_directory = place / "run"
    return sorted(os.listdir(run_directory)) if run_directory.exists() else []


def until(true: Callable[[], bool], seconds: float = 45.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@contextmanager
def mounted(node: str, place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", node, place], check=True, timeout=60)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)


def mkfs(node: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True, timeout=60)


# ---- from add to stop ----


def test_a_disk_from_add_to_stop(place: Path) -> None:
    done = run("add", "ram", "--size", "32M")
    assert (done.returncode, done.stderr) == (0, "")
    path = done.stdout.strip()
    number = path.removeprefix("/dev/ublkb")
    assert Path(path).is_block_device()

    [listed] = json.loads(run_here("list", "--json").stdout)
    pid = listed.pop("server_pid")
    log = Path(listed.pop("log"))
    assert listed == {
        "id": int(number),
        "path": path,
        "target": "ram",
        "size": 32 * MIB,
        "state": "live",
        "queues": 1,
        "depth": 128,
        "used_by": [],
        "ours": True,
        "failed_requests": 0,
    }
    assert log == place / "run" / f"{number}.log"
    assert f"serving ram as {path}" in log.read_text()
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"

    mkfs(path)
    with mounted(path, place / "mnt") as files, process(pid) as server:
        (files / "greeting").write_text("hello")
        refused = run_here("stop", number)
        assert refused.exit_code == ExitCode.BUSY
        assert refused.stderr == f"pyublk: {path} is mounted at {files}\n"
        assert (files / "greeting").read_text() == "hello"
        assert not server.wait(0)

    with process(pid) as server:
        done = run("stop", path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert server.wait(0), "the server outlived the stop"
    assert not Path(path).exists()
    assert left(place) == []


def test_tables_for_people() -> None:
    made = added("null", "--size", "1G")
    head, row = run_here("list").stdout.splitlines()
    assert head.split()[:6] == ["ID", "PATH", "TARGET", "SIZE", "STATE", "QUEUES"]
    assert row.split()[:5] == [str(made["id"]), made["path"], "null", "1GiB", "live"]
    assert row.endswith("  -"), "nobody uses it"
    lines = run_here("info", made["path"]).stdout.splitlines()
    assert lines[0].split() == ["DISK", made["path"]]
    assert any(line.split() == ["size", "1GiB", "(1073741824", "bytes)"] for line in lines)
    assert run_here("stop", "all").exit_code == 0
    assert run_here("list").stderr == "pyublk: there are no disks\n"


def test_all_about_a_disk() -> None:
    made = added("null", "--size", "1G", "--block-size", "4K", "--depth", "16", "--id", "7")
    assert (made["id"], made["path"]) == (7, "/dev/ublkb7")
    done = run_here("info", "/dev/ublkb7", "--json")
    [told] = json.loads(done.stdout)
    assert told["log"] == made["log"]
    assert told["depth"] == 16
    assert told["params"]["basic"]["size"] == 1 << 30
    assert told["params"]["basic"]["logical_block_size"] == 4096
    assert told["plan"]["target"] == "null"
    assert told["served"]["reads"] >= 1, "add reads the disk before it returns"
    assert "CMD_IOCTL_ENCODE" in told["flags"]
    [queue] = told["hardware_queues"]
    assert queue["cpus"] == sorted(os.sched_getaffinity(0))
    [thread] = queue["threads"]
    place = Path(f"/proc/{told['server_pid']}/task/{thread}/comm")
    assert place.read_text() == "ublk7-q0\n"
    assert made["log"] in run_here("info", "7").stdout
    assert run_here("stop", "7").exit_code == 0


def test_memory_that_clients_share(controller: pyublk.Controller) -> None:
    if not controller.features().has(Feature.SHMEM_ZC):
        done = run_here("add", "disks.py:Shares", "--shared-memory")
        assert done.exit_code == ExitCode.FAILED
        assert "SHMEM_ZC is not available: it needs Linux 7.1" in done.stderr
        return
    done = run_here("add", "disks.py:Shares", "--shared-memory", "--shared-memory-size", "64K")
    path = done.stdout.strip()
    number = path.removeprefix("/dev/ublkb")
    place = run_directory() / f"{number}.memory"
    words = f"clients find the memory that they share with {path} at {place}"
    assert done.stderr == f"pyublk: {words}\n"
    assert f"shared memory  {place}" in re.sub(" {3,}", "  ", run_here("info", number).stdout)
    with place.open("r+b") as file, mmap.mmap(file.fileno(), 65536) as memory:
        disk = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            part = memoryview(memory)
            assert os.preadv(disk, [part[4096:8192]], 0) == 4096
            part.release()
            assert memory[4096:4102] == b"shared"
            with mmap.mmap(-1, 4096) as other:
                assert os.preadv(disk, [other], 0) == 4096
                assert other[:6] == b"copied"
        finally:
            os.close(disk)
    assert run_here("stop", number).exit_code == 0
    assert not place.is_symlink()


def test_a_class_of_the_users_with_its_options(place: Path) -> None:
    """Relative paths mean the caller's directory, also those opened by the server."""
    made = added("disks.py:Xor", "--size", "64K", "-o", "key=255", "--option", "keep=kept")
    with open(made["path"], "r+b") as disk:
        disk.write(b"\x0f" * 4096)
    assert run_here("stop", str(made["id"])).exit_code == 0
    assert (place / "kept").read_bytes() == b"\xf0" * 4096 + bytes(60 * 1024)


@pytest.mark.thorough
def test_a_file_by_its_path(place: Path) -> None:
    (place / "disk.img").write_bytes(b"first block".ljust(1 * MIB, b"\0"))
    made = added("file", "disk.img", "--read-only")
    assert Path(made["path"]).read_bytes()[:11] == b"first block"
    assert Path(f"/sys/class/block/ublkb{made['id']}/ro").read_text() == "1\n"
    assert run_here("stop", str(made["id"])).exit_code == 0


# ---- in use ----


def test_info_tells_the_data_path_and_a_mirror_s_legs(place: Path) -> None:
    for name in ("a.img", "b.img"):
        (place / name).write_bytes(bytes(MIB))
    disk = added("mirror", "a.img", "b.img", "--path", "copy", "--no-batch")
    told = run_here("info", str(disk["id"]))
    assert told.exit_code == 0, told.output
    assert "copy (asked for; batch I/O switched off)" in told.output

    def tells(*states: str) -> bool:
        (now,) = json.loads(run_here("info", str(disk["id"]), "--json").output)
        return [leg["state"] for leg in now["status"]["legs"]] == list(states)

    until(lambda: tells("synced", "synced"))
    os.truncate(place / "a.img", 0)
    with open(disk["path"], "rb") as client:
        assert client.read(4096) == bytes(4096)
    until(lambda: tells("failed", "synced"))
    assert f"path {place / 'a.img'}, state failed" in run_here("info", str(disk["id"])).output
    assert run_here("stop", str(disk["id"])).exit_code == 0
    assert left(place) == []


@pytest.mark.thorough
def test_a_path_that_a_target_cannot_take_is_refused(place: Path) -> None:
    refused = run_here("add", "ram", "--size", "1M", "--path", "zero-copy")
    assert refused.exit_code == ExitCode.USAGE
    assert "cannot be served by zero-copy: it takes copy, user-copy, get-data" in refused.output
    assert left(place) == []


def test_force_flushes_a_mounted_disk(place: Path) -> None:
    made = added("file", "disk.img", "--size", "16M")
    mkfs(made["path"])
    with mounted(made["path"], place / "mnt") as files:
        (files / "kept").write_text("not synced by anybody else")
        done = run_here("stop", str(made["id"]), "--force")
        assert (done.exit_code, done.stderr) == (0, "")
    assert left(place) == []
    subprocess.run(["e2fsck", "-p", "disk.img"], check=False, timeout=60)  # replays the journal
    shown = subprocess.run(
        ["debugfs", "-R", "cat /kept", "disk.img"], capture_output=True, timeout=60, check=True
    )
    assert shown.stdout == b"not synced by anybody else"


@pytest.mark.thorough
def test_a_mounted_partition_keeps_the_disk(place: Path) -> None:
    table = bytearray(512)
    struct.pack_into("<BBBBBBBBII", table, 446, 0, 0, 0, 0, 0x83, 0, 0, 0, 2048, 16384)
    table[510:] = b"\x55\xaa"
    (place / "disk.img").write_bytes(bytes(table).ljust(16 * MIB, b"\0"))
    made = added("file", "disk.img")
    part = f"{made['path']}p1"
    until(Path(part).exists)
    mkfs(part)
    with mounted(part, place / "mnt") as files:
        refused = run_here("stop", str(made["id"]))
        assert refused.exit_code == ExitCode.BUSY
        assert refused.stderr == f"pyublk: {part} is mounted at {files}\n"
    assert run_here("stop", str(made["id"])).exit_code == 0


@pytest.mark.thorough
def test_swap_and_loop_devices_keep_the_disk(place: Path) -> None:
    path = added("ram", "--size", "16M")["path"]
    subprocess.run(["mkswap", path], check=True, timeout=60, capture_output=True)
    subprocess.run(["swapon", path], check=True, timeout=60)
    try:
        refused = run_here("del", path)
        assert (refused.exit_code, refused.stderr) == (
            ExitCode.BUSY,
            f"pyublk: {path} is used as swap\n",
        )
    finally:
        subprocess.run(["swapoff", path], check=True, timeout=60)
    loop = subprocess.run(
        ["losetup", "--find", "--show", path],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout.strip()
    try:
        refused = run_here("stop", path)
        assert refused.stderr == f"pyublk: {path} is behind {Path(loop).name}\n"
    finally:
        subprocess.run(["losetup", "-d", loop], check=True, timeout=60)
    assert run_here("del", path).exit_code == 0


# ---- several, and other people's ----


def test_one_that_fails_does_not_keep_the_others() -> None:
    first, second = added("null"), added("null")
    done = run_here("stop", "99", str(first["id"]), second["path"], "--json")
    assert done.exit_code == ExitCode.NO_DEVICE
    assert json.loads(done.stdout) == {"done": [first["id"], second["id"]]}
    assert done.stderr.startswith("pyublk: there is no device 99")


def test_the_disk_of_another_program(serve: Serve) -> None:
    disk = serve(Memory(1 * MIB))
    [listed] = json.loads(run_here("list", "--json").stdout)
    assert (listed["target"], listed["log"], listed["ours"]) == (None, None, True)
    assert listed["server_pid"] == os.getpid()
    assert run_here("stop", str(disk.id)).exit_code == 0
    assert disk.wait(10), "the program is told that its disk was stopped"


# ---- failures leave nothing ----


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nul"], ExitCode.USAGE, "there is no target 'nul' (did you mean 'null'?)"),
        (["disks.py:NoRead"], ExitCode.USAGE, "NoRead has no read method"),
        (["null", "-o", "colour=red"], ExitCode.USAGE, "null has no option 'colour'"),
        (["file", "missing.img"], ExitCode.FAILED, "missing.img does not exist"),
        (["null", "--queues", "4000"], ExitCode.FAILED, "asked for 4000"),
        (["disks.py:FailsToOpen"], ExitCode.PERMISSION, "the vault is closed"),
        (["disks.py:Raises"], ExitCode.FAILED, "the first block of /dev/ublkb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_add_that_fails(
    arguments: list[str], code: ExitCode, sentence: str, place: Path
) -> None:
    done = run_here("add", *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    first, *notes = done.stderr.splitlines()
    assert first.startswith("pyublk: ")
    assert sentence in first
    assert left(place) == []
    if arguments == ["disks.py:Raises"]:
        assert "  KeyError: 'lost'" in notes, "the log tells why, and it is gone"


@pytest.mark.thorough
def test_an_id_in_use(place: Path) -> None:
    made = added("null")
    refused = run_here("add", "null", "--id", str(made["id"]))
    assert refused.exit_code == ExitCode.BUSY
    assert "the id is in use" in refused.stderr
    assert left(place) == [f"{made['id']}.{kind}" for kind in ("json", "log", "sock")]
    assert run_here("stop", str(made["id"])).exit_code == 0


@pytest.mark.thorough
def test_an_id_that_is_taken_says_by_whom(place: Path, serve: Serve) -> None:
    disk = serve(Memory(MIB))
    refused = run_here("add", "null", "--id", str(disk.id))
    assert refused.exit_code == ExitCode.BUSY
    assert f"{disk.path} is live, served by " in refused.stderr
    assert f"(process {os.getpid()})" in refused.stderr
    # Somebody who has the disk open, after the device has gone.
    with open(disk.path, "rb") as node:
        client = subprocess.Popen(["sleep", "60"], stdin=node)
    try:
        disk.stop()
        refused = run_here("add", "null", "--id", str(disk.id))
    finally:
        client.kill()
        client.wait()
    assert f"{disk.path} was deleted, and its id is free once nobody has it open" in refused.stderr
    assert f"it is open in sleep (process {client.pid})" in refused.stderr
    assert left(place) == []


@pytest.mark.thorough
def test_an_id_that_a_mount_keeps(place: Path) -> None:
    made = added("ram", "--size", "16M", "--no-restart")
    mkfs(made["path"])
    mount_point = place / "a mount"
    mount_point.mkdir()
    subprocess.run(["mount", made["path"], mount_point], check=True, timeout=60)
    try:
        with process(made["server_pid"]) as server:
            server.send(signal.SIGKILL)
            assert server.wait(10)
        until(lambda: not Path(f"/sys/class/ublk-char/ublkc{made['id']}").exists())
        refused = run_here("add", "null", "--id", str(made["id"]))
    finally:
        subprocess.run(["umount", mount_point], check=True, timeout=60)
    assert refused.exit_code == ExitCode.BUSY
    assert f"it is mounted at {mount_point}" in refused.stderr
    run_here("doctor", "--repair")


def test_a_disk_that_waits_for_a_server_is_shown_and_deleted_by_force(place: Path) -> None:
    image = str(place / "image")
    made = added("file", image, "--size", "16M", "--recovery", "resend", "--no-restart")
    with process(made["server_pid"]) as server:
        server.send(signal.SIGKILL)
        assert server.wait(10)

    def state() -> str:
        (listed,) = json.loads(run_here("list", "--json").stdout)
        return str(listed["state"])

    until(lambda: state() == "quiesced")
    doctor = run_here("doctor")
    assert f"device {made['id']} is QUIESCED: it waits for a new server" in doctor.stdout
    assert f"{made['id']}.json was left behind" not in doctor.stdout
    run_here("doctor", "--repair")
    refused = run_here("stop", str(made["id"]))
    assert refused.exit_code == ExitCode.BUSY
    assert "waits for a new server: stopping it now loses what was not written" in refused.stderr
    assert run_here("del", "--force", str(made["id"])).exit_code == 0
    assert left(place) == []


@pytest.mark.thorough
def test_failed_requests_are_counted_and_a_log_that_grows_is_cut(place: Path) -> None:
    (place / "fails.py").write_text(
        "import pyublk\n"
        "class Fails(pyublk.Target):\n"
        "    def read(self, offset, buffer):\n"
        "        print('x' * 4095, flush=True)\n"
        "        if offset >= 7 << 20: raise OSError(5, 'no such sector')\n"
        "        buffer[:] = bytes(len(buffer))\n"
        "    def write(self, offset, data): pass\n"
    )
    made = added("fails.py:Fails", "--size", "8M")

    def failed() -> int:
        (told,) = json.loads(run_here("info", str(made["id"]), "--json").stdout)
        (listed,) = json.loads(run_here("list", "--json").stdout)
        assert isinstance(listed["failed_requests"], int)
        return int(told["failed_requests"])

    before = failed()
    read = ["dd", f"if={made['path']}", "of=/dev/null", "iflag=direct", "bs=16k"]
    for place_to_read, code in ((["count=400"], 0), (["skip=450", "count=1"], 1)):
        done = subprocess.run([*read, *place_to_read], capture_output=True, timeout=60, check=False)
        assert done.returncode == code
    until(lambda: failed() == before + 1, 20)
    assert re.search(
        rf"^failed requests +{failed()}$", run_here("info", str(made["id"])).stdout, re.MULTILINE
    )
    log = Path(made["log"])
    until(lambda: log.read_text().startswith("(older lines were removed)"), 20)
    assert log.stat().st_size <= logs.LIMIT
    assert run_here("stop", str(made["id"])).exit_code == 0
    assert left(place) == []


@pytest.mark.thorough
def test_logs_of_servers_that_are_gone_go_with_the_next_add(place: Path) -> None:
    made = added("null", "--no-restart")
    with process(made["server_pid"]) as server:
        server.send(signal.SIGKILL)
        assert server.wait(10)
    until(lambda: not Path(f"/sys/class/ublk-char/ublkc{made['id']}").exists())
    assert Path(made["log"]).exists()
    next_one = added("null", "--id", str(made["id"] + 1))
    assert not Path(made["log"]).exists()
    assert run_here("stop", "all").exit_code == 0
    assert not Path(next_one["log"]).exists()


IN_A_CONTAINER = """
set -e
mount -t tmpfs none /dev
mknod /dev/null c 1 3; mknod /dev/zero c 1 5; mknod /dev/urandom c 1 9
mknod /dev/ublk-control c 10 $CONTROL
exec "$@"
"""


def run_in_a_container(*arguments: str) -> "subprocess.CompletedProcess[str]":
    number = os.minor(os.stat("/dev/ublk-control").st_rdev)
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", IN_A_CONTAINER, "sh", *COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CONTROL": str(number)},
        check=False,
    )


@pytest.mark.thorough
def test_a_containers_dev_is_recognized(place: Path) -> None:
    done = run_in_a_container("add", "null")
    assert done.returncode == ExitCode.FAILED
    words = (
        " did not appear: the kernel has made the device, but /dev is a tmpfs, as in a container"
    )
    assert words in done.stderr
    assert "What to do: run outside the container, or with the machine's own /dev" in done.stderr
    assert left(place) == []


@pytest.mark.thorough
def test_the_doctor_sees_that_a_containers_dev_lacks_nodes(serve: Serve) -> None:
    disk = serve(Memory(MIB))
    done = run_in_a_container("doctor", "--json")
    (check,) = [c for c in json.loads(done.stdout)["checks"] if c["name"] == "device nodes"]
    assert check["status"] == "failed"
    assert f"ublkb{disk.id}, ublkc{disk.id}" in check["finding"]


def test_a_device_that_does_not_exist() -> None:
    done = run_here("info", "0")
    assert done.exit_code == ExitCode.NO_DEVICE
    assert done.stderr == "pyublk: there is no device 0, nor any other\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_add_waits_leaves_nothing(place: Path, number: signal.Signals) -> None:
    """The target hangs in the first read, which comes while the disk is being started."""
    os.mkfifo("told")
    with subprocess.Popen(
        [*COMMAND, "add", "disks.py:HangsAt", "-o", "place=0", "-o", "told=told"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert Path("told").read_text() == "hanging"
        waiting.send_signal(number)
        out, err = waiting.communicate(timeout=90)
    assert (waiting.returncode, out, err) == (ExitCode.INTERRUPTED, "", "pyublk: interrupted\n")
    assert left(place) == []


# ---- foreground ----


@pytest.mark.parametrize("number", SIGNALS)  # Ctrl-C, a terminal that goes
def test_foreground_until_a_signal(place: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*COMMAND, "add", "ram", "--size", "1M", "--foreground"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as serving:
        assert serving.stdout is not None
        path = serving.stdout.readline().strip()
        [listed] = json.loads(run_here("list", "--json").stdout)
        assert (listed["path"], listed["target"], listed["server_pid"], listed["log"]) == (
            path,
            "ram",
            serving.pid,
            None,
        )
        assert Path(path).read_bytes() == bytes(1 * MIB)
        serving.send_signal(number)
        out, err = serving.communicate(timeout=60)
    assert (serving.returncode, out) == (0, "")
    words = err.split()
    assert words[0] == "pyublk:"
    assert int(words[1]) >= 2
    assert words[2:4] == ["requests", "served"]
    assert err.endswith("0 failed\n")
    assert left(place) == []


def test_foreground_is_stopped_by_stop(place: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "add", "null", "--foreground", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as serving:
        assert serving.stdout is not None
        made = json.loads(serving.stdout.readline())
        assert run_here("stop", made["path"]).exit_code == 0
        out, _ = serving.communicate(timeout=60)
    assert serving.returncode == 0
    assert json.loads(out).keys() == {"requests", "seconds"}
    assert left(place) == []


# ---- commands that meet ----


def test_stop_waits_for_a_start(place: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """START_DEV after a STOP_DEV crashes kernels."""
    monkeypatch.setattr(stopping, "_STARTING", 60.0)
    begun, go_on = threading.Event(), threading.Event()
    really = pyublk.Device._begin_serving

    def begin(device: pyublk.Device, *, on_this_loop: bool) -> None:
        begun.set()
        assert go_on.wait(60)
        really(device, on_this_loop=on_this_loop)

    monkeypatch.setattr(pyublk.Device, "_begin_serving", begin)
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(serve, Memory(MIB))
        assert begun.wait(60)
        stop = pool.submit(run_here, "stop", "all", "--json")
        time.sleep(0.5)
        assert not stop.done()
        go_on.set()
        with suppress(pyublk.DeviceLost):  # it was stopped as soon as it had been started
            assert starting.result(60).wait(60)
        done = stop.result(60)
    assert (done.exit_code, len(json.loads(done.stdout)["done"])) == (0, 1)


@pytest.mark.thorough
def test_a_disk_of_all_that_is_gone_already_is_no_failure(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = added("null"), added("null")

    def stop_both(controller: pyublk.Controller, device: DeviceInfo, **options: Any) -> None:
        for number in (first["id"], second["id"]):
            stopping.stop(controller, controller.info(number), **options)

    monkeypatch.setattr("pyublk.cli.stopping.stop", stop_both)
    done = run_here("stop", "all", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"done": [first["id"]]})
    assert left(place) == []


@pytest.mark.thorough
def test_a_disk_that_goes_while_it_is_listed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = added("null")

    def gone(controller: pyublk.Controller, device: DeviceInfo, *, ask_server: bool) -> None:
        assert run("stop", made["path"]).returncode == 0
        inventory.disk(controller, device, ask_server=ask_server)

    monkeypatch.setattr("pyublk.cli.listing.disk", gone)
    assert run_here("list").stderr == "pyublk: there are no disks\n"


# ---- servers that hang, and servers that are killed ----


@contextmanager
def hanging_read(place: Path) -> Iterator[tuple[dict[str, Any], "subprocess.Popen[bytes]"]]:
    """A disk of whose requests one is never answered, and the client that waits for it."""
    os.mkfifo(place / "told")
    offset = 512 * 1024  # no partition scan looks there
    made = added("disks.py:HangsAt", "-o", f"place={offset}", "-o", "told=told")
    with subprocess.Popen(
        [
            "dd",
            f"if={made['path']}",
            "of=/dev/null",
            "iflag=direct",
            "bs=4k",
            "skip=128",
            "count=1",
        ],
        stderr=subprocess.DEVNULL,
    ) as client:
        assert (place / "told").read_text() == "hanging"
        yield made, client
        assert client.wait(60) != 0, "the read that was given up fails"


def test_a_handler_that_hangs_is_given_up_by_its_server(place: Path) -> None:
    with hanging_read(place) as (made, _):
        done = run_here("stop", made["path"])
    assert done.exit_code == ExitCode.FAILED
    log = Path(made["log"])
    assert done.stderr == (
        f"pyublk: {made['path']} is gone, but its server ended with an error: see {log}\n"
    )
    assert "HandlerTimeout" in log.read_text()
    assert left(place) == [log.name]


@pytest.mark.thorough
def test_a_handler_that_hangs_in_the_foreground_leaves_no_record(place: Path) -> None:
    os.mkfifo("told")
    with subprocess.Popen(
        [*COMMAND, "add", "disks.py:HangsAt", "-o", "place=524288", "-o", "told=told", "-f"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as serving:
        assert serving.stdout is not None
        disk = serving.stdout.readline().strip()
        client = subprocess.Popen(
            ["dd", f"if={disk}", "of=/dev/null", "iflag=direct", "bs=4k", "skip=128", "count=1"],
            stderr=subprocess.DEVNULL,
        )
        assert Path("told").read_text() == "hanging"
        serving.send_signal(signal.SIGINT)
        _, err = serving.communicate(timeout=90)
        assert client.wait(60) != 0
    assert serving.returncode == ExitCode.TIMEOUT
    assert err.startswith("pyublk: a handler of HangsAt never returned: every request it held was")
    assert left(place) == []


def test_a_server_that_hangs_is_killed_after_the_timeout(place: Path) -> None:
    with hanging_read(place) as (made, _), process(made["server_pid"]) as server:
        done = run_here("stop", made["path"], "--timeout", "1")
        assert server.wait(0)
    assert done.exit_code == ExitCode.TIMEOUT
    assert "did not end within 1 s and was killed" in done.stderr
    assert not Path(made["path"]).exists()
    assert left(place) == [Path(made["log"]).name]


def test_a_killed_server_leaves_no_device(place: Path) -> None:
    made = added("null", "--no-restart")
    assert re.search(r"^restart +no: it was added so$", run_here("info", made["path"]).stdout, re.M)
    with process(made["server_pid"]) as server:
        server.send(signal.SIGKILL)
        assert server.wait(10)
    until(lambda: not Path(f"/sys/class/ublk-char/ublkc{made['id']}").exists())
    assert run_here("list").stderr == "pyublk: there are no disks\n"
    checks = json.loads(run_here("doctor", "--json").stdout)["checks"]
    assert [c["status"] for c in checks if c["name"] == "records"] == ["warning"] * 3
    done = run_here("doctor", "--repair", "--json")
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["repaired"]) == 3
    assert left(place) == []


def kill_with_helper(server: int) -> None:
    """Stopped first, a server does not replace its helper."""
    [helper] = helpers_of(server)
    with process(server) as victim, process(helper) as guardian:
        victim.send(signal.SIGSTOP)
        for one in (guardian, victim):
            one.send(signal.SIGKILL)
            assert one.wait(10)


def test_the_doctor_deletes_an_orphan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the server and its guardian are killed."""
    monkeypatch.setattr(stopping, "_STARTING", 0.0)
    made = added("null", "--no-restart")
    kill_with_helper(made["server_pid"])
    with pyublk.Controller() as controller:
        controller.wait_for_status(made["id"], DeviceStatus.DEAD, timeout=45)
    found = json.loads(run_here("doctor", "--json").stdout)["checks"]
    assert [c["finding"] for c in found if c["name"] == "devices"] == [
        f"device {made['id']} is an orphan: its server is gone"
    ]
    done = run_here("doctor", "--repair")
    assert done.exit_code == 0
    assert f"pyublk: device {made['id']} was deleted\n" in done.stderr
    with pyublk.Controller() as controller:
        assert controller.devices() == []
    assert left(place) == []


def test_stop_deletes_an_orphan_of_ours(place: Path) -> None:
    made = added("null", "--no-restart")
    kill_with_helper(made["server_pid"])
    with pyublk.Controller() as controller:
        controller.wait_for_status(made["id"], DeviceStatus.DEAD, timeout=45)
    assert run_here("stop", str(made["id"])).exit_code == 0
    assert run_here("list").stderr == "pyublk: there are no disks\n"


# ---- looking at the machine ----


def test_features() -> None:
    told = json.loads(run_here("features", "--json").stdout)
    assert told["kernel"] == os.uname().release
    by_name = {feature["name"]: feature for feature in told["features"]}
    assert by_name["CMD_IOCTL_ENCODE"]["available"]
    assert by_name["CMD_IOCTL_ENCODE"]["reason"] is None
    missing = by_name["UNPRIVILEGED_DEV"]
    assert not missing["available"]
    assert "CAP_SYS_ADMIN" in missing["reason"]
    shown = run_here("features")
    assert all(name in shown.stdout for name in by_name)
    assert {one["what"] in shown.stderr for one in told["defects"]} <= {True}
    assert bool(told["defects"]) == (
        tuple(map(int, re.findall(r"\d+", told["kernel"])[:3])) < (7, 3, 4)
    )


def test_the_doctor_finds_nothing_that_prevents_disks() -> None:
    done = run_here("doctor", "--json")
    assert done.exit_code == 0
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in ("driver", "control node", "io_uring", "devices"):
        assert checks[name]["status"] == "ok"
