# SPDX-License-Identifier: MIT
"""Several files or block devices, one after the other, as one disk."""

from pathlib import Path

from pyublk.mapped import MappedTarget
from pyublk.resizing import Ends


class Linear(MappedTarget):
    """Serves whole `files`, one after the other; the disk ends after `size` bytes, if given.

    Args:
        files: regular files or block devices, in order.
        size: bytes of the disk; by default, the sum of the files.
        direct, read_only, block_size: as for `File`.
    """

    cuts_files = True
    recoverable = True
    succeeds = True

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

    def ends(self, size: int) -> Ends:
        found = super().ends(size)
        ((file, end),) = found.items()
        if file < len(self.files) - 1 and end > self.backing[file].size:
            raise ValueError(
                f"the disk was cut off in {self.files[file]}, and cannot grow beyond that file "
                "while it is served: stop it, and serve it with the new size"
            )
        return found
