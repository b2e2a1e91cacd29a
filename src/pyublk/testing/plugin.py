# SPDX-License-Identifier: MIT
"""The pytest plugin: disks without a kernel, closed when the test ends."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyublk.target import Target
    from pyublk.testing.disk import Disk


@pytest.fixture
def ublk_disk() -> "Iterator[Callable[..., Disk]]":
    """`ublk_disk(target, **options)`: an open `pyublk.testing.Disk`, closed after the test."""
    from pyublk.testing.disk import Disk  # here, so that the plugin costs other projects nothing

    disks: list[Disk] = []

    def make(target: "Target", **options: Any) -> Disk:
        disk = Disk(target, **options)
        disk.open()
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        disk.close()
