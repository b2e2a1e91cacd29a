"""A program's data on a real file system that becomes full."""

import shutil

import pytest


def test_a_full_disk(ublk_fs):
    fs = ublk_fs("ext4", "16M")
    size = shutil.disk_usage(fs.path).total
    with pytest.raises(OSError, match="No space left on device"):
        (fs / "data").write_bytes(bytes(size))
    (fs / "data").unlink()
    fs.unmount()
    fs.check()
