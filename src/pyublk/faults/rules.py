# SPDX-License-Identifier: MIT
"""The rules of a disk: which there are, and what they do to its requests."""

import errno
import threading
from collections import deque
from collections.abc import Iterator
from math import log
from types import TracebackType
from typing import Any, Self, Unpack

from pyublk._native import Gate, GateRule
from pyublk.arguments import seconds as check_seconds
from pyublk.arguments import whole
from pyublk.faults.filters import (
    ALL,
    OPERATIONS,
    FaultFilter,
    Operations,
    check_happens,
    checked_filter,
    is_all,
    near,
    of_target,
    operations_named,
)
from pyublk.faults.profiles import load
from pyublk.faults.texts import parse, rule_text, split
from pyublk.paths import DataPath
from pyublk.profile import Profile
from pyublk.target import Target
from pyublk.uapi import SECTOR_SIZE

#: Values that stand for a distribution: more of them would not be told apart.
SAMPLES = 1024
#: Seconds of a limit that a disk which is used less saves up.
BURST = 0.1
#: Rules that a disk remembers when they have been removed.
REMEMBERED = 32

#: The operations that an action is for, of those that are for some only. A read that is dropped
#: would show clients whatever is in the server's memory.
ONLY_FOR = {
    "drop": ("write", "flush", "discard", "write_zeroes"),
    "tear": ("write",),
    "misdirect": ("read", "write"),
    "rot": ("read",),
    "stale": ("read",),
}
#: Whose answers are changed, so that the data must pass through the server.
CHANGES_DATA = ("rot", "stale")
#: Data paths on which it does.
COPYING = frozenset({DataPath.COPY, DataPath.GET_DATA})


class Rule:
    """What a disk does to some of its requests; from the methods of `Faults`.

    As a context manager, it is removed at the end of the block.
    """

    def __init__(self, faults: "Faults", action: str, text: str, gate_rule: GateRule) -> None:
        self._faults = faults
        self._rule = gate_rule
        #: What it does, such as "fail" or "delay".
        self.action = action
        #: The rule in one line, as `Faults.add` takes it.
        self.text = text
        #: Its number among the rules of this disk, from 1 on; 0 for the limit of the whole disk.
        self.number = 0

    @property
    def matched(self) -> int:
        """How many requests its filter chose, before its counts and its chance were asked."""
        return self._rule.counts()[0]

    @property
    def fired(self) -> int:
        """How often it has done what it does."""
        return self._rule.counts()[1]

    def release(self) -> None:
        """Lets the requests go on that it holds now."""
        self._faults._gate.release(self._rule)

    def remove(self) -> None:
        """No request meets it any more, and what it holds goes on. Twice is allowed."""
        self._faults._remove([self])

    def told(self) -> dict[str, Any]:
        """Number, text and counts, for JSON."""
        matched, fired = self._rule.counts()
        return {"number": self.number, "rule": self.text, "matched": matched, "fired": fired}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Rule {self.number} {self.text}, fired {self.fired} times>"


