"""What a disk owes its clients, without a kernel."""

from collections.abc import Callable

import pytest

pytest.register_assert_rewrite("target_contract")

from target_contract import TargetContract, target  # noqa: E402

from pyublk.testing import Disk  # noqa: E402

__all__ = ["target"]  # a fixture


class TestADiskWithoutAKernel(TargetContract):
    @pytest.fixture
    def open_disk(self, open_disk: Callable[..., Disk]) -> Callable[..., Disk]:
        return open_disk
