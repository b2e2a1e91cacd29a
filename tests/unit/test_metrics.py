"""What Prometheus is told: names, units, values; promtool and a real Prometheus take it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from samples import FakeObserver, foreign, histogram, sample, silent

from pyublk.cli import main
from pyublk.cli.failures import ExitCode
from pyublk.service.observing import Sample
from pyublk.stats import QueueStats

prometheus_client = pytest.importorskip("prometheus_client")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/observing.md"
DASHBOARD = json.loads((ROOT / "src/pyublk/service/grafana.json").read_text())

DISKS = [
    sample(
        0,
        target='x.py:"Disk"\\',
        counters=QueueStats(
            reads=7, writes=5, flushes=2, discards=1, write_zeroes=3, others=4, bytes_read=28672,
            bytes_written=20480, bytes_discarded=4096, bytes_zeroed=8192, errors=6, fallbacks=8,
            held=9,
        ),
        latency={
            # Of at most 1 µs, at and about a bound of Prometheus's buckets, and of half a minute.
            "read": histogram((512, 1), (1 << 20, 2), (5 << 18, 3), (30 << 30, 1)),
            "write": histogram((1 << 20, 5)),
        },
        restarts=2,
    ),
    sample(3, target="mirror", status={"legs": [{"state": "synced"}, {"state": "failed"}]}),
    silent(4, state="quiesced"),
    foreign(12),
]  # fmt: skip


def text_of(disks: Sequence[Sample]) -> str:
    from pyublk.service.metrics import DiskCollector

    registry = prometheus_client.CollectorRegistry()
    registry.register(DiskCollector(lambda: list(disks)))
    return str(prometheus_client.generate_latest(registry).decode())


def values(text: str) -> dict[str, float]:
    """Of each series, by its name and labels as they are written."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in lines}


def metric_names(text: str) -> set[str]:
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ('pyublk_disk_info{device="ublkb0",target="x.py:\\"Disk\\"\\\\"}', 1),
        ('pyublk_disk_info{device="ublkb12",target=""}', 1),
        ('pyublk_disk_size_bytes{device="ublkb0"}', 1 << 30),
        ('pyublk_disk_state{device="ublkb0",state="live"}', 1),
        ('pyublk_disk_state{device="ublkb0",state="quiesced"}', 0),
        ('pyublk_disk_state{device="ublkb4",state="quiesced"}', 1),
        ('pyublk_server_up{device="ublkb0"}', 1),
        ('pyublk_server_up{device="ublkb4"}', 0),
        ('pyublk_server_restarts_total{device="ublkb0"}', 2),
        ('pyublk_requests_total{device="ublkb0",operation="read"}', 7),
        ('pyublk_requests_total{device="ublkb0",operation="other"}', 4),
        ('pyublk_requests_total{device="ublkb3",operation="read"}', 0),
        ('pyublk_request_bytes_total{device="ublkb0",operation="write"}', 20480),
        ('pyublk_request_bytes_total{device="ublkb0",operation="write_zeroes"}', 8192),
        ('pyublk_request_errors_total{device="ublkb0"}', 6),
        ('pyublk_data_path_fallbacks_total{device="ublkb0"}', 8),
        ('pyublk_requests_in_flight{device="ublkb0"}', 9),
        ('pyublk_mirror_legs{device="ublkb3",state="synced"}', 1),
        ('pyublk_mirror_legs{device="ublkb3",state="failed"}', 1),
        ('pyublk_mirror_legs{device="ublkb3",state="resync"}', 0),
    ],
)
def test_values(series: str, value: float) -> None:
    assert values(text_of(DISKS))[series] == value


@pytest.mark.parametrize("device", ["ublkb4", "ublkb12"])
def test_what_only_a_server_knows_is_left_out(device: str) -> None:
    """Of one that is silent, or another program's."""
    ours = [series for series in values(text_of(DISKS)) if f'device="{device}"' in series]
    names = {series.partition("{")[0] for series in ours}
    disk = {"pyublk_disk_info", "pyublk_disk_size_bytes", "pyublk_disk_state"}
    servers = {"pyublk_server_up", "pyublk_server_restarts_total"}
    assert names == (disk | servers if device == "ublkb4" else disk)


def buckets(text: str, operation: str) -> list[tuple[float, float]]:
    form = rf'_bucket{{device="ublkb0",le="([^"]+)",operation="{operation}"}} (\S+)$'
    return [(float(bound), float(count)) for bound, count in re.findall(form, text, re.M)]


def test_latencies_are_in_the_buckets_that_hold_them() -> None:
    text = text_of(DISKS)
    reads = buckets(text, "read")
    assert [bound for bound, _ in reads] == [bound for bound, _ in buckets(text, "write")]
    assert reads == sorted(reads)
    counts = dict(reads)
    bounds = {power: (1 << power) / 1e9 for power in range(10, 35)}
    assert counts[bounds[10]] == 1
    assert counts[bounds[19]] == 1
    assert counts[bounds[20]] == 3, "what is at most the bound is below it"
    assert counts[bounds[21]] == 6
    assert counts[bounds[34]] == 6
    assert counts[float("inf")] == 7
    name = "pyublk_request_duration_seconds"
    labels = '{device="ublkb0",operation="read"}'
    assert values(text)[f"{name}_count{labels}"] == 7
    total = (512 + 2 * (1 << 20) + 3 * (5 << 18) + (30 << 30)) / 1e9
    assert values(text)[f"{name}_sum{labels}"] == pytest.approx(total)


def tool(program: str) -> str:
    place = ROOT / ".venv/bin" / program
    found = str(place) if place.exists() else shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (./run setup gets it)")
    return found


def complaints(text: str) -> str:
    """What promtool has to say."""
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("disks", [DISKS, []], ids=["disks", "no disks"])
def test_promtool_finds_nothing_wrong(disks: list[Sample]) -> None:
    assert complaints(text_of(disks)) == ""
    assert "counter metrics should have" in complaints("# HELP a b\n# TYPE a counter\na 1\n")


# ---- the command ----


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sees DISKS."""
    monkeypatch.setattr("pyublk.cli.metrics.open_controller", nullcontext)
    monkeypatch.setattr("pyublk.service.observing.Observer", FakeObserver(DISKS))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["metrics", *arguments], prog_name="pyublk")


@pytest.mark.usefixtures("disks")
def test_once() -> None:
    result = run("--once")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == text_of(DISKS)


def test_the_dashboard_is_printed_without_a_driver() -> None:
    result = run("--dashboard")
    assert (result.exit_code, json.loads(result.stdout)) == (0, DASHBOARD)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give one of --listen, --once and --dashboard"),
        (["--once", "--dashboard"], "give one of --listen, --once and --dashboard"),
        (["--once", "--listen", ":1"], "give one of --listen, --once and --dashboard"),
        (["--listen", "9870"], "'9870' is no address and port, such as 127.0.0.1:9870"),
        (["--listen", "::1:9870"], "'::1:9870' is no address and port"),
        (["--listen", "localhost:99999"], "'localhost:99999' is no address and port"),
    ],
)
def test_wrong_usage(arguments: list[str], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == ExitCode.USAGE
    assert told in result.stderr


@pytest.mark.usefixtures("disks")
def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("--listen", place)
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr == f"pyublk: Address already in use: '{place}'\n"


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [one for one in sys.modules if one.partition(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    result = run("--once")
    assert result.exit_code == ExitCode.FAILED
    told = "pyublk: prometheus_client is not installed: pip install 'pyublk[metrics]'\n"
    assert result.stderr == told


PROGRAM = """
import contextlib
from samples import FakeObserver
from test_metrics import DISKS
import pyublk.cli.metrics, pyublk.service.observing
pyublk.cli.metrics.open_controller = contextlib.nullcontext
pyublk.service.observing.Observer = FakeObserver(DISKS)
from pyublk.cli import main
main()
"""


@contextmanager
def exporter(address: str = "127.0.0.1") -> Iterator[str]:
    """`pyublk metrics --listen` with DISKS; where it listens."""
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    arguments = ["metrics", "--listen", f"{address}:{port}"]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said == f"pyublk: listening at http://{address}:{port}/metrics\n"
        try:
            yield f"{address}:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == ExitCode.INTERRUPTED
            assert process.stderr.read() == "pyublk: interrupted\n"


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


def test_listening() -> None:
    with exporter() as place:
        for _ in range(2):
            assert get(f"http://{place}/metrics").decode() == text_of(DISKS)


# ---- the dashboard, and a Prometheus ----


def expressions() -> list[str]:
    """Of all panels, with the dashboard's variables as they are at first."""
    return [
        target["expr"].replace("$device", ".*").replace("$__rate_interval", "1m")
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]


