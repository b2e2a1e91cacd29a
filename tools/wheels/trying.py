"""The unit tests, on an installed wheel: without the checkout's package, and without a compiler."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.wheels import interpreters
from tools.wheels.building import ROOT
from tools.wheels.debian import Archive
from tools.wheels.targets import Target

#: What every test needs.
RUNNER = ("pytest>=9", "pytest-timeout", "pytest-rerunfailures", "hypothesis>=6", "numpy")
#: Of the group `test`, what has wheels for all interpreters; other tests are skipped, and say so.
PACKAGES = (*RUNNER, "pytest-xdist", "prometheus-client", "obstore", "zstandard", "localbucket")
#: An interpreter that this machine does not have, out of Debian's packages, with what tests call.
DEBIAN = ["python{0}-minimal", "libpython{0}-stdlib", "util-linux", "coreutils", "dash", "procps"]
DEBIAN += ["bash", "sed", "busybox-static", "base-passwd", "ca-certificates"]
DEBIAN += ["libc-bin"]  # the locale C.UTF-8
DEBIAN += ["libstdc++6"]  # for numpy
#: Programs that some tests call, and are skipped without.
PROGRAMS = ["qemu-utils", "qemu-system-common", "nbdkit", "nbdkit-plugin-python", "openssl"]
PROGRAMS += ["e2fsprogs", "xfsprogs", "btrfs-progs", "dosfstools", "fio", "blktrace"]
_COMPILER = ("cc", "c89", "c99", "gcc", "g++", "c++", "clang", "ld", "as", "tcc", "zig")


class TrialFailed(Exception):
    """A wheel cannot be installed, or its tests fail."""


@dataclass(frozen=True)
class Trial:
    """How commands run with an interpreter.

    Attributes:
        command: what comes before the interpreter's arguments.
        environment: what is set for it.
        packages: a directory that it finds the wheel's package below.
    """

    command: list[str]
    environment: Mapping[str, str]
    packages: Path

    def run(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            check=False,
        )
        if done.returncode != 0:
            raise TrialFailed(f"{' '.join(self.command[-1:])} {' '.join(arguments[:3])} failed")


def without_compiler(path: str, directory: Path) -> Path:
    """Fill a directory with links to all programs of a PATH that compile nothing."""
    directory.mkdir(parents=True)
    for place in map(Path, path.split(os.pathsep)):
        for program in sorted(place.iterdir()) if place.is_dir() else []:
            words = re.split(r"[-.]", program.name)
            link = directory / program.name
            if not any(word in _COMPILER for word in words) and not link.is_symlink():
                link.symlink_to(program)
    return directory


def install(target: Target, wheel: Path, work: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """Install a wheel and packages for an interpreter that pip does not run on.

    Returns:
        The directory that the interpreter is to look for modules in.

    Raises:
        TrialFailed: pip cannot install it.
    """
    site = work / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--only-binary", ":all:"]
    command += ["--target", str(site), "--python-version", target.version, "--abi", target.abi_tag]
    platforms = [f"manylinux_2_{minor}_{target.machine}" for minor in (34, 28, 27, 17)]
    for platform in (*platforms, target.platform_tag):
        command += ["--platform", platform]
    if subprocess.run([*command, *packages, str(wheel)], check=False).returncode != 0:
        raise TrialFailed(f"pip cannot install {wheel.name}")
    return site


def _here(python: str, wheel: Path, work: Path) -> Trial:
    """A new virtual environment of an interpreter of this machine."""
    place = work / "environment"
    subprocess.run([python, "-m", "venv", "--without-pip", place], check=True)
    program = str(place / "bin" / "python")
    # pip 22.3 and newer install for another interpreter.
    command = [sys.executable, "-m", "pip", "--python", program, "install", "-q"]
    if subprocess.run([*command, *PACKAGES, str(wheel)], check=False).returncode != 0:
        raise TrialFailed(f"pip cannot install {wheel.name}")
    programs = without_compiler("/usr/sbin:/usr/bin:/sbin:/bin", work / "programs")
    return Trial([program], {"PATH": f"{place / 'bin'}:{programs}", "PYTHONPATH": ""}, place)


def debian_root(target: Target, archive: Archive, more: Sequence[str] = ()) -> Path:
    """Return a root directory with an interpreter of Debian's, which is made when it is missing.

    Args:
        target: what the interpreter is for.
        archive: where it is taken from, and where the directory is kept.
        more: packages that are to be in it, too.
    """
    packages = [*(name.format(target.version) for name in DEBIAN), *more]
    mark = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    root = archive.directory / "roots" / f"{target}-{mark}"
    if not root.exists():
        archive.unpack(packages, target.machine, root, complete=True)
    return root


#: Makes a directory the root of what is called, which then sees nothing else. What is mounted in it
#: comes as pairs of a directory here and its place there; `--` ends them.
_ENTER = """
set -e
root=$1
shift
mount --rbind "$root" "$root"
while [ "$1" != -- ]; do
    mkdir -p "$root$2"
    mount --rbind "$1" "$root$2"
    shift 2
