# SPDX-License-Identifier: MIT
"""Whether the kernel looks for partitions when a disk starts."""

import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest
from blocks import Blocks
from command_line import added, run_here
from conftest import Serve
from memory import Memory
from needs import needs, only_where
from servers import until

import pyublk
from pyublk.uapi import Feature

MIB = 1 << 20
BLKRRPART = 0x125F


def partitioned(size: int = 4 * MIB) -> Memory:
    """A disk with an MBR that tells of one partition, from 1 MiB on."""
    memory = Memory(size)
    entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", MIB // 512, (size - MIB) // 512)
    memory.data[446 : 446 + len(entry)] = entry
    memory.data[510:512] = b"\x55\xaa"
    return memory


def test_partitions_appear_by_themselves(serve: Serve) -> None:
    disk = serve(partitioned())
    until(lambda: os.path.exists(f"{disk.path}p1"), what="the partition appears")


def test_partitions_appear_when_asked_for(serve: Serve) -> None:
    needs(Feature.NO_AUTO_PART_SCAN)
    disk = serve(partitioned(), partition_scan=False)
    assert Feature.NO_AUTO_PART_SCAN in disk.info().flags
    with Blocks(disk.path) as client:  # a scan would hold the open up until it is through
        client.read(4096, 2 * MIB)
        assert not os.path.exists(f"{disk.path}p1")
        fcntl.ioctl(client.fd, BLKRRPART)
    assert Path(f"/sys/block/{Path(disk.path).name}/{Path(disk.path).name}p1").exists()
    until(lambda: os.path.exists(f"{disk.path}p1"), what="the partition's node")


def test_a_kernel_without_it_is_named(controller: pyublk.Controller) -> None:
    has = controller.features().has(Feature.NO_AUTO_PART_SCAN)
    only_where(not has, "this kernel has NO_AUTO_PART_SCAN")
    with pytest.raises(pyublk.FeatureMissing, match="NO_AUTO_PART_SCAN"):
        pyublk.Device(partitioned(), partition_scan=False).start()


@pytest.mark.thorough
def test_the_command_switches_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(Feature.NO_AUTO_PART_SCAN)
    image = tmp_path / "image"
    image.write_bytes(partitioned().data)
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    disk = added("file", str(image), "--no-partition-scan")
    try:
        assert not os.path.exists(f"{disk['path']}p1")
        subprocess.run(["blockdev", "--rereadpt", disk["path"]], check=True, timeout=60)
        until(lambda: os.path.exists(f"{disk['path']}p1"), what="the partition's node")
    finally:
        done = run_here("stop", str(disk["id"]))
    assert done.exit_code == 0, done.stderr
