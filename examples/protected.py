"""A disk in memory that keeps metadata beside its data: 8 bytes for each 512, T10 protection
information, which the kernel makes when it writes and checks when it reads.

pyublk add examples/protected.py:Protected --size 64M
python examples/protected.py

Needs Linux 7.0, and root.
"""

import pyublk
from pyublk.params import Integrity
from pyublk.uapi import Checksum, Feature, Op

INTERVAL = 512
T10 = Integrity(metadata_size=8, interval=INTERVAL, checksum=Checksum.T10DIF, ref_tag=True)


class Protected(pyublk.Target):
    needs = Feature.INTEGRITY
    paths = (pyublk.DataPath.USER_COPY,)  # metadata travels no other way

    def __init__(self, size: int, integrity: Integrity = T10) -> None:
        super().__init__(size=size)
        self.integrity = integrity
        self.data = memoryview(bytearray(size))
        # All ones: nothing to check, as for blocks that were never written.
        self.metadata = memoryview(bytearray(b"\xff") * (size // INTERVAL * self.per_interval))

    @property
    def per_interval(self) -> int:
        return self.integrity.metadata_size if self.integrity else 0

    def metadata_at(self, offset: int, length: int) -> memoryview:
        first = offset // INTERVAL * self.per_interval
        return self.metadata[first : first + length // INTERVAL * self.per_interval]

    def handle(self, io: pyublk.IO) -> None:
        data = self.data[io.offset : io.offset + io.length]
        beside = self.metadata_at(io.offset, io.length)
        if io.op is Op.READ:
            io.write_from(data)
            if io.metadata:
                io.write_from(beside, metadata=True)
        else:
            io.read_into(data)
            if io.metadata:
                io.read_into(beside, metadata=True)


if __name__ == "__main__":
    with pyublk.Device(Protected(64 << 20)) as disk:
        print(disk.path, flush=True)
        disk.wait()
