# SPDX-License-Identifier: MIT
"""How a chunk's bytes lie in its object: as they are, or compressed by zstd."""

import errno
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, get_args

from pyublk.errors import ExtraMissing
from pyublk.targets.objects.failures import Failure

Compression = Literal["none", "zstd"]

#: The level that zstd compresses with: its own default.
LEVEL = 3


class Codec:
    """Compresses and decompresses chunks of `size` bytes. Its methods may be called at once.

    Raises ExtraMissing without a package for zstd, ValueError for another compression.
    """

    def __init__(self, compression: str, size: int) -> None:
        if compression not in get_args(Compression):
            allowed = ", ".join(get_args(Compression))
            raise ValueError(f"compression is {compression!r}: it must be one of {allowed}")
        self.compression = compression
        self._size = size
        self._own = threading.local()  # contexts are kept, and serve one thread at a time each
        if compression == "zstd":
            self._contexts()

    def _contexts(self) -> tuple[Callable[[Any], bytes], Callable[[Any], bytes], type[Exception]]:
        found = getattr(self._own, "contexts", None)
        if found is None:
            found = self._own.contexts = _zstd(self._size)
        return found

    def encode(self, data: bytes) -> bytes:
        return self._contexts()[0](data) if self.compression == "zstd" else data

    def decode(self, data: Any, what: str) -> memoryview:
        """The chunk of an object's bytes. Raises Failure for what cannot be one."""
        if self.compression == "zstd":
            _, decompress, error = self._contexts()
            try:
                data = decompress(data)
            except error as wrong:
                raise Failure(errno.EIO, f"{what} cannot be decompressed: {wrong}") from None
        view = memoryview(data)
        if len(view) != self._size:
            raise Failure(errno.EIO, f"{what} has {len(view)} bytes in place of {self._size}")
        return view


def _zstd(size: int) -> tuple[Callable[[Any], bytes], Callable[[Any], bytes], type[Exception]]:
    """How to compress, how to decompress, and what that raises."""
    if sys.version_info >= (3, 14):
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]

        parameter = zstd.CompressionParameter
        options = {parameter.compression_level: LEVEL, parameter.checksum_flag: 1}

        def decompress(data: Any) -> bytes:
            frame = zstd.ZstdDecompressor()
            chunk: bytes = frame.decompress(data, size + 1)  # up to the checksum, behind the chunk
            if not frame.eof:
                raise zstd.ZstdError("it is cut off, or longer than a chunk")
            return chunk

        return lambda data: zstd.compress(data, options=options), decompress, zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise ExtraMissing("zstandard", "s3") from None
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    decompressor = zstandard.ZstdDecompressor()

    def decompress(data: Any) -> bytes:
        if zstandard.frame_content_size(data) > size:  # which would be allocated
            raise zstandard.ZstdError("it is longer than a chunk")
        return decompressor.decompress(data, max_output_size=size)

    return compressor.compress, decompress, zstandard.ZstdError
