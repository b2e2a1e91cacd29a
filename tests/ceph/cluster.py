"""A Ceph cluster of one monitor and one OSD on the loopback interface, for tests: nothing of it is
secure, or kept."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "rbd")
#: Seconds for each step.
PATIENCE = 120.0


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def use_debians_binding(folder: Path) -> None:
    """Lets this environment import Debian's python3-rbd, and nothing else of Debian's."""
    folder.mkdir()
    for name in ("rbd", "rados"):
        for module in Path("/usr/lib/python3/dist-packages").glob(f"{name}.cpython-*.so"):
            (folder / module.name).symlink_to(module)
    sys.path.insert(0, str(folder))


class Cluster:
    """Use `with`: it is started, and ended, with all that is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "ceph.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        at = f"v1:127.0.0.1:{port}"
        cluster, osd = uuid.uuid4(), uuid.uuid4()
        self.conf.write_text(_CONF.format(cluster=cluster, at=at, folder=self.folder))
        for name in ("mon-a", "osd-0"):
            (self.folder / name).mkdir()
        monmap = self.folder / "monmap"
        self._do(
            "monmaptool",
            "--create",
            "--fsid",
            str(cluster),
            "--addv",
            "a",
            f"[{at}/0]",
            str(monmap),
        )
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
        self._serve("mon", "ceph-mon", "-i", "a")
        self._await(lambda: "a" in self.ask("mon", "stat"))
        assert self.ask("osd", "new", str(osd)).strip() == "0"
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", str(osd))
        self.start_osd()
        self.ask("osd", "pool", "create", "rbd", "8", "8")

    def start_osd(self) -> None:
        """Also after `kill_osd`; returns when it is up."""
        self._serve("osd", "ceph-osd", "-i", "0")

        def is_up() -> bool:
            if self._processes["osd"].poll() is not None:  # at once after a kill, it may fail
                self._serve("osd", "ceph-osd", "-i", "0")
            return "1 up" in self.ask("osd", "stat")

        self._await(is_up)

    def kill_osd(self) -> None:
        """As a machine that dies."""
        osd = self._processes["osd"]
        osd.send_signal(signal.SIGKILL)
        osd.wait()

    def ask(self, *words: str) -> str:
        """A command of ceph's."""
        return self._do("ceph", "--connect-timeout", "30", *words)

    def rbd(self, *words: str) -> str:
        """A command of rbd's."""
        return self._do("rbd", *words)

    def _do(self, program: str, *words: str) -> str:
        done = subprocess.run(
            [program, "-c", str(self.conf), *words]
            if program != "monmaptool"
            else [program, *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stderr}"
        return done.stdout

    def _serve(self, name: str, program: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [program, "-c", str(self.conf), "-f", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ,
            )

    def _await(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, "the cluster did not come up"
            time.sleep(0.2)


_CONF = """[global]
fsid = {cluster}
mon host = [{at}/0]
mon initial members = a
ms bind msgr2 = false
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
osd pool default pg autoscale mode = off
osd pool default pg num = 8
bluestore block create = true
bluestore block size = 4294967296
osd memory target = 939524096
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
mon data = {folder}/mon-a
osd data = {folder}/osd-0
keyring = {folder}/keyring
"""
