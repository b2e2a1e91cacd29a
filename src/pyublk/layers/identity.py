# SPDX-License-Identifier: MIT
"""By what a base is known again: an overlay over a base with other bytes is another disk.

Nothing short of reading all of it proves that a file has the same bytes. Its size and the time of
its last write tell of every ordinary change, and a few blocks of it tell of files that took its
place. A source that knows better says so by a method `identity`: an ETag, a generation.
"""

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pyublk.backing import Backing
from pyublk.files import read_into
from pyublk.layers.base import Below
from pyublk.layers.presence import PresenceLayer
from pyublk.sizes import format_size
from pyublk.target import Target

#: Bytes of a sampled block, and how many there are at most.
SAMPLE = 4096
SAMPLES = 32
#: Where file systems have what every mount changes: ext4 and xfs at 0, btrfs at 64 KiB.
_SUPERBLOCKS = (0, 64 << 10)
#: Bytes of a sample's digest.
_DIGEST = 8

Read = Callable[[int, memoryview], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a base was like when an overlay was made over it.

    Args:
        size: bytes.
        said: what the source's own `identity` returned; None if it has no such method.
        written: when each of its regular files was written last, in nanoseconds since 1970.
        samples: the digests of sampled blocks in hexadecimal, one after the other; empty where
            `said` is enough.
    """

    size: int
    said: str | None = None
    written: tuple[int, ...] = ()
    samples: str = ""

    @classmethod
    def of(cls, target: Target, *, size: int | None = None, below: Below | None = None) -> Self:
        """That of a target which is open; `size`: of as many bytes from its beginning; `below`: by
        which it is called already.

        Raises OSError when it cannot be read.
        """
        size = target.size if size is None else size
        say = getattr(target, "identity", None)
        if say is not None and (said := say()) is not None:
            return cls(size=size, said=str(said))
        files: Sequence[Backing] = getattr(target, "backing", ())
        if isinstance(target, PresenceLayer):  # a file that fills is no other base
            files = ()
        stats = [os.fstat(one.fd) for one in files if not one.is_device]
        written = tuple(one.st_mtime_ns for one in stats)
        if len(files) == 1:
            samples = _sampled(_reader(files[0].fd), size)
        elif target.profile().kind == "async":
            samples = ""  # an event loop would have to read it
        elif below is not None:
            samples = _sampled(below.read, size)
        else:
            below = Below(target)
            try:
                samples = _sampled(below.read, size)
            finally:
                below.end_calls()
        return cls(size=size, written=written, samples=samples)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for a record that is none."""
        said = record["said"]
        return cls(
            size=int(record["size"]),
            said=None if said is None else str(said),
            written=tuple(int(one) for one in record["written"]),
            samples=str(record["samples"]),
        )

    def to_record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def difference(self, now: "Identity") -> str | None:
        """What shows that a base is not as it was, as the end of a sentence; None: nothing does."""
        if (found := self.content_difference(now)) is not None:
            return found
        if now.written != self.written:
            last = max(now.written, default=0) / 1e9
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last))
            return f"it was last written to at {when}, and not when the overlay last saw it"
        return None

    def content_difference(
        self, now: "Identity", sampled: Callable[[int], bool] = lambda offset: True
    ) -> str | None:
        """The same, but files may have been written at other times, as when one was copied. Only
        blocks at offsets that are `sampled` are compared."""
        if now.size != self.size:
            return f"it had {format_size(self.size)}, and has {format_size(now.size)}"
        if now.said != self.said:
            return f"it said of itself {self.said!r}, and says {now.said!r}"
        if len(now.samples) != len(self.samples):
            return "it is another kind of source"
        digits = 2 * _DIGEST
        for number, offset in enumerate(sample_offsets(self.size)):
            place = slice(number * digits, (number + 1) * digits)
            if self.samples[place] != now.samples[place] and sampled(offset):
                return f"its bytes at {offset} are other ones"
        return None


def settle(target: Target) -> None:
    """Makes durable by what an open target will be known again: a time of the last write may be
    lost in a power cut although what was written is not."""
    for one in getattr(target, "backing", ()):
        os.fsync(one.fd)


def sample_offsets(size: int) -> list[int]:
    """Where blocks are sampled, in something of `size` bytes."""
    blocks = -(-size // SAMPLE)
    count = min(blocks, SAMPLES)
    spread = {blocks - 1 - (blocks - 1) * n // max(count - 1, 1) for n in range(count)}
    spread |= {offset // SAMPLE for offset in _SUPERBLOCKS if offset < size}
    return [block * SAMPLE for block in sorted(spread)]


def _sampled(read: Read, size: int) -> str:
    with mmap.mmap(-1, SAMPLE) as page:  # aligned, as direct I/O wants it
        digests = []
        for offset in sample_offsets(size):
            with memoryview(page)[: min(SAMPLE, size - offset)] as piece:
                read(offset, piece)
                digests.append(hashlib.blake2b(piece, digest_size=_DIGEST).hexdigest())
    return "".join(digests)


def _reader(fd: int) -> Read:
    def read(offset: int, buffer: memoryview) -> None:
        read_into(fd, buffer, offset)

    return read
