# SPDX-License-Identifier: MIT
"""What a test needs of the machine, and what of it is not there."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from pyublk.control import Controller
from pyublk.features import Features, is_privileged
from pyublk.uapi import Feature

#: Where programs of root's are, which a user's PATH often leaves out.
_MORE_PLACES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class Need(Protocol):
    """Something that a test needs."""

    def lacking(self) -> str | None:
        """What is missing, in a few words; None: nothing."""


@functools.cache
def _features() -> Features | str:
    """The features of this kernel's ublk, or why there are none."""
    try:
        with Controller() as controller:
            return controller.features()
    except OSError as error:
        return f"needs ublk: {error}"


@dataclass(frozen=True, slots=True)
class Driver:
    """A kernel with ublk that this user may use."""

    def lacking(self) -> str | None:
        found = _features()
        return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class Root:
    """CAP_SYS_ADMIN, and the right to mount."""

    def lacking(self) -> str | None:
        return None if is_privileged() else "needs root's rights (CAP_SYS_ADMIN)"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of some release, such as "6.16", or a newer one."""

    release: str

    def lacking(self) -> str | None:
        here = os.uname().release
        if _numbers(here) >= _numbers(self.release):
            return None
        return f"needs Linux {self.release}, here is {here}"


def _numbers(release: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


@dataclass(frozen=True, slots=True)
class KernelFeature:
    """A feature of the driver."""

    feature: Feature

    def lacking(self) -> str | None:
        found = _features()
        reason = found if isinstance(found, str) else found.reason(self.feature)
        return None if reason is None else f"{self.feature.name} {reason}"


@dataclass(frozen=True, slots=True)
class Tool:
    """A program, such as mkfs.xfs."""

    name: str

    def lacking(self) -> str | None:
        places = [os.environ.get("PATH", os.defpath), *_MORE_PLACES]
        if shutil.which(self.name, path=os.pathsep.join(places)):
            return None
        return f"needs the program {self.name}"


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the kernel, loaded if need be."""

    name: str

    def lacking(self) -> str | None:
        if Path("/sys/module", self.name).exists():
            return None
        command = ["modprobe", self.name]
        try:
            loaded = subprocess.run(command, capture_output=True, timeout=60, check=False)
        except FileNotFoundError:
            return f"needs a kernel with {self.name}, and modprobe to load it"
        return f"needs a kernel with {self.name}" if loaded.returncode else None


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system that the kernel can mount."""

    kind: str

    def lacking(self) -> str | None:
        if re.search(rf"\b{self.kind}$", Path("/proc/filesystems").read_text(), re.MULTILINE):
            return None
        return Module(self.kind).lacking()


MARKER = (
    "ublk(*features, kernel=None, tools=(), root=True): the test needs ublk: a kernel that has it, "
    "root's rights, features of the driver by name, a kernel as new as that, programs. It is "
    "skipped where one is missing (failed with --ublk-require), or runs in a virtual machine "
    "(--ublk=vm)."
)


def of_marks(marks: Iterator[pytest.Mark]) -> list[Need]:
    """What the markers of a test ask for. Raises ValueError or TypeError for what none can."""
    needs: dict[Need, None] = {Driver(): None}
    root = True
    for mark in marks:
        marked = _of_mark(*mark.args, **mark.kwargs)
        root &= Root() in marked
        needs |= marked
    needs.pop(Root(), None)
    if root:
        needs[Root()] = None
    return list(needs)


def _of_mark(
    *features: str | Feature,
    kernel: str | None = None,
    tools: str | tuple[str, ...] | list[str] = (),
    root: bool = True,
) -> "dict[Need, None]":
    needs: list[Need] = [Root()] if root else []
    for feature in features:
        named = Feature.__members__.get(feature) if isinstance(feature, str) else feature
        if not isinstance(named, Feature):
            known = ", ".join(Feature.__members__)
            raise ValueError(f"ublk has no feature {feature!r}; it has {known}")
        needs += [KernelFeature(one) for one in named]
    if kernel is not None:
        if not isinstance(kernel, str) or not re.fullmatch(r"\d+(\.\d+)+", kernel):
            raise ValueError(f"kernel={kernel!r} is no release: write '6.16', for example")
        needs.append(Kernel(kernel))
    needs += [Tool(name) for name in ([tools] if isinstance(tools, str) else tools)]
    return dict.fromkeys(needs)


def lacking(*needs: Need) -> str | None:
    """What the first that is missing says; None: everything is there."""
    return next((reason for need in needs if (reason := need.lacking())), None)
