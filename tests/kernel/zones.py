"""What clients ask of zones, by ioctl(2)."""

import fcntl
import struct

from blocks import Blocks

from pyublk.uapi import Op
from pyublk.zones import REPORT_BYTES, Zone

BLKREPORTZONE = 0xC0101282
#: The kernel makes one ZONE_RESET_ALL of a reset of all zones.
MANAGE = {
    Op.ZONE_RESET: 0x40101283,
    Op.ZONE_RESET_ALL: 0x40101283,
    Op.ZONE_OPEN: 0x40101286,
    Op.ZONE_CLOSE: 0x40101287,
    Op.ZONE_FINISH: 0x40101288,
}


def report(client: Blocks, count: int, offset: int = 0) -> list[Zone]:
    assert count <= 15, "Python keeps the GIL in an ioctl on more than 1 KiB: nobody would serve"
    answer = bytearray(struct.pack("QII", offset // 512, count, 0) + bytes(count * REPORT_BYTES))
    fcntl.ioctl(client.fd, BLKREPORTZONE, answer)
    _, found, _ = struct.unpack_from("QII", answer)
    return [
        Zone.unpack(answer[at : at + REPORT_BYTES])
        for at in range(16, 16 + found * REPORT_BYTES, REPORT_BYTES)
    ]


def manage(client: Blocks, op: Op, offset: int, length: int) -> None:
    fcntl.ioctl(client.fd, MANAGE[op], struct.pack("QQ", offset // 512, length // 512))
