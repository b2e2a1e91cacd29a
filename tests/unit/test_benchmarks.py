# SPDX-License-Identifier: MIT
"""The benchmarks' own arithmetic and formats: what can be wrong without anybody seeing it."""

import json
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import guest, jobs, kublk, many, measure, programs, report, ring  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.contenders import CONTENDERS, REFERENCES  # noqa: E402
from benchmarks.plan import Measurement, Plan, Results  # noqa: E402

PLAN = Plan(
    contenders=("null_blk", "kublk", "pyublk-null"),
    jobs=("randread",),
    repeats=2,
    runtime=0.5,
    ramp=0.1,
)


def measured(
    contender: str, iops: float, *, repeat: int = 0, cpu: float | None = None
) -> Measurement:
    return Measurement(
        contender=contender,
        job="randread",
        repeat=repeat,
        iops=iops,
        bandwidth=iops * 4096,
        latency_mean=1e-3,
        latency_median=9e-4,
        latency_p99=2e-3,
        server_cpu=cpu,
    )


RESULTS = Results(
    date="2026-01-31",
    kernel="7.2.13",
    processor="a processor",
    counting=True,
    plan=PLAN,
    measurements=(
        measured("null_blk", 100_000.0),
        measured("null_blk", 110_000.0, repeat=1),
        measured("kublk", 70_000.0, cpu=4e-6),
        measured("pyublk-null", 77_000.0, cpu=3e-6),
    ),
    missing={"pyublk-async": "it did not start"},
)


def test_a_plan_survives_the_way_to_the_guest() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_results_survive_the_way_back(tmp_path: Path) -> None:
    RESULTS.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == RESULTS


def test_every_second_round_turns_the_order_around() -> None:
    assert [name for _, _, name in measure.order(PLAN)] == [
        *PLAN.contenders,
        *reversed(PLAN.contenders),
    ]


def test_rows_are_medians_with_ratios_to_those_of_their_kind() -> None:
    limit, other, ours = report.rows(RESULTS, "randread")
    assert limit.iops == 105_000
    assert limit.spread == pytest.approx(10 / 105)
    assert limit.server_cpu is None
    assert other.ratios == pytest.approx((70 / 105, 1, 70 / 77))
    assert ours.server_cpu == 3e-6


def test_a_ratio_to_one_that_was_not_measured_is_left_out() -> None:
    alone = replace(RESULTS, measurements=RESULTS.measurements[:1])
    assert report.rows(alone, "randread")[0].ratios == (1.0, None, None)
    assert report.verdicts(alone) == []


def test_what_is_wanted_is_asked_of_the_counting_mode_only() -> None:
    ((wanted, value),) = report.verdicts(RESULTS)
    assert (wanted.contender, wanted.reference) == ("pyublk-null", "kublk")
    assert value == pytest.approx(1.1)
    assert report.verdicts(replace(RESULTS, counting=False)) == []


def test_what_is_wanted_of_the_servers_processor_time() -> None:
    lean = replace(
        RESULTS,
        measurements=(
            replace(measured("kublk-batch", 70_000.0), server_cpu=3e-6),
            replace(measured("pyublk-null-batch", 77_000.0), server_cpu=4e-6),
        ),
    )
    values = {wanted.cpu: value for wanted, value in report.verdicts(lean)}
    assert values == {False: pytest.approx(1.1), True: pytest.approx(0.75)}
    output = StringIO()
    assert not report.show(lean, Console(file=output, width=120))
    words = "MISSED: pyublk-null-batch is 0.750 of kublk-batch in randread, per CPU, wanted 0.995"
    assert words in output.getvalue()


def test_what_a_saved_copy_predicts() -> None:
    rates = {
        "pyublk-null-batch": 5000.0,  # 200 us, of which 150 are for the copy
        "pyublk-null-batch-user-copy": 20_000.0,
        "pyublk-disk-copy": 1000.0,  # 1000 us, so 850 without
        "pyublk-disk-auto-buffer": 1250.0,
    }
    measurements = tuple(
        replace(measured(name, rate), job="read-1m") for name, rate in rates.items()
    )
    results = replace(RESULTS, measurements=measurements)
    assert report.saved_copy(results) == pytest.approx((1000 / 850, 1.25))
    output = StringIO()
    report.show(results, Console(file=output, width=120))
    assert (
        "1 MiB reads without the copy: 1.25 of those with it, predicted 1.18" in output.getvalue()
    )
    assert report.saved_copy(replace(results, measurements=measurements[:3])) is None


@pytest.mark.parametrize(("iops", "verdict"), [(74_000.0, "reached"), (73_000.0, "MISSED")])
def test_the_tables_end_with_a_verdict(iops: float, verdict: str) -> None:
    results = replace(
        RESULTS, measurements=(*RESULTS.measurements[:3], measured("pyublk-null", iops))
    )
    output = StringIO()
    passed = report.show(results, Console(file=output, width=120))
    assert passed is (verdict == "reached")
    assert f"{verdict}: pyublk-null is {iops / 70_000:.3f} of kublk" in output.getvalue()
    assert "not measured: pyublk-async: it did not start" in output.getvalue()


def test_the_references_are_contenders_of_their_kind() -> None:
    for kind, names in REFERENCES.items():
        assert [CONTENDERS[name].kind for name in names] == [kind] * 3
    assert all({w.contender, w.reference} <= CONTENDERS.keys() for w in report.WANTED)


