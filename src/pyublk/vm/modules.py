"""Kernel modules: what each needs, and the files by which modprobe finds them.

A kernel's package leaves it to depmod to write `modules.dep` when it is installed. A machine
may lack depmod, so the index is made here, from the `.modinfo` section of the modules.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyublk.vm.decompress import NotDecompressed, decompress
from pyublk.vm.errors import KernelUnavailable

# The parts of a kernel that a machine with block devices, file systems and 9p may want.
# Graphics, sound, wireless and most networking stay behind: nine tenths of the bytes.
_WANTED = (
    "arch",
    "block",
    "crypto",
    "drivers/block",
    "drivers/char",
    "drivers/dax",
    "drivers/md",
    "drivers/nvdimm",
    "drivers/nvme",
    "drivers/scsi",
    "drivers/target",
    "drivers/virtio",
    "fs",
    "lib",
    "mm",
    "net/9p",
)
_SUFFIX = re.compile(r"\.ko(\.(xz|gz|zst))?$")


def module_name(path: str | Path) -> str:
    """Return a module's name: of its file, without suffix, with underscores for dashes."""
    return _SUFFIX.sub("", Path(path).name).replace("-", "_")


@dataclass(frozen=True)
class Module:
    """One module of a kernel.

    Attributes:
        path: relative to the kernel's module directory, such as `kernel/fs/9p/9p.ko`.
        needs: names of the modules to be loaded before it.
        aliases: patterns by which the kernel asks for it, such as `fs-9p`.
    """

    path: str
    needs: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def name(self) -> str:
        """The module's name."""
        return module_name(self.path)


def parse(path: str, content: bytes) -> Module:
    """Read what a module says about itself.

    `.modinfo` holds zero-terminated `key=value` strings; `depends` is in every module.
    """
    match = re.search(rb"\0depends=([^\0]*)\0", b"\0" + content)
    needs = match[1].decode() if match else ""
    aliases = re.findall(rb"(?<=\0)alias=([^\0]+)(?=\0)", content)
    return Module(
        path,
        tuple(name.replace("-", "_") for name in needs.split(",") if name),
        tuple(alias.decode(errors="replace") for alias in aliases),
    )


def in_order(modules: dict[str, Module], names: Iterable[str]) -> list[Module]:
    """Return the named modules and all they need, each after what it needs.

    A name that is no module is passed over: it may be built into the kernel.
    """
    ordered: dict[str, Module] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        module = modules.get(name)
        if module is None or name in ordered or name in path:
            return
        for need in module.needs:
            visit(need, (*path, name))
        ordered[name] = module

    for name in names:
        visit(name, ())
    return list(ordered.values())


def dependency_lines(modules: dict[str, Module]) -> Iterator[str]:
    """Give the lines of `modules.dep`: a module, then what it needs, nearest first."""
    for module in modules.values():
        *needed, _ = in_order(modules, [module.name])
        yield " ".join([f"{module.path}:", *(need.path for need in reversed(needed))])


def alias_lines(modules: dict[str, Module]) -> Iterator[str]:
    """Give the lines of `modules.alias`."""
    for module in modules.values():
        for alias in module.aliases:
            yield f"alias {alias} {module.name}"


def _is_wanted(relative: str) -> bool:
    return any(relative.startswith(f"kernel/{part}/") for part in _WANTED)


def install(source: Path, target: Path) -> dict[str, Module]:
    """Copy the wanted part of a kernel's modules, uncompressed and indexed.

    Uncompressed, because a guest under emulation takes seconds to unpack a file system's module.

    Args:
        source: the kernel's module directory, `/lib/modules/<release>` of a package or a host.
        target: directory to make.

    Returns:
        The modules installed, by name.

    Raises:
        KernelUnavailable: a module cannot be read.
    """
    files = {
        str(file.relative_to(source)): file
        for file in sorted((source / "kernel").rglob("*.ko*"))
        if _SUFFIX.search(file.name)
    }
    by_name = {module_name(relative): relative for relative in files}
    waiting = [relative for relative in files if _is_wanted(relative)]
    installed: dict[str, Module] = {}
    while waiting:
        relative = waiting.pop()
        if module_name(relative) in installed:
            continue
        try:
            content = decompress(files[relative].read_bytes())
        except NotDecompressed as error:
            raise KernelUnavailable(f"the module {relative} cannot be read: {error}") from error
        plain = re.sub(r"\.ko\..*$", ".ko", relative)
        module = parse(plain, content)
        installed[module.name] = module
        (target / plain).parent.mkdir(parents=True, exist_ok=True)
        (target / plain).write_bytes(content)
        waiting += [by_name[need] for need in module.needs if need in by_name]
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    (target / "modules.dep").write_text("\n".join([*dependency_lines(installed), ""]))
    (target / "modules.alias").write_text("\n".join([*alias_lines(installed), ""]))
    return installed


def read_index(directory: Path) -> dict[str, Module]:
    """Read the modules of an installed kernel back from its `modules.dep`."""
    modules = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        module = Module(path, tuple(module_name(need) for need in reversed(needs.split())), ())
        modules[module.name] = module
    return modules
