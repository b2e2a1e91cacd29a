"""The soak's beginning; `./run soak` goes on for as long as you like."""

import logging

import pytest
import soak
from report import Report


@pytest.mark.thorough
@pytest.mark.leaves_threads
@pytest.mark.timeout(400)
def test_handlers_that_misbehave(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pyublk")  # each event would be told

    def enough(report: Report) -> bool:
        return report.lives.total() >= 3 and report.events.total() >= 350

    report = soak.run(4, ["chaos"], enough, print)
    assert report.checked > 1500
    for event in ("raise first", "raise last", "stall", "keep", "late wake-up", "kill", "stop"):
        assert report.events[event], f"{event} never happened: {report}"


def test_what_clients_see_of_servers_that_are_killed() -> None:
    """Concurrent reads and writes to few blocks, over kills, swaps and sizes."""
    report = soak.run(1, ["model"], lambda report: report.lives.total() >= 2, print)
    assert report.checked > 200
    assert len(report.pauses["another server"]) >= 2
