"""What a soak did, and how long clients waited."""

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass
class Report:
    """Counted over all lives."""

    lives: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)  # of clients, that were answered
    checked: int = 0  # operations on a block that were explained
    #: Seconds without any answer around a kill, by how the next server came.
    pauses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __str__(self) -> str:
        text = (
            f"{_counted(self.lives)} lives; {_counted(self.events)}\n"
            f"{self.operations.total()} requests ({_counted(self.operations)}), "
            f"{self.checked} operations on a block explained"
        )
        for how, pauses in sorted(self.pauses.items()):
            median, worst = statistics.median(pauses), max(pauses)
            text += f"\n{len(pauses)} pauses, {how}: median {median:.2f} s, worst {worst:.2f} s"
        return text


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))
