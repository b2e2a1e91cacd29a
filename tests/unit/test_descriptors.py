"""The limit of open files: raised when disks come near it, and not for children."""

import logging
import os
import resource
from collections.abc import Iterator

import pytest

from pyublk import descriptors
from pyublk.descriptors import RESERVE, make_room

LIMIT = resource.RLIMIT_NOFILE


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(LIMIT)
    monkeypatch.setattr(descriptors, "_before", None)
    resource.setrlimit(LIMIT, (1024, before[1]))
    yield 1024, before[1]
    resource.setrlimit(LIMIT, before)


def test_it_stays_while_there_is_room() -> None:
    make_room(1024 - RESERVE - 1)
    assert resource.getrlimit(LIMIT)[0] == 1024


def test_it_is_raised_when_there_is_little(
    limits: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        make_room(1024 - RESERVE)
        make_room(1024 - RESERVE)
    assert resource.getrlimit(LIMIT) == (limits[1], limits[1])
    assert caplog.text.count("the limit of open files is") == 1


def test_a_low_number_tells_that_no_high_one_is_left(limits: tuple[int, int]) -> None:
    make_room(5)
    assert resource.getrlimit(LIMIT)[0] == limits[1]


def test_a_forked_child_gets_the_old_one_back(limits: tuple[int, int]) -> None:
    make_room(1023)
    if (child := os.fork()) == 0:
        os._exit(0 if resource.getrlimit(LIMIT) == limits else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert resource.getrlimit(LIMIT)[0] == limits[1]


def test_where_it_may_not_be_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_which: int, _limits: tuple[int, int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with caplog.at_level(logging.INFO):
        make_room(1023)
    assert "the limit of 1024 open files stays: [Errno 1]" in caplog.text
    monkeypatch.undo()
