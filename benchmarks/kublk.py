# SPDX-License-Identifier: MIT
"""The kernel's own ublk server, kublk, built from Debian's kernel source and kept in the cache.

kublk is a self-test of the kernel (tools/testing/selftests/ublk). It needs the headers of its own
kernel and a newer liburing than Debian 12 has, so both come from the machine's mirror too, through
the same private apt as the kernels of the virtual machine; nothing of the machine is changed.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from pyublk.vm import apt
from pyublk.vm.kernels import cache_directory

from . import programs
from .programs import Unavailable

_TESTS = "tools/testing/selftests/ublk"


def series_of(release: str) -> str:
    """The series of a kernel release: 7.2 of 7.2.13+deb14-amd64."""
    return ".".join(re.findall(r"\d+", release)[:2])


def choose_source(packages: list[str], series: str) -> str:
    """The source package of a series, or the newest where the mirror has none of it.

    Raises Unavailable when there is none at all.
    """
    found = {
        tuple(map(int, match[1].split("."))): match[0]
        for name in packages
        if (match := re.fullmatch(r"linux-source-(\d+\.\d+)", name))
    }
    if not found:
        raise Unavailable("this machine's mirror has no package linux-source-*")
    wanted = tuple(map(int, series.split(".")))
    return found.get(wanted) or found[max(found)]


class _Archive:
    """The mirror's packages, by the lists of a private apt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._apt = apt.Apt(directory / "apt", apt.machine_mirror())
        self._apt.update()

    def _ask(self, *arguments: str) -> list[str]:
        line = [programs.find("apt-cache", "apt"), *arguments]
        environment = {**os.environ, "APT_CONFIG": str(self._directory / "apt" / "apt.conf")}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()

    def sources(self) -> list[str]:
        """Names of the kernel's source packages."""
        return [line.split()[0] for line in self._ask("search", "--names-only", "^linux-source-")]

    def newest_version(self, package: str) -> str:
        """A package's newest version in any suite. Raises Unavailable when there is none."""
        for line in self._ask("madison", package):
            return line.split("|")[1].strip()
        raise Unavailable(f"this machine's mirror has no package {package}")

    def unpack(self, packages: list[str], name: str) -> Path:
        """Download packages and unpack them into a directory of that name."""
        place = self._directory / f"{name}-packages"
        place.mkdir()
        root = self._directory / name
        for package in self._apt.download(packages, place, lambda _what, _fraction: None):
            apt.unpack(package, root)
            package.unlink()
        return root


def _compile(sources: Path, include: list[Path], library: Path, program: Path) -> None:
    # Its Makefile builds small helpers, each with a main of its own, from the same directory.
    files = [
        file
        for file in sorted(sources.glob("*.c"))
        if file.name == "kublk.c" or not re.search(r"^int main\(", file.read_text(), re.MULTILINE)
    ]
    programs.run(
        programs.find("cc", "gcc"),
        *("-D_GNU_SOURCE", "-O3", "-w", "-static", f"-I{sources.parent}"),
        *(f"-I{directory}" for directory in include),
        *map(str, files),
        *("-o", str(program), f"-L{library}", "-luring", "-lpthread", "-lm"),
    )


def _build(archive: _Archive, series: str, scratch: Path, program: Path) -> str:
    package = choose_source(archive.sources(), series)
    version = archive.newest_version(package)
    root = archive.unpack(
        [
            f"{package}={version}",
            f"linux-libc-dev={version}",
            f"liburing-dev={archive.newest_version('liburing-dev')}",
        ],
        "root",
    )
    (tarball,) = root.glob("usr/src/linux-source-*.tar.xz")
    programs.run(
        programs.find("tar", "tar"),
        *("-xf", str(tarball), "-C", str(scratch), "--strip-components=1", "--wildcards"),
        *(f"*/{_TESTS}", "*/tools/testing/selftests/*.h"),
    )
    triplet = programs.run(programs.find("cc", "gcc"), "-print-multiarch").strip()
    headers = root / "usr/include"
    library = root / "usr/lib" / triplet
    _compile(scratch / _TESTS, [headers, headers / triplet], library, program)
    return version


def build(release: str) -> Path:
    """The kublk program for a kernel release, from the cache or built now (half a minute).

    Raises:
        Unavailable: it does not build, or a package or program is missing.
        pyublk.vm.errors.VMError: the mirror cannot be used.
    """
    cache = cache_directory() / "kublk"
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / series_of(release)
    if not place.exists():
        with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as directory:
            scratch = Path(directory)
            fresh = scratch / "done"
            for path in (fresh, scratch / "tree"):
                path.mkdir(mode=0o755)
            version = _build(_Archive(scratch), place.name, scratch / "tree", fresh / "kublk")
            (fresh / "version").write_text(version + "\n")
            fresh.rename(place)
    return place / "kublk"
