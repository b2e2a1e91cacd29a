# SPDX-License-Identifier: MIT
"""The targets that ship, and how a name and options become a target."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyublk.errors import InvalidTarget
from pyublk.sizes import format_size, parse_size
from pyublk.target import Target
from pyublk.targets.file import File
from pyublk.targets.integrity import IntegrityFile
from pyublk.targets.linear import Linear
from pyublk.targets.mirror import Mirror
from pyublk.targets.null import Null
from pyublk.targets.ram import Ram
from pyublk.targets.slice import Slice
from pyublk.targets.stripe import Stripe
from pyublk.targets.texts import convert, hints_of
from pyublk.targets.zoned import Zoned

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = [
    "File",
    "IntegrityFile",
    "Linear",
    "Mirror",
    "Null",
    "Ram",
    "Slice",
    "Stripe",
    "Zoned",
    "build",
    "format_size",
    "names",
    "parse_size",
    "resolve",
]

BUILT_IN: dict[str, type[Target]] = {
    "file": File,
    "integrity": IntegrityFile,
    "linear": Linear,
    "mirror": Mirror,
    "null": Null,
    "ram": Ram,
    "slice": Slice,
    "stripe": Stripe,
    "zoned": Zoned,
}
ENTRY_POINTS = "pyublk.targets"


def _entry_points() -> "EntryPoints":
    """Other packages' targets; looked for only when asked, since it imports half of email."""
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)


def names() -> list[str]:
    """Every target that has a short name: the built-in ones, and other packages' entry points."""
    others = _entry_points()
    return sorted({*BUILT_IN, *(point.name for point in others)})


def resolve(text: str) -> type[Target]:
    """The class that `text` names: a short name, "package.module:Class", or "file.py:Class".

    Raises ValueError when there is no such thing (with what is near), InvalidTarget when it is no
    Target. What a user's module raises while it is imported comes through as it is.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]
    module_name, colon, class_name = text.rpartition(":")
    if not colon:
        if text.endswith(".py"):
            raise ValueError(f"{text!r} names a file, but no class: write {text}:Class")
        for point in _entry_points().select(name=text):
            return _checked(point.load(), text)
        raise ValueError(
            f"there is no target {text!r}{_near(text, names())}; the targets are "
            f"{', '.join(names())}, or write package.module:Class or file.py:Class"
        )
    if not module_name or (not module_name.endswith(".py") and not _is_dotted(module_name)):
        raise ValueError(f"{text!r} names no module: write package.module:Class or file.py:Class")
    module = _load(module_name)
    found = getattr(module, class_name, None) if class_name else None
    if found is None:
        classes = [
            name
            for name, thing in vars(module).items()
            if inspect.isclass(thing) and issubclass(thing, Target) and thing is not Target
        ]
        raise ValueError(
            (
                f"{module_name} has no {class_name!r}{_near(class_name, classes)}; "
                if class_name
                else f"{text!r} names no class of {module_name}; "
            )
            + f"its targets are: {', '.join(sorted(classes)) or 'none'}"
        )
    return _checked(found, text)


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _near(text: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(text, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _checked(found: object, text: str) -> type[Target]:
    if inspect.isclass(found) and issubclass(found, Target):
        return found
    raise InvalidTarget(f"{text} is not a subclass of pyublk.Target")


def _load(name: str) -> types.ModuleType:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"there is no file {name!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"there is no module {name!r} (looked in {Path.cwd()} too)") from None
        raise


def build(
    cls: type[Target], options: Mapping[str, str], arguments: Sequence[str] = (), **given: object
) -> Target:
    """Makes a target from text: `options` by name, `arguments` by position, converted as the
    class's own signature says. What is in `given` and not None is passed on as it is.

    Raises ValueError, naming the option and what is allowed.
    """
    parameters = dict(inspect.signature(cls).parameters)
    hints = hints_of(cls)
    positional = [
        name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    collected = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    if collected is not None and not positional:
        hint = hints.get(collected.name, str)
        given_arguments = [convert(collected.name, text, hint) for text in arguments]
        arguments = ()
    else:
        given_arguments = []
    if len(arguments) > len(positional):
        raise ValueError(
            f"{cls.__name__} takes {len(positional)} argument(s) "
            f"({', '.join(positional) or 'none'}), not {len(arguments)}"
        )
    texts = dict(zip(positional, arguments, strict=False))
    if twice := texts.keys() & options.keys():
        raise ValueError(f"{sorted(twice)[0]} is given twice")
    texts.update(options)
    values: dict[str, object] = {n: v for n, v in given.items() if v is not None}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in [*texts, *values]:
        if name not in parameters and not open_ended:
            allowed = sorted(parameters)
            raise ValueError(
                f"{cls.__name__} has no option {name!r}{_near(name, allowed)}; "
                f"it takes {', '.join(allowed) or 'none'}"
            )
    for name, text in texts.items():
        values[name] = convert(name, text, hints.get(name, str))
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and name not in values
    ]
    if missing:
        raise ValueError(f"{cls.__name__} needs {' and '.join(missing)}")
    return cls(*given_arguments, **values)  # type: ignore[arg-type]
