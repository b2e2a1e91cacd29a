# SPDX-License-Identifier: MIT
"""What a kernel and a caller's rights allow, and how it is said when they do not."""

import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest

from pyublk.errors import FeatureMissing
from pyublk.features import Features
from pyublk.uapi import Feature

LINUX_6_12 = Features(mask=0x1FE, kernel_release="6.12.107", privileged=True)
LINUX_7_2 = Features(mask=0xFFFFF, kernel_release="7.2.13", privileged=True)
UNPRIVILEGED = dataclasses.replace(LINUX_7_2, privileged=False)
LINUX_6_1 = Features(mask=None, kernel_release="6.1.192", privileged=True)

RECOVERY = Feature.USER_RECOVERY


def test_a_feature_that_is_there() -> None:
    assert LINUX_6_12.has(Feature.USER_COPY)
    assert LINUX_6_12.reason(Feature.USER_COPY) is None
    LINUX_6_12.require(Feature.USER_COPY | Feature.ZONED)
    LINUX_6_12.require(Feature(0))


def test_several_features_are_there_only_together() -> None:
    assert not LINUX_6_12.has(Feature.USER_COPY | Feature.QUIESCE)
    assert LINUX_7_2.has(Feature.USER_COPY | Feature.QUIESCE)


@pytest.mark.parametrize(
    ("features", "feature", "reason"),
    [
        (
            LINUX_6_12,
            Feature.AUTO_BUF_REG,
            "needs Linux 6.16, here is Linux 6.12.107, whose driver offers 0x1fe without it",
        ),
        (
            LINUX_6_12,
            Feature.INTEGRITY,
            "needs Linux 7.0 with CONFIG_BLK_DEV_INTEGRITY, here is Linux 6.12.107, whose driver "
            "offers 0x1fe without it",
        ),
        (
            LINUX_6_1,
            RECOVERY,
            "needs Linux 6.1, here is Linux 6.1.192, which cannot tell its features (6.5 and "
            "newer can)",
        ),
        (UNPRIVILEGED, Feature.USER_COPY, "needs CAP_SYS_ADMIN, here is a caller without it"),
        (UNPRIVILEGED, Feature.QUIESCE, "needs CAP_SYS_ADMIN, here is a caller without it"),
        (
            LINUX_7_2,
            Feature.UNPRIVILEGED_DEV,
            "needs a caller without CAP_SYS_ADMIN, here is one with it, for whom the kernel drops "
            "the flag",
        ),
        (
            LINUX_7_2,
            Feature(1 << 40),
            "needs a newer pyublk, here is one that has no name for it",
        ),
    ],
)
def test_the_reason_why_one_is_missing(features: Features, feature: Feature, reason: str) -> None:
    assert features.reason(feature) == reason
    assert not features.has(feature)


def test_require_raises_with_the_parts_of_the_reason() -> None:
    with pytest.raises(FeatureMissing) as caught:
        LINUX_6_12.require(Feature.USER_COPY | Feature.BATCH_IO)
    assert str(caught.value) == (
        "BATCH_IO is not available: it needs Linux 7.0, here is Linux 6.12.107, whose driver "
        "offers 0x1fe without it"
    )
    assert caught.value.feature == "BATCH_IO"
    assert caught.value.needed == "Linux 7.0"
    assert caught.value.found == "Linux 6.12.107, whose driver offers 0x1fe without it"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.feature) == (str(caught.value), "BATCH_IO")


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        (
            RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.USER_RECOVERY_FAIL_IO,
            "USER_RECOVERY_REISSUE does not go together with USER_RECOVERY_FAIL_IO",
        ),
        (Feature.USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE needs USER_RECOVERY as well"),
        (Feature.USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO needs USER_RECOVERY as well"),
        (Feature.QUIESCE, "QUIESCE needs USER_RECOVERY as well"),
        (Feature.INTEGRITY, "INTEGRITY needs USER_COPY as well"),
        (Feature.ZONED, "ZONED needs SUPPORT_ZERO_COPY or USER_COPY as well"),
        (
            Feature.UNPRIVILEGED_DEV | Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY,
            "UNPRIVILEGED_DEV does not go together with SUPPORT_ZERO_COPY and USER_COPY",
        ),
        (
            Feature.UNPRIVILEGED_DEV | Feature.AUTO_BUF_REG,
            "UNPRIVILEGED_DEV does not go together with AUTO_BUF_REG",
        ),
        (
            Feature.UNPRIVILEGED_DEV | RECOVERY,
            "UNPRIVILEGED_DEV does not go together with USER_RECOVERY",
        ),
        (
            Feature.NEED_GET_DATA | Feature.USER_COPY,
            "NEED_GET_DATA does not go together with USER_COPY",
        ),
        (
            Feature.NEED_GET_DATA | Feature.BATCH_IO,
            "NEED_GET_DATA does not go together with BATCH_IO",
        ),
        (
            Feature.BATCH_IO | Feature.PER_IO_DAEMON,
            "BATCH_IO does not go together with PER_IO_DAEMON",
        ),
    ],
)
def test_flags_that_do_not_go_together(combination: Feature, message: str) -> None:
    for features in (LINUX_7_2, UNPRIVILEGED, LINUX_6_1):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            features.check(combination)


