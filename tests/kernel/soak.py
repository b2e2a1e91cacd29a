"""Disks under trouble for as long as you like: `./run soak --minutes 60 --seed 7`.

Lives of two kinds come in turn: in those of `chaos`, handlers misbehave; in those of `model`,
servers are killed and followed by others. Each life follows from the seed and its number, and can
be repeated by itself. `--kills`, `--upgrades` and `--corners` are about servers of the
command, `--hand-overs` about servers that need no start.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import chaos
import corners
import handovers
import kills
import model
from nursery import Nursery
from report import Report

import pyublk

PARTS: dict[str, Any] = {"chaos": chaos, "model": model}


def run(
    seed: int,
    parts: Sequence[str],
    enough: Callable[[Report], bool],
    tell: Callable[[str], Any],
    first: int = 0,
) -> Report:
    """Lives that follow from a seed, until it is enough. Raises what was wrong with one, told."""
    report = Report()
    with pyublk.Controller() as controller:
        features = controller.features()
    with Nursery(*parts) as nursery:
        for number in range(first, sys.maxsize):
            name = parts[number % len(parts)]
            life = PARTS[name].planned(
                random.Random(f"{seed}/{number}"), number // len(parts), features
            )
            began = time.monotonic()
            try:
                with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                    PARTS[name].live(life, nursery, Path(folder), report)
            except BaseException:
                tell(f"life {number} was wrong: {life}\n{report}")
                only = f" --only {name}" if len(parts) == 1 else ""
                tell(f"repeat it: ./run soak --seed {seed} --first {number}{only}")
                raise
            report.lives[name] += 1
            tell(f"life {number}, {name}, {time.monotonic() - began:.1f} s: {life}")
            if enough(report):
                return report
    raise AssertionError("there is no end of numbers")


def main() -> int:
    parser = argparse.ArgumentParser(description="Disks under trouble, every answer explained.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="repeats what a run did")
    parser.add_argument("--first", type=int, default=0, help="the life, or the disk, to begin with")
    parser.add_argument("--only", choices=sorted(PARTS), help="lives of one kind")
    parser.add_argument("--kills", type=int, metavar="N", help="instead: N kills under fio")
    parser.add_argument("--upgrades", type=int, metavar="N", help="instead: N upgrades under fio")
    parser.add_argument("--hand-overs", type=int, metavar="N", help="instead: N of them")
    parser.add_argument("--corners", type=int, metavar="N", help="instead: each bad moment N times")
    parser.add_argument("--corner", choices=corners.CORNERS, help="of these, only one")
    options = parser.parse_args()
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be a positive number, not {options.minutes:g}")
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    print(f"--seed {seed}", flush=True)
    tell = lambda text: print(text, flush=True)  # noqa: E731
    began = time.monotonic()
    instead = {
        partial(kills.kills, first=options.first): options.kills,
        kills.upgrades: options.upgrades,
        handovers.hand_overs: options.hand_overs,
        partial(corners.corners, only=options.corner): options.corners,
    }
    if any(instead.values()):
        report = Report()
        for part, count in instead.items():
            if count:
                part(count, seed, report, tell)
    else:
        parts = [options.only] if options.only else list(PARTS)
        enough = lambda _: time.monotonic() > began + options.minutes * 60  # noqa: E731
        report = run(seed, parts, enough, tell, options.first)
    print(f"{report}\nnothing wrong in {time.monotonic() - began:.0f} s; --seed {seed} repeats it")
    return 0


if __name__ == "__main__":
    import logging

    logging.getLogger("pyublk").addHandler(logging.NullHandler())
    logging.getLogger("pyublk").propagate = False
    sys.exit(main())
