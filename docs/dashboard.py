"""Draws the panels of the Grafana dashboard, with what a Prometheus answers to their queries."""

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

EXPORTER, PROMETHEUS = "127.0.0.1:9870", "127.0.0.1:9871"
#: Seconds between two looks at the disks, and of a rate.
INTERVAL, RATE = 3, 15
UNITS = {"iops": "/s", "binBps": "B/s", "s": "s"}


def ask(what: str, **arguments: object) -> list[dict[str, Any]]:
    """What Prometheus's API answers."""
    url = f"http://{PROMETHEUS}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


@contextmanager
def watched(place: Path) -> Iterator[None]:
    """All disks are watched by `pyublk metrics` and a Prometheus, whose files are in `place`."""
    program = shutil.which("prometheus", path=str(Path(sys.executable).parent))
    if program is None:
        raise SystemExit("prometheus is not installed: ./run setup gets it")
    scrape = {"job_name": "pyublk", "static_configs": [{"targets": [EXPORTER]}]}
    settings = {"global": {"scrape_interval": f"{INTERVAL}s"}, "scrape_configs": [scrape]}
    (place / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    exporter = [sys.executable, "-m", "pyublk", "metrics", "--listen", EXPORTER]
    server = [
        program, f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
        f"--web.listen-address={PROMETHEUS}", "--log.level=error",
    ]  # fmt: skip
    with subprocess.Popen(exporter, stderr=subprocess.DEVNULL) as one:
        try:
            with subprocess.Popen(server) as other:
                try:
                    yield
                finally:
                    other.terminate()
        finally:
            one.terminate()


def wait_for(seconds: float) -> float:
    """Until Prometheus has looked at the disks for so long; returns when that was."""
    while True:
        try:
            looked = ask("query", query=f"count_over_time(up[{round(seconds) + 60}s])")
        except OSError:
            looked = []  # it does not listen yet
        if looked and float(looked[0]["value"][1]) >= seconds / INTERVAL:
            return time.time()
        time.sleep(1)


def draw(dashboard: dict[str, Any], seconds: float, file: Path) -> None:
    """The last seconds of each panel, where the dashboard has it."""
    end = wait_for(seconds)
    figure = Figure(figsize=(14, 16))
    rows = 1 + max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in dashboard["panels"])
    figure.suptitle(dashboard["title"])
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        left, bottom = (at["x"] + 1.4) / 24, (rows - 1 - at["y"] - at["h"] + 0.8) / rows
        axes = figure.add_axes((left, bottom, (at["w"] - 1.8) / 24, (at["h"] - 1.8) / rows))
        axes.set_title(panel["title"], fontsize=10)
        (target,) = panel["targets"]
        query = target["expr"].replace("$device", ".*").replace("$__rate_interval", f"{RATE}s")
        if panel["type"] == "stat":
            _draw_number(axes, ask("query", query=query, time=end))
            continue
        found = ask("query_range", query=query, start=end - seconds, end=end, step=INTERVAL)
        if panel["type"] == "heatmap":
            _draw_heat(axes, found, end)
        else:
            _draw_lines(axes, found, end, target["legendFormat"])
            unit = panel["fieldConfig"]["defaults"].get("unit")
            if unit in UNITS:
                axes.yaxis.set_major_formatter(EngFormatter(UNITS[unit]))
            axes.set_ylim(bottom=0)
        axes.set_xlim(-seconds, 0)
    figure.savefig(file, dpi=80)


def _draw_number(axes: Axes, found: list[dict[str, Any]]) -> None:
    axes.axis("off")
    (value,) = found
    axes.text(0.5, 0.4, f"{float(value['value'][1]):g}", ha="center", va="center", fontsize=24)


def _draw_lines(axes: Axes, found: list[dict[str, Any]], end: float, legend: str) -> None:
    for series in found:
        label = legend
        for name, value in series["metric"].items():
            label = label.replace("{{" + name + "}}", value)
        values = [(float(moment) - end, float(value)) for moment, value in series["values"]]
        if any(value == value for _, value in values):  # not of nothing but NaN
            axes.plot(*zip(*values, strict=True), label=label)
    axes.legend(fontsize=7, loc="upper left")


def _draw_heat(axes: Axes, found: list[dict[str, Any]], end: float) -> None:
    """Prometheus's buckets have all that is below their limits."""
    found = sorted(found, key=lambda one: float(one["metric"]["le"]))
    limits = [float(one["metric"]["le"]) for one in found][:-1]
    times = sorted({float(moment) for one in found for moment, _ in one["values"]})
    below = [{float(moment): float(count) for moment, count in one["values"]} for one in found[:-1]]
    cells = [
        [max(0.0, upper.get(moment, 0) - lower.get(moment, 0)) or float("nan") for moment in times]
        for lower, upper in pairwise(below)
    ]
    mesh = axes.pcolormesh(
        [moment - end for moment in times], limits[1:], cells, norm=LogNorm(), shading="nearest"
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.figure.colorbar(mesh, ax=axes)
