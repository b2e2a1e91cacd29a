"""Who has an id, as a made-up /proc tells it."""

from pathlib import Path

import pytest

from pyublk.occupants import who_has
from pyublk.uapi import DeviceStatus

MOUNT = "36 35 259:0 / {} rw - ext4 {} rw\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Three processes: 10 serves /dev/ublkb3, 11 is a child of its, 12 lives in a namespace."""

    def process(
        pid: int, name: str, namespace: str, mounts: str, *files: str, maps: str = ""
    ) -> None:
        place = tmp_path / str(pid)
        (place / "fd").mkdir(parents=True)
        (place / "ns").mkdir()
        (place / "ns/mnt").symlink_to(namespace)
        (place / "comm").write_text(f"{name}\n")
        (place / "mountinfo").write_text(mounts)
        (place / "maps").write_text(maps)
        for number, file in enumerate(files):
            (place / "fd" / str(number)).symlink_to(file)

    here = MOUNT.format("/", "/dev/sda1") + MOUNT.format(r"/mnt\040one", "/dev/ublkb3p1")
    process(10, "python3", "mnt:[1]", here, "/dev/null", "/dev/ublkc3")
    process(11, "python3", "mnt:[1]", here, "/dev/ublkc3")
    process(12, "dd (x) y", "mnt:[2]", MOUNT.format("/data", "/dev/ublkb4"), "/dev/ublkb33")
    mapping = "7f00-7f01 r--s 00000000 00:06 421  /dev/ublkb5 (deleted)\n7f02-7f03 r--p 0 0:0 0\n"
    process(13, "reader", "mnt:[1]", here, "/dev/ublkb4 (deleted)", maps=mapping)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "status", "server", "told"),
    [
        (
            3,
            DeviceStatus.LIVE,
            10,
            "/dev/ublkb3 is live, served by python3 (process 10); it is mounted at /mnt one; it is "
            "open in python3 (process 11)",
        ),
        (
            3,
            DeviceStatus.DEAD,
            None,
            "/dev/ublkb3 is dead and has no server; it is mounted at /mnt one; it is open in "
            "python3 (process 10); it is open in python3 (process 11)",
        ),
        (
            4,
            None,
            None,
            "/dev/ublkb4 was deleted, and its id is free once nobody has it open; it is mounted at "
            "/data; it is open in reader (process 13)",
        ),
        (
            5,
            None,
            None,
            "/dev/ublkb5 was deleted, and its id is free once nobody has it open; it is open in "
            "reader (process 13)",
        ),
        (33, DeviceStatus.LIVE, 99, "/dev/ublkb33 is live, served by ? (process 99); it is open in "
         "dd (x) y (process 12)"),
        (7, None, None, "/dev/ublkb7 was deleted, and its id is free once nobody has it open"),
    ],
)  # fmt: skip
def test_who_has_an_id(
    proc: Path, number: int, status: DeviceStatus | None, server: int | None, told: str
) -> None:
    assert who_has(number, status, server, proc=proc) == told
