"""Whether what clients saw of a disk can be told as a story in which one thing happens after the
other: linearizability, of each block by itself.

A block is a register. An operation on it takes effect at one moment between its call and its
answer. `explain` looks for an order of these moments in which each read finds what was written
last. It goes through the calls and answers in the order in which they came, with every state that
is still possible: what the register may hold, and which of the open operations have taken effect
(Wing and Gong's search, with what it has seen remembered, as Lowe proposes).

- A write takes effect once. One that was never answered may do so at any later time, or never.
- A write that *failed*, or a discard that need not do anything, leaves the old value or the new,
  in each byte.
- A write that was open while a server was killed may have taken effect, and does so *again* when
  the next server gets it: any number of times until it is answered.
- A read that found several values is as many reads at the same time: bytes need not change
  together while somebody writes them. Where nobody does, such a read has no place in the order.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

#: What a register may hold: several values after a write that failed.
Held = frozenset[int]
#: A state of the search: what the register holds, and the open operations that took effect.
_State = tuple[Held, frozenset[int]]

Kind = Literal["read", "write", "maybe"]


@dataclass(slots=True, kw_only=True)
class Op:
    """One operation on one block. `maybe` is a write that failed, or need not do anything."""

    kind: Kind
    value: int
    called: int
    answered: int | None = None  # never
    again: bool = False  # it may take effect several times

    def after(self, held: Held) -> Held | None:
        """What the register holds after it; None where it has no place."""
        if self.kind == "read":
            return held if self.value in held else None
        return frozenset([self.value]) if self.kind == "write" else held | {self.value}


class Inexplicable(AssertionError):
    """No order of the operations explains what a read found. `op`: the first that has no place."""

    def __init__(self, told: str, op: Op) -> None:
        super().__init__(told)
        self.op = op


#: Of an inexplicable operation, how much is told of what was beside and before it, and after it.
NEAR, AFTER = 40, 10


def explain(ops: list[Op], before: Iterable[Held]) -> set[Held]:
    """What the register may hold after these operations, if it held one of `before`.

    Raises Inexplicable, with the operation whose answer cannot be explained.
    """
    moments = [(op.called, False, number) for number, op in enumerate(ops)]
    moments += [(op.answered, True, n) for n, op in enumerate(ops) if op.answered is not None]
    states: set[_State] = {(held, frozenset()) for held in before}
    called: set[int] = set()
    for _, is_answer, number in sorted(moments):
        if not is_answer:
            called.add(number)
            continue
        possible = {state for state in _reached(states, ops, called) if number in state[1]}
        if not possible:
            raise Inexplicable(_told(ops, number, called, states), ops[number])
        called.remove(number)
        states = {(value, done - {number}) for value, done in possible}
    return {value for value, _ in _reached(states, ops, called)}


def _reached(states: set[_State], ops: list[Op], called: set[int]) -> set[_State]:
    """These states, and those after any of the open operations, in any order."""
    found = set(states)
    ahead = list(states)
    while ahead:
        value, done = ahead.pop()
        for number in called:
            if number in done and not ops[number].again:
                continue
            after = ops[number].after(value)
            if after is not None and (state := (after, done | {number})) not in found:
                found.add(state)
                ahead.append(state)
    return found


def _told(ops: list[Op], number: int, called: set[int], states: set[_State]) -> str:
    op = ops[number]
    held = sorted({tuple(sorted(value)) for value, _ in states})
    found = [one.value for one in ops if (one.called, one.answered) == (op.called, op.answered)]
    beside = ", ".join(
        f"{ops[one].kind} {ops[one].value}"
        for one in sorted(called)
        if (ops[one].called, ops[one].answered) != (op.called, op.answered)
    )
    torn = f", one of {_values(found)}" if len(found) > 1 else ""
    return (
        f"the {op.kind} of {op.value}{torn} ({op.called} to {op.answered}) has no place: the block "
        f"could hold {held[:4]}, and meanwhile there was {beside or 'nothing'}"
    )


def _near(op: Op, ops: list[Op], notes: list[tuple[int, str]]) -> list[str]:
    """What was done about when it was, a line each, with the notes that are nearest to it."""
    end = _end(op)
    before = sorted((one for one in ops if one.called <= end), key=_end)[-NEAR:]
    after = sorted((one for one in ops if one.called > end), key=lambda one: one.called)[:AFTER]
    lines: dict[tuple[float, float, str], list[int]] = {}
    for one in (*before, *after):
        what = f"{one.kind}, which may come again," if one.again else one.kind
        lines.setdefault((one.called, _end(one), what), []).append(one.value)
    told = [
        (called, f"{called} to {answered}: {what} of {_values(values)}")
        for (called, answered, what), values in lines.items()
    ]
    nearest = sorted(notes, key=lambda note: abs(note[0] - op.called))[:AFTER]
    told += [(moment, f"{moment}: --- {event}") for moment, event in nearest]
    return [line for _, line in sorted(told)]


def _end(op: Op) -> float:
    return float("inf") if op.answered is None else op.answered


def _values(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    return f"{sorted(values)}, all in this one block"


class History:
    """What clients did to the blocks of a disk, as they do it; from any thread."""

    def __init__(self) -> None:
        self.held: dict[int, set[Held]] = {}  # one of these, where it is not {0}
        self.checked = 0
        self._ops: dict[int, list[Op]] = {}
        self._open: dict[int, Op] = {}  # the writes, by their identity
        self._resending = False
        self._lock = threading.Lock()
        self._now = 0
        self._values = 0
        self._notes: list[tuple[int, str]] = []

    def note(self, event: str) -> None:
        """What happens to the disk now: told beside what cannot be explained."""
        with self._lock:
            self._now += 1
            self._notes.append((self._now, event))

    def fresh(self) -> int:
        """A value that nobody has written yet."""
        with self._lock:
            self._values += 1
            return self._values

    @contextmanager
    def writing(self, blocks: Iterable[int], value: int, kind: Kind = "write") -> Iterator[None]:
        """A write to blocks. With an OSError it has failed; with any other end it was not
        answered."""
        ops = self._call(blocks, kind, value)
        try:
            yield
        except OSError:
            for op in ops:
                op.kind = "maybe"
            self._answer(ops)
            raise
        self._answer(ops)

    @contextmanager
    def resending(self) -> Iterator[None]:
        """While a server is killed, until another has what was open."""
        with self._lock:
            self._resending = True
            for op in self._open.values():
                op.again = True
        try:
            yield
        finally:
            with self._lock:
                self._resending = False

    def reading(self) -> int:
        """The moment of a call, for `found`."""
        with self._lock:
            self._now += 1
            return self._now

    def found(self, called: int, block: int, values: Iterable[int]) -> None:
        """A block's read, called at that moment, was answered."""
        with self._lock:
            self._now += 1
            its = self._ops.setdefault(block, [])
            for value in values:
                its.append(Op(kind="read", value=value, called=called, answered=self._now))

    def check(self) -> None:
        """Explains all blocks, once no operation is under way; they are where the next ones begin.

        Raises Inexplicable. Operations that were not answered must not take effect any more.
        """
        with self._lock:
            for block, ops in sorted(self._ops.items()):
                self.checked += len(ops)
                try:
                    self.held[block] = explain(ops, self.held.get(block, {frozenset([0])}))
                except Inexplicable as wrong:
                    near = _near(wrong.op, ops, self._notes)
                    told = "\n".join([f"block {block}: {wrong}", *near])
                    raise Inexplicable(told, wrong.op) from None
            self._ops.clear()
            self._open.clear()

    def _call(self, blocks: Iterable[int], kind: Kind, value: int) -> list[Op]:
        with self._lock:
            self._now += 1
            made = []
            for block in blocks:
                made.append(Op(kind=kind, value=value, called=self._now, again=self._resending))
                self._open[id(made[-1])] = made[-1]
                self._ops.setdefault(block, []).append(made[-1])
            return made

    def _answer(self, ops: list[Op]) -> None:
        with self._lock:
            self._now += 1
            for op in ops:
                op.answered = self._now
                del self._open[id(op)]
