"""Presence maps: which blocks the upper file has, and who is asked for the others."""

from collections.abc import Callable, Sequence
from typing import final

from typing_extensions import Buffer, disjoint_base

from pyublk._binding.layout import Layout, _File
from pyublk._binding.mapped import MappedQueue

@final
class FileMemory(Buffer):
    """A part of a file in memory, which changes the file; the mapping keeps that, and takes no
    descriptor, as mmap.mmap does before Python 3.13. `offset` is a page's start.

    Raises OSError when it cannot be mapped.
    """

    def __init__(self, fd: int, length: int, *, offset: int = 0) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@disjoint_base
class PresenceLayout(Layout):
    """Blocks of `block_bytes` are in the first file where their bit is set, else below: where
    `below`, a layout of all files but the first, has them; without it, they are asked for.

    `bits` is memory of `map_bytes` bytes, the lowest bit of each byte first, which is changed as
    blocks come and go. `gated`: a block is written only when it is writable, or somebody allows it.
    `evicts`: requests are counted by region. `writes_through`: writes are deferred once the file
    has them. `always_deferred`: every flush is. What the map guarantees is said in
    _core/presence.h.
    """

    def __init__(
        self,
        files: Sequence[_File],
        size: int,
        bits: Buffer,
        *,
        block_bytes: int,
        below: Layout | None = None,
        gated: bool = False,
        evicts: bool = False,
        writes_through: bool = False,
        always_deferred: bool = False,
    ) -> None: ...
    @staticmethod
    def can_lie_over(below: Layout) -> bool:
        """Whether its files have its bytes, in a way that can be told without asking."""
    @staticmethod
    def map_bytes(size: int, block_bytes: int) -> int:
        """Bytes of the bits for a disk: whole pages."""
    def ask(
        self,
        *,
        fetch: Callable[[PresenceLayout, int, int], object] | None,
        write: Callable[[MappedQueue, int, int, int, int], object] | None,
        wake: Callable[[], object] | None,
    ) -> None:
        """Whom the queues' threads tell, which must not raise: `fetch(layout, offset, length)` of
        absent blocks that are wanted, held for him until `let_go`; `write(queue, tag, generation,
        offset, length)` of a write that waits for `MappedQueue.resolve`; `wake()` is to wake all
        queues. None, when no queue is left."""
    @property
    def block_bytes(self) -> int: ...
    def is_present(self, offset: int, length: int) -> bool:
        """Whether all blocks that the range touches are."""
    def run(self, offset: int, end: int) -> tuple[int, bool]:
        """The length (bytes) of the run of blocks that are alike from `offset` on, a block's start,
        at most up to `end`; and whether they are present."""
    def count_present(self) -> int:
        """How many blocks are."""
    def counters(self) -> tuple[int, int, int]:
        """Requests that found all blocks present, those that did not, and parts copied up."""
    def claim(self, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        """Holds absent blocks of the range that nobody holds, in runs of at most `most` bytes; the
        runs (offset, length), each to be ended by `let_go`."""
    def let_go(self, offset: int, length: int, present: bool) -> None:
        """Of blocks that were held: they are in the upper file whole now, or are absent still."""
    def fail(self, offset: int, length: int, error: int) -> None:
        """Requests that wait for one of the blocks fail with this errno. Before `let_go`."""
    @property
    def synced(self) -> bool:
        """Whether the map's file says what the bits say."""
    def begin_sync(self) -> None: ...
    def end_sync(self) -> None: ...
    def take_dirty(self) -> list[tuple[int, bytes]]:
        """The pages that changed: (their place among the bits in bytes, a copy), which count as
        written from now on, or are to be marked dirty again."""
    def mark_dirty(self, place: int) -> None:
        """The page of the bits at this byte is out of date in the file."""
    @property
    def region_bytes(self) -> int: ...
    def block_region(self, region: int | None = None) -> None:
        """No request begins in this region (None: any may); `wake` the queues then."""
    def is_drained(self, region: int) -> bool:
        """Whether no request to the region is under way."""
    def uses(self, region: int) -> int:
        """How many requests have begun in a region; wraps around at 2**32."""
    def evict(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Makes the present blocks of the range absent, but for writable ones, and holds them; runs
        as of `claim`. Its region is blocked and drained."""
    def take_touched(self, offset: int, length: int) -> bool:
        """Whether a request touched one of the blocks since this was asked last."""
    def set_writable(self, offset: int, length: int, writable: bool) -> None: ...
    def is_writable(self, offset: int, length: int) -> bool: ...
