"""What is done to requests before their target has them."""

from collections.abc import Callable, Sequence
from typing import final

from pyublk.uapi import Op

@final
class GateRule:
    """One rule of a `Gate`; whoever makes it checks its arguments.

    `ops` has a bit for each operation. The rule is for bytes from `begin` to `end` (0: all), for
    requests that jump, for which `when` is true. Of these, the `nth` (0: each), `times` at most.
    `delays` are in seconds, each as likely; costs are the seconds of a request, and of a byte.
    """

    def __init__(
        self,
        action: str,
        *,
        ops: int,
        begin: int = 0,
        end: int = 0,
        jumps: bool = False,
        when: Callable[[Op | int, int, int], object] | None = None,
        nth: int = 0,
        every: bool = False,
        times: int = 0,
        probability: float = 1.0,
        seed: int = 0,
        error: int = 0,
        delays: Sequence[float] = (),
        amount: int = 0,
        place: int = 0,
        request_cost: float = 0.0,
        byte_cost: float = 0.0,
        burst: float = 0.0,
    ) -> None: ...
    def counts(self) -> tuple[int, int]:
        """How many requests matched, and for how many it fired."""

@final
class Gate:
    """What a disk's rules do to the requests of its queues, which are made with it."""

    def exchange(self, rules: Sequence[GateRule]) -> None:
        """These are the rules from now on."""
    def release(self, rule: GateRule | None = None) -> None:
        """Lets go of what a rule holds now, or all of them."""
    def suspend(self, suspended: bool) -> None:
        """No rule applies, and nothing is held, until this is taken back."""
    def set_size(self, size: int, zone_size: int = 0) -> None:
        """Bytes of the disk."""
