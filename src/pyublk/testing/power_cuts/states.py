# SPDX-License-Identifier: MIT
"""The states that a power cut may leave: which there are, in which order they are told, and their
names."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import TypeVar

from pyublk.testing.power_cuts.record import Record, Write

T = TypeVar("T")

#: For each unit that is not stable: how many of the requests since its stable version it has.
Choices = list[int]
#: The choice that is neither old nor new.
GARBAGE = -1
#: How many random states in a row may be known already before a point has no more.
TRIES = 64

#: A request, and the unit of it that is meant.
Piece = tuple[int, int]


class Point:
    """A moment at which the power is cut, and what is not stable then.

    `units` are the units that are not stable, `newer[i]` the requests that changed `units[i]` since
    its stable version, `writes` all of these requests in the order of arrival.
    """

    def __init__(self, record: Record, time: int, *, garbage: bool = False) -> None:
        self.record = record
        self.time = time
        self.garbage = garbage
        self.marks = tuple(mark.name for mark in record.marks if mark.time <= time)
        volatile = record.volatile(time)
        self.units = list(volatile)
        self.newer = list(volatile.values())
        self.index = {unit: index for index, unit in enumerate(self.units)}
        self.stable = [record.stable_version(unit, time) for unit in self.units]
        self.writes = sorted(
            {write.number: write for newer in self.newer for write in newer}.values(),
            key=lambda write: write.number,
        )
        self._hashes: list[list[int]] | None = None
        self._places: dict[int, list[tuple[int, int]]] = {}

    # ---- choices ----

    @property
    def all_lost(self) -> Choices:
        return [0] * len(self.units)

    @property
    def all_kept(self) -> Choices:
        return [len(newer) for newer in self.newer]

    def places(self, write: Write) -> list[tuple[int, int]]:
        """(index of a unit, choice that ends with this request) of what is not stable of it."""
        if (found := self._places.get(write.number)) is None:
            found = self._places[write.number] = []
            for unit, version in zip(write.units, write.places, strict=True):
                index = self.index.get(unit)
                if index is not None and version > self.stable[index]:
                    found.append((index, version - self.stable[index]))
        return found

    def without(self, lost: Iterable[Piece]) -> Choices:
        """Each unit has the newest of its requests that is not lost."""
        gone = set(lost)
        choices = self.all_kept
        for index, unit in enumerate(self.units):
            while choices[index] and (self.newer[index][choices[index] - 1].number, unit) in gone:
                choices[index] -= 1
        return choices

    def lost(self, choices: Choices) -> list[Piece]:
        """What is lost: the pieces newer than what each unit has."""
        return [
            (write.number, unit)
            for unit, newer, choice in zip(self.units, self.newer, choices, strict=True)
            for write in newer[max(choice, 0) :]
        ]

    def content(self, unit: int, choices: Choices) -> bytes:
        """What a unit that was changed has, when the power comes back."""
        index = self.index.get(unit)
        if index is None:
            return self.record.content(unit, self.record.stable_version(unit, self.time))
        if choices[index] == GARBAGE:
            length = len(self.record.content(unit, 0))
            return random.Random(f"{self.time} {unit}").randbytes(length)
        return self.record.content(unit, self.stable[index] + choices[index])

    # ---- telling states apart ----

    @property
    def hashes(self) -> list[list[int]]:
        """Of each unit that is not stable, by choice; with garbage, the last is that of it."""
        if self._hashes is None:
            self._hashes = [
                [self.record.hash(unit, stable + choice) for choice in range(len(newer) + 1)]
                for unit, newer, stable in zip(self.units, self.newer, self.stable, strict=True)
            ]
            if self.garbage:
                for unit, found in zip(self.units, self._hashes, strict=True):
                    found.append(-1 - unit)
        return self._hashes

    def fingerprint(self, choices: Choices, stable: int) -> int:
        """Of the image; `stable` is the sum of the hashes of all that was changed, without what is
        not stable."""
        return sum(map(list.__getitem__, self.hashes, choices), stable)

    def count(self) -> int:
        """How many images there are."""
        return prod(len(set(found)) for found in self.hashes)

    # ---- in the order in which they tell most ----

    def prefixes(self) -> Iterator[Choices]:
        """Some first requests kept, in the order of arrival."""
        choices = self.all_lost
        for write in self.writes[:-1]:
            for index, choice in self.places(write):
                choices[index] = choice
            yield choices.copy()

    def _only_lost(self, write: Write, places: list[tuple[int, int]]) -> Choices:
        choices = self.all_kept
        for index, choice in places:
            if choice == choices[index]:
                choices[index] -= 1
        return choices

    def _only_kept(self, places: list[tuple[int, int]]) -> Choices:
        choices = self.all_lost
        for index, choice in places:
            choices[index] = choice
        return choices

    def single_lost(self) -> Iterator[Choices]:
        """Each request lost, all others kept."""
        for write in self.writes:
            yield self._only_lost(write, self.places(write))

    def single_kept(self) -> Iterator[Choices]:
        """Each request kept, all others lost."""
        for write in self.writes:
            yield self._only_kept(self.places(write))

    def single_garbage(self) -> Iterator[Choices]:
        """Each request that changed what is there now to nobody knows what."""
        for write in self.writes:
            choices = self.all_kept
            for index, choice in self.places(write):
                if choice == choices[index]:
                    choices[index] = GARBAGE
            yield choices

    def torn(self) -> Iterator[Choices]:
        """Each request of several units torn behind the first, in the middle, before the last: its
        begin kept, or its end; all others kept, then those after it lost."""
        before = self.all_lost
        for write in self.writes:
            places = self.places(write)
            for cut in sorted({1, len(places) // 2, len(places) - 1} - {0, len(places)}):
                yield self._only_lost(write, places[cut:])
                yield self._only_lost(write, places[:cut])
                for part in (places[:cut], places[cut:]):
                    choices = before.copy()
                    for index, choice in part:
                        choices[index] = choice
                    yield choices
            for index, choice in places:
                before[index] = choice

    def every(self) -> Iterator[Choices]:
        """All that there are."""
        distinct = []
        for found in self.hashes:
            first = {hashed: choice for choice, hashed in reversed(list(enumerate(found)))}
            garbage = len(found) - 1 if self.garbage else None
            distinct.append(
                [GARBAGE if choice == garbage else choice for choice in sorted(first.values())]
            )
        for choices in itertools.product(*distinct):
            yield list(choices)

    def chosen_by(self, seed: int, number: int) -> Choices:
        """A random one: whole requests are lost or kept, or (odd numbers) each unit by itself."""
        chance = random.Random(f"{seed} {self.time} {number}")
        share = chance.choice((0.1, 0.5, 0.9))
        if number % 2 == 0:
            gone = {write.number for write in self.writes if chance.random() < share}
            choices = self.all_kept
            for index, newer in enumerate(self.newer):
                while choices[index] and newer[choices[index] - 1].number in gone:
                    choices[index] -= 1
        else:
            choices = [
                kept if chance.random() < share else chance.randrange(kept + 1)
                for kept in self.all_kept
            ]
        if self.garbage:
            return [GARBAGE if chance.random() < share / 4 else one for one in choices]
        return choices


# ---- names ----


def _joined(numbers: list[int]) -> str:
    """Whole numbers that are sorted: 1..4,7."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda one: one[1] - one[0]):
        members = [number for _, number in run]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}..{members[-1]}")
    return ",".join(parts)


