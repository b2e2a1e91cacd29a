"""A program's data on a real file system that becomes full."""

import pytest


def test_a_full_disk(ublk_fs):
    fs = ublk_fs("ext4")
    with pytest.raises(OSError, match="No space left"):
        (fs / "data").write_bytes(bytes(1 << 30))
    (fs / "data").unlink()
    fs.unmount()
    fs.check()
