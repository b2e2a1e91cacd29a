"""Samples of disks that nobody serves, for what looks at disks."""

from collections.abc import Sequence
from typing import Any, Self

from pyublk.service.observing import Sample
from pyublk.stats import Histogram, QueueStats

MICROSECOND = 1000


def histogram(*latencies: tuple[int, int]) -> Histogram:
    """Of (upper bound in nanoseconds, count)."""
    return Histogram(latencies, sum(bound * count for bound, count in latencies))


def sample(number: int = 0, *, time: float = 0.0, **changed: Any) -> Sample:
    """A disk of `pyublk add` whose server answers and has done nothing."""
    fields: dict[str, Any] = {
        "id": number,
        "path": f"/dev/ublkb{number}",
        "target": "ram",
        "state": "live",
        "size": 1 << 30,
        "cookie": 1000 + number,
        "server_pid": 100 + number,
        "time": time,
        "answers": True,
        "counters": QueueStats(),
        "latency": {},
        "restarts": 0,
        "silence": None,
    }
    return Sample(**fields | changed)


def foreign(number: int, **changed: Any) -> Sample:
    """A disk of another program."""
    about = {"target": None, "answers": False, "restarts": None, "cookie": 0}
    return sample(number, **about | changed)


def silent(number: int, **changed: Any) -> Sample:
    """A disk whose server does not answer."""
    return sample(number, answers=False, silence="the server did not answer", **changed)


class FakeObserver:
    """Has these samples, one list after the other, the last one again and again."""

    def __init__(self, *lists: Sequence[Sample]) -> None:
        self._lists = list(lists)

    def __call__(self, *_arguments: Any, **_options: Any) -> Self:
        """In the place of `Observer(controller)`."""
        return self

    def samples(self, **_options: Any) -> Sequence[Sample]:
        return self._lists.pop(0) if len(self._lists) > 1 else self._lists[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass
