# SPDX-License-Identifier: MIT
"""A trace in pictures, by matplotlib (the extra `plot`)."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyublk.errors import ExtraMissing
from pyublk.sizes import format_size, short_seconds
from pyublk.traces.requests import Trace
from pyublk.traces.summary import depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "read": "#2f6f9f",
    "write": "#d1662f",
    "flush": "#7a4f9a",
    "discard": "#5a8f3c",
    "other": "#8a8a8a",
}
#: Above this many points, an SVG has a picture of them in place of each.
_POINTS = 5000
_BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB")


def _offsets(panel: "Axes", trace: Trace) -> None:
    """Where the requests were, over time."""
    highest = max((one.offset + one.length for one in trace.requests), default=1)
    power = 0
    while highest >= 10 * 1024 ** (power + 1) and power < len(_BYTES) - 1:
        power += 1
    for name, color in COLORS.items():
        found = [one for one in trace.requests if one.operation == name and one.length]
        if found:
            panel.scatter(
                [one.arrived for one in found],
                [one.offset / 1024**power for one in found],
                s=3,
                color=color,
                label=name,
                linewidths=0,
                rasterized=len(trace.requests) > _POINTS,
            )
    panel.set_title("offset over time", loc="left")
    panel.set_xlabel("time (s)")
    panel.set_ylabel(f"offset ({_BYTES[power]})")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper right", markerscale=3, fontsize=8)


def _latency(panel: "Axes", trace: Trace) -> None:
    """How many requests took how long, over time."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogFormatter

    answered = [one for one in trace.requests if one.latency is not None]
    # A clock may not have moved on between arrival and answer: no logarithm of 0.
    latencies = [max(one.latency or 0, 1e-9) for one in answered]
    panel.set_title("latency over time", loc="left")
    panel.set_xlabel("time (s)")
    panel.set_ylabel("latency")
    if not latencies:
        return
    times = [one.arrived for one in answered]
    edges = [min(latencies) / 1.1]
    while edges[-1] <= max(latencies):
        edges.append(edges[-1] * 1.15)
    columns = min(120, max(10, len(answered) // 20))
    counted = panel.hist2d(
        times, latencies, bins=(columns, edges), cmin=1, norm=LogNorm(), cmap="viridis"
    )
    counted[3].set_rasterized(True)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_seconds(value)))
    assert panel.figure is not None
    bar = panel.figure.colorbar(counted[3], ax=panel)
    bar.set_label("requests")
    bar.ax.yaxis.set_major_formatter(LogFormatter())  # 2, and not 2 times 10 to the 0
    bar.ax.yaxis.set_minor_formatter(LogFormatter())


def _sizes(panel: "Axes", trace: Trace) -> None:
    """How many requests had which size."""
    counts: Counter[tuple[str, int]] = Counter(
        (one.operation, one.length) for one in trace.requests if one.length
    )
    sizes = sorted({size for _, size in counts})
    classes = [format_size(size) for size in sizes]
    if len(sizes) > 16:  # one for each power of two
        powers = sorted({size.bit_length() - 1 for size in sizes})
        classes = [f"from {format_size(1 << power)}" for power in powers]
        by_power: Counter[tuple[str, int]] = Counter()
        for (name, size), count in counts.items():
            by_power[name, size.bit_length() - 1] += count
        counts, sizes = by_power, powers
    bottom = [0] * len(sizes)
    for name, color in COLORS.items():
        heights = [counts[name, size] for size in sizes]
        if any(heights):
            panel.barh(range(len(sizes)), heights, left=bottom, color=color, label=name)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    panel.set_yticks(range(len(sizes)), classes)
    panel.set_title("sizes", loc="left")
    panel.set_xlabel("requests")
    if sizes:
        panel.legend(fontsize=8)


def _depth(panel: "Axes", trace: Trace) -> None:
    """How many requests the server had at a time."""
    points = list(depth(trace))
    panel.step(
        [time for time, _ in points],
        [have for _, have in points],
        where="post",
        color="#2f6f4f",
        linewidth=0.8,
        rasterized=len(points) > _POINTS,
    )
    panel.set_ylim(bottom=0)
    panel.set_title("queue depth", loc="left")
    panel.set_xlabel("time (s)")
    panel.set_ylabel("requests in flight")


#: Name of a plot -> what draws it.
PLOTS: dict[str, Callable[["Axes", Trace], None]] = {
    "offsets": _offsets,
    "latency": _latency,
    "sizes": _sizes,
    "depth": _depth,
}


def plot(trace: Trace, path: str | Path, *, plots: Sequence[str] = tuple(PLOTS)) -> None:
    """Draws `plots`, of offsets, latency, sizes and depth, into one picture; the suffix of `path`,
    .png or .svg, tells its form.

    Raises ExtraMissing without matplotlib, ValueError for another suffix or an unknown plot, and
    OSError.
    """
    for name in plots:
        if name not in PLOTS:
            raise ValueError(f"there is no plot {name!r}; there are: {', '.join(PLOTS)}")
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture's name ends in .png or .svg, unlike {str(path)!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ExtraMissing("matplotlib", "plot") from None
    columns = 2 if len(plots) > 1 else 1
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, panel in zip(plots, panels, strict=False):
        panel.spines[["top", "right"]].set_visible(False)
        PLOTS[name](panel, trace)
    for panel in panels:  # one that is left over
        panel.set_visible(False)
    figure.suptitle(f"{trace.name}: {len(trace.requests)} requests in {trace.duration:.3g} s")
    figure.savefig(path, dpi=120)
