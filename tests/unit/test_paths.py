"""The choice of a data path, and requests' data by hand."""

import errno

import pytest

import pyublk
from pyublk import DataPath
from pyublk._native import Queue
from pyublk.features import Features
from pyublk.paths import choose_path
from pyublk.targets import Ram
from pyublk.uapi import Feature, Op

EVERYTHING = Feature((1 << 21) - 1)


def kernel(*missing: Feature) -> Features:
    mask = EVERYTHING
    for feature in missing:
        mask &= ~feature
    return Features(mask=mask.value, kernel_release="7.3.4", privileged=True)


ALL = tuple(DataPath)


def test_auto_takes_the_first_that_the_kernel_has() -> None:
    able = (DataPath.AUTO_BUFFER, DataPath.USER_COPY, DataPath.COPY)
    choice = choose_path(able, kernel())
    assert choice.path is DataPath.AUTO_BUFFER
    assert choice.batch
    assert choice.flags == (
        Feature.AUTO_BUF_REG | Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY | Feature.BATCH_IO
    )
    choice = choose_path(able, kernel(Feature.AUTO_BUF_REG, Feature.BATCH_IO))
    assert choice.path is DataPath.USER_COPY
    assert not choice.batch
    assert choice.flags == Feature.USER_COPY
    assert choice.reason == (
        "auto-buffer needs Linux 6.16, here is Linux 7.3.4, whose driver offers 0x1f77ff without "
        "it; batch I/O needs Linux 7.0"
    )
    assert str(choice).startswith("user-copy (auto-buffer needs")


def test_auto_without_any_says_what_the_best_needs() -> None:
    with pytest.raises(pyublk.FeatureMissing, match="USER_COPY is not available"):
        choose_path((DataPath.USER_COPY,), kernel(Feature.USER_COPY))


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        (DataPath.GET_DATA, Feature.NEED_GET_DATA),
        (DataPath.USER_COPY, Feature.USER_COPY),
        (DataPath.ZERO_COPY, Feature.SUPPORT_ZERO_COPY),
        (DataPath.AUTO_BUFFER, Feature.AUTO_BUF_REG),
    ],
)
def test_a_forced_path_is_taken_or_refused_by_name(path: DataPath, missing: Feature) -> None:
    choice = choose_path(ALL, kernel(), path=path)
    assert choice.path is path
    assert missing in choice.flags
    assert choice.reason.startswith("asked for")
    with pytest.raises(pyublk.FeatureMissing, match=f"{missing.name} is not available"):
        choose_path(ALL, kernel(missing), path=path)


def test_batch_can_be_switched_and_is_refused_by_name() -> None:
    assert not choose_path(ALL, kernel(), batch=False).batch
    assert choose_path(ALL, kernel(), batch=True).batch
    with pytest.raises(pyublk.FeatureMissing, match="BATCH_IO is not available"):
        choose_path(ALL, kernel(Feature.BATCH_IO), batch=True)
    with pytest.raises(ValueError, match="batch I/O does not go together with get-data"):
        choose_path(ALL, kernel(), path="get-data", batch=True)


def test_a_depth_of_one_has_no_batch_io() -> None:
    choice = choose_path(ALL, kernel(), depth=1)
    assert not choice.batch
    assert choice.reason.endswith("batch I/O needs a depth of 2 or more")
    with pytest.raises(ValueError, match="batch I/O needs a depth of 2 or more, not 1"):
        choose_path(ALL, kernel(), depth=1, batch=True)


def test_wrong_paths_are_told_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="path must be 'auto' or one of copy, get-data, user-copy"):
        choose_path(ALL, kernel(), path="teleport")
    with pytest.raises(ValueError, match="cannot be served by zero-copy: it takes copy"):
        choose_path((DataPath.COPY,), kernel(), path="zero-copy")


def test_needed_features_are_added_and_refused_by_name() -> None:
    choice = choose_path(ALL, kernel(), path="user-copy", needed=Feature.INTEGRITY)
    assert Feature.INTEGRITY in choice.flags
    with pytest.raises(pyublk.FeatureMissing, match="INTEGRITY is not available"):
        choose_path(ALL, kernel(Feature.INTEGRITY), path="user-copy", needed=Feature.INTEGRITY)


# ---- a request's data by hand ----


def test_read_into_and_write_from_move_the_bytes_asked_for() -> None:
    with Queue.loopback(depth=2, buffer_size=4096) as queue:
        queue.fetch()
        queue.memory(0, 4096)[:] = bytes(range(256)) * 16
        queue.inject(0, Op.WRITE, 0, 4096)
        queue.inject(1, Op.READ, 0, 4096)
        write, read = queue.wait(1) or []
        part = bytearray(16)
        write.read_into(part, 256 + 8)
        assert part == bytes(range(8, 24))
        read.write_from(b"answer", 100)
        assert queue.memory(1, 4096)[100:106] == b"answer"
        for wrong, words in (
            (lambda: write.write_from(b"x"), "write_from does not fit"),
            (lambda: read.read_into(bytearray(1)), "read_into does not fit"),
            (lambda: write.read_into(bytearray(8), 4090), "bytes 4090 to 4098 are not in this"),
            (lambda: write.read_into(bytearray(1), metadata=True), "has no metadata"),
        ):
            with pytest.raises(ValueError, match=words):
                wrong()
        with pytest.raises((BufferError, TypeError, ValueError)):
            write.read_into(b"immutable")
        write.complete()
        with pytest.raises(pyublk.StaleIO):
            write.read_into(part)
        read.complete()


def test_only_zone_reports_have_zones() -> None:
    with Queue.loopback(depth=1, buffer_size=4096) as queue:
        queue.fetch()
        queue.inject(0, Op.READ, 0, 4096)
        (io,) = queue.wait(1) or []
        assert io.zones == 0
        assert not io.metadata
        io.fail(errno.EIO)


def test_queue_shares_are_checked() -> None:
    with pytest.raises(ValueError, match="first_tag and tag_step must be below the depth, 4"):
        Queue(-1, depth=4, first_tag=4)
    with pytest.raises(ValueError, match="threads must be 1 to 4096, not 0"):
        pyublk.Device(Ram(size=1 << 20), threads=0)
    with pytest.raises(ValueError, match="threads must be 1 to the depth, 2, not 3"):
        pyublk.Device(Ram(size=1 << 20), depth=2, threads=3)
