# SPDX-License-Identifier: MIT
"""Disks without a kernel that are closed when the test ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from pyublk import Target
from pyublk.testing import Disk

pytest_plugins = ["pytester"]


@pytest.fixture
def open_disk() -> Iterator[Callable[..., Disk]]:
    """`open_disk(target, **options)`: an open `pyublk.testing.Disk`."""
    with ExitStack() as disks:

        def make(target: Target, **options: Any) -> Disk:
            return disks.enter_context(Disk(target, **options))

        yield make