def test_the_dashboard_has_only_metrics_that_there_are() -> None:
    queries = [DASHBOARD["templating"]["list"][1]["query"]["query"], *expressions()]
    named = set(re.findall(r"\bpyublk_\w+", " ".join(queries)))
    assert named
    assert named <= metric_names(text_of(DISKS))


def test_grafanas_own_types_have_all_of_the_dashboard() -> None:
    """Which Grafana generates from its schema: nothing is unknown, or of another type."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard").Dashboard
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()

    def without_additions(read: Any, ours: Any) -> Any:
        if isinstance(read, dict) and isinstance(ours, dict):
            return {name: without_additions(read.get(name), ours[name]) for name in ours}
        if isinstance(read, list) and isinstance(ours, list):
            return [without_additions(*both) for both in zip(read, ours, strict=True)]
        return read

    read = json.loads(encoder().encode(dashboard.from_json(DASHBOARD)))
    assert without_additions(read, DASHBOARD) == DASHBOARD


def test_the_page_names_every_metric_and_no_other() -> None:
    page = PAGE.read_text()
    told = metric_names(text_of(DISKS)) - {"pyublk_exporter_info"}
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in told}
    assert set(re.findall(r"^\| `(pyublk_\w+)`", page, re.M)) == families
    assert set(re.findall(r"expr:.*?(pyublk_\w+)", page)) <= families


def test_the_panels_do_not_overlap() -> None:
    places = []
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = [(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])]  # fmt: skip
        assert all(x < 24 for x, _ in cells)
        places.append(set(cells))
    assert not any(one & other for one, other in combinations(places, 2))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def ask(place: str, query: str) -> list[dict[str, Any]]:
    url = f"http://{place}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    answer = json.loads(get(url))
    assert answer["status"] == "success"
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


@contextmanager
def prometheus(target: str, where: Path) -> Iterator[str]:
    """A Prometheus that scrapes the exporter every second, and has the page's rules, which do not
    wait a minute; where it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    scrape = {"job_name": "pyublk", "static_configs": [{"targets": [target]}]}
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", PAGE.read_text(), re.S)
    (where / "rules.yml").write_text(rules.replace("for: 1m", "for: 0s"))
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [scrape],
        "rule_files": [str(where / "rules.yml")],
    }
    (where / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
    with (
        open(where / "log", "w") as log,
        subprocess.Popen(
            [tool("prometheus"), f"--config.file={where}/prometheus.yml",
             f"--storage.tsdb.path={where}/data", f"--web.listen-address={place}"],
            stdout=log, stderr=log, env=os.environ | {"GOMAXPROCS": "1"},
        ) as process,
    ):  # fmt: skip
        try:
            yield place
        finally:
            process.terminate()
            process.wait(timeout=60)


def scraped_twice(place: str) -> bool:
    try:
        found = ask(place, "count_over_time(up[1m]) >= 2")
    except OSError:  # it does not listen yet
        return False
    return bool(found)


def test_a_prometheus_has_data_for_every_panel(tmp_path: Path) -> None:
    tool("prometheus")
    with exporter() as target, prometheus(target, tmp_path) as place:
        end = time.monotonic() + 60
        while not scraped_twice(place):  # rates need two
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        assert ask(place, "up")[0]["value"][1] == "1"
        empty = [one for one in expressions() if not ask(place, one.replace(" > 0", ""))]
        assert not empty
        legs = ask(place, 'pyublk_mirror_legs{state="failed"}')
        assert (legs[0]["metric"]["device"], legs[0]["value"][1]) == ("ublkb3", "1")
        while not (fired := ask(place, 'ALERTS{alertstate="firing"}')):
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        alerts = {(one["metric"]["alertname"], one["metric"]["device"]) for one in fired}
        assert alerts == {("MirrorDegraded", "ublkb3"), ("DiskServerSilent", "ublkb4")}
