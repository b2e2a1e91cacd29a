"""Take the uncompressed kernel out of a bootable image.

QEMU starts an ELF kernel directly (PVH); under emulation that saves the second or two which the
kernel's own decompressor takes. The layout of the image is from the kernel's
Documentation/arch/x86/boot.rst.
"""

import contextlib
import struct

from pyublk.vm.decompress import NotDecompressed, decompress

_SETUP_SECTS = 0x1F1
_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD = 0x248
_HAS_PAYLOAD = 0x208


def extract(image: bytes) -> bytes | None:
    """Return the ELF kernel in an x86 bzImage, or None when there is none to be had."""
    if len(image) < _PAYLOAD + 8 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        return None
    (version,) = struct.unpack_from("<H", image, _VERSION)
    if version < _HAS_PAYLOAD:
        return None
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = ((image[_SETUP_SECTS] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    # All but gzip are followed by four bytes that tell the kernel's size.
    for stream in (payload[:-4], payload):
        with contextlib.suppress(NotDecompressed):
            kernel = decompress(stream)
            return kernel if kernel.startswith(b"\x7fELF") else None
    return None