class Faults:
    """The rules of one disk, in their order; from `Device.faults` and `testing.Disk.faults`.

    Each method but `clear` and `release` adds a rule, which the next requests meet, and returns it.
    `operations` is the name of one ("read", "write", "flush", "discard", "write_zeroes", and those
    of zones), several names, or "all". The rule fires for every such request, unless a
    `FaultFilter` says less.

    A request meets the rules in their order. Those that hold it (`delay`, `hang`, `limit`) add up;
    of the others the first that fires decides. While a disk is stopped, or its target exchanged, no
    rule applies, and what was held goes on.

    Raises ValueError for a rule that could never fire: for an operation that the target does not
    take, an unknown errno, an invalid time or count. From any thread.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._gate = Gate()
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._made = 0
        #: The last rules that were removed: a report tells what they have done.
        self.removed: deque[Rule] = deque(maxlen=REMEMBERED)
        self._path: DataPath | None = None  # once it is served
        self._zone_size = 0
        #: What the disk's `limit` has set, if anything.
        self.disk_limit: Rule | None = None

    # ---- what there is ----

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules.copy())

    def __len__(self) -> int:
        return len(self._rules)

    def clear(self) -> None:
        """No more rules, but for the disk's limit. What they hold goes on."""
        self._remove(list(self))

    def release(self) -> None:
        """Lets all requests go on that rules hold now."""
        self._gate.release()

    # ---- rules as texts ----

    def profile(self, name: str) -> list[Rule]:
        """Adds the rules of a disk profile (`pyublk.faults.profiles`): "hdd-7200", "sd-card",
        "cloud-gp2", "dying-hdd"."""
        return self.extend(";".join(load(name).rules))

    def add(self, text: str) -> Rule:
        """Adds the rule that a text describes, such as "fail:op=write,range=4K-8K,errno=EIO".

        It names a method, and its arguments but for `when`: `op` has the operations, with "+"
        between several. Sizes are written as 4K or 1M, times as 10ms or 50us, or in seconds.
        """
        action, arguments = parse(text)
        rule: Rule = getattr(self, action)(**arguments)
        return rule

    def extend(self, texts: str) -> list[Rule]:
        """Adds the rules that texts describe, with semicolons between them, or none if one of them
        is wrong. `profile:NAME` stands for the rules of that disk profile.
        """
        found: list[Rule] = []
        try:
            for text in split(texts):
                found.append(self.add(text))
        except BaseException:
            self._remove(found)
            raise
        return found

    def find(self, number: int) -> Rule:
        """The rule of that number. Raises ValueError when there is none, or none any more."""
        for rule in self:
            if rule.number == number:
                return rule
        there = ", ".join(str(rule.number) for rule in self)
        raise ValueError(f"there is no rule {number}{f': there are {there}' if there else ''}")

    def told(self) -> list[dict[str, Any]]:
        """Every rule with its counts, for JSON."""
        return [rule.told() for rule in self]

    # ---- rules that hold requests ----

    def delay(
        self,
        operations: Operations,
        seconds: float,
        *,
        jitter: float = 0.0,
        distribution: str = "uniform",
        **only: Unpack[FaultFilter],
    ) -> Rule:
        """Requests take `seconds` longer. With `jitter` (seconds), the time varies:

        - "uniform": between `seconds` - `jitter` and `seconds` + `jitter`;
        - "normal": around `seconds`, with the standard deviation `jitter`, but never below 0;
        - "exponential": at least `seconds`, and `jitter` more in the mean.
        """
        check_seconds("seconds", seconds, zero=True)
        check_seconds("jitter", jitter, zero=True)
        delays = _delays(seconds, jitter, distribution)
        said: dict[str, object] = {"seconds": float(seconds)}
        if jitter:
            said |= {"jitter": float(jitter), "distribution": distribution}
        return self._add("delay", operations, said, only, delays=delays)

    def hang(self, operations: Operations, **only: Unpack[FaultFilter]) -> Rule:
        """Requests are held until the rule is released or removed."""
        return self._add("hang", operations, {}, only)

    def limit(
        self,
        operations: Operations = ALL,
        *,
        iops: float | None = None,
        bandwidth: float | None = None,
        burst: float = BURST,
        **only: Unpack[FaultFilter],
    ) -> Rule:
        """At most `iops` requests and `bandwidth` bytes a second; others wait for their turn.

        A disk that is used less saves up `burst` seconds of it: so many requests, or bytes, pass at
        once afterwards. The rule fires for each request that waits.
        """
        said, does = _limit(iops, bandwidth, burst)
        return self._add("limit", operations, said, only, **does)

    # ---- rules that decide ----

    def fail(
        self, operations: Operations, error: int = errno.EIO, **only: Unpack[FaultFilter]
    ) -> Rule:
        """Requests fail with `error`, an errno. The kernel tells clients EIO for most of them;
        ENOSPC, ETIMEDOUT, ENODATA, EILSEQ, EBADE, ENOMEM and EOPNOTSUPP are among those that it
        passes on."""
        if not isinstance(error, int) or error is True or error not in errno.errorcode:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error!r}")
        said: dict[str, object] = {"errno": errno.errorcode[error]}
        return self._add("fail", operations, said, only, error=error)

    def full(self, **only: Unpack[FaultFilter]) -> Rule:
        """The disk has no more room: whatever writes, but for discards, fails with ENOSPC."""
        return self.fail(self._taken("write", "write_zeroes", "zone_append"), errno.ENOSPC, **only)

    def read_only(self, **only: Unpack[FaultFilter]) -> Rule:
        """The disk takes no more writes, as flash at the end of its life: they, discards, and what
        finishes or resets zones fail with EROFS, for which the kernel tells clients EIO."""
        zones = ("zone_append", "zone_finish", "zone_reset", "zone_reset_all")
        writing = self._taken("write", "write_zeroes", "discard", *zones)
        return self.fail(writing, errno.EROFS, **only)

    def drop(self, operations: Operations, **only: Unpack[FaultFilter]) -> Rule:
        """Requests are answered as done, and nothing is done: a lost write, a flush that lies."""
        return self._add("drop", operations, {}, only)

    def tear(
        self, operations: Operations = "write", *, sectors: int = 1, **only: Unpack[FaultFilter]
    ) -> Rule:
        """Of a longer write only the first `sectors`, of 512 bytes, reach the target, and it is
        answered as done."""
        whole("sectors", sectors, least=1)
        self._check_blocks("sectors", sectors * SECTOR_SIZE)
        said: dict[str, object] = {"sectors": sectors}
        return self._add("tear", operations, said, only, amount=sectors)

    def misdirect(
        self, operations: Operations = "write", *, offset: int, **only: Unpack[FaultFilter]
    ) -> Rule:
        """Reads or writes go to the byte `offset` instead; what would reach beyond the disk's end
        goes to its end."""
        whole("offset", offset, least=0)
        self._check_blocks("offset", offset)
        said: dict[str, object] = {"offset": offset}
        return self._add("misdirect", operations, said, only, place=offset)

    def rot(
        self, operations: Operations = "read", *, bits: int = 1, **only: Unpack[FaultFilter]
    ) -> Rule:
        """What reads return has `bits` bits flipped, chosen by `seed`; what is stored stays.

        The data must pass through the server, by the data path "copy". A disk with this rule takes
        it by itself when it starts; one that is served by another path refuses the rule
        (ValueError).
        """
        whole("bits", bits, least=1)
        said: dict[str, object] = {"bits": bits}
        return self._add("rot", operations, said, only, amount=bits)

    def stale(self, operations: Operations = "read", **only: Unpack[FaultFilter]) -> Rule:
        """Reads return what their sectors held when they were first read or written since the rule
        was added, whatever was written later. What had not passed before is returned as it is.

        65,536 sectors (of 512 bytes) are remembered. For the data path, see `rot`.
        """
        return self._add("stale", operations, {}, only)

    # ---- how they are kept ----

    def _check_blocks(self, name: str, size: int) -> None:
        block = self.target.block_size
        if size % block:
            raise ValueError(
                f"{name} must be whole blocks of {type(self.target).__name__}, of {block} bytes"
            )

    def _taken(self, *names: str) -> tuple[str, ...]:
        """Of these, what the target takes; the first, for the message, if it takes none."""
        taken = of_target(self.target)
        return tuple(name for name in names if name in taken) or names[:1]

    def _add(
        self,
        action: str,
        operations: Operations,
        said: dict[str, object],
        only: FaultFilter,
        **does: Any,
    ) -> Rule:
        rule = self._make(action, operations, said, only, **does)
        with self._lock:
            rule.number = self._made + 1
            self._put([*self._rules, rule], self.disk_limit)
            self._made += 1
        return rule

    def _make(
        self,
        action: str,
        operations: Operations,
        said: dict[str, object],
        only: FaultFilter,
        **does: Any,
    ) -> Rule:
        names = operations_named(operations)
        allowed = ONLY_FOR.get(action, names)
        if is_all(operations):
            names = self._taken(*(name for name in names if name in allowed))
        for name in names:
            if name not in allowed:
                raise ValueError(f"{action} is for {', '.join(allowed)}, not for {name!r}")
        check_happens(names, self.target)
        if action in CHANGES_DATA and COPYING.isdisjoint(self.target.paths):
            raise ValueError(
                f"{action} changes data on its way, which never passes through the server of "
                f"{type(self.target).__name__}: its data path is {self.target.paths[0]}"
            )
        if names == ("flush",) and only.get("range") is not None:
            raise ValueError("a flush is of no range: leave the range out")
        filtered = checked_filter(only)
        ops = sum(1 << OPERATIONS[name] for name in names)
        text = rule_text(action, ALL if is_all(operations) else "+".join(names), said, only)
        return Rule(self, action, text, GateRule(action, ops=ops, **filtered, **does))

    def _put(self, rules: list[Rule], limit: Rule | None) -> None:
        """With the lock."""
        if self._path is not None:
            _check_path(rules, self._path)
        everything = rules if limit is None else [limit, *rules]
        self._gate.exchange([rule._rule for rule in everything])
        self._rules, self.disk_limit = rules, limit

    def _remove(self, gone: list[Rule]) -> None:
        with self._lock:
            limit = None if self.disk_limit in gone else self.disk_limit
            removed = [rule for rule in self._rules if rule in gone]
            self._put([rule for rule in self._rules if rule not in gone], limit)
            self.removed.extend(removed)
        for rule in gone:
            rule.release()

    def _set_disk_limit(self, iops: float | None, bandwidth: float | None, burst: float) -> None:
        rule = None
        if iops is not None or bandwidth is not None:
            said, does = _limit(iops, bandwidth, burst)
            rule = self._make("limit", ALL, said, {}, **does)
        with self._lock:
            before = self.disk_limit
            self._put(self._rules, rule)
        if before is not None:
            before.release()

    # ---- called by who serves the disk ----

    @property
    def gate(self) -> Gate:
        """What its queues are made with."""
        return self._gate

    def wanted_path(self, asked: DataPath | str) -> DataPath | str:
        """The data path to ask for, where `asked` leaves the choice."""
        needs_copy = any(rule.action in CHANGES_DATA for rule in self)
        return DataPath.COPY if needs_copy and asked == "auto" else asked

    def serve(self, profile: Profile, path: DataPath = DataPath.COPY) -> None:
        """The disk is like this, and has this data path, from now on. Raises ValueError for a
        rule that cannot be followed on it."""
        with self._lock:
            _check_path(self._rules, path)
            self._path = path
        self._zone_size = profile.zones.zone_size if profile.zones is not None else 0
        self.resize(profile.size)

    def resize(self, size: int) -> None:
        """The disk has so many bytes from now on."""
        self._gate.set_size(size, self._zone_size)

    def suspend(self, suspended: bool) -> None:
        """No rule applies, and nothing is held, until this is taken back."""
        self._gate.suspend(suspended)


