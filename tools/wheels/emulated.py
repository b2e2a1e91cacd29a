"""A wheel for another machine, in an emulated one that has real disks."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pyublk.vm import Machine
from pyublk.vm.architecture import KNOWN
from pyublk.vm.roots import Root
from tools.wheels import trying
from tools.wheels.building import ROOT
from tools.wheels.debian import Archive
from tools.wheels.targets import Target

#: What the guest's scripts and a disk's tests call, besides the interpreter's.
PACKAGES = ("e2fsprogs", "mount", "kmod")
#: The tests that show most of what differs between processors, and take minutes, not hours.
TESTS = ("tests/unit/test_buffers.py", "tests/unit/test_target_contract.py")
DISKS = ("tests/kernel/test_target_contract.py", "tests/kernel/test_buffers.py")
_GIB = 1 << 30
#: Seconds. An emulated processor is twenty to fifty times slower.
_PATIENCE = 3600


def has(target: Target, archive: Archive) -> bool:
    """Tell whether Debian has the interpreter of a target for its machine."""
    return target.gil and archive.has(f"python{target.version}-minimal", target.machine)


def root(target: Target, archive: Archive) -> Root:
    """Return the root of a guest that has a target's interpreter."""
    directory = trying.debian_root(target, archive, PACKAGES)
    return Root(
        directory,
        KNOWN[target.machine],
        Path("/usr/bin/busybox"),
        directory / "var/cache/pyublk",
    )


def try_wheel(
    target: Target, wheel: Path, work: Path, archive: Archive, options: Sequence[str]
) -> None:
    """Serve disks with an installed wheel, and run some tests on it, in an emulated machine.

    Args:
        target: what the wheel is for.
        wheel: the wheel.
        work: an empty directory.
        archive: where the interpreter is taken from.
        options: for pytest.

    Raises:
        TrialFailed: it cannot be installed, no disk came of it, or a test failed.
        VMError: there is no such machine here, or it failed.
    """
    site = trying.install(target, wheel, work, trying.RUNNER)
    for name in ("tests", "docs", "tools"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("_build"))
    shutil.copy2(ROOT / "pyproject.toml", work)
    machine = Machine(cpus=4, memory=2 * _GIB, outputs=[work], root=root(target, archive))
    python = f"/usr/bin/python{target.version}"
    environment = {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}
    environment |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "--timeout", "600")
    # All at once, since each boot takes a minute; the two have tests of the same names.
    unit = shlex.join([python, *pytest, *TESTS, *options])
    disks = shlex.join([python, *pytest, *DISKS, "--require-kernel", *options])
    script = f"{python} tools/wheels/disk.py && {unit} && {disks}"
    done = machine.run(
        ["/bin/sh", "-c", script],
        cwd=work,
        env=environment,
        timeout=_PATIENCE,
    )
    if done.returncode != 0:
        print(done.console, file=sys.stderr)
        raise trying.TrialFailed(f"{wheel.name} failed in an emulated machine")
