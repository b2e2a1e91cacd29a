"""Disks of users without CAP_SYS_ADMIN, to whom a real udev gives the nodes by the rule that
ships."""

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from needs import python_for_everybody
from servers import until

import pyublk
from pyublk.service import installing

UDEVD = "/lib/systemd/systemd-udevd"
GROUP = grp.getgrnam("nogroup").gr_gid
ALICE = pwd.getpwnam("nobody").pw_uid
BOB = pwd.getpwnam("games").pw_uid
PATIENCE = 60


def udevadm(*arguments: str) -> None:
    subprocess.run(["udevadm", *arguments], check=True, timeout=PATIENCE)


@pytest.fixture
def udev(tmp_path: Path) -> Iterator[None]:
    """udev, with the rule."""
    if not Path("/run/pyublk-vm").is_dir():
        pytest.fail("this would change the machine's rules: run it in `pyublk vm`")
    work = installing.installation((), users="nogroup", units=tmp_path / "units")
    for step in work.files:
        step.path.parent.mkdir(parents=True, exist_ok=True)
        step.path.write_text(step.text)
    mode = os.stat("/dev/ublk-control").st_mode
    subprocess.run([UDEVD, "--daemon"], check=True, timeout=PATIENCE)
    try:
        udevadm("trigger", "--action=add", "--sysname-match=ublk-control")
        udevadm("settle")
        assert os.stat("/dev/ublk-control").st_gid == GROUP
        yield
    finally:
        udevadm("control", "--exit")
        (installing.RULES / installing.RULE).unlink()
        os.chown("/dev/ublk-control", 0, 0)
        os.chmod("/dev/ublk-control", mode & 0o777)


def run(user: int, place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command of a user, whose run directory is below `place`."""
    own = place / str(user)
    if not own.exists():
        own.mkdir()
        os.chown(own, user, GROUP)
    return subprocess.run(
        [sys.executable, "-m", "pyublk", *arguments],
        env={"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(own)},
        cwd="/",
        user=user,
        group=GROUP,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def made_by(user: int, place: Path, *arguments: str) -> dict[str, Any]:
    done = run(user, place, "add", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user can reach."""
    made = Path("/run/pyublk-users")
    made.mkdir()
    with python_for_everybody():
        yield made
    shutil.rmtree(made)


@pytest.mark.usefixtures("udev")
def test_a_user_has_disks_of_his_own(place: Path, controller: pyublk.Controller) -> None:
    disk = made_by(ALICE, place, "ram", "--size", "1M")
    number, path = str(disk["id"]), disk["path"]
    info = controller.info(disk["id"])
    assert (info.owner_uid, info.owner_gid) == (ALICE, GROUP)
    for node in (info.path, info.char_path):
        assert (os.stat(node).st_uid, os.stat(node).st_mode & 0o777) == (ALICE, 0o600)
    copied = "dd if=/dev/urandom of={0} bs=4k count=1 status=none && cmp -n 4096 {0} {0}"
    as_user = {"user": ALICE, "group": GROUP, "extra_groups": []}
    subprocess.run(["sh", "-c", copied.format(path)], check=True, timeout=PATIENCE, **as_user)
    assert number in run(ALICE, place, "list").stdout

    # Nobody else can touch it.
    for command in ("stop", "del", "info"):
        refused = run(BOB, place, command, number)
        assert refused.returncode == 4, (command, refused.stderr)
        assert f"device {number}" in refused.stderr
    assert run(BOB, place, "list", "--json").stdout.strip() == "[]"
    for how in ("if={} of=/dev/null", "of={} if=/dev/null"):
        opened = subprocess.run(
            ["dd", *how.format(path).split()],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **(as_user | {"user": BOB}),
        )
        assert "Permission denied" in opened.stderr
    assert controller.info(disk["id"]).server_pid == disk["server_pid"]

    # Nor can he touch root's.
    with pyublk.Device(pyublk.targets.Null(size=1 << 20)) as roots:
        for command in ("stop", "del"):
            refused = run(ALICE, place, command, str(roots.id))
            assert refused.returncode == 4, refused.stderr
        with Blocks(roots.path) as blocks:
            assert blocks.read(4096, 0) == bytes(4096)

    done = run(ALICE, place, "stop", number)
    assert done.returncode == 0, done.stderr
    assert controller.devices() == []
    assert list((place / str(ALICE) / "pyublk").iterdir()) == []


@pytest.mark.usefixtures("udev")
def test_what_users_are_refused(place: Path, controller: pyublk.Controller) -> None:
    refused = run(ALICE, place, "add", "ram", "--size", "1M", "--recovery", "resend")
    assert refused.returncode != 0
    assert "needs CAP_SYS_ADMIN, here is a caller without it" in refused.stderr
    assert controller.devices() == []
    # One whose server is killed is deleted by the helper.
    disk = made_by(ALICE, place, "ram", "--size", "1M")
    os.kill(disk["server_pid"], 9)
    until(lambda: controller.devices() == [], what="the disk is deleted")
    # Without the rule, he cannot even delete what the kernel made for him.
    rule = installing.RULES / installing.RULE
    text = rule.read_text()
    rule.unlink()
    udevadm("control", "--reload")
    try:
        refused = run(ALICE, place, "add", "ram", "--size", "1M")
        assert refused.returncode == 4
        assert "does not belong to user" in refused.stderr
        assert "have root run `pyublk service install --users GROUP`" in refused.stderr
    finally:
        rule.write_text(text)
        udevadm("control", "--reload")
        for device in controller.devices():
            controller.delete(device.id)
