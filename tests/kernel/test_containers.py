"""A server in a container: what it must be given, and what it says without."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from needs import in_any_pid_namespace
from servers import until

import pyublk

MIB = 1 << 20
PATIENCE = 60.0

#: Its own processes, mounts, names and run directory, and no capability but one.
CONTAINER = """
mount -t tmpfs run /run && {dev} &&
exec setpriv --bounding-set=-all,+sys_admin --inh-caps=-all --no-new-privs \
    {python} -m pyublk add ram --size 1M --foreground --json
"""


@contextmanager
def container(dev: str = "true") -> Iterator["subprocess.Popen[str]"]:
    """`dev` is what is done with its /dev."""
    server = subprocess.Popen(
        [
            *("unshare", "--pid", "--mount", "--ipc", "--uts", "--fork"),
            *("--kill-child", "--mount-proc"),
            *("sh", "-c", CONTAINER.format(dev=dev, python=sys.executable)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield server
    finally:
        server.kill()
        server.communicate(timeout=PATIENCE)


def test_a_server_in_a_container(controller: pyublk.Controller) -> None:
    in_any_pid_namespace()
    with container() as server:
        assert server.stdout is not None
        made: dict[str, Any] = json.loads(server.stdout.readline())
        with Blocks(made["path"]) as disk:
            disk.write(b"kept".ljust(4096), 0)
            assert disk.read(4096, 0).startswith(b"kept")
        pid = controller.info(made["id"]).server_pid
        assert pid is not None
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"CapEff:\t{1 << 21:016x}" in status  # CAP_SYS_ADMIN
        assert made["server_pid"] != pid  # it has a number of its own in there
        # Its end takes the helper along: nobody deletes the disk.
        server.kill()
        server.wait(PATIENCE)
        until(lambda: not Path(f"/proc/{pid}").exists(), what="the server ends")
    controller.delete(made["id"])


@pytest.mark.thorough
def test_a_container_with_a_dev_of_its_own(controller: pyublk.Controller) -> None:
    """Nodes of new devices appear in the machine's alone."""
    dev = (
        "touch /run/control && mount --bind /dev/ublk-control /run/control && "
        "mount -t tmpfs dev /dev && touch /dev/ublk-control && "
        "mount --bind /run/control /dev/ublk-control && "
        "mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
    )
    with container(dev) as server:
        _, said = server.communicate(timeout=PATIENCE)
    assert server.returncode == 1
    assert "did not appear" in said
    assert "--volume /dev:/dev" in said
    assert controller.devices() == []
