# SPDX-License-Identifier: MIT
"""QEMU's storage daemon, as long as this process needs it."""

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from typing import IO

from pyublk.targets.image_files import ImageFile, failure, program

EXPORT = "disk"

#: Seconds for its start, and for its end, in which it writes what it holds back.
STARTS, ENDS = 30.0, 30.0
#: Seconds in which the image of a server that was killed comes free: its daemon still flushes.
COMES_FREE = 5.0
#: Connections that it takes.
CONNECTIONS = 16

# The shell ends the daemon when its own standard input ends: when this process closes it, or is
# gone, however it died. A signal to the parent's death (prctl(2)) would come with the death of the
# thread that started it.
_WHILE_WANTED = """
exec 3<&0 </dev/null
directory=$1
shift
"$@" 3<&- &
daemon=$!
( read -r _ <&3; kill "$daemon" 2>/dev/null ) &
watch=$!
exec 3<&-
wait "$daemon"
code=$?
kill "$watch" 2>/dev/null
rm -rf "$directory"
exit $code
"""


class StorageDaemon:
    """`qemu-storage-daemon` with one image, at `socket`, a UNIX socket in a directory of its own.

    Args:
        image: what it opens, as it is told by `image_files.examine`.
        read_only: it opens it for reading.
        direct: bypass the page cache.
    """

    def __init__(self, image: ImageFile, *, read_only: bool, direct: bool) -> None:
        self._image = image
        self._read_only = read_only
        self._direct = direct
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: str | None = None
        self._log: IO[bytes] | None = None

    @property
    def socket(self) -> str:
        """Where it answers."""
        assert self._directory is not None
        return os.path.join(self._directory, "socket")

    @property
    def pid(self) -> int | None:
        """The process that waits for it, while it runs."""
        return self._process.pid if self._process is not None and self.runs() else None

    def start(self) -> None:
        """Returns when it takes connections. Raises OSError in one sentence."""
        until = time.monotonic() + COMES_FREE
        while True:
            try:
                self._start()
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > until:
                    raise
            time.sleep(0.2)

    def _start(self) -> None:
        name = program("qemu-storage-daemon", "qemu-system-common")
        self._directory = tempfile.mkdtemp(prefix="pyublk-image-")  # for nobody else (mode 0700)
        try:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
            self._process = subprocess.Popen(
                ["sh", "-c", _WHILE_WANTED, "sh", self._directory, name, *self._options()],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for this process, which ends it in order
                env=os.environ | {"LC_ALL": "C"},
            )
            self._await_socket()
        except BaseException:
            self.stop()
            raise

    def _options(self) -> list[str]:
        writable = "off" if self._read_only else "on"
        node = self._image.node(direct=self._direct) | {
            "node-name": "disk",
            "read-only": self._read_only,
            "discard": "unmap",
        }
        # What is not whole clusters goes through here, and below it nothing is cached.
        node["file"] |= {"discard": "unmap"}
        return [
            "--blockdev", json.dumps(node),
            "--nbd-server",
            f"addr.type=unix,addr.path={self.socket},max-connections={CONNECTIONS}",
            "--export", f"type=nbd,id=export,node-name=disk,name={EXPORT},writable={writable}",
        ]  # fmt: skip

    def _await_socket(self) -> None:
        until = time.monotonic() + STARTS
        pause = 0.005
        while not self._answers():
            if not self.runs():
                raise failure(self._image.path, self.said())
            if time.monotonic() > until:
                raise TimeoutError(
                    errno.ETIMEDOUT,
                    f"QEMU did not open {self._image.path} within {STARTS:g} s",
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.1)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(self.socket)
            return True
        return False

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """Its output."""
        assert self._log is not None
        return os.pread(self._log.fileno(), 1 << 16, 0).decode(errors="replace")

    def stop(self) -> str | None:
        """Ends it, when it has written all; says how it ended if that was not in order."""
        process, self._process = self._process, None
        said = None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                code = process.wait(ENDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                said = f"QEMU did not close {self._image.path} within {ENDS:g} s, and was killed"
            else:
                if code:
                    said = f"QEMU ended with exit code {code}: {self.said().strip()}"
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        if self._log is not None:
            self._log.close()
            self._log = None
        return said