class WithFaults:
    """A disk with rules."""

    _faults: Faults

    @property
    def faults(self) -> Faults:
        """What is done to the disk's requests; rules may be added and removed at any time."""
        return self._faults

    def limit(
        self,
        *,
        iops: float | None = None,
        bandwidth: float | None = None,
        burst: float = BURST,
    ) -> None:
        """Limits the whole disk to `iops` requests and `bandwidth` bytes a second, from now on, in
        place of the limit that it had; without arguments, it has none any more.

        A disk that is used less saves up `burst` seconds of the limit. Rules of `Faults.limit`
        limit some of its requests. Raises ValueError for numbers that are not above 0.
        """
        self._faults._set_disk_limit(iops, bandwidth, burst)


def _check_path(rules: list[Rule], path: DataPath) -> None:
    for rule in rules:
        if rule.action in CHANGES_DATA and path not in COPYING:
            raise ValueError(
                f"{rule.action} changes data on its way, which does not pass through the server on "
                f'the data path "{path}": start the disk with path="copy" (--path copy)'
            )


def _limit(
    iops: float | None, bandwidth: float | None, burst: float
) -> tuple[dict[str, object], dict[str, float]]:
    """What a limit says of itself, and what its rule is made with."""
    if iops is None and bandwidth is None:
        raise ValueError("a limit needs iops or bandwidth")
    said: dict[str, object] = {}
    does = {"burst": check_seconds("burst", burst, zero=True)}
    for name, cost, rate in (
        ("iops", "request_cost", iops),
        ("bandwidth", "byte_cost", bandwidth),
    ):
        if rate is None:
            continue
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e18:
            raise ValueError(f"{name} must be a number above 0, not {rate!r}")
        said[name] = rate
        does[cost] = 1.0 / rate
    return said | {"burst": float(burst)}, does


def _delays(seconds: float, jitter: float, distribution: str) -> list[float]:
    """Equally likely times that stand for the distribution."""
    if not jitter:
        return [seconds]
    from statistics import NormalDist  # a third of what importing pyublk would cost

    chances = [(number + 0.5) / SAMPLES for number in range(SAMPLES)]
    found = {
        "uniform": lambda: [seconds + jitter * (2 * chance - 1) for chance in chances],
        "normal": lambda: [NormalDist(seconds, jitter).inv_cdf(chance) for chance in chances],
        "exponential": lambda: [seconds - jitter * log(1 - chance) for chance in chances],
    }
    if distribution not in found:
        raise ValueError(
            f"distribution must be one of {', '.join(found)}, not {distribution!r}"
            f"{near(distribution, found)}"
        )
    return [max(0.0, delay) for delay in found[distribution]()]
