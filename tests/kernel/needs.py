"""What tests need of the kernel and of the machine, as the plugin has it, and a little more: the
only way to skip one here.

Where everything must be there (`--every-feature`), a test that lacks something fails, and so does
one that is skipped in any other way.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyublk
from pyublk.defects import defects_of
from pyublk.pytest_plugin.needs import KernelFeature, Module
from pyublk.pytest_plugin.needs import Tool as Program
from pyublk.uapi import Feature


class Lacking(pytest.skip.Exception):
    """Something that the test needs is not there."""


class Elsewhere(pytest.skip.Exception):
    """The test shows what is so on other machines only: none lacks anything for it."""


@dataclass(frozen=True, slots=True)
class CPUs:
    count: int

    def lacking(self) -> str | None:
        here = len(os.sched_getaffinity(0))
        return f"needs {self.count} CPUs, here are {here}" if here < self.count else None


def needs(*things: Feature | CPUs | Program | Module) -> None:
    """Skips the test where one of these is not there."""
    for what in things:
        need = KernelFeature(what) if isinstance(what, Feature) else what
        if reason := need.lacking():
            raise Lacking(reason)


@contextmanager
def needs_what_it_asks_for() -> Iterator[None]:
    """Skips the test where a disk asks for something that the kernel lacks."""
    try:
        yield
    except pyublk.FeatureMissing as missing:
        raise Lacking(str(missing)) from missing


def only_where(condition: bool, otherwise: str) -> None:
    """Skips the test on machines where it has nothing to show, for that reason."""
    if not condition:
        raise Elsewhere(otherwise)


def in_any_pid_namespace() -> None:
    """Skips the test on kernels that start no disk in a pid namespace but the machine's own."""
    found = defects_of(os.uname().release, in_pid_namespace=True)
    only_where(
        not any(one.only_in_pid_namespace for one in found),
        "this kernel starts no disk in a pid namespace",
    )


@contextmanager
def python_for_everybody() -> Iterator[None]:
    """Lets every user run this Python, which may be below the home of one of them."""
    closed = {
        place: mode
        for place in Path(sys.executable).resolve().parents
        if not (mode := place.stat().st_mode) & 0o001
    }
    for place, mode in closed.items():
        place.chmod(mode | 0o001)
    try:
        yield
    finally:
        for place, mode in closed.items():
            place.chmod(mode & 0o7777)
