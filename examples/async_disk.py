"""Two async disks on one event loop: reads of the slow one do not hold up the fast one.

python examples/async_disk.py
"""

import asyncio

import pyublk


class Slow(pyublk.Target):
    """Answers after `delay` seconds, as a store behind a network would."""

    def __init__(self, size: int, delay: float = 0.0) -> None:
        super().__init__(size=size)
        self.data = bytearray(size)
        self.delay = delay

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(self.delay)
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(self.delay)
        self.data[offset : offset + len(data)] = data


async def main() -> None:
    async with (
        pyublk.Device(Slow(16 << 20)) as fast,
        pyublk.Device(Slow(16 << 20, delay=0.01)) as slow,
    ):
        print(fast.path, slow.path, flush=True)
        await fast.wait_async()


if __name__ == "__main__":
    asyncio.run(main())
