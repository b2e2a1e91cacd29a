"""Any target served by nbdkit: qemu-io is the client, and says what it gets."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pyublk.cli import main
from pyublk.nbdkit import PLUGIN


def version_of_nbdkits_python() -> str | None:
    """Such as "3.11"; None without nbdkit's plugin for Python."""
    if shutil.which("nbdkit") is None or shutil.which("qemu-io") is None:
        return None
    told = subprocess.run(
        ["nbdkit", "python", "--dump-plugin"], capture_output=True, text=True, check=False
    ).stdout
    lines = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    return ".".join(lines.get("python_version", "").split(".")[:2]) or None


pytestmark = pytest.mark.skipif(
    version_of_nbdkits_python() != f"{sys.version_info[0]}.{sys.version_info[1]}"
    or bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="nbdkit, nbdkit-plugin-python (for this version of Python) or qemu-utils is missing",
)

CLASSES = """
import asyncio, errno, sys, threading
import pyublk

class Plain(pyublk.Target):
    def __init__(self, *, size=1 << 20):
        super().__init__(size=size, block_size=4096)
        self.bytes, self.kept = bytearray(size), []
        self.threads = set()
    def read(self, offset, buffer):
        self.threads.add(threading.get_ident())
        if offset == self.size - 4096:
            raise OSError(errno.ENOSPC, "no room to read")
        if offset == self.size - 8192:
            return 5
        buffer[:] = self.bytes[offset : offset + len(buffer)]
    def write(self, offset, data):
        self.kept.append(data)  # which is allowed
        self.bytes[offset : offset + len(data)] = data
    def close(self):
        data = b"".join(self.kept[:1])
        print("closed", len(self.threads), len(data), set(data), file=sys.stderr, flush=True)

class Coroutines(pyublk.Target):
    async def open(self):
        self.bytes = bytearray(self.size)
        self.loop = asyncio.get_running_loop()
    async def read(self, offset, buffer):
        await asyncio.sleep(0)
        assert self.loop is asyncio.get_running_loop()
        buffer[:] = self.bytes[offset : offset + len(buffer)]
    async def write(self, offset, data):
        self.bytes[offset : offset + len(data)] = data
    async def flush(self):
        await asyncio.sleep(0)
    async def write_fua(self, offset, data):
        await self.write(offset, data)
    async def close(self):
        print("closed", file=sys.stderr, flush=True)

class Whole(pyublk.Target):
    flushes = discards = True
    def open(self):
        self.bytes = bytearray(self.size)
    def handle(self, io):
        end = io.offset + io.length
        if io.op == 0:
            io.buffer[:] = self.bytes[io.offset : end]
        elif io.op == 1:
            self.bytes[io.offset : end] = io.buffer
"""


def serve(*words: str, run: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "classes.py").write_text(CLASSES)
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    return subprocess.run(
        ["nbdkit", "-f", "-U", "-", "python", PLUGIN, *words, "--run", run],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def client(*commands: str) -> str:
    return 'qemu-io -t none -f raw "$uri"' + "".join(f" -c '{one}'" for one in commands)


@pytest.mark.parametrize(
    "words",
    [
        ["target=ram", "size=1M"],
        ["target=file", "arguments=disk.img"],
        ["target=stripe", "arguments=disk.img", "arguments=disk2.img", "size=1M"],
        ["target=classes.py:Plain"],
        ["target=classes.py:Coroutines", "size=1M"],
        ["target=classes.py:Whole", "size=1M"],
    ],
    ids=["native", "mapped", "striped", "methods", "coroutines", "handle"],
)
def test_each_kind_of_target_is_served(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "disk2.img").write_bytes(bytes(1 << 20))
    commands = (
        "write -P 7 0 768k", "write -f -P 8 8k 4k", "flush", "write -z 0 4k",
        "discard 64k 8k", "read -P 0 0 4k", "read -P 7 4k 4k", "read -P 8 8k 4k",
        "read -P 7 128k 640k", "read -P 0 768k 4k",
    )  # fmt: skip
    done = serve(*words, run=client(*commands), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert done.stdout.count("bytes at offset") == len(commands) - 1  # flush says nothing


def test_what_a_target_raises_and_keeps(tmp_path: Path) -> None:
    commands = ["write -P 7 0 4k", "read 1044480 4k", "read 1040384 4k", "read -P 7 0 4k"]
    commands += ["read 100 512"]  # qemu reads the whole block, as it was told
    done = serve("target=classes.py:Plain", run=client(*commands), folder=tmp_path)
    said = [line for line in done.stdout.splitlines() if "failed" in line or "read" in line]
    assert said[:2] == ["read failed: No space left on device", "read failed: Input/output error"]
    assert said[2] == "read 4096/4096 bytes at offset 0"
    assert "closed 1 4096 {7}" in done.stderr  # one thread, and data that nobody changed
    assert "no room to read" in done.stderr
    assert "returned 5, and not None" in done.stderr


def test_a_read_only_target_and_a_spec(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    disk = {"read_only": True}
    spec.write_text(json.dumps({"target": "file", "arguments": ["disk.img"], "disk": disk}))
    done = serve(f"spec={spec}", run='qemu-io -r -f raw "$uri" -c "read -P 0 0 4k"; '
                 'qemu-io -f raw "$uri" -c "write 0 4k"', folder=tmp_path)  # fmt: skip
    assert "read 4096/4096" in done.stdout
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nbdkit: pyublk: target=NAME is missing, such as target=file arguments=disk.img"),
        (["target=ram", "size=1M", "colour=red"], "nbdkit: pyublk: ram has no option 'colour'"),
        (["target=file", "arguments=none.img"], "nbdkit: pyublk: none.img does not exist"),
        (
            ["target=zoned", "size=64M"],
            "nbdkit: pyublk: Zoned needs what NBD does not have (<Feature.ZONED",
        ),
    ],
)
def test_what_is_wrong_is_a_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    done = serve(*words, run="true", folder=tmp_path)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_prints_where_the_plugin_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nbdkit-plugin"])
    assert Path(capsys.readouterr().out.strip()) == PLUGIN
