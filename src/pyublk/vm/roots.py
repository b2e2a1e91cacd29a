"""Whose files a guest has as its own."""

from dataclasses import dataclass
from pathlib import Path

from pyublk.vm import architecture, programs
from pyublk.vm.architecture import Architecture
from pyublk.vm.kernels import cache_directory


@dataclass(frozen=True)
class Root:
    """A directory that is a guest's root.

    Attributes:
        directory: on the host.
        architecture: of its programs, and so of the guest.
        busybox: a path in it; of another architecture's, the static one.
        kernels: a directory in it, where kernels for it are kept.
    """

    directory: Path
    architecture: Architecture
    busybox: Path
    kernels: Path

    def on_host(self, path: Path) -> Path:
        """Return where the host has what the guest calls `path`."""
        return self.directory / path.relative_to("/")

    def in_guest(self, path: Path) -> Path:
        """Return what the guest calls a path of the host's."""
        return "/" / path.relative_to(self.directory)


def own() -> Root:
    """Return this machine's root.

    Raises:
        VMError: no machine is known of its architecture.
        MissingProgram: busybox is not installed.
    """
    busybox = Path(programs.find("busybox", "busybox-static")).resolve()
    return Root(Path("/"), architecture.native(), busybox, cache_directory() / "kernels")
