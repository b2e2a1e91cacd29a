# SPDX-License-Identifier: MIT
"""The demonstration: disks served by Python, formatted, filled with real files, verified.

Runs on this machine's kernel when it has ublk, else in a virtual machine whose kernel has.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyublk
from pyublk import launch
from pyublk.control import CONTROL_NODE
from pyublk.targets import Ram
from pyublk.vm import Machine, VMError, attached

FILES = 3000
LARGEST_FILE = 64 << 10
DISK_SIZE = 256 << 20
#: Programs the demonstration runs, and the Debian packages they are in.
PROGRAMS = {"mkfs.ext4": "e2fsprogs", "mount": "mount", "umount": "mount", "fio": "fio"}


class Rot13(pyublk.Target):
    """The ten-line disk of the README: keeps every byte rotated by 13."""

    turned = bytes((byte + 13) % 256 for byte in range(256))
    back = bytes((byte - 13) % 256 for byte in range(256))

    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self.data = bytearray(bytes(1).translate(self.turned)) * size

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)].translate(self.back)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = bytes(data).translate(self.turned)


class Failed(Exception):
    """The demonstration showed something else than it promised."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pyublk.demo", description=__doc__)
    parser.add_argument(
        "--kernel", default="latest", help="of the virtual machine, if one is needed"
    )
    options = parser.parse_args(arguments)
    launch.ctrl_c_interrupts()
    try:
        _require_programs()
        if not os.path.exists(CONTROL_NODE):
            return _in_a_machine(options.kernel)
        if os.geteuid() != 0:
            raise Failed("only root may make disks and mount them: run it with sudo")
        _run_here()
    except VMError as error:
        attached.report(error)
        return 1
    except (Failed, OSError, subprocess.SubprocessError, pyublk.UblkError) as error:
        print(f"the demonstration failed: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("the demonstration was interrupted", file=sys.stderr)
        return 1
    return 0


def _require_programs() -> None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where a user's may not lead
    os.environ["PATH"] = path
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            raise Failed(f"{program} is not installed: apt-get install {package}")


def _in_a_machine(kernel: str) -> int:
    _say(f"{os.uname().release}, this machine's kernel, has no ublk: starting a virtual one")
    machine = Machine(kernel, memory=3 << 30)
    command = (sys.executable, "-m", "pyublk.demo")
    return 1 if attached.run(machine, command, env=attached.environment(), timeout=600) else 0


def _run_here() -> None:
    began = time.monotonic()
    _say(f"kernel {os.uname().release}, {os.cpu_count()} CPUs")
    with _step(f"{FILES} files of this machine read, to be kept on each disk"):
        files = _collect_files()
    if len(files) < FILES:
        raise Failed(f"this machine has only {len(files)} files of up to {LARGEST_FILE} bytes")
    summaries = []
    for name, target in (
        ("a disk in memory, served in C", Ram(size=DISK_SIZE)),
        ("a disk of ten lines of Python", Rot13(DISK_SIZE)),
    ):
        _say(f"\n{name}: {type(target).__name__}")
        summaries.append(_show(name, target, files))
    _say(f"\nall verified in {time.monotonic() - began:.0f} s")
    if _is_emulated():
        _say("this processor is emulated: times and IOPS say little about a real one")
    for summary in summaries:
        _say(summary)


def _is_emulated() -> bool:
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def _say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def _step(text: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    _say(f"  {text} ({time.monotonic() - began:.1f} s)")


def _collect_files() -> dict[str, bytes]:
    """Real files of this machine: name on the disk -> content."""
    found: dict[str, bytes] = {}
    paths = _paths()
    with ThreadPoolExecutor(8) as pool:  # a virtual machine gets files one slow message at a time
        while batch := list(islice(paths, 128)):
            for path, content in zip(batch, pool.map(_content, batch), strict=True):
                if 0 < len(content) <= LARGEST_FILE and len(found) < FILES:
                    found[path.lstrip("/")] = content
            if len(found) == FILES:
                break
    return found


def _paths() -> Iterator[str]:
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share", "/etc"]
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                yield os.path.join(folder, name)


def _content(path: str) -> bytes:
    """What a file holds, or a little of it when it is too large; nothing where we may not look."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, LARGEST_FILE + 1)
    finally:
        os.close(descriptor)


def _show(name: str, target: pyublk.Target, files: dict[str, bytes]) -> str:
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        pyublk.Device(target, queues=min(2, os.cpu_count() or 1)) as disk,
    ):
        _say(f"  {disk.path} is there ({time.monotonic() - began:.1f} s)")
        with _step("fio --verify=crc32c is clean"):
            iops = _verify_with_fio(disk.path)
        with _step("mkfs.ext4"):
            _run("mkfs.ext4", "-q", "-F", disk.path)
        with _mounted(disk.path, folder), _step(f"{len(files)} files copied in and synced"):
            _copy(files, Path(folder))
        with (
            _mounted(disk.path, folder),
            _step(f"{len(files)} checksums equal after remounting"),
        ):
            _compare(files, Path(folder))
        stopping = time.monotonic()
    stats = disk.stats().total
    if stats.errors or os.path.exists(disk.path):
        raise Failed(f"{disk.path} was not stopped cleanly: {stats.errors} requests failed")
    _say(f"  stopped and deleted, no request failed ({time.monotonic() - stopping:.1f} s)")
    return (
        f"{name}: {stats.requests} requests served "
        f"({stats.bytes_read >> 20} MiB read, {stats.bytes_written >> 20} MiB written), "
        f"{iops:.0f} IOPS under fio"
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _verify_with_fio(path: str) -> float:
    """Writes blocks with checksums all over the disk, reads them back; returns its IOPS."""
    said = _run(
        *("fio", "--name=verify", f"--filename={path}", "--rw=randwrite", "--bsrange=512-64k"),
        *("--size=8M", "--ioengine=libaio", "--iodepth=16", "--direct=1", "--verify=crc32c"),
        *("--verify_fatal=1", "--randseed=1", "--thread", "--output-format=json"),
    )
    job = json.loads(said[said.index("{") :])["jobs"][0]  # warnings come before the report
    done = [job[kind] for kind in ("read", "write")]
    milliseconds: int = sum(kind["runtime"] for kind in done)
    requests: int = sum(kind["total_ios"] for kind in done)
    return requests * 1000 / max(milliseconds, 1)


@contextmanager
def _mounted(path: str, folder: str) -> Iterator[None]:
    _run("mount", "-t", "ext4", path, folder)
    try:
        yield
    except BaseException:
        subprocess.run(("umount", "--lazy", folder), timeout=60, check=False)  # whoever is in there
        raise
    _run("umount", folder)


def _copy(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.sync()
    finally:
        os.close(descriptor)


def _compare(files: dict[str, bytes], folder: Path) -> None:
    names = list(files)
    random.Random(1).shuffle(names)  # not in the order in which they were written
    for name in names:
        kept = hashlib.sha256((folder / name).read_bytes()).digest()
        if kept != hashlib.sha256(files[name]).digest():
            raise Failed(f"{name} is not what was written")


if __name__ == "__main__":
    sys.exit(main())
