"""Whether a disk's server is restarted, how often, and why not."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk.features import Features
from pyublk.options import DiskOptions
from pyublk.recovery import Recovery
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
from pyublk.service.records import Record
from pyublk.service.restarts import LIMIT, PAUSES, WINDOW, Restarts, decide
from pyublk.targets import File, Mirror, Null, Ram
from pyublk.uapi import Feature

ALL = Feature((1 << 20) - 1)


def features(mask: Feature = ALL, release: str = "7.3.4") -> Features:
    return Features(mask=int(mask), kernel_release=release, privileged=True)


def decided(target: pyublk.Target, there: Recovery | None = None, **asked: Any) -> Restarts:
    return decide(DiskOptions(**asked), target, features(), background=True, there=there)


# ---- how often ----


def test_each_pause_is_longer_and_there_is_an_end() -> None:
    restarts = Restarts()
    pauses = []
    while (pause := restarts.pause(at=100.0 + len(pauses))) is not None:
        pauses.append(pause)
        restarts = restarts.counted(at=100.0 + len(pauses) - 1)
    assert pauses == list(PAUSES)
    assert len(pauses) == LIMIT == restarts.count
    assert pauses == sorted(set(pauses))


def test_what_is_long_ago_does_not_count() -> None:
    restarts = Restarts()
    for at in range(LIMIT):
        restarts = restarts.counted(float(at))
    assert restarts.pause(WINDOW - 1) is None
    assert restarts.pause(WINDOW) == PAUSES[LIMIT - 1]
    assert restarts.pause(WINDOW + LIMIT) == PAUSES[0]
    restarts = restarts.counted(WINDOW + LIMIT)
    assert restarts.count == LIMIT + 1
    assert restarts.times == (WINDOW + LIMIT,)


def test_what_is_said_of_it() -> None:
    restarts = Restarts()
    assert restarts.words() == "yes, at most 5 times in 10 minutes"
    assert restarts.history() is None
    assert (history := restarts.counted(0.0).history()) is not None
    assert history.startswith("1, the last on ")
    assert Restarts(why_not="it was added so").words() == "no: it was added so"


def test_a_record_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path))
    record = Record(
        id=0,
        cookie=1,
        server=ProcessId.own(),
        plan=DiskSpec(target="null"),
        log=None,
        recovery="resend",
        restarts=Restarts().counted(1.5),
    )
    record.write()
    assert Record.load(0) == record
    record.not_restarted()
    assert (found := Record.load(0)) is not None
    assert not found.is_restarted
    # Those of earlier versions have none.
    text = json.loads((tmp_path / "0.json").read_text())
    del text["recovery"], text["restarts"]
    (tmp_path / "0.json").write_text(json.dumps(text))
    assert Record.load(0) == replace(record, recovery=None, restarts=None)


@pytest.mark.parametrize(
    "wrong", [{"count": "1"}, {"count": True}, {"times": 3}, {"times": ["x"]}, {"why_not": 1}]
)
def test_what_is_no_history(wrong: dict[str, object]) -> None:
    fields = asdict(Restarts()) | wrong
    with pytest.raises((TypeError, ValueError)):
        Restarts.from_fields(fields)


# ---- whether ----


@pytest.mark.parametrize("target", [File("x", size=4096), Null(size=4096), Ram(size=4096)])
def test_targets_that_are_restarted(target: pyublk.Target) -> None:
    assert decided(target).on
    assert decided(target, recovery="fail").on
    assert decided(target, there=Recovery.RESEND).on


class Unknown(pyublk.Target):
    def read(self, offset: int, buffer: memoryview) -> None: ...


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"restart": False}, "it was added so"),
        ({"recovery": "none"}, "it was added with recovery=none"),
        ({"shared_memory": True}, "it shares memory with clients"),
    ],
)
def test_what_is_asked_for_decides(asked: dict[str, Any], why: str) -> None:
    restarts = decided(Null(size=4096), **asked)
    assert restarts.why_not is not None
    assert restarts.why_not.startswith(why)


@pytest.mark.parametrize(
    "target", [Unknown(size=4096, read_only=True), pyublk.Layer(Unknown(size=4096, read_only=True))]
)
def test_targets_that_are_not(target: pyublk.Target) -> None:
    said = f"the class {type(target).__name__} does not say that it is recoverable"
    assert decided(target).why_not == said
    with pytest.raises(ValueError, match=f"server cannot be restarted: {said}"):
        decided(target, restart=True)
    assert decided(target, there=Recovery.RESEND, restart=True).why_not == said


def test_the_kernel_decides_unless_it_is_asked_for() -> None:
    def found(features: Features, **asked: Any) -> Restarts:
        return decide(DiskOptions(**asked), Null(size=4096), features, background=True)

    without = features(ALL & ~Feature.USER_RECOVERY)
    assert str(found(without).why_not).startswith("recovery needs Linux 6.1, here is Linux 7.3.4")
    user = Features(mask=int(ALL), kernel_release="7.3.4", privileged=False)
    assert str(found(user).why_not).startswith("recovery needs CAP_SYS_ADMIN")
    bad = features(release="7.3.2")
    assert "requests may be lost" in str(found(bad).why_not)
    assert found(bad, restart=True).on
    assert found(bad, recovery="resend").on


def test_a_server_in_the_foreground_is_not_restarted() -> None:
    found = decide({}, Null(size=4096), features(), background=False)
    assert found.why_not == "it is served in the foreground"


def test_a_hang_is_longer_than_what_a_target_may_take() -> None:
    mirror = Mirror("a", "b", size=4096, leg_timeout=4)
    with pytest.raises(ValueError, match="hang_timeout must be above 6 s, for which Mirror may be"):
        decided(mirror, hang_timeout=6)
    assert decided(mirror, hang_timeout=7).on
    with pytest.raises(ValueError, match="hang_timeout is for a server that is restarted: it was"):
        decided(mirror, hang_timeout=7, restart=False)
