"""A disk of a wheel's, on a real kernel: formatted, mounted, filled, mounted again, read back.

It runs as a program, as root, where `mkfs.ext4` and `mount` are: a target in Python and one in C.
"""

import hashlib
import os
import platform
import random
import subprocess
import tempfile
from pathlib import Path

import pyublk
from pyublk.targets import Ram

SIZE = 64 << 20


class Memory(pyublk.Target):
    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self.data = bytearray(size)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=300)


def show(target: pyublk.Target) -> None:
    written = random.Random(1).randbytes(SIZE // 4)
    with pyublk.Device(target, queues=2) as disk, tempfile.TemporaryDirectory() as folder:
        _run("mkfs.ext4", "-q", disk.path)
        _run("mount", disk.path, folder)
        Path(folder, "file").write_bytes(written)
        _run("umount", folder)
        _run("mount", "-o", "ro", disk.path, folder)
        read = Path(folder, "file").read_bytes()
        _run("umount", folder)
        assert read == written, f"{disk.path} lost what was written"
        digest = hashlib.sha256(read).hexdigest()[:16]
        print(f"{type(target).__name__}: {disk.path} on ext4 keeps {len(read) >> 20} MiB, {digest}")


if __name__ == "__main__":
    where = f"Linux {os.uname().release} on {platform.machine()}"
    print(f"pyublk {pyublk.__file__}, Python {platform.python_version()}, {where}", flush=True)
    for each in (Memory(SIZE), Ram(size=SIZE)):
        show(each)
