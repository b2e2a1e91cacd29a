"""A program's data on a real file system that becomes full."""

import errno

import pytest


def test_a_full_disk(ublk_fs):
    fs = ublk_fs("ext4")
    with pytest.raises(OSError) as full, (fs / "data").open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
    assert full.value.errno == errno.ENOSPC
    (fs / "data").unlink()
    fs.unmount()
    fs.check()
