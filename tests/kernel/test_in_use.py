"""Disks that somebody uses, in whatever way: the command leaves them alone, and says who it is."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import Serve
from filesystems import run
from needs import Module, Program, needs
from servers import Server, end_recorded_servers, until
from variations import variations

import pyublk
from pyublk.cli import main
from pyublk.cli.failures import ExitCode
from pyublk.openers import command_name
from pyublk.service import claim, stopping
from pyublk.service.records import place
from pyublk.service.stacking import top_first
from pyublk.targets import Ram, Slice
from pyublk.uapi import Feature

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
ME = f"{command_name(os.getpid())} (process {os.getpid()})"


@pytest.fixture(autouse=True)
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server outlives the test."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    yield
    end_recorded_servers()


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="pyublk")


def added(*arguments: object) -> str:
    done = command("add", *arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()


def refused(*arguments: object) -> str:
    """What the command says that leaves a disk alone."""
    done = command(*arguments)
    assert done.exit_code == ExitCode.BUSY, (done.exit_code, done.output)
    return done.stderr.removeprefix("pyublk: ").rstrip()


def stopped(*paths: object) -> None:
    done = command("stop", *paths)
    assert (done.exit_code, done.stderr) == (0, "")


def disks() -> list[int]:
    with pyublk.Controller() as controller:
        return [device.id for device in controller.devices()]


@contextmanager
def undone(*how: object) -> Iterator[None]:
    try:
        yield
    finally:
        run(*how)


def partitioned(disk: str) -> str:
    """The only partition that it gets."""
    run("sh", "-c", f"echo 2048,16384 | sfdisk -q {disk}")
    until(Path(f"{disk}p1").exists)
    return f"{disk}p1"


# ---- claims of the kernel's ----


def test_a_file_system_of_two_disks(serve: Serve, tmp_path: Path) -> None:
    needs(Module("btrfs"))
    first, second = (serve(Ram(size=160 * MIB)).path for _ in range(2))
    run("mkfs.btrfs", "-q", "-f", "-d", "raid0", "-m", "raid0", first, second)
    run("mount", first, tmp_path)
    with undone("umount", tmp_path):
        for path in (first, second):
            assert refused("stop", path) == f"{path} is mounted at {tmp_path}"
            assert refused("del", path) == f"{path} is mounted at {tmp_path}"
        (tmp_path / "file").write_bytes(os.urandom(8 * MIB))
        os.sync()


def test_the_journal_of_a_file_system(serve: Serve, tmp_path: Path) -> None:
    data, journal = (serve(Ram(size=32 * MIB)).path for _ in range(2))
    run("mke2fs", "-q", "-b", "4096", "-O", "journal_dev", journal)
    run("mke2fs", "-q", "-b", "4096", "-t", "ext4", "-J", f"device={journal}", data)
    run("mount", data, tmp_path)
    with undone("umount", tmp_path):
        assert refused("stop", data) == f"{data} is mounted at {tmp_path}"
        assert refused("stop", journal) == f"{journal} is held by a file system, as its journal"
    stopped(data, journal)


def test_a_mount_that_was_taken_away_while_it_is_used(serve: Serve, tmp_path: Path) -> None:
    path = serve(Ram(size=32 * MIB)).path
    run("mkfs.ext4", "-q", path)
    run("mount", path, tmp_path)
    with open(tmp_path / "file", "wb") as file:
        run("umount", "--lazy", tmp_path)
        file.write(b"written afterwards")
        file.flush()
        assert refused("stop", path) == f"{path} is unmounted, but its files are open in {ME}"
    stopped(path)


def test_a_mount_in_another_namespace(serve: Serve, tmp_path: Path) -> None:
    path = serve(Ram(size=32 * MIB)).path
    run("mkfs.ext4", "-q", path)
    script = f"mount {path} {tmp_path} && echo mounted && exec sleep 60"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"mounted\n"
            assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
            told = refused("stop", path)
            assert re.fullmatch(
                rf"{path} is mounted at {tmp_path} in the mount namespace of \w+ "
                rf"\(process {other.pid}\)",
                told,
            ), told
        finally:
            other.kill()
    until(lambda: command("stop", path).exit_code == 0, what="the namespace goes away")


@contextmanager
def held(path: str, flags: int) -> Iterator[None]:
    descriptor = os.open(path, flags)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("partition", variations([False, True], [True]))
def test_a_program_that_claims_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, partition: bool
) -> None:
    disk = serve(Ram(size=32 * MIB)).path
    path = partitioned(disk) if partition else disk
    with held(path, os.O_RDONLY | os.O_EXCL):
        assert refused("stop", disk) == f"{path} is open in {ME}"
        monkeypatch.setattr(claim, "opened", lambda *_, **__: [])
        assert refused("stop", disk) == f"{disk} is in use by something that cannot be found"
    stopped(disk)


def test_a_device_on_top(serve: Serve) -> None:
    path = serve(Ram(size=32 * MIB)).path
    needs(Program("dmsetup"))
    run("dmsetup", "create", "pyublk-test", "--table", f"0 65536 linear {path} 0")
    with undone("dmsetup", "remove", "--retry", "pyublk-test"):
        assert re.fullmatch(rf"{path} is held by dm-\d+", refused("stop", path))
    stopped(path)


# ---- programs that have it open ----


def test_who_writes_is_asked_and_who_reads_is_not(serve: Serve) -> None:
    path = serve(Ram(size=MIB)).path
    with held(path, os.O_RDWR):
        assert refused("stop", path) == f"{path} is open for writing in {ME}"
    with held(path, os.O_RDONLY):
        stopped(path)


def test_a_safe_stop_asks_readers_too(serve: Serve, controller: pyublk.Controller) -> None:
    path = serve(Ram(size=MIB)).path
    if not controller.features().has(Feature.SAFE_STOP_DEV):
        done = command("stop", "--safe", path)
        assert done.exit_code == ExitCode.FAILED
        assert "SAFE_STOP_DEV is not available: it needs Linux 7.0" in done.stderr
        return
    with held(path, os.O_RDONLY):
        assert refused("stop", "--safe", path) == f"{path} is open in {ME}"
        assert disks() == [int(path.removeprefix("/dev/ublkb"))]
    done = command("stop", "--safe", path)
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_kernel_that_can_stops_only_what_nobody_opened_since(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, controller: pyublk.Controller
) -> None:
    needs(Feature.SAFE_STOP_DEV)
    disk = serve(Ram(size=MIB))
    late: list[int] = []
    really = pyublk.Controller.safe_stop

    def opened_just_before(one: pyublk.Controller, device: int, **options: Any) -> None:
        if not late:
            late.append(os.open(disk.path, os.O_RDWR))
        really(one, device, **options)

    monkeypatch.setattr(pyublk.Controller, "safe_stop", opened_just_before)
    try:
        assert f"{disk.path} is open for writing in" in refused("stop", disk.path)
    finally:
        os.close(late[0])
    stopped(disk.path)
    assert disk.wait(10)


# ---- disks on disks ----


UPPER = """
from pyublk.targets import File
with pyublk.Device(File(sys.argv[1], read_only=sys.argv[2] == "True"), id=2):
    tell("serving")
    sys.stdin.readline()
