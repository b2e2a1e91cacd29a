# SPDX-License-Identifier: MIT
"""Features that a target cannot do without: asked for with its data path, refused by name."""

import pytest

from pyublk import Device
from pyublk.errors import FeatureMissing, InvalidTarget
from pyublk.features import Features
from pyublk.paths import DataPath, choose_path
from pyublk.targets import Null
from pyublk.uapi import Feature

LINUX_6_12 = Features(mask=0x1FE, kernel_release="6.12.107", privileged=True)
LINUX_7_2 = Features(mask=0xFFFFF, kernel_release="7.2.13", privileged=True)
NEW = (DataPath.COPY, DataPath.USER_COPY, DataPath.GET_DATA)
ONE = (DataPath.USER_COPY,)


def test_what_is_needed_is_among_the_flags() -> None:
    choice = choose_path(ONE, LINUX_6_12, needed=Feature.ZONED)
    assert choice.flags == Feature.USER_COPY | Feature.ZONED
    choice = choose_path(NEW, LINUX_7_2, batch=False, needed=Feature.NO_AUTO_PART_SCAN)
    assert choice.flags == Feature.NO_AUTO_PART_SCAN


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        (Feature.INTEGRITY, r"INTEGRITY .* Linux 7\.0 with CONFIG_BLK_DEV_INTEGRITY.* 6\.12\.107"),
        (Feature.NO_AUTO_PART_SCAN, r"NO_AUTO_PART_SCAN .* Linux 7\.0.* 6\.12\.107"),
        (Feature.ZONED | Feature.SHMEM_ZC, r"SHMEM_ZC .* Linux 7\.1.* 6\.12\.107"),
    ],
)
def test_what_the_kernel_lacks_is_named(needed: Feature, said: str) -> None:
    with pytest.raises(FeatureMissing, match=said):
        choose_path(ONE, LINUX_6_12, needed=needed)


def test_a_kernel_that_may_be_built_without_zones_is_told_the_option() -> None:
    old = Features(mask=0xFE, kernel_release="6.5.1", privileged=True)
    with pytest.raises(FeatureMissing, match=r"ZONED .* Linux 6\.6 with CONFIG_BLK_DEV_ZONED"):
        choose_path(ONE, old, needed=Feature.ZONED)


def test_what_does_not_go_with_the_path_is_refused() -> None:
    with pytest.raises(ValueError, match="INTEGRITY needs USER_COPY as well"):
        choose_path(NEW, LINUX_7_2, path="copy", needed=Feature.INTEGRITY)


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Feature.USER_RECOVERY, r"USER_RECOVERY: .* the user's choice: pass Device\(recovery="),
        (Feature.QUIESCE | Feature.ZONED, "QUIESCE: what becomes of a disk without its server"),
        (Feature.UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV: who owns the device depends on who makes it"),
        (Feature.USER_COPY | Feature.BATCH_IO, "USER_COPY and BATCH_IO: the data path is the"),
        (Feature.NO_AUTO_PART_SCAN, r".*: pass Device\(partition_scan=False\)"),
        (Feature.SHMEM_ZC, r".*: pass Device\(shared_memory=True\)"),
    ],
)
def test_what_is_not_the_targets_to_ask_for(needs: Feature, words: str) -> None:
    target = Null(size=4096)
    target.needs = needs
    with pytest.raises(InvalidTarget, match=f"Null.needs has {words}"):
        Device(target)
