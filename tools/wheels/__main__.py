"""`./run wheels`: what a release uploads, built, checked and tried."""

import argparse
import filecmp
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from pyublk.vm.errors import VMError
from tools.wheels import building, checking, emulated, headers, targets, trying
from tools.wheels.debian import Archive
from tools.wheels.targets import Target


class NotTheSame(Exception):
    """Two builds of one thing are not the same bytes."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("./run wheels", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORD",
        help="the wheels with this in their name, such as cp313 or aarch64; may be given again",
    )
    parser.add_argument(
        "--twice",
        action="store_true",
        help="build everything a second time, and compare the bytes",
    )
    parser.add_argument("--untried", action="store_true", help="build and check, but run no tests")
    parser.add_argument(
        "--emulated",
        action="store_true",
        help="try the other machine's wheels in an emulated one, with disks",
    )
    parser.add_argument("--output", type=Path, default=building.ROOT / "dist", metavar="DIR")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    return parser


def _same(first: Path, second: Path) -> None:
    if not filecmp.cmp(first, second, shallow=False):
        raise NotTheSame(f"{first} was built twice and differs; the second one is {second}")
    print(f"  the same bytes when built again: {first.name}", flush=True)


class Release:
    """The files of a release, one after the other, since each needs a processor to itself.

    Args:
        work: an empty directory.
        output: where finished files are put.
        twice: whether each is built a second time, to be compared.
        emulated: whether wheels of the other machine are tried in an emulated one.
    """

    def __init__(self, work: Path, output: Path, *, twice: bool, emulated: bool) -> None:
        self._work, self._output, self._twice = work, output, twice
        self._emulated = emulated
        self._again = work / "again"
        self._again.mkdir()
        self.archive = Archive()

    def sdist(self) -> Path:
        """Build the source distribution, and return the directory where it is unpacked."""
        made = building.build_sdist(self._work, self._output)
        if self._twice:
            _same(made, building.build_sdist(self._work, self._again))
        self.made = made
        return building.unpack_sdist(made, self._work)

    def wheel(self, target: Target, source: Path) -> Path:
        include = headers.directories(target, self.archive)
        made = building.build_wheel(target, source, include, self._output)
        if self._twice:
            _same(made, building.build_wheel(target, source, include, self._again))
        if complaints := checking.check(made, target):
            made.unlink()
            raise building.BuildFailed("\n".join(complaints))
        return made

    def try_out(self, target: Target, wheel: Path, options: list[str]) -> str:
        """Run tests on a wheel, where that can be done, and return what was done."""
        place = self._work / str(target)
        place.mkdir()
        if trying.runs_here(target):
            trying.try_wheel(target, wheel, place, self.archive, options)
            done = "unit tests passed on it"
        elif self._emulated and emulated.has(target, self.archive):
            emulated.try_wheel(target, wheel, place, self.archive, options)
            done = "disks and some tests passed on it, in an emulated machine"
        else:
            done = "not run: this machine has no such interpreter"
        shutil.rmtree(place)
        return done

    def try_sdist(self) -> None:
        place = self._work / "sdist"
        place.mkdir()
        trying.try_sdist(self.made, place)


def release(arguments: argparse.Namespace) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = targets.chosen(arguments.only)
    if not building.committed():
        print("not a release: the tree has changes that are not committed", flush=True)
    with tempfile.TemporaryDirectory(prefix="pyublk-wheels-") as scratch:
        files = Release(
            Path(scratch), arguments.output, twice=arguments.twice, emulated=arguments.emulated
        )
        source = files.sdist()
        print(f"{files.made.name}: built", flush=True)
        if not arguments.untried:
            files.try_sdist()
            print(f"{files.made.name}: installed without Cython, and a disk served", flush=True)
        failed = []
        for target in chosen:
            began = time.monotonic()
            wheel = files.wheel(target, source)
            seconds = round(time.monotonic() - began)
            print(f"{wheel.name}: built and checked in {seconds} s", flush=True)
            if arguments.untried:
                continue
            try:
                told = files.try_out(target, wheel, arguments.pytest)
            except trying.TrialFailed as error:  # the others are worth their hour
                failed.append(wheel.name)
                told = f"FAILED: {error}"
            print(f"{wheel.name}: {told}", flush=True)
        if failed:
            raise trying.TrialFailed(f"the trial failed of {', '.join(failed)}")


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    # A shell has its background jobs ignore Ctrl-C, and so would the tests that are about it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        release(arguments)
    except ValueError as error:
        parser.error(str(error))
    except (
        building.BuildFailed,
        headers.NoHeaders,
        trying.TrialFailed,
        NotTheSame,
        VMError,
    ) as error:
        print(f"wheels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
