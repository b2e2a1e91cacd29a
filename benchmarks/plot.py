# SPDX-License-Identifier: MIT
"""Results as a picture: a panel for each job, a bar for each contender."""

from pathlib import Path

from matplotlib.figure import Figure

from .contenders import CONTENDERS
from .jobs import JOBS
from .plan import Results
from .report import rows

_OURS, _OTHERS = "#2f6f4f", "#9aa5b1"


def draw(results: Results, path: Path) -> None:
    """Write the picture; the suffix of `path` (.png, .svg) tells its form."""
    jobs = results.plan.jobs
    count = len({one.contender for one in results.measurements})
    figure = Figure(figsize=(9, 0.8 + len(jobs) * (0.6 + 0.24 * count)), layout="constrained")
    figure.suptitle(
        f"Linux {results.kernel}, {'instructions counted' if results.counting else 'real time'}, "
        f"{results.date}"
    )
    panels = figure.subplots(len(jobs), 1, squeeze=False)[:, 0]
    for panel, job in zip(panels, jobs, strict=True):
        drawn = rows(results, job)[::-1]
        bars = panel.barh(
            [row.contender for row in drawn],
            [row.iops / 1000 for row in drawn],
            color=[_OURS if row.contender.startswith("pyublk") else _OTHERS for row in drawn],
            hatch=["//" if CONTENDERS[row.contender].kind == "bytes" else "" for row in drawn],
            edgecolor="white",
        )
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.set_title(JOBS[job].title, loc="left", fontsize=10)
        panel.set_xlabel("thousand requests a second (hatched: bytes are kept)", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
