"""Images of virtual machines, made by qemu-img: read by their map, written through QEMU."""

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyublk import targets
from pyublk.targets import image_daemon
from pyublk.targets.image import Image
from pyublk.targets.image_files import examine
from pyublk.targets.image_map import MappedImage
from pyublk.testing import Disk

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-storage-daemon") is None,
    reason="the packages qemu-utils and qemu-system-common are not installed",
)

SIZE = 4 << 20
CONTENTS = bytearray(SIZE)
for place in range(0, SIZE, 1 << 20):
    CONTENTS[place : place + 196608] = random.Random(place).randbytes(196608)


def qemu(program: str, *words: object) -> str:
    done = subprocess.run(
        [f"qemu-{program}", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    path.write_bytes(CONTENTS)
    return path


def make(raw: Path, path: Path, *options: str, format: str = "qcow2") -> Path:
    qemu("img", "convert", "-f", "raw", "-O", format, *options, raw, path)
    return path


# ---- read-only ----


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi"])
def test_a_read_only_image_is_served_by_its_map(format: str, raw: Path, tmp_path: Path) -> None:
    made = make(raw, tmp_path / "disk.img", format=format)
    target = targets.build(targets.resolve("image"), {}, [str(made)], read_only=True)
    assert isinstance(target, MappedImage)
    with Disk(target) as disk:
        assert disk.params.basic.read_only
        assert disk.pread(SIZE, 0) == CONTENTS
        assert target.status()["served_by"] == "its map"
        identity = target.identity()
        # QEMU sees that it is read: it reads too, and does not write.
        qemu("io", "-r", "-f", format, "-c", "read 0 4k", made)
        with pytest.raises(AssertionError, match='write" lock'):
            qemu("io", "-f", format, "-c", "write 0 4k", made)
    qemu("io", "-f", format, "-c", "write 0 4k", made)
    with Disk(target) as disk:
        assert target.identity() != identity


def test_backing_files_are_read_where_they_lie(raw: Path, tmp_path: Path) -> None:
    base = make(raw, tmp_path / "base.qcow2")
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top: strange, json:{}.qcow2"
    qemu("img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", middle)
    qemu("io", "-f", "qcow2", "-c", "write -P 9 1M 4k", "-c", "write -z 2M 64k", middle)
    qemu("img", "create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top, "6M")
    qemu("io", "-f", "qcow2", "-c", "write -P 8 5M 4k", f"file:{top}")
    expected = bytearray(CONTENTS) + bytes(2 << 20)
    expected[1 << 20 : (1 << 20) + 4096] = bytes([9]) * 4096
    expected[2 << 20 : (2 << 20) + 65536] = bytes(65536)
    expected[5 << 20 : (5 << 20) + 4096] = bytes([8]) * 4096
    target = Image(top, read_only=True)
    assert isinstance(target, MappedImage)
    with Disk(target) as disk:
        assert disk.pread(6 << 20, 0) == expected
        assert len(target.status()["image"]) == 3


def test_a_raw_base_is_never_taken_for_another_format(raw: Path, tmp_path: Path) -> None:
    """What a guest wrote into its disk: the header of an image that lies on /etc/passwd."""
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"secret".ljust(65536))
    evil = tmp_path / "evil.qcow2"
    qemu("img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", evil)
    top = tmp_path / "top.qcow2"
    qemu("img", "create", "-q", "-f", "qcow2", "-b", evil, "-F", "raw", top)
    for read_only in (True, False):
        with Disk(Image(top, read_only=read_only)) as disk:
            assert disk.pread(512, 0)[:4] == b"QFI\xfb"
    with Disk(Image(evil, format="raw", read_only=True)) as disk:
        assert disk.pread(512, 0)[:4] == b"QFI\xfb"


@pytest.mark.parametrize(
    ("format", "options"), [("vhdx", []), ("qcow2", ["-c"])], ids=["vhdx", "compressed"]
)
def test_what_has_no_map_is_read_through_the_daemon(
    format: str, options: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.raw"
    text.write_bytes(b"compressible " * 10240 + bytes(SIZE - 133120))
    made = make(text, tmp_path / "disk.img", *options, format=format)
    target = Image(made, read_only=True)
    assert not isinstance(target, MappedImage)
    with Disk(target) as disk:
        assert disk.params.basic.read_only
        assert disk.pread(SIZE, 0) == text.read_bytes()
    with pytest.raises(ValueError, match="cannot be served by its map: some of its clusters"):
        Disk(MappedImage(made)).open()


# ---- written ----


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", []),
        ("qcow2", ["-c", "-o", "compression_type=zstd"]),
        ("qcow2", ["-o", "lazy_refcounts=on,cluster_size=2M"]),
        ("vmdk", []),
        ("vdi", []),
        ("vdi", ["-o", "static=on"]),
        ("vhdx", []),
        ("vhdx", ["-o", "subformat=fixed"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value[-1:]),
)
def test_an_image_is_written(format: str, options: list[str], raw: Path, tmp_path: Path) -> None:
    """Over what it has, and where it has nothing: qemu-img finds no error, and these bytes."""
    made = make(raw, tmp_path / "disk.img", *options, format=format)
    expected = bytearray(CONTENTS)
    rng = random.Random(1)
    for _ in range(2):  # the second time opens what the first has left
        with Disk(Image(made), depth=8) as disk:
            assert disk.params.basic.volatile_cache
            for _ in range(20):
                data = rng.randbytes(rng.choice([512, 4096, 65536, 300_032]))
                at = rng.randrange((SIZE - len(data)) // 512) * 512
                disk.pwrite(data, at, fua=rng.random() < 0.2)
                expected[at : at + len(data)] = data
            disk.write_zeroes(2 << 20, 65536)
            expected[2 << 20 : (2 << 20) + 65536] = bytes(65536)
            disk.flush()
            assert disk.pread(SIZE, 0) == expected
            status = disk.target.status()
            assert status is not None
            assert status["served_by"] == "QEMU's storage daemon"
        assert not processes_of(made)
        qemu("img", "check", "-q", "-f", format, made)
        (tmp_path / "expected").write_bytes(expected)
        qemu("img", "compare", "-q", "-f", format, "-F", "raw", made, tmp_path / "expected")


def test_what_can_be_written_once_only_is_read(raw: Path, tmp_path: Path) -> None:
    made = make(raw, tmp_path / "disk.vmdk", "-o", "subformat=streamOptimized", format="vmdk")
    with pytest.raises(ValueError, match=r"stream-optimized VMDK.*: serve it read-only, lay an"):
        Disk(Image(made)).open()
    with Disk(Image(made, read_only=True)) as disk:
        assert disk.pread(SIZE, 0) == CONTENTS


def processes_of(image: Path) -> list[int]:
    """QEMU's that have the image on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"qemu-storage-daemon") and str(image).encode() in b" ".join(words):
            found.append(int(place.parent.name))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_that_is_killed_takes_its_daemon_along(raw: Path, tmp_path: Path) -> None:
    made = make(raw, tmp_path / "disk.qcow2")
    server = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib\n"
         "from pyublk import testing\nfrom pyublk.targets import image\n"
         "disk = testing.Disk(image.Image(pathlib.Path(sys.argv[1])))\n"
         "disk.open(); disk.pwrite(b'k' * 4096, 0); disk.flush(); print('ready', flush=True)\n"
         "sys.stdin.read()", made],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdin is not None
    assert server.stdout.readline() == b"ready\n"
    assert len(processes_of(made)) == 1
    with pytest.raises(OSError, match="is in use by another program") as failure:
        Disk(MappedImage(made)).open()
    assert failure.value.errno == errno.EBUSY
    server.kill()
    server.wait()
    server.stdin.close()
    server.stdout.close()
    with Disk(Image(made)) as disk:  # once the daemon has ended
        assert disk.pread(4096, 0) == b"k" * 4096


def test_a_daemon_that_dies_fails_the_disk(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(raw, tmp_path / "disk.qcow2")
    with Disk(Image(made)) as disk:
        disk.pwrite(b"k" * 4096, 0)
        (daemon,) = processes_of(made)
        os.kill(daemon, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(OSError, match="at 0") as failure:
                disk.pread(4096, 0)
            assert failure.value.errno == errno.EIO
        wait_until(lambda: "has died" in caplog.text)
        status = disk.target.status()
        assert status is not None
        assert status["daemon"] == "dead"
        with pytest.raises(OSError, match="FLUSH at 0"):
            disk.flush()
    with Disk(Image(made)) as disk:
        assert disk.size == SIZE


def test_a_daemon_that_pauses_is_waited_for(raw: Path, tmp_path: Path) -> None:
    made = make(raw, tmp_path / "disk.qcow2")
    with Disk(Image(made)) as disk:
        (daemon,) = processes_of(made)
        os.kill(daemon, signal.SIGSTOP)
        began = time.monotonic()
        back = threading.Timer(1, os.kill, (daemon, signal.SIGCONT))
        back.start()
        assert disk.pread(4096, 0) == CONTENTS[:4096]
        assert time.monotonic() - began > 0.9
        back.join()


def test_an_image_that_shrinks_while_it_is_read_is_an_error(raw: Path, tmp_path: Path) -> None:
    made = make(raw, tmp_path / "disk.qcow2")
    with Disk(Image(made, read_only=True)) as disk:
        assert disk.pread(4096, 0) == CONTENTS[:4096]
        os.truncate(made, made.stat().st_size // 4)
        with pytest.raises(OSError, match="READ at 3145728 failed"):
            disk.pread(4096, 3 << 20)


# ---- what is refused ----


def patch(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def refused(path: Path, **options: object) -> str:
    """What both ways of serving it say, which is the same."""
    said = []
    for read_only in (True, False):
        with pytest.raises((OSError, ValueError)) as failure:
            Disk(Image(path, read_only=read_only, **options)).open()  # type: ignore[arg-type]
        said.append(str(failure.value))
    assert said[0] == said[1]
    return said[0]


def test_no_image_and_the_wrong_format(raw: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none")
    assert "neither a regular file nor" in refused(tmp_path)
    assert "serve it by the target file" in refused(raw)
    assert "is not a qcow2 image" in refused(raw, format="qcow2")
    assert "is not a vdi image, but qcow2" in refused(make(raw, tmp_path / "a"), format="vdi")
    assert "it must be one of qcow2, vmdk, vhdx, vdi, raw" in refused(raw, format="iso")
    qemu("img", "create", "-q", "-f", "qcow2", tmp_path / "empty.qcow2", "0")
    assert "is the image of an empty disk: `qemu-img resize`" in refused(tmp_path / "empty.qcow2")


def test_images_that_are_encrypted_corrupt_or_cut_off(raw: Path, tmp_path: Path) -> None:
    made = make(raw, tmp_path / "a.qcow2")
    head = made.read_bytes()[:65536]
    (tmp_path / "short.qcow2").write_bytes(head[:40])
    assert "is cut off" in refused(tmp_path / "short.qcow2")
    assert "qemu-img check -r all" in refused(patch(made, 72, struct.pack(">Q", 2)))
    assert "is encrypted" in refused(patch(made, 32, struct.pack(">I", 2)))
    data = tmp_path / "with_data.qcow2"
    qemu("img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", data, "1M")
    assert "keeps its data in another file" in refused(data)
    make(raw, tmp_path / "flat.vmdk", "-o", "subformat=monolithicFlat", format="vmdk")
    assert "is a VMDK of several files" in refused(tmp_path / "flat.vmdk")
    vmdk = patch(make(raw, tmp_path / "a.vmdk", format="vmdk"), 12, bytes(8))
    assert "is a VMDK of several files" in refused(vmdk)
    empty = patch(make(raw, tmp_path / "b.qcow2"), 4, struct.pack(">I", 77))
    assert "QEMU cannot open" in refused(empty)


@pytest.mark.parametrize(
    "name", ["nbd://127.0.0.1/x", 'json:{"driver": "file"}', "file:/etc/passwd", "ssh://host/x"]
)
def test_backing_files_are_files(name: str, tmp_path: Path) -> None:
    made = tmp_path / "a.qcow2"
    qemu("img", "create", "-q", "-f", "qcow2", made, "1M")
    qemu("img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", made)
    assert "which QEMU would not take for a file's name" in refused(made)


def test_a_chain_that_is_broken(raw: Path, tmp_path: Path) -> None:
    top, base = tmp_path / "top.qcow2", tmp_path / "base.qcow2"
    qemu("img", "create", "-q", "-f", "qcow2", top, "1M")
    qemu("img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert "base.qcow2 does not exist" in refused(top)
    base.symlink_to(top)
    assert "on top of itself" in refused(top)
    head = bytearray(top.read_bytes())
    at = head.index(struct.pack(">I", 0xE2792ACA))
    patch(top, at, struct.pack(">I", 0x12345678))
    assert "does not say which format its backing file" in refused(top)


def test_without_qemu(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(raw, tmp_path / "a.qcow2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"qemu-storage-daemon, .* qemu-system-common of"):
        Disk(Image(made)).open()
    with pytest.raises(FileNotFoundError, match=r"qemu-img, .* in the package qemu-utils"):
        Disk(MappedImage(made)).open()


def test_an_image_that_a_virtual_machine_has_open(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_daemon, "COMES_FREE", 0.1)
    made = make(raw, tmp_path / "a.qcow2")
    machine = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", made], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert machine.stdin is not None
    assert machine.stdout is not None
    machine.stdin.write(b"write 0 4k\n")
    machine.stdin.flush()
    machine.stdout.readline()
    try:
        assert "is in use by another program" in refused(made)
    finally:
        machine.communicate(b"quit\n", timeout=20)
    assert examine(made).format == "qcow2"
    assert json.loads(qemu("img", "info", "--output=json", made))["format"] == "qcow2"
