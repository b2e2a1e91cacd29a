"""The initial file system of the guest: an archive in the kernel's own format, newc cpio.

The format is from the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
import subprocess
from pathlib import Path

from pyublk.vm import modules
from pyublk.vm.kernels import Kernel

# What the guest needs before it sees the host's files, and the driver all of this is for.
_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "loop", "ublk_drv")
_GUEST = Path(__file__).parent / "guest"


def _libraries(program: Path) -> list[Path]:
    """Return the shared libraries a program is started with; none for a static one."""
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        return []
    words = (word for line in listing.stdout.splitlines() for word in line.split())
    return [Path(word) for word in words if word.startswith("/")]


class Archive:
    """A newc archive under construction."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._directories: set[str] = set()

    def _entry(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        for part in (header, content):
            self._parts.append(part + bytes(-len(part) % 4))

    def directory(self, name: str) -> None:
        """Add a directory and those above it, once. Names are relative to the root."""
        if name and name not in self._directories:
            self.directory(name.rpartition("/")[0])
            self._directories.add(name)
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file, and the directories above it."""
        self.directory(name.rpartition("/")[0])
        self._entry(name, stat.S_IFREG | mode, content)

    def device(self, name: str, major: int, minor: int) -> None:
        """Add a character device; its directory must be there."""
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def program(self, name: str, source: Path) -> None:
        """Add a program of the host, with the shared libraries it is started with."""
        self.file(name, source.read_bytes(), 0o755)
        for library in _libraries(source):
            self.file(str(library).lstrip("/"), library.read_bytes(), 0o755)

    def finish(self) -> bytes:
        """Return the archive."""
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)


def build(kernel: Kernel, busybox: Path, settings: bytes, job: bytes) -> bytes:
    """Return the initramfs for one run.

    Args:
        kernel: the kernel to be booted; its modules are taken.
        busybox: the host's busybox, static or not.
        settings: shell assignments for the guest's scripts.
        job: shell script that becomes the command.
    """
    archive = Archive()
    for name in ("dev", "proc", "sys", "host", "ram", "root", "tmp"):
        archive.directory(name)
    archive.device("dev/console", 5, 1)
    archive.program("bin/busybox", busybox)
    order = modules.in_order(modules.read_index(kernel.modules), _MODULES)
    for module in order:
        archive.file(f"modules/{module.name}", (kernel.modules / module.path).read_bytes())
    archive.file("modules/order", "".join(f"{module.name}\n" for module in order).encode())
    archive.file("init", (_GUEST / "init.sh").read_bytes(), 0o755)
    archive.file("pyublk/session.sh", (_GUEST / "session.sh").read_bytes(), 0o755)
    archive.file("pyublk/settings", settings)
    archive.file("pyublk/job", job)
    return archive.finish()