def fio_says(**changes: object) -> str:
    side = {
        "total_ios": 5000,
        "iops": 10_000.0,
        "bw_bytes": 40_960_000,
        "lat_ns": {"mean": 6.4e6, "percentile": {"50.000000": 6_000_000, "99.000000": 9_000_000}},
    }
    idle = {"total_ios": 0}
    job = {"error": 0, "read": {**side, **changes}, "write": idle}
    return "fio: a warning\n" + json.dumps({"jobs": [job]})


def test_fio_is_read_in_seconds_and_bytes() -> None:
    assert jobs.parse(fio_says()) == jobs.Outcome(10_000.0, 40_960_000, 6.4e-3, 6e-3, 9e-3)


def test_a_run_without_requests_is_no_result() -> None:
    with pytest.raises(ValueError, match="fio served no request in the time it had"):
        jobs.parse(fio_says(total_ios=0))


def test_fio_that_fails_is_told_in_its_own_words() -> None:
    line = [sys.executable, "-c", "import sys; sys.exit('no such engine')"]
    with pytest.raises(RuntimeError, match="fio failed: no such engine"):
        jobs.run(line, timeout=30, unblock=lambda: None)


def test_fio_that_hangs_is_unblocked_and_ended() -> None:
    unblocked = []
    line = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(RuntimeError, match=r"fio did not end within 0\.1 s"):
        jobs.run(line, timeout=0.1, unblock=lambda: unblocked.append(True))
    assert unblocked == [True]


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(
        programs.Unavailable, match=r"no-such-program is not installed \(Debian package nothing\)"
    ):
        programs.find("no-such-program", "nothing")


def test_a_program_that_fails_is_named_with_its_last_words() -> None:
    with pytest.raises(programs.Unavailable, match=r"ls failed: .*/no/such/place"):
        programs.run("/bin/ls", "/no/such/place")


def test_a_missing_module_is_named_with_the_way_out() -> None:
    with pytest.raises(
        programs.Unavailable, match=r"does not load no_such_module .* --count-instructions does"
    ):
        programs.load_module("no_such_module")


@pytest.mark.parametrize(
    ("release", "series"),
    [("7.2.13+deb14-amd64", "7.2"), ("6.12.117-amd64", "6.12"), ("7.3", "7.3")],
)
def test_a_release_belongs_to_a_series(release: str, series: str) -> None:
    assert kublk.series_of(release) == series


def test_the_source_is_that_of_the_kernel_or_the_newest() -> None:
    names = ["linux-source-6.12", "linux-source-7.2", "linux-source", "linux-source-6.1"]
    assert kublk.choose_source(names, "6.12") == "linux-source-6.12"
    assert kublk.choose_source(names, "6.18") == "linux-source-7.2"
    with pytest.raises(programs.Unavailable, match="has no package linux-source"):
        kublk.choose_source(["linux-source"], "7.2")


def test_ring_ratios_are_taken_within_each_round() -> None:
    rounds = [ring.Round(100, 110, 200), ring.Round(200, 220, 400), ring.Round(100, 110, 900)]
    result = ring.summary(rounds)
    assert result.native_ratio == pytest.approx(1.1)
    assert result.python_ratio == pytest.approx(2.0)
    assert result.passed
    assert not replace(result, native_ratio=1.21).passed
    assert not replace(result, python_ratio=2.8).passed


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")
def test_the_three_ring_loops_run() -> None:
    try:
        result = ring.measure(rounds=3, batches=10)
    except OSError as error:
        pytest.skip(f"io_uring is not to be had: {error}")
    assert 0 < result.bare_ns < 1e6
    assert 0 < result.native_ns < 1e6
    assert 0 < result.python_ns < 1e6


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.plot import draw

    path = tmp_path / f"plot.{suffix}"
    draw(RESULTS, path)
    assert path.stat().st_size > 1000


def test_an_unknown_contender_is_refused_with_those_there_are() -> None:
    done = CliRunner().invoke(main, ["--only", "kubl"])
    assert done.exit_code == 2
    assert "'kublk-batch'" in done.output


@pytest.mark.parametrize(("missing", "code"), [({}, 0), ({guest.THE_REST: "broke off"}, 1)])
def test_a_run_that_broke_off_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: dict[str, str], code: int
) -> None:
    measurements = (measured("null_blk", 100_000.0), measured("pyublk-null", 77_000.0))
    results = replace(RESULTS, measurements=measurements, missing=missing)
    monkeypatch.setattr(guest, "carry_out", lambda *_: results)
    arguments = ["--count-instructions", "--only", "pyublk-null", "--output", str(tmp_path)]
    assert CliRunner().invoke(main, arguments).exit_code == code


def test_many_disks_are_shown_one_by_one(tmp_path: Path) -> None:
    run = many.Run(
        kind="ram",
        disks=4,
        starts=[0.004, 0.004, 0.004, 0.008],
        stops=[0.009] * 4,
        commands={"add": [0.0002] * 4, "set_params": [], "start": [0.001] * 4, "stop": [0.007] * 4},
        idle=4 << 16,
        used=4 << 17,
        helper=4096,
        descriptors=12,
        threads=4,
        switches=2.0,
        iops=50000.0,
    )
    results = many.Results("2026-11-28", "7.3.4", "Python 3.11.2", counting=True, runs=(run,))
    results.save(tmp_path / "many.json")
    assert many.Results.load(tmp_path / "many.json") == results
    output = StringIO()
    Console(file=output, width=160).print(many.table(results))
    (line,) = [line for line in output.getvalue().splitlines() if "ram" in line]
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == [
        *("ram", "4", "4.0", "8.0", "9.0", "9.0", "1.2", "7.0"),
        *("64", "128", "1.0", "3.00", "1.00", "0.50", "50,000"),
    ]
