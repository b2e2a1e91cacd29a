"""Kernels by name, kept in a cache.

The cache holds a directory per kernel release, complete or not there at all: it is made beside
its place and renamed into it. A name (`latest`, `6.12`) is a symbolic link to a release.
"""

import fcntl
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyublk.vm import apt, modules, vmlinux
from pyublk.vm.apt import Progress
from pyublk.vm.architecture import Architecture, native
from pyublk.vm.errors import KernelUnavailable, NoSuchName

_SERIES = re.compile(r"\d+\.\d+")


def cache_directory() -> Path:
    """Return the directory of everything kept between runs, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "pyublk"


@dataclass(frozen=True)
class Kernel:
    """A kernel that is ready to be booted.

    Attributes:
        release: its full name, as `uname -r` prints it.
        directory: where it lies in the cache.
    """

    release: str
    directory: Path

    @property
    def image(self) -> Path:
        """What QEMU loads: the ELF kernel, or the bzImage where it could not be unpacked."""
        plain = self.directory / "vmlinux"
        return plain if plain.exists() else self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """Its module directory, uncompressed and indexed."""
        return self.directory / "modules"


def quiet(_what: str, _fraction: float | None) -> None:
    """Report no progress."""


def _store(release: str, image: Path, module_source: Path, cache: Path) -> Kernel:
    """Put a kernel into the cache, whole or not at all."""
    place = cache / release
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as scratch:
        fresh = Path(scratch) / release
        fresh.mkdir(mode=0o755)
        data = image.read_bytes()
        plain = vmlinux.extract(data)
        (fresh / ("vmlinuz" if plain is None else "vmlinux")).write_bytes(plain or data)
        installed = modules.install(module_source, fresh / "modules")
        if "ublk_drv" not in installed:
            raise KernelUnavailable(
                f"the kernel {release} has no ublk driver (module ublk_drv); "
                "choose another with --kernel, for example latest"
            )
        if place.exists():
            place.rename(Path(scratch) / "old")
        fresh.rename(place)
    return Kernel(release, place)


def _name(name: str, kernel: Kernel, cache: Path) -> None:
    link = cache / name
    fresh = cache / f".{name}.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(kernel.release)
    fresh.rename(link)


def _cached(name: str, cache: Path) -> Kernel | None:
    link = cache / name
    if not link.is_symlink() or not link.exists():
        return None
    directory = link.resolve()
    if name == "host" and directory.name != platform.release():
        return None
    return Kernel(directory.name, directory)


@contextmanager
def _locked(cache: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time change the cache."""
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that fetches a kernel", None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpacked(scratch: Path) -> tuple[Path, Path]:
    """Find the image and the modules in unpacked packages, wherever this release keeps them."""
    images = [*scratch.glob("boot/vmlinuz-*"), *scratch.glob("usr/lib/modules/*/vmlinuz")]
    trees = [*scratch.glob("lib/modules/*/kernel"), *scratch.glob("usr/lib/modules/*/kernel")]
    if not images or not trees:
        raise KernelUnavailable("the kernel's packages hold no kernel image or no modules")
    return images[0], trees[0].parent


def _fetch(name: str, cache: Path, architecture: str, progress: Progress) -> Kernel:
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as directory:
        scratch = Path(directory)
        progress("reading package lists", None)
        archive = apt.Apt(scratch / "apt", apt.machine_mirror(), architectures=(architecture,))
        archive.update()
        image = apt.choose_image(archive.images(architecture), name)
        if (cache / image.release).exists():
            return Kernel(image.release, cache / image.release)
        progress(f"downloading {image.release}", 0.0)
        packages = archive.download(
            archive.packages(image),
            scratch,
            lambda what, fraction: progress(f"{what} {image.release}", fraction),
        )
        progress(f"unpacking {image.release}", None)
        for package in packages:
            apt.unpack(package, scratch / "root")
        return _store(image.release, *_unpacked(scratch / "root"), cache)


def host_files(release: str) -> tuple[Path, Path]:
    """Return where a kernel installed on this machine has its image and its modules.

    Raises:
        KernelUnavailable: one of them is missing.
    """
    image, tree = Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}")
    for path in (image, tree / "kernel"):
        if not path.exists():
            raise KernelUnavailable(
                f"this machine runs {release}, but {path} is not there, so its kernel cannot be "
                "booted again: choose --kernel latest instead"
            )
    return image, tree


def _host(cache: Path) -> Kernel:
    release = platform.release()
    try:
        return _store(release, *host_files(release), cache)
    except PermissionError as error:
        raise KernelUnavailable(
            f"the host's kernel cannot be read by this user: {error}"
        ) from error


def _fetch_locked(
    name: str, cache: Path, architecture: str, progress: Progress, *, refresh: bool
) -> Kernel:
    with _locked(cache, progress):
        # Nobody else fetches now, so what is unfinished was left by a process that was killed.
        for left in cache.glob("partial-*"):
            shutil.rmtree(left)
        known = None if refresh else _cached(name, cache)
        if known:
            return known
        fetched = name != "host"
        kernel = _fetch(name, cache, architecture, progress) if fetched else _host(cache)
        _name(name, kernel, cache)
    return kernel


def check_name(name: str, architecture: Architecture | None = None) -> None:
    """See whether a kernel can have a name, whatever there is here.

    Args:
        name: as `find_kernel` takes it.
        architecture: whose; this machine's, unless said.

    Raises:
        NoSuchName: no kernel can have that one.
    """
    if name not in ("latest", "host") and not _SERIES.fullmatch(name):
        raise NoSuchName(
            f"no kernel is called {name!r}: give latest, host, or a series such as 6.12"
        )
    if name == "host" and architecture not in (None, native()):
        raise NoSuchName(
            "the host's kernel does not run on other processors: give latest, or a series"
        )


def find_kernel(
    name: str,
    *,
    refresh: bool = False,
    progress: Progress = quiet,
    architecture: Architecture | None = None,
    cache: Path | None = None,
) -> Kernel:
    """Return a kernel, from the cache or from the machine's Debian mirror.

    Args:
        name: `latest`, `host`, or a series such as `6.12`, of which the newest is taken.
        refresh: ask the mirror again even if the cache has an answer.
        progress: told what is being done.
        architecture: whose; this machine's, unless said.
        cache: where it is kept; in the user's cache, unless said.

    Raises:
        NoSuchName: no kernel can have that one.
        KernelUnavailable: there is no such kernel, or it could not be fetched; the cache is as
            it was.
        MissingProgram: apt is needed and not there.
    """
    check_name(name, architecture)
    wanted = (architecture or native()).debian
    cache = cache or cache_directory() / "kernels"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        known = None if refresh else _cached(name, cache)
        return known or _fetch_locked(name, cache, wanted, progress, refresh=refresh)
    except OSError as error:
        raise KernelUnavailable(f"the kernel cache {cache} cannot be filled: {error}") from error
