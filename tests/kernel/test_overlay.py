"""Overlays on real disks: file systems over a read-only base, servers that are killed, commits."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import added, run_here
from filesystems import run
from servers import until

import pyublk
from pyublk import overlays
from pyublk.cli.failures import ExitCode
from pyublk.targets import Ram
from pyublk.targets.overlay import OverlayFile
from pyublk.uapi import DeviceStatus

MIB = 1 << 20


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def base(place: Path) -> Path:
    """An ext4 that has a file of 1 MiB, which nobody may write."""
    content, image = place / "content", place / "base.img"
    content.mkdir()
    (content / "old").write_bytes(os.urandom(MIB))
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    run("mkfs.ext4", "-q", "-d", content, image)
    image.chmod(0o444)
    return image


@contextmanager
def mounted(disk: str, place: Path) -> Iterator[Path]:
    mount = place / "mnt"
    mount.mkdir(exist_ok=True)
    run("mount", disk, mount)
    try:
        yield mount
    finally:
        run("umount", mount)


def kill_and_recover(controller: pyublk.Controller, disk: dict[str, Any]) -> None:
    server = json.loads(run_here("info", str(disk["id"]), "--json").stdout)[0]["server_pid"]
    os.kill(server, signal.SIGKILL)
    until(lambda: controller.info(disk["id"]).status is DeviceStatus.QUIESCED)
    done = run_here("recover", str(disk["id"]))
    assert done.exit_code == 0, done.stderr


@pytest.mark.thorough
def test_a_file_system_over_a_read_only_image(
    place: Path, base: Path, controller: pyublk.Controller
) -> None:
    before, old = digest(base), (place / "content/old").read_bytes()
    assert run_here("overlay", "create", "top", "--base", str(base)).exit_code == 0
    disk = added("overlay", "top", "--recovery", "resend", "--no-restart")
    number = str(disk["id"])
    new, flushed = os.urandom(MIB), os.urandom(MIB)
    with mounted(disk["path"], place) as mount:
        assert (mount / "old").read_bytes() == old
        (mount / "flushed").write_bytes(flushed)
        run("sync", "-f", mount / "flushed")
        in_use = run_here("overlay", "commit", "top")
        assert in_use.exit_code == ExitCode.BUSY
        assert f"which serves {disk['path']}" in in_use.stderr
        kill_and_recover(controller, disk)
        assert (mount / "flushed").read_bytes() == flushed
        (mount / "new").write_bytes(new)
        (mount / "old").unlink()
    assert run_here("stop", number).exit_code == 0
    assert digest(base) == before
    told = json.loads(run_here("overlay", "info", "top", "--json").stdout)
    assert (told["state"], told["present"] > 2 * MIB) == ("unchanged", True)

    disk = added("overlay", "top")
    with mounted(disk["path"], place) as mount:
        assert (mount / "new").read_bytes() == new
    assert run_here("stop", str(disk["id"])).exit_code == 0
    run("fsck.ext4", "-fn", overlay_image(place))
    assert run_here("overlay", "commit", "top").exit_code == 0
    assert overlays.info(place / "top").present == 0
    assert digest(base) == digest(place / "whole.img")
    run("fsck.ext4", "-fn", base)
    disk = added("overlay", "top")
    with mounted(disk["path"], place) as mount:
        assert (mount / "flushed").read_bytes() == flushed
        assert not (mount / "old").exists()
    assert run_here("stop", str(disk["id"])).exit_code == 0


def overlay_image(place: Path) -> Path:
    done = run_here("overlay", "squash", "top", "--to", "whole.img")
    assert done.exit_code == 0, done.stderr
    return place / "whole.img"


def test_what_was_written_and_not_flushed_outlives_the_server(
    place: Path, base: Path, controller: pyublk.Controller
) -> None:
    overlays.create(place / "top", str(base))
    disk = added("overlay", "top", "--recovery", "resend", "--no-restart")
    data = os.urandom(64 << 10)
    with Blocks(disk["path"]) as blocks:
        blocks.write(data, MIB)
        kill_and_recover(controller, disk)
        assert blocks.read(len(data), MIB) == data
    assert run_here("stop", str(disk["id"])).exit_code == 0


@pytest.mark.thorough
def test_a_base_that_changed_while_the_disk_was_stopped(place: Path, base: Path) -> None:
    overlays.create(place / "top", str(base))
    disk = added("overlay", "top")
    assert run_here("stop", str(disk["id"])).exit_code == 0
    base.chmod(0o644)
    base_disk = added("file", str(base))
    with mounted(base_disk["path"], place):
        pass
    refused = run_here("add", "overlay", "top")
    assert refused.exit_code == ExitCode.BUSY
    assert "base.img is in use" in refused.stderr
    assert run_here("stop", str(base_disk["id"])).exit_code == 0
    refused = run_here("add", "overlay", "top")
    assert refused.exit_code != 0
    assert f"the base of top, {base}, has changed: " in refused.stderr
    assert json.loads(run_here("list", "--json").stdout) == []


def test_a_block_device_as_the_base(place: Path, serve: Any) -> None:
    below = serve(Ram(size=4 * MIB))
    with Blocks(below.path) as blocks:
        blocks.write(b"base".ljust(4096), 0)
    for name in ("one", "two"):
        overlays.create(place / name, below.path)
    one, two = serve(OverlayFile(place / "one")), serve(OverlayFile(place / "two"))
    for disk, word in ((one, b"one"), (two, b"two")):
        with Blocks(disk.path) as blocks:
            assert blocks.read(4096, 0) == b"base".ljust(4096)
            blocks.write(word.ljust(4096), 0)
            blocks.write(word.ljust(4096), 65536)
    two.stop()
    with pytest.raises(OSError, match="in use"):
        overlays.commit(place / "two", force=True)  # `one` reads it
    one.stop()
    overlays.commit(place / "two", force=True)
    with Blocks(below.path) as blocks:
        assert blocks.read(4096, 65536) == b"two".ljust(4096)
    with pytest.raises(pyublk.UblkError, match="its bytes at 0 are other ones"):
        serve(OverlayFile(place / "one"))


def test_a_clone_where_the_file_system_makes_one(place: Path, serve: Any) -> None:
    """On btrfs, which is on a disk of ours."""
    disk = serve(Ram(size=256 * MIB))
    run("mkfs.btrfs", "-q", disk.path)
    with mounted(disk.path, place) as mount:
        image = mount / "base.img"
        image.write_bytes(os.urandom(8 * MIB))
        done = run_here("overlay", "create", str(mount / "copy"), "--base", str(image), "--clone")
        assert done.exit_code == 0, done.stderr
        assert digest(mount / "copy") == digest(image)
        shared = run("filefrag", "-v", mount / "copy")
        assert "shared" in shared
        refused = run_here(
            "overlay", "create", str(place / "other"), "--base", str(image), "--clone"
        )
        assert refused.exit_code == ExitCode.FAILED
        assert "leave out --clone for an overlay" in refused.stderr
        assert not (place / "other").exists()
