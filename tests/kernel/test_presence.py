"""Disks half of whose blocks are in a file of their own, by every path, over files and Python."""

import os
import random
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from fio import verified
from needs import needs_what_it_asks_for

from pyublk import DataPath, Target
from pyublk.layers.presence import PresenceLayer
from pyublk.targets import File

MIB = 1 << 20
SIZE = 8 * MIB


class Python(Target):
    concurrency = "parallel"

    def __init__(self, content: bytes) -> None:
        super().__init__(size=len(content), read_only=True)
        self.content = content

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


def below(kind: str, folder: Path, content: bytes) -> Target:
    if kind == "plain":
        return Python(content)
    base = folder / "base"
    base.write_bytes(content)
    return File(base, read_only=True)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (DataPath.AUTO_BUFFER, "file"),
        (DataPath.COPY, "plain"),
        pytest.param(DataPath.USER_COPY, "file", marks=pytest.mark.thorough),
        pytest.param(DataPath.ZERO_COPY, "plain", marks=pytest.mark.thorough),
        pytest.param(DataPath.ZERO_COPY, "file", marks=pytest.mark.thorough),
        pytest.param(DataPath.AUTO_BUFFER, "plain", marks=pytest.mark.thorough),
    ],
)
def test_every_path_keeps_the_bytes(
    serve: Serve, tmp_path: Path, path: DataPath, kind: str
) -> None:
    content = random.Random(1).randbytes(SIZE)
    layer = PresenceLayer(below(kind, tmp_path, content), tmp_path / "upper", granularity=16384)
    with needs_what_it_asks_for():
        disk = serve(layer, path=path, queues=2, max_io_size=256 * 1024)
    assert disk.data_path.path is path
    with Blocks(disk.path) as blocks:  # every other piece is present
        for at in range(4 * MIB, SIZE, 128 * 1024):
            blocks.write(content[at : at + 4096], at + 8192)
    # Below 4 MiB blocks become present as fio goes along.
    verified(disk.path, rw="randwrite", bsrange="4k-64k", size="4m", iodepth=16)
    data = os.urandom(MIB)
    with Blocks(disk.path) as blocks:
        blocks.write(data[:12288], 7 * MIB + 4096)
        blocks.zero_out(7 * MIB + 65536, 32768)
        blocks.discard(7 * MIB + 262144, 65536)
        blocks.sync()
        before = blocks.read(MIB, 7 * MIB)
        middle = blocks.read(2 * MIB, 5 * MIB)
    expected = bytearray(content[7 * MIB :])
    pieces = bytearray(content)
    for at in range(4 * MIB, SIZE, 128 * 1024):
        pieces[at + 8192 : at + 12288] = content[at : at + 4096]
    expected[:] = pieces[7 * MIB :]
    expected[4096:16384] = data[:12288]
    expected[65536 : 65536 + 32768] = bytes(32768)
    expected[262144 : 262144 + 65536] = bytes(65536)
    assert before == expected
    assert middle == pieces[5 * MIB : 7 * MIB]
    disk.stop()
    again = serve(PresenceLayer(below(kind, tmp_path, content), tmp_path / "upper"))
    with Blocks(again.path) as blocks:
        assert blocks.read(MIB, 7 * MIB) == expected
