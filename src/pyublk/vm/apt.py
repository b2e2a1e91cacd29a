"""Debian's kernels through apt, from the machine's own mirror, without touching its apt state.

apt runs with a configuration of our own: our sources, lists and caches, and of the machine's
settings only `Acquire::` (its proxy). So it needs no rights, and hooks other packages put into
apt's configuration do not run.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pyublk.vm import programs
from pyublk.vm.errors import KernelUnavailable

Progress = Callable[[str, float | None], None]
"""Called with what is being done and how much of it is done (0 to 1, None when unknown)."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Mirror:
    """Where this machine gets its packages: archive address, release name, keyring path."""

    uri: str
    codename: str
    keyring: str

    def sources(self, suites: Iterable[str]) -> str:
        """Return the lines of a sources.list for some suites of the mirror."""
        return "".join(
            f"deb [signed-by={self.keyring}] {self.uri} {suite} main\n" for suite in suites
        )


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    return ""


def choose_mirror(targets: Iterable[str], codename: str, keyring: str) -> Mirror:
    """Pick the mirror that serves the machine's own release.

    Args:
        targets: lines `URI|suite|component|keyring` as `apt-get indextargets` prints them.
        codename: the machine's release, such as `bookworm`.
        keyring: the keyring for entries that name none.

    Raises:
        KernelUnavailable: no entry serves the release's `main`.
    """
    for line in targets:
        uri, suite, component, signed_by = line.strip().split("|")
        if suite == codename and component == "main":
            named = signed_by if signed_by.startswith("/") else keyring
            return Mirror(uri, codename, named)
    raise KernelUnavailable(
        f"no entry of this machine's apt sources serves Debian's {codename or 'own release'} "
        "(main); kernels come from a Debian mirror only, so use --kernel host here"
    )


def machine_mirror() -> Mirror:
    """Ask apt for the mirror this machine uses.

    Raises:
        MissingProgram: there is no apt.
        KernelUnavailable: the machine's sources name no Debian mirror.
    """
    form = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)"
    listing = subprocess.run(
        [programs.find("apt-get", "apt"), "indextargets", "--no-release-info", "--format", form],
        capture_output=True,
        text=True,
        check=False,
    )
    return choose_mirror(listing.stdout.splitlines(), _codename(), str(_KEYRING))


@dataclass(frozen=True)
class Image:
    """A kernel image package: its name and the kernel release in it."""

    package: str
    release: str

    @property
    def order(self) -> tuple[int, ...]:
        """Sort key: the numbers of the release, so that 6.12.117 comes after 6.12.95."""
        version, _, _architecture = self.release.rpartition("-")
        return tuple(int(number) for number in re.findall(r"\d+", version))

    def is_of(self, series: str) -> bool:
        """Tell whether the release belongs to a series such as `6.12`."""
        return re.match(re.escape(series) + r"(?!\d)", self.release) is not None


def parse_images(names: Iterable[str], architecture: str) -> list[Image]:
    """Pick the generic, released kernel images out of package names, oldest first.

    Flavours (cloud has no 9p, rt is not what people run), debug symbols and release candidates
    are left out; an unsigned image counts only where its signed twin is missing.
    """
    form = re.compile(rf"linux-image-(\d[\d.]*(?:\+[^-]+)?-{architecture})(-unsigned)?")
    images: dict[str, Image] = {}
    for name in names:
        match = form.fullmatch(name)
        if match and (not match[2] or match[1] not in images):
            images[match[1]] = Image(name, match[1])
    return sorted(images.values(), key=lambda image: image.order)


def choose_image(images: list[Image], kernel: str) -> Image:
    """Return the newest image of a series, or of all for `latest`.

    Raises:
        KernelUnavailable: there is none; the message lists the series there are.
    """
    fitting = [image for image in images if kernel == "latest" or image.is_of(kernel)]
    if fitting:
        return fitting[-1]
    series = dict.fromkeys(".".join(image.release.split(".")[:2]) for image in images)
    raise KernelUnavailable(
        f"this machine's mirror has no kernel {kernel}; it has {', '.join(series) or 'none at all'}"
    )


