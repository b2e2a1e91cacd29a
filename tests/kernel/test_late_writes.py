"""A write that a server had begun when it was killed is over before the next server has the disk:
its bytes never come later than those that are written to the same place next."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from memory import Memory
from servers import Server, until
from variations import variations

import pyublk
from pyublk.control import Controller
from pyublk.targets import File

MIB = 1 << 20
PLACE = 65536

#: argv: the device that has the bytes, and the data path.
SERVE = """
from pyublk.targets import File

with pyublk.Device(File(sys.argv[1], direct=True), recovery="resend", path=sys.argv[2]) as disk:
    tell(disk.id)
    sys.stdin.readline()
"""


class Slow(Memory):
    """Whose first write to a place is done when it is released."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.begun, self.released = threading.Event(), threading.Event()
        self.writes: list[bytes] = []

    def write(self, offset: int, data: memoryview) -> None:
        if offset == PLACE:
            self.writes.append(bytes(data[:5]))
            if len(self.writes) == 1:
                self.begun.set()
                assert self.released.wait(60)
        super().write(offset, data)


def written(path: str, word: bytes) -> None:
    with Blocks(path) as client:
        client.write(word.ljust(4096), PLACE)


@pytest.mark.parametrize("path", variations(["copy", "user-copy", "auto"], quick=["copy"]))
def test_a_write_of_a_killed_server_is_never_late(
    serve: Serve, controller: Controller, path: str
) -> None:
    slow = Slow()
    below = serve(slow).path
    with Server(SERVE, below, path) as server:
        device = int(server.line())
        disk = f"/dev/ublkb{device}"
        try:
            client = threading.Thread(target=written, args=[disk, b"first"])
            client.start()
            assert slow.begun.wait(30)
            server.process.kill()
            server.ended()
            # The kernel's I/O outlives the process, and keeps the disk from the next one.
            with pytest.raises(pyublk.DeviceBusy):
                pyublk.Device.take_over(device, File(below, direct=True), deadline=1).start()
            assert client.is_alive()
            slow.released.set()
            with pyublk.Device.take_over(device, File(below, direct=True)):
                client.join(30)
                assert not client.is_alive()
                written(disk, b"later")
                until(lambda: bytes(slow.data[PLACE:][:5]) == b"later", what="it is written")
                assert slow.writes == [b"first", b"first", b"later"]  # the first was sent again
        finally:
            slow.released.set()
            with suppress(pyublk.DeviceNotFound):
                controller.delete(device)
    assert not os.path.exists(disk)
    assert Path(below).exists()
