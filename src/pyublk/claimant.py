# SPDX-License-Identifier: MIT
"""A program that claims a disk, flushes it, and holds it until it is let go or gone (`Claim`).

    claimant.py NODE [--exclusive] [PARTITION...]

Of each of its three steps, to begin, to open and to flush, it tells the errno on its standard
output, 0 for success. The end of its standard input lets the disk go. It imports nothing but the
standard library, to start at once.
"""

import errno
import fcntl
import os
import select
import sys
import time
from contextlib import suppress

#: linux/fs.h: writes back the page cache of a block device and syncs the file system on it.
BLKFLSBUF = 0x1261

#: Seconds in which somebody who has claimed the disk in passing may let it go.
PASSING = 1.0


def main(node: str, *arguments: str) -> None:
    with suppress(OSError), open("/proc/self/comm", "w") as name_of_this:
        name_of_this.write("pyublk-claim")  # for those who look who has the disk
    tell(0)
    flags = os.O_EXCL if "--exclusive" in arguments else 0
    try:
        held = claim(node, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        tell(error.errno)
        return
    tell(0)
    try:
        for part in arguments:
            if part != "--exclusive":
                flush_node(part)
        flush(held)
    except OSError as error:
        tell(error.errno)
    else:
        tell(0)
    name = os.path.basename(node)
    while not select.select([0], [], [], 0.02)[0] and os.path.exists(f"/sys/class/block/{name}"):
        pass


def claim(node: str, flags: int) -> int:
    until = time.monotonic() + PASSING
    while True:
        try:
            return os.open(node, flags)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        time.sleep(0.02)


def flush_node(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    with suppress(PermissionError):  # of a user without CAP_SYS_ADMIN, who mounts nothing
        fcntl.ioctl(descriptor, BLKFLSBUF)
    os.fsync(descriptor)  # the page cache, and the disk's own, which BLKFLSBUF leaves alone


def tell(number: int | None) -> None:
    os.write(1, f"{number or 0}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
