# SPDX-License-Identifier: MIT
"""What `ps` shows of this process: its name, and its command line, which may say what it is for."""

import ctypes
from contextlib import suppress
from pathlib import Path

#: Bytes of a name (prctl(2), PR_SET_NAME).
_NAME = 15


def show(name: str, line: str) -> None:
    """Sets both, as far as there is room: the line takes the place of the arguments."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name.encode()[:_NAME].decode(errors="ignore"))
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        first, end = int(fields[45]), int(fields[46])  # proc(5): arg_start, arg_end
        if 0 < first < end:
            # Nothing reads them any more: Python has made texts of its own of them.
            ctypes.memset(first, 0, end - first)
            text = line.encode()[: end - first - 1]
            ctypes.memmove(first, text, len(text))


def of_disk(number: int, target: str) -> tuple[str, str]:
    """For the server of one disk."""
    return f"pyublk:ublkb{number}", f"pyublk: ublkb{number} ({target})"


def of_server(name: str, disks: list[tuple[int, str]]) -> tuple[str, str]:
    """For a server of several."""
    served = ", ".join(f"ublkb{number} {target}" for number, target in disks)
    return f"pyublk:{name}", f"pyublk: server {name} ({served or 'no disk'})"
