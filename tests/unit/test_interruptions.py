# SPDX-License-Identifier: MIT
"""What signals and cancellations may interrupt, and what they may not."""

import asyncio
import errno
import signal
import threading
import time
from typing import Any

import pytest

from pyublk.interruptions import Signalled, run_shielded, run_shielded_async, signals_raised


def test_a_cancellation_waits_for_what_is_under_way() -> None:
    begun, go_on = threading.Event(), threading.Event()
    ended: list[str] = []

    def step() -> None:
        begun.set()
        assert go_on.wait(30)
        ended.append("step")

    async def main() -> None:
        task = asyncio.ensure_future(run_shielded_async(step))
        await asyncio.to_thread(begun.wait, 30)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["step"]

    asyncio.run(main())


def test_a_step_that_fails_on_a_loop() -> None:
    def step() -> None:
        raise OSError(errno.EIO, "no")

    with pytest.raises(OSError, match="no"):
        asyncio.run(run_shielded_async(step))


def test_a_signal_that_comes_while_wait_prepares_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own handlers are back all the same."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    set_handler = signal.signal

    def set_and_send(number: int, handler: Any) -> Any:
        replaced = set_handler(number, handler)
        if handler not in before:
            signal.raise_signal(number)
        return replaced

    monkeypatch.setattr(signal, "signal", set_and_send)
    with pytest.raises(Signalled), signals_raised():
        pytest.fail("the signal did not end the preparation")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("signals", [1, 2, 20])
def test_signals_wait_for_the_end_of_a_step(signals: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    told = threading.Event()
    ended: list[bool] = []

    def step() -> None:
        for _ in range(signals):
            signal.pthread_kill(main, signal.SIGINT)
        assert told.wait(30), "nobody was told of the signal"
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_shielded(step, told.set)
    assert ended == [True]


def test_a_step_s_result_and_its_failure() -> None:
    assert run_shielded(lambda: 7, pytest.fail) == 7
    with pytest.raises(ZeroDivisionError):
        run_shielded(lambda: 1 // 0, pytest.fail)


def test_a_step_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert run_shielded(threading.get_ident, pytest.fail) == threading.get_ident()
