"""The checker that the kernel tests rely on: it accepts what is right, and nothing else."""

import itertools
import threading
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear import AFTER, NEAR, History, Inexplicable, Kind, Op, explain

ZERO = {frozenset([0])}


def op(kind: Kind, value: int, called: int, answered: int | None) -> Op:
    return Op(kind=kind, value=value, called=called, answered=answered)


def write(value: int, called: int, answered: int | None = None) -> Op:
    return op("write", value, called, answered)


def read(value: int, called: int, answered: int) -> Op:
    return op("read", value, called, answered)


@pytest.mark.parametrize(
    "ops",
    [
        [],
        [read(0, 1, 2)],
        [write(1, 1, 2), read(1, 3, 4)],
        # A read beside a write finds the old or the new.
        [write(1, 1, 4), read(0, 2, 3)],
        [write(1, 1, 4), read(1, 2, 3)],
        [write(1, 1, 6), read(0, 2, 3), read(1, 4, 5)],
        # One that was called before a write and is answered after it.
        [read(0, 1, 4), write(1, 2, 3)],
        # Two writes at once come in either order.
        [write(1, 1, 4), write(2, 2, 3), read(1, 5, 6)],
        [write(1, 1, 4), write(2, 2, 3), read(2, 5, 6)],
        # One that was not answered takes effect late, or never.
        [write(1, 1), read(0, 2, 3), read(0, 4, 5)],
        [write(1, 1), write(2, 2, 3), read(2, 4, 5), read(1, 6, 7)],
        # A read of old and new bytes while they are written.
        [write(1, 1, 4), read(0, 2, 3), read(1, 2, 3)],
        # What failed may be there in part.
        [op("maybe", 1, 1, 2), read(1, 3, 4), read(0, 3, 4), read(1, 5, 6), read(0, 7, 8)],
        [op("maybe", 1, 1, 2), write(2, 3, 4), read(2, 5, 6)],
    ],
)
def test_right(ops: list[Op]) -> None:
    explain(ops, ZERO)


@pytest.mark.parametrize(
    "ops",
    [
        [read(1, 1, 2)],
        [read(1, 1, 2), write(1, 3, 4)],  # before it was written
        [write(1, 1, 2), read(0, 3, 4)],  # lost, or stale
        [write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)],
        [write(1, 1, 6), read(1, 2, 3), read(0, 4, 5)],  # new, then old
        [write(1, 1, 4), write(2, 2, 3), read(1, 5, 6), read(2, 7, 8)],  # there and back
        [write(1, 1), read(1, 2, 3), read(0, 4, 5)],
        [write(1, 1), write(2, 2, 3), read(1, 4, 5), write(3, 6, 7), read(1, 8, 9)],  # twice
        [write(1, 1, 2), read(0, 3, 4), read(1, 3, 4)],  # torn, and nobody writes
        [write(1, 1, 8), read(0, 2, 3), read(1, 2, 3), read(0, 4, 5), read(1, 4, 5)],
        [op("maybe", 1, 1, 2), write(2, 3, 4), read(1, 5, 6)],  # comes back
        [write(1, 1, 2), op("maybe", 2, 3, 4), read(0, 5, 6)],
    ],
)
def test_wrong(ops: list[Op]) -> None:
    with pytest.raises(Inexplicable):
        explain(ops, ZERO)


def test_what_is_sent_again_takes_effect_until_it_is_answered() -> None:
    ops = [write(1, 1, 12), read(1, 2, 3), write(2, 4, 5), read(2, 6, 7), read(1, 8, 9)]
    with pytest.raises(Inexplicable):
        explain(ops, ZERO)
    ops[0].again = True
    assert explain(ops, ZERO) == {frozenset([1])}
    explain([*ops, write(3, 10, 11), read(1, 13, 14)], ZERO)
    with pytest.raises(Inexplicable):
        explain([*ops, write(3, 13, 14), read(1, 15, 16)], ZERO)


def test_a_history_knows_what_is_sent_again() -> None:
    history = History()
    with history.writing([0], 1):
        history.found(history.reading(), 0, [1])
        with history.writing([0], 2):
            pass
        with history.resending():
            history.found(history.reading(), 0, [2])
        history.found(history.reading(), 0, [1])
    history.check()
    with history.resending(), history.writing([0], 3):
        for value in (3, 4, 3):
            with history.writing([0], 4) if value == 4 else nullcontext():
                pass
            history.found(history.reading(), 0, [value])
    history.check()
    with history.writing([0], 5):
        history.found(history.reading(), 0, [5])
        history.found(history.reading(), 0, [3])
    with pytest.raises(Inexplicable):
        history.check()


