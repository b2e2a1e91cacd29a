"""Debian's packages of any suite and machine, unpacked into directories and not installed."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pyublk.vm import apt, kernels
from tools.wheels.targets import MACHINES

#: How long package lists are used, in seconds: sid's packages are replaced within days.
FRESH = 6 * 3600


def _quiet(_what: str, _fraction: float | None) -> None:
    """Report no progress."""


def merge_usr(root: Path) -> None:
    """Make `bin`, `sbin`, `lib` and `lib64` of a root links into `usr`, as in Debian.

    Programs name their interpreter by these. Packages of bookworm still have files in `lib`, and
    dpkg-deb replaces a link by a directory of theirs: what is there is moved afterwards.
    """
    for name in ("bin", "sbin", "lib", "lib64"):
        plain, merged = root / name, root / "usr" / name
        if plain.is_dir() and not plain.is_symlink():
            shutil.copytree(plain, merged, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(plain)
        if merged.is_dir() and not plain.is_symlink():
            plain.symlink_to(f"usr/{name}")


def set_up(root: Path) -> None:
    """Do for a root what its packages' own scripts would do, which are not run.

    It gets the users, the groups and the authorities that these packages bring: `base-passwd` and
    `ca-certificates`. Of a package that is not there, nothing is done.
    """
    brought = {
        "passwd": "base-passwd/passwd.master",
        "group": "base-passwd/group.master",
        "ssl/certs/ca-certificates.crt": "ca-certificates/*/*.crt",
    }
    for name, pattern in brought.items():
        if parts := sorted((root / "usr/share").glob(pattern)):
            file = root / "etc" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"".join(part.read_bytes() for part in parts))


class Archive:
    """apt with the lists of all suites and machines, which are fetched when first needed.

    Attributes:
        directory: of what is kept between runs.
    """

    def __init__(self) -> None:
        self.directory = kernels.cache_directory() / "wheels"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._apt: apt.Apt | None = None

    def _lists(self) -> apt.Apt:
        if self._apt is None:
            self._apt = apt.Apt(
                self.directory / "apt",
                apt.machine_mirror(),
                architectures=tuple(MACHINES.values()),
            )
            self._update()
        return self._apt

    def _update(self) -> None:
        """Fetch the lists, which are large, unless they are of the last hours."""
        mark = self.directory / "apt" / "updated"
        if not mark.exists() or time.time() - mark.stat().st_mtime > FRESH:
            print("fetching package lists", flush=True)
            assert self._apt is not None
            self._apt.update()
            mark.touch()

    def has(self, package: str, machine: str) -> bool:
        return self._lists().has(f"{package}:{MACHINES[machine]}")

    def unpack(
        self, packages: Sequence[str], machine: str, root: Path, *, complete: bool = False
    ) -> None:
        """Unpack packages into `root`, which is there afterwards as a whole or not at all.

        Args:
            packages: their names.
            machine: a key of `MACHINES`.
            root: the directory to be made.
            complete: also what they depend on, so that their programs run there.
        """
        names = [f"{package}:{MACHINES[machine]}" for package in packages]
        if complete:
            names = self._lists().closure(names)
        with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
            fresh = Path(scratch) / "root"
            fresh.mkdir(mode=0o755)
            for package in self._lists().download(names, Path(scratch), _quiet):
                apt.unpack(package, fresh)
            if complete:
                merge_usr(fresh)
                set_up(fresh)
            root.parent.mkdir(parents=True, exist_ok=True)
            fresh.rename(root)
