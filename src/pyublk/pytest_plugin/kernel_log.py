# SPDX-License-Identifier: MIT
"""What the kernel logs while a test runs, from /dev/kmsg (the kernel's
Documentation/ABI/testing/dev-kmsg)."""

import os
import re
from typing import Self

#: Larger than any record.
_RECORD = 8192
#: The most lines that a report gets: the last ones.
_LINES = 200


class KernelLog:
    """The kernel's messages from now on; none where this user may not read them."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError:
            self.close()

    def read(self) -> str:
        """What came since the last call, a line for each message, as dmesg prints them."""
        lines: list[str] = []
        while self._descriptor is not None:
            try:
                lines.append(_line(os.read(self._descriptor, _RECORD)))
            except BlockingIOError:
                break
            except BrokenPipeError:
                lines.append("(messages were overwritten before they could be read)")
            except OSError:
                break
        return "\n".join(lines[-_LINES:])

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(record: bytes) -> str:
    """Of "priority,number,microseconds,flags;message", and lines of properties after it."""
    head, _, rest = record.decode(errors="replace").partition(";")
    message = re.sub(r"\\x([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), rest.split("\n")[0])
    return f"[{int(head.split(',')[2]) / 1e6:12.6f}] {message}"
