"""Decompression of kernels and modules, with what every Debian machine has."""

import bz2
import lzma
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from typing import Protocol

_APT_HELPER = "/usr/lib/apt/apt-helper"


class NotDecompressed(ValueError):
    """The data is damaged, or compressed in a way that cannot be undone here."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _whole(decompressor: _Decompressor, data: bytes) -> bytes:
    """Decompress one stream; what follows it is passed over, a missing end is an error."""
    plain = decompressor.decompress(data)
    if not decompressor.eof:
        raise NotDecompressed("the compressed data ends too early")
    return plain


def _zstd(data: bytes) -> bytes:
    """Decompress zstd: Python has it from 3.14 on only, apt's own helper always."""
    with tempfile.NamedTemporaryFile(suffix=".zst") as file:
        file.write(data)
        file.flush()
        result = subprocess.run(
            [_APT_HELPER, "cat-file", file.name], capture_output=True, check=True
        )
    return result.stdout


_BY_MAGIC: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": lambda data: _whole(zlib.decompressobj(wbits=31), data),
    b"\xfd7zXZ\0": lambda data: _whole(lzma.LZMADecompressor(), data),
    b"\x5d\0\0": lambda data: _whole(lzma.LZMADecompressor(), data),
    b"BZh": lambda data: _whole(bz2.BZ2Decompressor(), data),
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\x7fELF": bytes,
}


def decompress(data: bytes) -> bytes:
    """Return what `data` holds, by its magic number; an ELF file is returned as it is.

    Raises:
        NotDecompressed: it is none of gzip, xz, lzma, bzip2, zstd, or it is damaged.
    """
    for magic, function in _BY_MAGIC.items():
        if data.startswith(magic):
            try:
                return function(data)
            except (lzma.LZMAError, zlib.error, OSError, subprocess.CalledProcessError) as error:
                raise NotDecompressed(f"the compressed data is damaged: {error}") from error
    raise NotDecompressed(f"unknown compression (starts with {data[:4].hex()})")