@pytest.mark.parametrize(
    "combination",
    [
        Feature(0),
        RECOVERY,
        RECOVERY | Feature.USER_RECOVERY_REISSUE,
        RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
        RECOVERY | Feature.QUIESCE,
        Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG,
        Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY,
        Feature.USER_COPY | Feature.AUTO_BUF_REG,
        Feature.BATCH_IO | Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY | Feature.AUTO_BUF_REG,
        Feature.USER_COPY | Feature.INTEGRITY,
        Feature.ZONED | Feature.SUPPORT_ZERO_COPY,
        Feature.SHMEM_ZC | Feature.BATCH_IO,
    ],
)
def test_flags_that_go_together(combination: Feature) -> None:
    LINUX_7_2.check(combination)


def test_check_names_what_this_kernel_lacks() -> None:
    with pytest.raises(FeatureMissing, match=r"^QUIESCE is not available: it needs Linux 6\.16"):
        LINUX_6_12.check(RECOVERY | Feature.QUIESCE)


def test_a_caller_without_rights_must_ask_for_an_unprivileged_device() -> None:
    UNPRIVILEGED.check(Feature.UNPRIVILEGED_DEV)
    with pytest.raises(FeatureMissing) as caught:
        UNPRIVILEGED.check(Feature(0))
    assert str(caught.value) == (
        "a device without UNPRIVILEGED_DEV is not available: it needs CAP_SYS_ADMIN, here is a "
        "caller without it"
    )


def test_the_table_has_every_feature_in_order() -> None:
    rows = list(LINUX_6_12)
    assert [row.feature for row in rows] == list(Feature)
    assert [row.bit for row in rows] == list(range(21))
    assert [row.name for row in rows] == [feature.name for feature in Feature]
    assert sum(row.feature for row in rows if row.available) == 0x1FE & ~Feature.UNPRIVILEGED_DEV
    for row in rows:
        assert row.buys
        assert re.fullmatch(r"\d\.\d+", row.since)
        assert (row.reason is None) == row.available


def test_a_kernel_that_cannot_tell_has_nothing() -> None:
    assert not any(row.available for row in LINUX_6_1)


def test_bits_of_newer_kernels_are_told() -> None:
    assert dataclasses.replace(LINUX_7_2, mask=1 << 40 | 0xFFFFF).unknown == 1 << 40
    assert LINUX_7_2.unknown == LINUX_6_1.unknown == 0


def test_this_machine() -> None:
    features = Features.of_this_machine(0x42)
    assert features.kernel_release == os.uname().release
    assert features.mask == 0x42
    if os.geteuid():
        assert not features.privileged


def test_root_of_another_user_namespace_is_not_privileged() -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1)")
    inside = [unshare, "--user", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("user namespaces are forbidden here")
    ask = "from pyublk.features import Features; print(Features.of_this_machine(0).privileged)"
    answer = subprocess.run(
        [*inside, sys.executable, "-c", ask], check=True, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "False\n"