def test_what_may_be_there_in_the_end() -> None:
    assert explain([write(1, 1), op("maybe", 2, 2, 3)], ZERO) == {
        frozenset([0, 2]),
        frozenset([1]),
        frozenset([1, 2]),
    }
    assert explain([write(1, 1, 4), write(2, 2, 3)], ZERO) == {frozenset([1]), frozenset([2])}
    assert explain([read(5, 1, 2)], [frozenset([4, 5]), frozenset([4])]) == {frozenset([4, 5])}


def by_trying_all_orders(ops: list[Op]) -> bool:
    """What `explain` tells, without a thought."""
    for order in itertools.permutations(ops):
        held: frozenset[int] | None = frozenset([0])
        for place, one in enumerate(order):
            late = any(
                other.answered is not None and other.answered < one.called
                for other in order[place + 1 :]
            )
            held = None if late or held is None else one.after(held)
        if held is not None:
            return True
    return False


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "write", "maybe"]),
            st.integers(0, 2),
            st.integers(0, 9),
            st.integers(1, 6),
        ),
        max_size=5,
    )
)
def test_all_orders_tell_the_same(drawn: list[tuple[Kind, int, int, int]]) -> None:
    # No two moments are the same: a call is even, an answer odd.
    ops = [
        op(kind, value + (kind != "read") * number, 20 * start + 2 * number,
           20 * (start + length) + 2 * number + 1)
        for number, (kind, value, start, length) in enumerate(drawn)
    ]  # fmt: skip
    try:
        explain(ops, ZERO)
    except Inexplicable:
        assert not by_trying_all_orders(ops)
    else:
        assert by_trying_all_orders(ops)


def test_a_history_goes_on_after_a_check() -> None:
    history = History()
    with history.writing([1, 2], 7):
        pass
    with pytest.raises(OSError, match="no"), history.writing([2], 8):
        raise OSError("no")
    history.check()
    assert history.held == {1: {frozenset([7])}, 2: {frozenset([7, 8])}}
    history.found(history.reading(), 2, [7, 8])
    history.found(history.reading(), 3, [0])
    history.check()
    assert history.checked == 6
    history.found(history.reading(), 1, [0])
    with pytest.raises(Inexplicable, match=r"block 1: the read of 0 \(.*could hold \[\(7,\)\]"):
        history.check()


def test_a_history_tells_what_was_done_about_when_it_went_wrong() -> None:
    history = History()
    late = history.writing([0], 999)  # open all the time
    late.__enter__()

    def written_and_read(count: int) -> None:
        for _ in range(count):
            with history.writing([0], value := history.fresh()):
                pass
            history.found(history.reading(), 0, [value])

    history.note("long before")
    for number in range(AFTER):
        written_and_read(10)
        history.note(f"note {number}")
    history.found(history.reading(), 0, [998, 10 * AFTER])
    written_and_read(100)
    history.note("long after")
    late.__exit__(None, None, None)
    with pytest.raises(Inexplicable) as wrong:
        history.check()
    first, *lines = str(wrong.value).split("\n")
    assert "block 0: the read of 998, one of [100, 998], all in this one block (" in first
    assert first.endswith("meanwhile there was write 999")
    ops = [line for line in lines if "---" not in line]
    notes = [line.partition("--- ")[2] for line in lines if "---" in line]
    assert wrong.value.op.value == 998
    assert notes == [f"note {number}" for number in range(AFTER)]
    assert len(ops) == NEAR - 1 + AFTER  # the two values that one read found are a line
    assert "write of 999" in ops[0]
    assert "read of [100, 998], all in this one block" in ops[NEAR - 2]
    assert [line.rpartition(" ")[2] for line in ops[-2:]] == ["105", "105"]


def test_a_history_of_many_threads() -> None:
    """Over a register that is right, and over one that loses a write now and then."""

    def explained(loses: bool) -> bool:
        history, lock, held = History(), threading.Lock(), [0]

        def client(first: int) -> None:
            for value in range(first, first + 200):
                with history.writing([0], value), lock:
                    if not (loses and value % 50 == 0):
                        held[0] = value
                called = history.reading()
                with lock:
                    seen = held[0]
                history.found(called, 0, [seen])

        threads = [threading.Thread(target=client, args=[1 + 1000 * n]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        # All that was written last is lost; nobody is beside it.
        with history.writing([0], 9000), lock:
            held[0] = held[0] if loses else 9000
        history.found(history.reading(), 0, [held[0]])
        try:
            history.check()
        except Inexplicable:
            return False
        return True

    assert explained(loses=False)
    assert not explained(loses=True)
