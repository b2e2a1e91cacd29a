# SPDX-License-Identifier: MIT
"""What can follow at the end of a command line. No file of the user's is run for it, only read."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from click.shell_completion import CompletionItem

from pyublk import targets


def items(names: list[str], incomplete: str) -> list[CompletionItem]:
    """Those that go on from what is there."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def target_names(incomplete: str) -> list[CompletionItem]:
    """Short names, the classes of a file that is named, else files."""
    file, colon, _ = incomplete.rpartition(":")
    if colon and not targets.REGISTRY.has(incomplete.partition(":")[0]):
        return items([f"{file}:{one.name}" for one in _classes(Path(file))], incomplete)
    names = items(targets.names(), incomplete)
    return names or [CompletionItem(incomplete, type="file")]


def option_names(target: str, incomplete: str) -> list[CompletionItem]:
    """The parameters of the target's class, each with the sign after which its value goes."""
    return items([f"{name}=" for name in _parameters(target)], incomplete)


def _parameters(target: str) -> list[str]:
    target, _ = targets.REGISTRY.split(target)
    file, colon, name = target.rpartition(":")
    if not colon:
        try:
            return list(inspect.signature(targets.resolve(target)).parameters)
        except (ValueError, ImportError):
            return []
    for one in _classes(Path(file)):
        for method in one.body:
            if (one.name, getattr(method, "name", "")) == (name, "__init__"):
                assert isinstance(method, ast.FunctionDef)
                found = method.args
                return [each.arg for each in [*found.args[1:], *found.kwonlyargs]]
    return []


def _classes(file: Path) -> Iterator[ast.ClassDef]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield from (node for node in tree.body if isinstance(node, ast.ClassDef))


def kernel_names(incomplete: str) -> list[CompletionItem]:
    """The names that are always there, and those that were fetched."""
    from pyublk.vm.kernels import cache_directory

    links = [
        link.name for link in (cache_directory() / "kernels").glob("[!.]*") if link.is_symlink()
    ]
    return items(sorted({"latest", "host", *links}), incomplete)
