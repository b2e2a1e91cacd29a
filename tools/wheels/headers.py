"""The headers of interpreters: from Debian's packages, which are unpacked and not installed."""

import subprocess
from pathlib import Path

from tools.wheels import interpreters
from tools.wheels.debian import Archive
from tools.wheels.targets import Target


class NoHeaders(Exception):
    """The headers of a target cannot be had here; says what would bring them."""


def _unpacked(target: Target, archive: Archive) -> Path | None:
    """The root of Debian's package of headers for a target, if Debian has that version."""
    root = archive.directory / "headers" / f"{target.version}-{target.machine}"
    if not root.exists():
        package = f"libpython{target.version}-dev"
        if not archive.has(package, target.machine):
            return None
        archive.unpack([package], target.machine, root)
    return root


def directories(target: Target, archive: Archive) -> list[Path]:
    """Return where a target's headers are, as a compiler is to look for them.

    A version that Debian's suites lack is taken from an interpreter of this machine, also for the
    other machine: their pyconfig.h differ by nothing that a module is compiled by. (Debian's for
    3.11, 3.13 and 3.14 differ in assembler for doubles, wchar_t, vectors, and the support tier.)

    Raises:
        NoHeaders: neither has them.
    """
    root = _unpacked(target, archive)
    if root is not None:
        include = root / "usr/include"
        return [include / f"python{target.version}", include]
    python = interpreters.find(target.version)
    if python is None:
        raise NoHeaders(
            f"Debian's suites have no libpython{target.version}-dev, and this machine has no "
            f"Python {target.version}: install one, with its headers"
        )
    include = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('include'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    if not (include / "Python.h").exists():
        raise NoHeaders(f"{python} comes without its headers: {include}/Python.h is not there")
    return [include]
