"""The Python interpreters that this machine has."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_ASK = "import sys; print('%d.%d' % sys.version_info[:2] + getattr(sys, 'abiflags', ''))"


def _candidates(version: str) -> Iterator[str]:
    found = shutil.which(f"python{version}")
    if found:
        yield found
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(root.glob(f"versions/{version}*/bin/python3")))


def find(version: str, *, gil: bool = True) -> str | None:
    """Return an interpreter of a version such as `3.12`, or None."""
    for python in _candidates(version):
        # A shim of a version manager is there, and runs nothing.
        said = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False)
        if said.stdout.strip() == version + ("" if gil else "t"):
            return python
    return None