class Apt:
    """apt with lists and caches under one directory of our own.

    Args:
        directory: what apt keeps is put there.
        mirror: whose packages they are.
        architectures: Debian's names of those to be listed; this machine's, unless said.
    """

    def __init__(self, directory: Path, mirror: Mirror, architectures: Iterable[str] = ()) -> None:
        self._directory = directory
        self._architectures = tuple(architectures)
        for name in ("lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._mirror = mirror
        self._complaints = ""
        (directory / "apt.conf").write_text(self._machine_settings() + self._own_settings())
        self._environment = {
            **os.environ,
            "APT_CONFIG": str(directory / "apt.conf"),
            "LC_ALL": "C.UTF-8",
        }

    def _machine_settings(self) -> str:
        dump = subprocess.run(
            [programs.find("apt-config", "apt"), "dump"], capture_output=True, text=True, check=True
        )
        return "".join(f"{x}\n" for x in dump.stdout.splitlines() if x.startswith("Acquire::"))

    def _own_settings(self) -> str:
        settings = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::sourcelist": str(self._directory / "sources.list"),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": str(self._directory),
            "Dir::State::lists": str(self._directory / "lists"),
            "Dir::State::status": "/dev/null",
            "Dir::Cache": str(self._directory / "cache"),
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            # As root apt would drop to a user who cannot write below a home directory.
            "APT::Sandbox::User": "root",
        }
        lines = [f'{name} "{value}";\n' for name, value in settings.items()]
        if self._architectures:
            lines.append(f'APT::Architecture "{self._architectures[0]}";\n')
        lines += [f'APT::Architectures:: "{name}";\n' for name in self._architectures]
        return "".join(lines)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [programs.find(program, "apt"), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def update(self) -> None:
        """Fetch the package lists of every suite that has kernels.

        The suites are those of the machine's own release, of the stable one, and sid. Some
        mirrors serve an older state under the alias `stable` than under the release's name, so
        the name is asked for first. Suites that the mirror lacks are passed over in silence.
        """
        own = self._mirror.codename
        self._fetch_lists(
            ["stable"], "-o", "Acquire::IndexTargets::deb::Packages::DefaultEnabled=0"
        )
        stable = self._stable_name() or own
        suites = [own, f"{own}-backports", stable, f"{stable}-backports", "sid"]
        self._fetch_lists(dict.fromkeys(suites))

    def _fetch_lists(self, suites: Iterable[str], *options: str) -> None:
        (self._directory / "sources.list").write_text(self._mirror.sources(suites))
        self._complaints = self._run("apt-get", "-qq", *options, "update").stderr.strip()

    def _stable_name(self) -> str | None:
        for release in (self._directory / "lists").glob("*_dists_stable_*Release"):
            match = re.search(r"^Codename: (\S+)$", release.read_text(), re.MULTILINE)
            if match:
                return match[1]
        return None

    def images(self, architecture: str) -> list[Image]:
        """Return the kernel images of all suites, oldest first.

        Raises:
            KernelUnavailable: the lists hold no kernel at all; says what apt said.
        """
        found = self._run("apt-cache", "search", "--names-only", r"^linux-image-[0-9]").stdout
        images = parse_images((line.split(" ")[0] for line in found.splitlines()), architecture)
        if not images:
            lines = self._complaints.splitlines()
            raise KernelUnavailable(
                "this machine's mirror lists no kernels; apt says: "
                + (lines[-1] if lines else "nothing")
            )
        return images

    def has(self, package: str) -> bool:
        """Tell whether a suite has a package, such as `zstd` or `zstd:arm64`."""
        return self._run("apt-cache", "show", "--no-all-versions", package).returncode == 0

    def closure(self, packages: Iterable[str]) -> list[str]:
        """Return packages with all that they depend on.

        Raises:
            KernelUnavailable: they cannot be had together; the message ends with apt's own words.
        """
        plan = self._run(
            "apt-get", "-qq", "--simulate", "--no-install-recommends", "install", *packages
        )
        if plan.returncode != 0:
            said = plan.stderr.strip().splitlines() or ["nothing"]
            raise KernelUnavailable(f"apt cannot put {' '.join(packages)} together: {said[-1]}")
        return re.findall(r"^Inst (\S+)", plan.stdout, re.MULTILINE)

    def packages(self, image: Image) -> list[str]:
        """Return the packages that together hold the kernel and its modules.

        From Linux 6.19 on Debian splits the image into base, binary and modules.
        """
        listing = self._run("apt-cache", "depends", image.package).stdout
        parts = re.findall(r"Depends: (linux-(?:base|binary|modules)-\S+)", listing)
        return [image.package, *(part for part in parts if part.endswith(image.release))]

    def download(self, packages: list[str], directory: Path, progress: Progress) -> list[Path]:
        """Download packages into a directory; apt checks sizes and signed hashes.

        Raises:
            KernelUnavailable: apt failed; the message ends with apt's own last line.
        """
        command = [programs.find("apt-get", "apt"), "-qq", "-o", "APT::Status-Fd=1", "download"]
        with (
            tempfile.TemporaryFile("w+") as complaints,
            subprocess.Popen(
                [*command, *packages],
                env=self._environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    # dlstatus:<files>:<percent>:<what>
                    fields = line.split(":")
                    if fields[0] == "dlstatus":
                        progress("downloading", float(fields[2]) / 100)
            except BaseException:
                process.kill()
                raise
            if process.wait() != 0:
                complaints.seek(0)
                said = complaints.read().split("\n")
                last = next((line for line in reversed(said) if line.strip()), "nothing")
                raise KernelUnavailable(f"apt could not download {packages[0]}: {last}")
        return sorted(directory.glob("*.deb"))


def unpack(package: Path, directory: Path) -> None:
    """Unpack a Debian package.

    Raises:
        KernelUnavailable: the archive is damaged, or the disk is full.
    """
    result = subprocess.run(
        [programs.find("dpkg-deb", "dpkg"), "--extract", str(package), str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise KernelUnavailable(f"{package.name} does not unpack: {result.stderr.strip()}")