def _spelled(point: Point, pieces: Iterable[Piece]) -> str:
    by_write: dict[int, set[int]] = {}
    for number, unit in pieces:
        by_write.setdefault(number, set()).add(unit)
    whole, parts = [], []
    for write in point.writes:
        if (units := by_write.get(write.number)) is None:
            continue
        mine = {point.units[index] for index, _ in point.places(write)}
        if units == mine:
            whole.append(write.number)
        else:
            first = write.offset // point.record.unit
            inside = _joined(sorted(unit - first for unit in units))
            parts.append(f"{write.number}/{inside.replace(',', '.')}")
    return ",".join(filter(None, [_joined(whole), *parts]))


def name_of(point: Point, choices: Choices) -> str:
    """A state's name: the time of the cut, and what was lost ("-") or kept ("+"), whichever is
    shorter; then what has become garbage ("!")."""
    lost = "-" + _spelled(point, point.lost(choices))
    chosen = [
        (point.newer[index][choice - 1].number, unit)
        for index, (unit, choice) in enumerate(zip(point.units, choices, strict=True))
        if choice > 0
    ]
    name = str(point.time) + min(lost, "+" + _spelled(point, chosen), key=len)
    garbled = _joined([unit for unit, one in zip(point.units, choices, strict=True) if one < 0])
    return f"{name}!{garbled}" if garbled else name


def random_name(point: Point, seed: int, number: int) -> str:
    """The name of the state that `Point.chosen_by` gives."""
    return f"{point.time}r{seed}.{number}"


_NAME = re.compile(r"(\d+)(?:r(-?\d+)\.(\d+)|([-+])([\d.,/]*)(?:!([\d.,]+))?)")


