"""Mirrors: the state of their legs."""

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import disjoint_base

from pyublk._binding.layout import Layout, _File

@disjoint_base
class MirrorLayout(Layout):
    """The same bytes in every file, its legs; one that takes `leg_timeout` seconds has failed."""

    MAX_LEGS: ClassVar[int]
    def __init__(
        self, files: Sequence[_File], size: int, *, leg_timeout: float | None = None
    ) -> None: ...
    def leg_state(self, leg: int) -> int:
        """0: in step; 1: being brought in step, written but not read; 2: failed, left alone."""
    def set_leg_state(self, leg: int, state: int) -> None: ...
    def fail_leg(self, leg: int, file_generation: int | None = None) -> bool:
        """Leaves a leg alone from now on, and holds writes until `set_recorded`. False, and nothing
        is done, for one that has failed, whose `file_generation` is another now (it has another
        file), or that is the last in step, which is never given up."""
    @property
    def recorded(self) -> bool:
        """Whether all legs that have failed are on record; no write is done while not."""
    def set_recorded(self) -> None: ...
    def leg_errors(self, leg: int) -> int:
        """Requests that failed on it."""
    def leg_orphans(self, leg: int) -> tuple[int, int]:
        """Operations that nobody waits for any more, of a leg's file and of the one before it."""
    def replace_file(
        self, index: int, fd: int, memory: bool, device: bool, file_generation: int | None = None
    ) -> None:
        """Puts a file in a place; queues see it with their next request. What the one before does
        late is not charged to it where it has another number, its `file_generation`: a file has the
        same whenever it is in that place. None: it is the same file, opened again."""
    @property
    def region_bytes(self) -> int:
        """The unit in which a mirror's leg is brought in step."""
    def block_writes(self, region: int | None = None) -> None:
        """No write begins in this region of a mirror (None: any may); wake the queues then."""
    def is_drained(self, region: int) -> bool:
        """Whether no write to the region is under way."""
