# SPDX-License-Identifier: MIT
"""Classes by name, of targets and of layers, and objects that are made of them from texts."""

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from pyublk.errors import ExtraMissing, InvalidTarget
from pyublk.options import near
from pyublk.target import Target
from pyublk.texts import convert, hints_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

T = TypeVar("T", bound=Target)

_FORMS = "package.module:Class or file.py:Class"


class Registry(Generic[T]):
    """The classes of one kind: those that ship, and those that other packages bring.

    Args:
        word: what one of them is called, such as "target".
        base: the class that they derive from.
        group: the group of other packages' entry points.
        built_in: by short name, the class itself or its place, "package.module:Class", which is
            imported when it is asked for.
    """

    def __init__(
        self, word: str, base: type[T], group: str, built_in: Mapping[str, type[T] | str]
    ) -> None:
        self._word = word
        self._base = base
        self._group = group
        self._built_in = built_in

    def _entry_points(self) -> "EntryPoints":
        """Looked for only when asked, since it imports half of email."""
        from importlib.metadata import entry_points

        return entry_points(group=self._group)

    def names(self) -> list[str]:
        """Every short name: the built-in ones, and other packages' entry points."""
        return sorted({*self._built_in, *(point.name for point in self._entry_points())})

    def has(self, name: str) -> bool:
        """Whether it is a short name."""
        return name in self._built_in or (
            name.isidentifier() and bool(self._entry_points().select(name=name))
        )

    def split(self, text: str) -> tuple[str, str | None]:
        """What a text names, for `resolve`, and what follows after the next colon, or None.

        A short name goes before a package of the same name, and before a file.
        """
        first, colon, rest = text.partition(":")
        if self.has(first):
            return first, rest if colon else None
        end = text.find(".py:")  # directories may have colons in their names
        module = text[: end + 3] if end > 0 else first
        name, colon, rest = text[len(module) + 1 :].partition(":")
        return (f"{module}:{name}", rest) if colon else (text, None)

    def resolve(self, text: str) -> type[T]:
        """The class that `text` names: a short name, "package.module:Class", or "file.py:Class".

        Raises ValueError when there is no such thing (with what is near), InvalidTarget when it is
        something else, ExtraMissing for a built-in one that needs another package. What a user's
        module raises while it is imported comes through as it is.
        """
        if text in self._built_in:
            return self._load_built_in(text)
        module_name, colon, class_name = text.rpartition(":")
        if not colon:
            if text.endswith(".py"):
                raise ValueError(f"{text!r} names a file, but no class: write {text}:Class")
            for point in self._entry_points().select(name=text):
                return self._checked(point.load(), text)
            raise self._unknown(text)
        if not module_name or (not module_name.endswith(".py") and not _is_dotted(module_name)):
            if not class_name.isidentifier() and _is_dotted(text.partition(":")[0]):
                raise self._unknown(text.partition(":")[0])
            raise ValueError(f"{text!r} names no module: write {_FORMS}")
        if class_name and not class_name.isidentifier() and "." not in module_name:
            raise self._unknown(module_name)
        module = self._load(module_name)
        found = getattr(module, class_name, None) if class_name else None
        if found is None:
            classes = [
                name
                for name, thing in vars(module).items()
                if inspect.isclass(thing)
                and issubclass(thing, self._base)
                and thing is not self._base
            ]
            raise ValueError(
                (
                    f"{module_name} has no {class_name!r}{near(class_name, classes)}; "
                    if class_name
                    else f"{text!r} names no class of {module_name}; "
                )
                + f"its {self._word}s are: {', '.join(sorted(classes)) or 'none'}"
            )
        return self._checked(found, text)

    def _load_built_in(self, name: str) -> type[T]:
        found = self._built_in[name]
        if not isinstance(found, str):
            return found
        module, _, class_name = found.partition(":")
        try:
            return self._checked(getattr(importlib.import_module(module), class_name), name)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "pyublk"):
                raise
            raise ExtraMissing(package, name) from error  # extras are called as what needs them

    def _unknown(self, name: str) -> ValueError:
        names = self.names()
        listed = f"the {self._word}s are {', '.join(names)}, or " if names else ""
        return ValueError(
            f"there is no {self._word} {name!r}{near(name, names)}; {listed}write {_FORMS}"
        )

    def _load(self, name: str) -> types.ModuleType:
        if name.endswith(".py"):
            return _load_file(name)
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                raise ValueError(
                    f"there is no module {name!r} (looked in {Path.cwd()} too)"
                    f"{near(name, self.names())}"
                ) from None
            raise

    def _checked(self, found: object, text: str) -> type[T]:
        if inspect.isclass(found) and issubclass(found, self._base):
            return found
        raise InvalidTarget(f"{text} is not a subclass of pyublk.{self._base.__name__}")


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _load_file(name: str) -> types.ModuleType:
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


def build(
    cls: type[T],
    options: Mapping[str, str],
    arguments: Sequence[str] = (),
    *,
    first: tuple[object, ...] = (),
    called: str = "",
    **given: object,
) -> T:
    """Makes an object from text: `options` by name, `arguments` by position, converted as the
    class's own signature says. What is in `given` and not None is passed on as it is, and so is
    `first`, before the arguments: no option has the names of these parameters. `called`: what
    errors call the class, which has been named so.

    Raises ValueError, naming the option and what is allowed.
    """
    called = called or cls.__name__
    parameters = dict(inspect.signature(cls).parameters)
    hints = hints_of(cls)
    positional = [
        name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    for name in positional[: len(first)]:
        del parameters[name]
    positional = positional[len(first) :]
    collected = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    if collected is not None and not positional:
        hint = hints.get(collected.name, str)
        given_arguments = [convert(collected.name, text, hint) for text in arguments]
        arguments = ()
    else:
        given_arguments = []
    if len(arguments) > len(positional):
        raise ValueError(
            f"{called} takes {len(positional)} argument(s) "
            f"({', '.join(positional) or 'none'}), not {len(arguments)}"
        )
    texts = dict(zip(positional, arguments, strict=False))
    values: dict[str, object] = {n: v for n, v in given.items() if v is not None}
    given_twice = texts.keys() & options.keys() | (texts.keys() | options.keys()) & values.keys()
    if given_twice:
        raise ValueError(f"{min(given_twice)} is given twice")
    texts.update(options)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in [*texts, *values]:
        if name not in parameters and not open_ended:
            allowed = sorted(parameters)
            raise ValueError(
                f"{called} has no option {name!r}{near(name, allowed)}; "
                f"it takes {', '.join(allowed) or 'none'}"
            )
    for name, text in texts.items():
        values[name] = convert(name, text, hints.get(name, str))
    _check_complete(called, parameters, values)
    return cls(*first, *given_arguments, **values)  # type: ignore[arg-type]


def _check_complete(
    called: str, parameters: Mapping[str, inspect.Parameter], values: Mapping[str, object]
) -> None:
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and name not in values
    ]
    if not missing:
        return
    what = "it as an option" if len(missing) == 1 else "them as options"
    how = f"give {what}"
    if all(parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in missing):
        required = [name.upper() for name, p in parameters.items() if p.default is p.empty]
        how = f"write {called} {' '.join(required)}, or {how}"
    raise ValueError(f"{called} needs {' and '.join(missing)}: {how}")
