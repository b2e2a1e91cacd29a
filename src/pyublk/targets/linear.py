# SPDX-License-Identifier: MIT
"""Several files or block devices, one after the other, as one disk."""

from pathlib import Path

from pyublk.mapped import MappedTarget


class Linear(MappedTarget):
    """Concatenates `files`, each whole; `size` cuts the disk off after so many bytes.

    Args:
        files: regular files or block devices, in order.
        size: bytes of the disk; without, the sum of the files.
        direct, read_only, block_size: as for `File`.
    """

    def __init__(
        self,
        *files: Path,
        size: int | None = None,
        direct: bool = False,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        super().__init__(
            files, size=size, direct=direct, read_only=read_only, block_size=block_size
        )
