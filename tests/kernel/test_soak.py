"""The soak's beginning; `./run soak` goes on for as long as you like."""

import logging

import pytest
import soak


@pytest.mark.leaves_threads
@pytest.mark.timeout(400)
def test_a_thousand_events(caplog: pytest.LogCaptureFixture) -> None:
    """Handlers that misbehave."""
    caplog.set_level(logging.CRITICAL, "pyublk")  # each event would be told
    enough = lambda report: report.lives.total() >= 8 and report.events.total() >= 1000  # noqa: E731
    report = soak.run(4, ["chaos"], enough, print)
    assert report.checked > 5000
    for event in ("raise first", "raise last", "stall", "keep", "late wake-up", "kill", "stop"):
        assert report.events[event], f"{event} never happened: {report}"


def test_what_clients_see_of_servers_that_are_killed() -> None:
    """Concurrent reads and writes to few blocks, over kills, swaps and sizes."""
    report = soak.run(1, ["model"], lambda report: report.lives.total() >= 2, print)
    assert report.checked > 200
    assert len(report.pauses["another server"]) >= 2
