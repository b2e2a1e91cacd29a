"""A disk in ten lines: bytes are kept rotated by 13.

pyublk add examples/rot13.py:Rot13 --size 64M
python examples/rot13.py
"""

import pyublk

ROTATED = bytes((byte + 13) % 256 for byte in range(256))
BACK = bytes((byte - 13) % 256 for byte in range(256))


class Rot13(pyublk.Target):
    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self.data = bytearray(size)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)].translate(BACK)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = bytes(data).translate(ROTATED)


if __name__ == "__main__":
    with pyublk.Device(Rot13(64 << 20), queues=2) as disk:
        print(disk.path, flush=True)
        disk.wait()