done
shift
cd "$root"
pivot_root . .
exec /usr/bin/busybox sh -c 'umount -l . && cd / && exec "$@"' sh "$@"
"""


def _unpacked(target: Target, wheel: Path, work: Path, archive: Archive) -> Trial:
    """An interpreter of Debian's, in a root directory of its own that has nothing else.

    This machine's files are in it too, but only where the tests and the packages are. Packages are
    where Debian's interpreter looks by itself, also when it is told to ignore its environment.
    """
    root = debian_root(target, archive, PROGRAMS)
    site = install(target, wheel, work)
    packages = Path(f"/usr/local/lib/python{target.version}/dist-packages")
    mounts = [str(place) for place in ("/proc", "/dev", "/sys", "/tmp", ROOT) for _ in range(2)]
    mounts += [str(site), str(packages)]
    nothing = work / "nothing"  # of what programs' packages depend on
    nothing.mkdir()
    mounts += [str(nothing), "/usr/lib/python3/dist-packages"]
    unshare = ["unshare", "--mount"] + (["--map-root-user"] if os.geteuid() else [])
    variables = ["HOME=/root", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin"]
    variables += ["PYTHONDONTWRITEBYTECODE=1"]
    inside = ["/usr/bin/env", "--ignore-environment", "--chdir", str(ROOT), *variables]
    python = f"/usr/bin/python{target.version}"
    return Trial(
        [*unshare, "sh", "-c", _ENTER, "sh", str(root), *mounts, "--", *inside, python],
        {},
        packages,
    )


def runs_here(target: Target) -> bool:
    return target.machine == os.uname().machine and target.gil


def try_wheel(
    target: Target, wheel: Path, work: Path, archive: Archive, options: Sequence[str]
) -> None:
    """Install a wheel where nothing else is, and run the unit tests on it.

    Args:
        target: what the wheel is for.
        wheel: the wheel.
        work: an empty directory.
        archive: where an interpreter is taken from that this machine does not have.
        options: for pytest.

    Raises:
        TrialFailed: it cannot be installed, or a test failed.
    """
    python = interpreters.find(target.version, gil=target.gil)
    trial = _here(python, wheel, work) if python else _unpacked(target, wheel, work, archive)
    where = str(trial.packages)
    from_wheel = f"import pyublk; assert pyublk.__file__.startswith({where!r}), pyublk"
    trial.run("-c", from_wheel)
    trial.run("-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/unit", *options)


def try_sdist(sdist: Path, work: Path) -> None:
    """Install the source distribution with this machine's compiler, and without Cython.

    Raises:
        TrialFailed: it does not build, or what was built does not work.
    """
    place = work / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    program = str(place / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", program, "install", "-q"]
    for words in (["setuptools>=77"], ["--no-build-isolation", str(sdist)]):
        if subprocess.run([*pip, *words], check=False).returncode != 0:
            raise TrialFailed(f"pip cannot install {words[-1]} without Cython")
    environment = {"PYTHONPATH": "", "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    trial = Trial([program], environment, place)
    trial.run("-c", "import importlib.util; assert importlib.util.find_spec('Cython') is None")
    trial.run("-c", _DISK)


#: A disk without a kernel, written and read.
_DISK = """
from pyublk.targets import Ram
from pyublk.testing import Disk

with Disk(Ram(size=1 << 20)) as disk:
    disk.pwrite(b"pyublk" * 4096, 4096)
    assert disk.pread(6 * 4096, 4096) == b"pyublk" * 4096
"""
