"""Layers named on the command line, on real disks: killed, restarted, upgraded, shown."""

import json
import os
import signal
import zipfile
from pathlib import Path

import pytest
from blocks import Blocks
from command_line import added, run_here
from needs import needs
from servers import until

import pyublk
from pyublk.service.records import Record
from pyublk.uapi import Feature

MIB = 1 << 20
EXAMPLES = Path(__file__).parents[2] / "examples"

FLIPPED = """
import pyublk
class Flipped(pyublk.Layer):
    recoverable = True
    def __init__(self, below, mask: int = 255):
        super().__init__(below)
        self.mask, self.writes = mask, 0
    def read(self, offset, buffer):
        self.below.read(offset, buffer)
        buffer[:] = bytes(one ^ self.mask for one in buffer)
    def write(self, offset, data):
        self.writes += 1
        self.below.write(offset, memoryview(bytes(one ^ self.mask for one in data)))
    def status(self):
        return {"writes": self.writes}
"""


@pytest.fixture
def place(place: Path) -> Path:
    (place / "flipping.py").write_text(FLIPPED)
    (place / "store").write_bytes(bytes(MIB))
    return place


def server_of(device: int) -> int:
    record = Record.read(device)
    assert record is not None
    return record.server.pid


def test_layers_come_back_with_their_disk(place: Path) -> None:
    needs(Feature.USER_RECOVERY)
    layers = ["--layer", "flipping.py:Flipped:mask=15", "--layer", "flipping.py:Flipped"]
    disk = added("file", "store", *layers, "--recovery", "resend")
    with Blocks(disk["path"]) as blocks:
        blocks.write(b"\xff" * 4096, 0)
        blocks.sync()
        shown = run_here("info", str(disk["id"])).stdout
        tree = [" ".join(line.split()) for line in shown.splitlines()]
        for line in (
            "layer flipping.py:Flipped:mask=15",
            "stack Flipped",
            "writes: 1",
            "└─ Flipped",
            "└─ File",
        ):
            assert line in tree, shown
        pid = server_of(disk["id"])
        os.kill(pid, signal.SIGKILL)
        until(lambda: server_of(disk["id"]) != pid, what="another server has it")
        assert blocks.read(4096, 0) == b"\xff" * 4096
        blocks.write(b"\xaa" * 4096, 4096)
    (told,) = json.loads(run_here("info", str(disk["id"]), "--json").stdout)
    assert told["plan"]["layers"] == ["flipping.py:Flipped:mask=15", "flipping.py:Flipped"]
    assert [one["class"] for one in told["stack"]] == ["Flipped", "Flipped", "File"]
    assert told["stack"][0]["status"] == {"writes": 1}
    assert run_here("stop", str(disk["id"])).exit_code == 0
    assert (place / "store").read_bytes()[:4096] == bytes([15]) * 4096


def test_a_wrong_layer_is_told_in_a_sentence(place: Path) -> None:
    done = run_here("add", "file", "store", "--layer", "flipping.py:Flipped:msk=1")
    assert done.exit_code == 2
    assert "Flipped has no option 'msk' (did you mean 'mask'?)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_the_examples_layers(place: Path) -> None:
    """Encryption over a log over a file, which wraps around; a zip's member; each block once."""
    pytest.importorskip("cryptography")
    (place / "key").write_bytes(os.urandom(64))
    disk = added(
        "file", "log", "--size", "2M",
        "--layer", f"{EXAMPLES}/log_structured.py:LogStructured:spare=0.5",
        "--layer", f"{EXAMPLES}/encrypted.py:Encrypted:key=key",
    )  # fmt: skip
    data = os.urandom(65536)
    with Blocks(disk["path"]) as blocks:
        for _ in range(5):
            for at in range(0, 6 * 65536, 65536):
                blocks.write(data, at)
        blocks.sync()
        assert blocks.read(65536, 65536) == data
    (told,) = json.loads(run_here("info", str(disk["id"]), "--json").stdout)
    assert told["stack"][1]["status"]["written"] == 5 * 6 * 16
    assert run_here("stop", str(disk["id"])).exit_code == 0
    assert data[:4096] not in (place / "log").read_bytes()

    with zipfile.ZipFile("images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("disk.img", data)
    disk = added(f"{EXAMPLES}/zip_disk.py:ZipDisk:images.zip")
    with Blocks(disk["path"], os.O_RDONLY) as blocks:
        assert blocks.read(65536, 0) == data
    assert run_here("stop", str(disk["id"])).exit_code == 0

    disk = added(f"{EXAMPLES}/deduplicated.py:Deduplicated:kept", "--size", "4M")
    with Blocks(disk["path"]) as blocks:
        for at in range(0, 4 * 65536, 65536):
            blocks.write(data, at)
        blocks.sync()
        assert blocks.read(65536, 65536) == data
    assert run_here("stop", str(disk["id"])).exit_code == 0
    assert (place / "kept/blocks").stat().st_size == 65536


def test_coroutines_below_a_layer_with_plain_methods(place: Path) -> None:
    """On a disk of its own in this process: open and close are awaited on one loop."""
    import asyncio

    class Remote(pyublk.Target):
        concurrency = "parallel"

        def __init__(self) -> None:
            super().__init__(size=MIB)
            self.data = bytearray(MIB)
            self.loops: list[asyncio.AbstractEventLoop] = []

        async def open(self) -> None:  # type: ignore[override]
            self.loops.append(asyncio.get_running_loop())

        async def close(self) -> None:  # type: ignore[override]
            self.loops.append(asyncio.get_running_loop())

        async def read(self, offset: int, buffer: memoryview) -> None:
            await asyncio.sleep(0)
            buffer[:] = self.data[offset : offset + len(buffer)]

        async def write(self, offset: int, data: memoryview) -> None:
            self.loops.append(asyncio.get_running_loop())
            self.data[offset : offset + len(data)] = data

    class Plain(pyublk.Layer):
        def read(self, offset: int, buffer: memoryview) -> None:
            self.below.read(offset, buffer)

    for above in (pyublk.Layer, Plain):
        remote = Remote()
        with pyublk.Device(above(remote)) as disk, Blocks(disk.path) as blocks:
            blocks.write(b"kept" * 1024, 4096)
            assert blocks.read(4096, 4096) == b"kept" * 1024
        assert len(remote.loops) == 3
        assert len(set(remote.loops)) == 1
