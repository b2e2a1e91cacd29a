"""Every target that makes a disk of something else, taken through the same life on a real disk: fio
verifies it, a file system is made and mounted, and its server is killed under that."""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import added, run_here
from filesystems import check_file_system, checksums, make_file_system, mounted, run
from fio import verified
from object_stores import SmallS3, use_endpoint
from restarted import restart_of, served_again, server_of
from servers import until
from web_server import WebServer

from pyublk.control import Controller

MIB = 1 << 20
SIZE = 32 * MIB
#: Emulated machines keep no time, and a server is begun anew twice over.
PATIENCE = 200

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Disk:
    """How one is added. `restarts`: it is served again by itself when its server was killed; else
    it is deleted, and has what was synced."""

    words: tuple[str, ...]
    restarts: bool = True


def raw(place: Path) -> Path:
    file = place / "raw.img"
    with file.open("wb") as image:
        image.truncate(SIZE)
    return file


@contextmanager
def overlay(place: Path) -> Iterator[Disk]:
    base = raw(place)
    base.chmod(0o444)
    assert run_here("overlay", "create", "top", "--base", str(base)).exit_code == 0
    yield Disk(("overlay", "top"))
    assert not any(base.read_bytes())


@contextmanager
def cache(place: Path, mode: str) -> Iterator[Disk]:
    yield Disk(("cache", "kept", str(raw(place)), "--option", f"mode={mode}"))


@contextmanager
def presence(place: Path) -> Iterator[Disk]:
    layer = "pyublk.layers.presence:PresenceLayer:file=upper,granularity=16384"
    yield Disk(("file", str(raw(place)), "--layer", layer))


@contextmanager
def nbd(place: Path) -> Iterator[Disk]:
    socket = place / "s"
    with subprocess.Popen(
        ["nbdkit", "-f", "-U", socket, "file", raw(place)], stdin=subprocess.DEVNULL
    ) as server:
        try:
            until(socket.exists, what="nbdkit listens")
            yield Disk(("nbd", f"unix:{socket}"))
        finally:
            server.kill()


@contextmanager
def url(place: Path) -> Iterator[Disk]:
    """It is read-only: a cache and an overlay lie over it, as where machines boot from it."""
    content = bytearray(SIZE)
    with WebServer(content) as web:
        layers = ("--layer", "cache:file=kept", "--layer", "overlay:file=top")
        yield Disk(("url", web.url, "--option", 'etag="v1"', *layers))
        assert not any(content)


@contextmanager
def s3(place: Path, *options: str) -> Iterator[Disk]:
    words = ["s3", "bucket/disk", "--size", str(SIZE)]
    for option in ("chunk_size=1M", *options):
        words += ["--option", option]
    with pytest.MonkeyPatch.context() as patch, SmallS3() as server:
        use_endpoint(patch, server.endpoint)
        yield Disk(tuple(words), restarts=False)


@contextmanager
def image(place: Path, kind: str) -> Iterator[Disk]:
    if shutil.which("qemu-img") is None or shutil.which("qemu-storage-daemon") is None:
        pytest.skip("the packages qemu-utils and qemu-system-common are not installed")
    file = place / f"disk.{kind}"
    run("qemu-img", "create", "-q", "-f", kind, file, SIZE)
    yield Disk((f"image:{file}",))
    if kind == "qcow2":
        run("qemu-img", "check", "-q", file)


PLUGIN = """\
import os

API_VERSION = 2
path = None

def config(key, value):
    global path
    path = value

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return os.open(path, os.O_RDWR)

def close(handle):
    os.close(handle)

def get_size(handle):
    return os.fstat(handle).st_size

def pread(handle, buffer, offset, flags):
    os.preadv(handle, [buffer], offset)

def pwrite(handle, buffer, offset, flags):
    os.pwrite(handle, buffer, offset)

def can_flush(handle):
    return True

def flush(handle, flags):
    os.fsync(handle)
"""


@contextmanager
def nbdkit(place: Path) -> Iterator[Disk]:
    plugin = place / "plugin.py"
    plugin.write_text(f"import nbdkit\n{PLUGIN}")
    yield Disk((f"nbdkit:{plugin}", "--option", f"file={raw(place)}"), restarts=False)


MADE_OF: dict[str, Callable[[Path], Any]] = {
    "overlay": overlay,
    "cache, write-through": lambda place: cache(place, "write-through"),
    "cache, write-back": lambda place: cache(place, "write-back"),
    "presence": presence,
    "nbd": nbd,
    "url": url,
    "s3": s3,
    "s3, zstd": lambda place: s3(place, "compression=zstd"),
    "image, qcow2": lambda place: image(place, "qcow2"),
    "image, vhdx": lambda place: image(place, "vhdx"),
    "nbdkit": nbdkit,
}


def fill(tree: Path, name: str) -> dict[str, str]:
    """Files that are synced; returns their checksums."""
    (tree / name).mkdir()
    for number in range(8):
        data = random.Random(f"{name} {number}").randbytes(number * 40_000 + 1)
        (tree / name / str(number)).write_bytes(data)
    run("sync", "-f", tree)
    return checksums(tree)


def killed(disk: dict[str, Any], kind: Disk, controller: Controller) -> None:
    os.kill(disk["server_pid"], signal.SIGKILL)
    if kind.restarts:
        until(lambda: server_of(disk) != disk["server_pid"], PATIENCE, "another server has it")
        served_again(controller, disk, disk["server_pid"])
    else:
        until(lambda: not Path(disk["path"]).exists(), PATIENCE, "it is deleted")


@pytest.mark.parametrize("name", MADE_OF)
def test_a_life(name: str, place: Path, controller: Controller) -> None:
    with ExitStack() as stack:
        kind = stack.enter_context(MADE_OF[name](place))
        disk = added(*kind.words)
        path = disk["path"]
        assert restart_of(disk)["on"] is kind.restarts
        verified(path, rw="randwrite", bsrange="4k-64k", iodepth=8, size=8 * MIB, timeout=300)

        make_file_system("ext4", path)
        with mounted(path, place / "mnt") as tree:
            kept = fill(tree, "before")
            killed(disk, kind, controller)
            if not kind.restarts:  # the mount is of a disk that is gone
                run("umount", "--lazy", tree)
                disk = added(*kind.words)
                path = disk["path"]
                run("mount", path, tree)
            Path("/proc/sys/vm/drop_caches").write_text("3")
            found = checksums(tree)
            assert {one: found[one] for one in kept} == kept
            kept = fill(tree, "after")
        check_file_system("ext4", path)
        done = run_here("stop", str(disk["id"]))
        assert done.exit_code == 0, done.stderr

        disk = added(*kind.words)
        with mounted(disk["path"], place / "again") as tree:
            assert checksums(tree) == kept
        assert run_here("stop", str(disk["id"])).exit_code == 0