def read_name(name: str, point_at: Callable[[int], Point]) -> tuple[Point, Choices, str]:
    """The state of that name. Raises ValueError for what is no name, or not of this record."""
    if not (match := _NAME.fullmatch(name)):
        raise ValueError(f"{name!r} is not the id of a crash")
    point = point_at(int(match[1]))
    if match[2] is not None:
        return point, point.chosen_by(int(match[2]), int(match[3])), name
    writes = {write.number: write for write in point.writes}
    pieces: set[Piece] = set()
    for number, inside in _items(match[5]):
        if number not in writes:
            raise ValueError(f"{name!r} is not the id of a crash of this record: no such write")
        first = writes[number].offset // point.record.unit
        for index, _ in point.places(writes[number]):
            if inside is None or point.units[index] - first in inside:
                pieces.add((number, point.units[index]))
    if match[4] == "-":
        choices = point.without(pieces)
    else:
        choices = point.without(set(point.lost(point.all_lost)) - pieces)
    if match[6] and not point.garbage:
        raise ValueError(
            f"{name!r} is the id of a crash that leaves garbage, and this cut does not"
        )
    for unit in _numbers(match[6] or ""):
        if unit not in point.index:
            raise ValueError(f"{name!r} is not the id of a crash of this record: no such unit")
        choices[point.index[unit]] = GARBAGE
    return point, choices, name_of(point, choices)


def _items(text: str) -> Iterator[tuple[int, set[int] | None]]:
    for item in filter(None, text.split(",")):
        numbers, _, inside = item.partition("/")
        units = set(_numbers(inside.replace("..", ":").replace(".", ",").replace(":", "..")))
        for number in _numbers(numbers):
            yield number, units if inside else None


def _numbers(text: str) -> Iterator[int]:
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("..")
        yield from range(int(first), int(last or first) + 1)


# ---- all points together ----


def in_turn(generators: Iterable[tuple[Point, Iterator[T]]]) -> Iterator[tuple[Point, T]]:
    """One of each, again and again, until none has more."""
    waiting = list(generators)
    while waiting:
        left = []
        for point, generator in waiting:
            if (found := next(generator, None)) is not None:
                yield point, found
                left.append((point, generator))
        waiting = left


def in_order(points: list[Point]) -> Iterator[tuple[Point, Choices]]:
    """Of all points: what tells most comes first. With repetitions."""
    yield from ((point, point.all_lost) for point in points)
    yield from ((point, point.all_kept) for point in points)
    if any(point.garbage for point in points):
        yield from ((point, [GARBAGE] * len(point.units)) for point in points)
    yield from in_turn((point, point.prefixes()) for point in points)
    yield from in_turn((point, point.single_lost()) for point in points)
    yield from in_turn((point, point.single_kept()) for point in points)
    if any(point.garbage for point in points):
        yield from in_turn((point, point.single_garbage()) for point in points)
    yield from in_turn((point, point.torn()) for point in points)


def stable_sums(record: Record, points: list[Point]) -> dict[int, int]:
    """By time of the point: the sum of the hashes of the stable versions of all units, without
    those that are not stable then. All sums lack the same number, which need not be known: what had
    become stable before the first point."""
    settled = sorted(
        (write for write in record.writes if write.stable is not None),
        key=lambda write: (write.stable or 0, write.number),
    )
    sums: dict[int, int] = {}
    total, done, versions = 0, 0, dict[int, int]()
    for point in sorted(points, key=lambda point: point.time):
        while done < len(settled) and (settled[done].stable or 0) <= point.time:
            write = settled[done]
            for unit, version in zip(write.units, write.places, strict=True):
                if version > (old := versions.get(unit, 0)):
                    if sums:
                        total += record.hash(unit, version) - record.hash(unit, old)
                    versions[unit] = version
            done += 1
        sums[point.time] = total - sum(
            record.hash(unit, stable)
            for unit, stable in zip(point.units, point.stable, strict=True)
        )
    return sums


def unique_states(
    record: Record, points: list[Point], limit: int, seed: int
) -> Iterator[tuple[Point, Choices, str]]:
    """At most `limit` states, no two alike in image and marks; all of them when they are as few.

    The last of a tuple is the name of a random state; that of another is `name_of` it.
    """
    sums = stable_sums(record, points)
    seen: set[tuple[int, int]] = set()

    def new(point: Point, choices: Choices) -> bool:
        key = len(point.marks), point.fingerprint(choices, sums[point.time])
        if key in seen:
            return False
        seen.add(key)
        return True

    def random_ones(point: Point) -> Iterator[tuple[Choices, str]]:
        known = 0
        for number in itertools.count():
            choices = point.chosen_by(seed, number)
            if new(point, choices):
                known = 0
                yield choices, random_name(point, seed, number)
            elif (known := known + 1) == TRIES:
                return

    def rest(point: Point) -> Iterator[tuple[Choices, str]]:
        if point.count() > limit:
            return random_ones(point)
        return ((one, "") for one in point.every() if new(point, one))

    def everything() -> Iterator[tuple[Point, Choices, str]]:
        for point, choices in in_order(points):
            if new(point, choices):
                yield point, choices, ""
        for point, (choices, name) in in_turn((point, rest(point)) for point in points):
            yield point, choices, name

    yield from itertools.islice(everything(), limit)
