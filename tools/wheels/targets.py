"""What wheels are built for."""

from dataclasses import dataclass

#: The C library of manylinux2014; newer ones run what was linked with it.
GLIBC = (2, 17)
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
#: Those that are also built without the GIL.
WITHOUT_GIL = ("3.14",)
#: The machines, as the kernel and wheels call them, and as Debian does.
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Target:
    """One interpreter on one machine.

    Attributes:
        version: Python's, such as `3.14`.
        gil: whether the interpreter has a GIL; one without it has modules of its own.
        machine: a key of `MACHINES`.
    """

    version: str
    machine: str
    gil: bool = True

    @property
    def python_tag(self) -> str:
        return "cp" + self.version.replace(".", "")

    @property
    def abi_tag(self) -> str:
        return self.python_tag + ("" if self.gil else "t")

    @property
    def suffix(self) -> str:
        """What the interpreter wants a module's name to end in."""
        return f".cpython-{self.abi_tag.removeprefix('cp')}-{self.machine}-linux-gnu.so"

    @property
    def platform_tag(self) -> str:
        """As auditwheel takes it."""
        return f"manylinux2014_{self.machine}"

    @property
    def triple(self) -> str:
        """As zig takes it, with the C library's version."""
        return f"{self.machine}-linux-gnu." + ".".join(map(str, GLIBC))

    def __str__(self) -> str:
        return f"{self.abi_tag}-{self.machine}"


TARGETS = [
    Target(version, machine, gil)
    for machine in MACHINES
    for version in VERSIONS
    for gil in (True, False)
    if gil or version in WITHOUT_GIL
]


def chosen(names: list[str]) -> list[Target]:
    """Return the targets whose name has one of these words in it; without words, all.

    Raises:
        ValueError: a word is in no name; says which names there are.
    """
    for name in names:
        if not any(name in str(target) for target in TARGETS):
            raise ValueError(
                f"no wheel has {name!r} in its name: there are {', '.join(map(str, TARGETS))}"
            )
    return [t for t in TARGETS if not names or any(name in str(t) for name in names)]
