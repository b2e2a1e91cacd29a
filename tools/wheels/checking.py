"""What is in a wheel: for which machine, and for how old a C library."""

import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tools.wheels.targets import GLIBC, Target

#: As readelf calls the machines.
_READELF = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
#: What the dynamic linker finds on every system with glibc.
_NEEDED = re.compile(r"lib(c|pthread|dl|m|rt)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")


def _readelf(path: Path) -> str:
    return subprocess.run(
        ["readelf", "--wide", "--file-header", "--dynamic", "--dyn-syms", "--version-info", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def complaints(elf: str, target: Target) -> Iterator[str]:
    """Yield what is wrong with a file for a target, as readelf shows the file."""
    machine = re.search(r"^ +Machine: +(.*)$", elf, re.MULTILINE)
    if machine is None or machine[1].strip() != _READELF[target.machine]:
        yield f"is for {machine[1].strip() if machine else 'no machine'}"
    for version in sorted(set(re.findall(r"\bGLIBC_(\d+(?:\.\d+)+)", elf))):
        if tuple(map(int, version.split("."))) > GLIBC:
            yield f"needs glibc {version}"
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", elf):
        if not _NEEDED.fullmatch(library):
            yield f"needs {library}"
    for directory in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", elf):
        yield f"looks for libraries in {directory}"
    # Symbols that nobody has are found out at the first import only.
    for symbol in re.findall(r" UND (\S+)$", elf.replace(" [<other>", ""), re.MULTILINE):
        if "@" not in symbol and not symbol.startswith(("Py", "_Py", "__gmon", "_ITM", "__cxa")):
            yield f"has {symbol} from nowhere"


def check(wheel: Path, target: Target) -> list[str]:
    """Return what is wrong with a wheel, a sentence each."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
        root = Path(scratch)
        binaries = [path for path in root.rglob("*") if path.is_file() and _is_elf(path)]
        wanted = {f"pyublk/_native{target.suffix}", "pyublk/pyublk-helper"}
        there = {str(path.relative_to(root)) for path in binaries}
        if there != wanted:
            found.append(f"{wheel.name} has the binaries {sorted(there)} and not {sorted(wanted)}")
        for path in binaries:
            name = f"{wheel.name}: {path.name}"
            found += [f"{name} {what}" for what in complaints(_readelf(path), target)]
    return found


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"
