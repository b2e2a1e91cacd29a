# SPDX-License-Identifier: MIT
"""What `ps` shows of this process: its name, and its command line, which may say what it is for."""

import ctypes
from contextlib import suppress
from pathlib import Path

#: Bytes of a name (prctl(2), PR_SET_NAME).
_NAME = 15

#: What systemd spares when it kills all that is left at a machine's end: a command line of root's
#: that begins so (https://systemd.io/ROOT_STORAGE_DAEMONS).
_SPARED = "@"
_is_spared = False


def be_spared() -> None:
    """Of systemd, from now on, and so is a helper that begins later."""
    global _is_spared
    _is_spared = True
    show("pyublk", "pyublk")


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
            text = (_SPARED * _is_spared + line).encode()[: end - first - 1]
            ctypes.memmove(first, text, len(text))


def of_disk(number: int, target: str) -> tuple[str, str]:
    """For the server of one disk."""
    return f"pyublk:ublkb{number}", f"pyublk: ublkb{number} ({target})"


def of_server(name: str, disks: list[tuple[int, str]]) -> tuple[str, str]:
    """For a server of several."""
    served = ", ".join(f"ublkb{number} {target}" for number, target in disks)
    return f"pyublk:{name}", f"pyublk: server {name} ({served or 'no disk'})"
