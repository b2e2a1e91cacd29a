# SPDX-License-Identifier: MIT
"""The fixtures. Each is a function that makes something which ends with the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Generic, NoReturn, ParamSpec, Protocol, TypeVar, Unpack

import pytest

from pyublk.device import Device
from pyublk.options import DeviceOptions
from pyublk.pytest_plugin import file_systems, marking
from pyublk.pytest_plugin.file_systems import FileSystem, Watch, unmount_all
from pyublk.sizes import parse_size
from pyublk.target import Target
from pyublk.targets.ram import Ram
from pyublk.testing import PowerCut
from pyublk.testing.file_systems import kind_named


class MakeDisk(Protocol):
    """What `ublk_disk` is."""

    def __call__(
        self, content: Target | str | int = "64M", /, **options: Unpack[DeviceOptions]
    ) -> Device:
        """Starts a disk.

        Args:
            content: its target, or the size of a disk in memory ("64M", or a number of bytes).
            **options: those of `pyublk.Device`.
        """


class MakeFileSystem(Protocol):
    """What `ublk_fs` is."""

    def __call__(
        self,
        kind: str | None = None,
        content: Target | str | int | None = None,
        /,
        **options: Unpack[DeviceOptions],
    ) -> FileSystem:
        """Makes a file system on a disk of its own, and mounts it.

        Args:
            kind: "ext4", "xfs", "btrfs" or "vfat"; the fixture's parameter, or else ext4.
            content: as for `ublk_disk`; by default a disk in memory that is large enough.
            **options: those of `pyublk.Device`.
        """


class MakePowerCut(Protocol):
    """What `power_cut` is."""

    def __call__(
        self,
        kind: str = "ext4",
        content: Target | str | int | None = None,
        /,
        *,
        block_size: int | None = None,
        atomic: int | None = None,
        garbage: bool = False,
    ) -> tuple[PowerCut, FileSystem]:
        """Makes a file system on a disk that records what a power cut would leave of it, and mounts
        it. What it begins with is durable.

        Args:
            kind: "ext4", "xfs", "btrfs" or "vfat".
            content: as for `ublk_disk`; by default a disk in memory that is large enough.
            block_size, atomic, garbage: as for `pyublk.testing.PowerCut`.
        """


P = ParamSpec("P")
T = TypeVar("T")


class _Function(Generic[P, T]):
    """A fixture's function. Most fixtures of pytest are what the test wants, and not what makes it:
    who takes it for that is told so.

    Args:
        make: what it does.
        use: how it is used.
    """

    def __init__(self, make: Callable[P, T], use: str) -> None:
        self._make = make
        self._use = use

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> T:
        __tracebackhide__ = True
        return self._make(*arguments, **options)

    def __getattr__(self, name: str) -> NoReturn:
        __tracebackhide__ = True
        raise AttributeError(f"it has no {name!r}, being a function: call it, as in `{self._use}`")

    def __truediv__(self, name: object) -> NoReturn:
        __tracebackhide__ = True
        raise TypeError(f"it is no directory, but a function: call it, as in `{self._use}`")

    def __repr__(self) -> str:
        return f"<function, as in `{self._use}`>"


@pytest.fixture
def ublk_disk(request: pytest.FixtureRequest) -> Iterator[MakeDisk]:
    """Makes real disks: `disk = ublk_disk("64M")`, a disk in memory at `disk.path`;
    `ublk_disk(target, **options)`, a disk of that target. They are unmounted, stopped and deleted
    after the test."""
    marking.need(request.node, *marking.needs_of(request.node))
    with ExitStack() as disks:

        def make(
            content: Target | str | int = "64M", /, **options: Unpack[DeviceOptions]
        ) -> Device:
            disk = _start(_target(content), options, disks)
            request.node.stash.setdefault(marking.DISKS, []).append(disk)
            return disk

        yield _Function(make, 'disk = ublk_disk("64M")')


@pytest.fixture
def ublk_fs(
    request: pytest.FixtureRequest,
    ublk_disk: MakeDisk,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeFileSystem:
    """Makes file systems on real disks: `fs = ublk_fs("xfs")` is mounted at `fs.path`. It can be
    parametrized indirectly by the kind."""

    def make(
        kind: str | None = None,
        content: Target | str | int | None = None,
        /,
        **options: Unpack[DeviceOptions],
    ) -> FileSystem:
        kind = str(kind or getattr(request, "param", "ext4"))
        marking.need(request.node, *file_systems.needs_of(kind))
        if content is None:
            content = kind_named(kind).size
        made = FileSystem(kind, ublk_disk(content, **options), tmp_path_factory.mktemp(kind))
        made.make()
        made.mount()
        return made

    return _Function(make, 'fs = ublk_fs("ext4")')


@pytest.fixture
def faulty_disk(request: pytest.FixtureRequest, ublk_disk: MakeDisk) -> Iterator[MakeDisk]:
    """Makes disks as `ublk_disk` does, for tests of what goes wrong: `disk.faults.fail("write")`. A
    test that passes gets an error if a rule that it has left in place never fired: then it has
    shown nothing."""
    disks: list[Device] = []

    def make(content: Target | str | int = "64M", /, **options: Unpack[DeviceOptions]) -> Device:
        disks.append(ublk_disk(content, **options))
        return disks[-1]

    yield _Function(make, 'disk = faulty_disk("64M")')
    idle = [f"{disk.path}: {rule.text}" for disk in disks for rule in disk.faults if not rule.fired]
    if idle and request.node.stash.get(marking.PASSED, False):
        pytest.fail("these faults never happened:\n" + "\n".join(idle), pytrace=False)


@pytest.fixture
def power_cut(ublk_fs: MakeFileSystem) -> MakePowerCut:
    """Makes file systems that lose power: `cut, fs = power_cut("ext4")` is a
    `pyublk.testing.PowerCut` and the file system on it, mounted at `fs.path`."""

    def make(
        kind: str = "ext4",
        content: Target | str | int | None = None,
        /,
        *,
        block_size: int | None = None,
        atomic: int | None = None,
        garbage: bool = False,
    ) -> tuple[PowerCut, FileSystem]:
        if content is None:
            content = kind_named(kind).size
        cut = PowerCut(_target(content), block_size=block_size, atomic=atomic, garbage=garbage)
        made = ublk_fs(kind, cut)
        made.sync()
        return cut, made

    return _Function(make, 'cut, fs = power_cut("ext4")')


def _target(content: Target | str | int) -> Target:
    if isinstance(content, str):
        content = parse_size(content)
    return Ram(size=content) if isinstance(content, int) else content


def _start(target: Target, options: DeviceOptions, disks: ExitStack) -> Device:
    disk = Device(target, **options)
    disks.callback(disk.stop)
    disk.start()
    watch = Watch(disk.path)
    disks.callback(watch.done)
    disks.callback(_unmount, disk)
    disks.callback(disk.faults.clear)  # what hangs would keep an unmount
    return disk


def _unmount(disk: Device) -> None:
    if (in_use := unmount_all(disk.path.removeprefix("/dev/"))) is not None:
        pytest.fail(in_use, pytrace=False)
