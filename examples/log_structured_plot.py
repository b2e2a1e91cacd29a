"""Draws what the collector of `log_structured.py` costs: write amplification, by how much of the
log is kept spare. Runs without a kernel; needs matplotlib (the extra `plot`).

python examples/log_structured_plot.py write-amplification.png
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from log_structured import BLOCK, SEGMENT, LogStructured

from pyublk.targets import Ram

SEGMENTS = 48
SPARE = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def uniform(random: random.Random, blocks: int) -> int:
    return random.randrange(blocks)


def skewed(random: random.Random, blocks: int) -> int:
    """Nine writes of ten go to a tenth of the disk."""
    hot = max(1, blocks // 10)
    return random.randrange(hot) if random.random() < 0.9 else random.randrange(hot, blocks)


def amplification(choose: Callable[[random.Random, int], int], spare: float, times: int) -> float:
    """Of a full disk that is then overwritten, as often as `times` its size."""
    layer = LogStructured(Ram(size=SEGMENTS * SEGMENT * BLOCK), spare=spare)
    numbers = random.Random(1)
    layer.open()
    try:
        blocks = layer.size // BLOCK
        data = memoryview(bytes(BLOCK))
        for block in range(blocks):
            layer.write(block * BLOCK, data)
        layer.written = layer.moved = layer.summaries = 0
        for _ in range(times * blocks):
            layer.write(choose(numbers, blocks) * BLOCK, data)
        return float(layer.status()["write_amplification"])
    finally:
        layer.close()


def main(file: Path, times: int = 3) -> dict[str, list[float]]:
    found = {
        choose.__name__: [amplification(choose, spare, times) for spare in SPARE]
        for choose in (uniform, skewed)
    }
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, marker in (("uniform", "o"), ("skewed", "s")):
        axes.plot([100 * one for one in SPARE], found[name], marker=marker, label=name)
    axes.set(xlabel="spare, % of the log", ylabel="write amplification", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    return found


if __name__ == "__main__":
    for name, values in main(Path(sys.argv[1])).items():
        print(
            name, *(f"{spare:.0%}: {value:.2f}" for spare, value in zip(SPARE, values, strict=True))
        )
