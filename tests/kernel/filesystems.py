"""File systems on a disk: made, mounted, checked, and unmounted whatever happens."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyublk.testing.file_systems import KINDS

#: How large a disk must be for the tools of each.
SIZES = {name: kind.size for name, kind in KINDS.items()}


def run(*command: object, timeout: float = 50) -> str:
    """Runs a command; AssertionError with what it said when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def make_file_system(kind: str, path: str) -> None:
    run(*KINDS[kind].make, path)


def check_file_system(kind: str, path: str) -> None:
    run(*KINDS[kind].check, path)


@contextmanager
def mounted(path: str, directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    run("mount", *options, path, directory)
    try:
        yield directory
    except BaseException:
        subprocess.run(["umount", "--lazy", directory], timeout=50, check=False)
        raise
    run("umount", directory)


def checksums(tree: Path) -> dict[str, str]:
    """Every file of a tree by its path in it: the SHA-256, where a link leads, or "directory"."""
    found = {}
    for directory, folders, files in os.walk(tree):
        for name in folders + files:
            path = Path(directory, name)
            if path.is_symlink():
                what = f"-> {os.readlink(path)}"
            elif path.is_dir():
                what = "directory"
            else:
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(tree))] = what
    return found