"""


def test_what_lies_on_a_disk_comes_before_it(
    serve: Serve, controller: pyublk.Controller, tmp_path: Path
) -> None:
    """A disk on a file on a file system on a mapping on a loop device on a disk; numbers do not
    tell, since the lower disk has the higher one."""
    needs(Program("dmsetup"))
    lower = serve(Ram(size=32 * MIB), id=5).path
    with ExitStack() as stack:
        loop = run("losetup", "--find", "--show", lower).strip()
        stack.enter_context(undone("losetup", "--detach", loop))
        run("dmsetup", "create", "pyublk-test", "--table", f"0 65536 linear {loop} 0")
        stack.enter_context(undone("dmsetup", "remove", "--retry", "pyublk-test"))
        run("dmsetup", "mknodes", "pyublk-test")
        run("mke2fs", "-q", "/dev/mapper/pyublk-test")
        run("mount", "/dev/mapper/pyublk-test", tmp_path)
        stack.enter_context(undone("umount", tmp_path))
        (tmp_path / "image").write_bytes(bytes(MIB))
        upper = stack.enter_context(Server(UPPER, tmp_path / "image", False))
        assert upper.line() == "serving"
        found = controller.devices()
        assert [device.id for device in top_first(found)] == [2, 5]
        assert [device.id for device in top_first(found[::-1])] == [2, 5]
        upper.say("")
        assert upper.ended() == 0


def test_a_disk_that_only_reads_from_another(serve: Serve) -> None:
    lower = serve(Ram(size=MIB), id=5).path
    with Server(UPPER, lower, True) as upper:
        assert upper.line() == "serving"
        assert refused("stop", lower) == f"{lower} is under /dev/ublkb2"
        upper.say("")
        assert upper.ended() == 0
    stopped(lower)


@pytest.mark.thorough
def test_all_are_stopped_from_the_top() -> None:
    lower = added("ram", "--size", "32M", "--id", 5)
    part = partitioned(lower)
    upper = added("file", part, "--id", 2)
    assert refused("stop", lower) == f"{part} is under {upper}"
    stopped("all")
    assert disks() == []


def test_the_file_of_another_disk(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    disk = serve(Slice(image, offset=65536))
    told = refused("add", "file", image, "--size", "2M")
    assert told == f"{image} is in use: {ME} has locked it, which serves {disk.path}"
    assert image.stat().st_size == MIB
    assert disks() == [disk.id]
    assert os.listdir("run") == []


# ---- links, time, records ----


def test_a_link_to_a_disk_is_that_disk(serve: Serve, tmp_path: Path) -> None:
    disk = serve(Ram(size=MIB))
    link = tmp_path / "by-id" / "disk"
    link.parent.mkdir()
    link.symlink_to(disk.path)
    (tmp_path / "char").symlink_to(disk.char_path)
    for path in (link, tmp_path / "char"):
        [told] = json.loads(command("info", path, "--json").stdout)
        assert told["id"] == disk.id
    (tmp_path / "null").symlink_to("/dev/null")
    assert command("stop", tmp_path / "null").exit_code == ExitCode.USAGE
    stopped(link)


@pytest.mark.parametrize("shift", variations([-600, 600], [600]))
def test_the_wall_clock_does_not_count(
    controller: pyublk.Controller, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    monkeypatch.setattr(stopping, "_STARTING", 1.0)
    device = controller.add(queues=1, depth=16)
    now = time.clock_gettime(time.CLOCK_REALTIME)
    began = time.monotonic()
    time.clock_settime(time.CLOCK_REALTIME, now + shift)
    try:
        assert stopping.may_be_starting(device)
        done = command("del", device.id)
    finally:
        passed = time.monotonic() - began
        time.clock_settime(time.CLOCK_REALTIME, now + passed)
    assert (done.exit_code, done.stderr) == (0, "")
    assert passed >= 1.0, "the guard against START after STOP was off"
    assert device.id not in disks()


def test_a_disk_beside_a_record_that_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = added("ram", "--size", "1M")
    record = place(0)
    text = record.read_text()
    fields = json.loads(text)

    def told() -> str | None:
        """What `info` has to say of the record, which `doctor --repair` leaves alone."""
        assert command("doctor", "--repair").exit_code == 0
        assert {record.name, "0.log"} <= set(os.listdir("run"))
        [one] = json.loads(command("info", "0", "--json").stdout)
        assert (one["plan"] is None) == (one["record_trouble"] is not None)
        trouble: str | None = one["record_trouble"]
        return trouble and trouble.removeprefix(f"{record} ")

    record.write_text(json.dumps(fields | {"channel": "socket"}))
    assert told() is None
    record.write_text(json.dumps(fields | {"server": "elsewhere"}))
    assert told() == "is a record that this version of pyublk cannot read"
    record.write_text(text[:-20])
    assert told() == "is no record: it was cut off, or overwritten"
    os.chown(record, 1234, 1234)
    assert told() == "belongs to another user, 1234"
    record.unlink()
    record.mkdir()
    assert told() == "is a directory"
    record.rmdir()
    (tmp_path / "kept").write_text(text)
    record.symlink_to(tmp_path / "kept")
    assert told() == "is a symbolic link"
    assert command("list").stdout.splitlines()[1].split()[2] == "?"
    stopped(path)
    assert f"the server of {path} is not known: {record} is a symbolic link" in caplog.text
    until(lambda: not disks(), what="the server deletes its disk")
    assert (tmp_path / "kept").read_text() == text
