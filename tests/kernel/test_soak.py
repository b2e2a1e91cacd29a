"""A thousand events of trouble, each byte verified; `./run chaos` goes on as long as you like."""

import logging

import chaos
import pytest


@pytest.mark.leaves_threads
@pytest.mark.timeout(400)
def test_a_thousand_events(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pyublk")  # each event would be told
    told: list[str] = []
    enough = lambda report: report.lives >= 8 and report.events.total() >= 1000  # noqa: E731
    report = chaos.run(4, enough, told.append)
    assert report.wrong == []
    assert report.blocks > 5000
    for event in ("raise first", "raise last", "stall", "keep", "late wake-up", "SIGKILL", "stop"):
        assert report.events[event], f"{event} never happened: {told[-1]}"
