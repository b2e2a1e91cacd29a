"""What files say of themselves, and records that are read as what they are or not at all."""

import os
import socket
import stat
from pathlib import Path

import pytest

from pyublk import backing, files
from pyublk.backing import Backing
from pyublk.files import StrangeFile, about, read_record, write_record


def test_a_file_by_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    os.link(path, tmp_path / "link")
    told, found = about(path), path.stat()
    numbers = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    assert (told.mode, told.device, told.inode) == (found.st_mode, numbers, found.st_ino)
    with open(tmp_path / "link") as opened:
        assert about(opened.fileno()).identity == told.identity
    assert about("/dev/null").special == "1:3"
    with pytest.raises(FileNotFoundError):
        about(tmp_path / "none")


# ---- direct I/O ----


def test_a_file_system_is_asked_what_direct_io_demands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sparse"
    asked = {"memory": 512, "block": 4096}
    monkeypatch.setattr(backing, "_go_direct", lambda *_: None)
    monkeypatch.setattr(backing, "direct_alignment", lambda _fd: (asked["memory"], asked["block"]))

    def opened() -> tuple[int, int]:
        one = Backing.open(path, size=1 << 20, direct=True)
        one.close()
        return one.memory_alignment, one.block_size

    assert opened() == (512, 4096)
    asked |= {"memory": 4, "block": 1}  # a disk has no smaller blocks than that
    assert opened() == (4, 512)
    asked["block"] = 0
    with pytest.raises(OSError, match=f"{path} does not allow direct I/O"):
        opened()


def test_without_an_answer_the_device_below_is_asked(tmp_path: Path) -> None:
    for number, size in (("8:0", "4096"), ("8:16", "512")):
        queue = tmp_path / "devices" / number / "queue"
        queue.mkdir(parents=True)
        (queue / "logical_block_size").write_text(f"{size}\n")
    (tmp_path / "devices/8:0/sda1").mkdir()
    (tmp_path / "dev/block").mkdir(parents=True)
    for number, place in (("8:0", "8:0"), ("8:1", "8:0/sda1"), ("8:16", "8:16")):
        (tmp_path / "dev/block" / number).symlink_to(tmp_path / "devices" / place)
    sizes = {n: backing._block_size_below(n, tmp_path) for n in ("8:0", "8:1", "8:16", "0:44")}
    assert sizes == {"8:0": 4096, "8:1": 4096, "8:16": 512, "0:44": 4096}


def test_a_kernel_that_does_not_know_the_question(tmp_path: Path) -> None:
    with open("/proc/self/status") as file:  # nor does this file system
        assert files.direct_alignment(file.fileno()) is None


# ---- records ----


def test_a_record_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_record(path, "first")
    write_record(path, "second", durable=True)
    assert read_record(path) == "second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["record"]


def test_a_link_in_the_place_of_a_record_is_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "record"
    victim.write_text("theirs")
    path.symlink_to(victim)
    with pytest.raises(StrangeFile, match=r"record is a symbolic link$"):
        read_record(path)
    write_record(path, "ours")
    assert (victim.read_text(), read_record(path)) == ("theirs", "ours")
    assert not path.is_symlink()


def test_a_record_that_cannot_be_put_in_its_place_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_record(path, "ours")
    assert os.listdir(tmp_path) == ["record"]
    with pytest.raises(StrangeFile, match=r"record is a directory$"):
        read_record(path)


def test_what_is_no_record(tmp_path: Path) -> None:
    fifo, plug, large, binary = (tmp_path / name for name in ("fifo", "plug", "large", "binary"))
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(plug))
        large.write_bytes(bytes(2 << 20))
        binary.write_bytes(b"\xff\xfe")
        for path, what in (
            (fifo, "is a FIFO"),
            (plug, "is a socket"),
            (large, "has more than 1048576 bytes"),
            (binary, "is not text"),
        ):
            with pytest.raises(StrangeFile, match=f"^{path} {what}$"):
                read_record(path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_record_of_another_user(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_record(path, "theirs")
    os.chown(path, 1234, 1234)
    with pytest.raises(StrangeFile, match=f"^{path} belongs to another user, 1234$"):
        read_record(path)
