# SPDX-License-Identifier: MIT
"""What can follow at the end of a command line. No file of the user's is run for it, only read."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from click.shell_completion import CompletionItem

from pyublk import layers, targets
from pyublk.named import Registry
from pyublk.target import Target


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


def layer_texts(incomplete: str) -> list[CompletionItem]:
    """As `target_names`; after a layer's colon, or a comma, its parameters."""
    name, options = layers.REGISTRY.split(incomplete)
    if options is not None:
        before = incomplete[: len(incomplete) - len(options.rpartition(",")[2])]
        # The first parameter is the layer below.
        return items(
            [f"{before}{one}=" for one in _parameters(name, layers.REGISTRY)[1:]], incomplete
        )
    file, colon, _ = name.rpartition(":")
    if colon:
        return items([f"{file}:{one.name}" for one in _classes(Path(file))], incomplete)
    names = items(layers.names(), incomplete)
    return names or [CompletionItem(incomplete, type="file")]


def _parameters(target: str, registry: Registry[Target] = targets.REGISTRY) -> list[str]:
    target, _ = registry.split(target)
    file, colon, name = target.rpartition(":")
    if not colon:
        try:
            return list(inspect.signature(registry.resolve(target)).parameters)
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
