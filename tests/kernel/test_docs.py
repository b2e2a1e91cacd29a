"""The examples of the documentation that need a real disk."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from needs import needs_what_it_asks_for

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from pages import blocks, pages_that_need, run


@contextmanager
def interrupted_when_it_waits() -> Iterator[None]:
    """An example that serves until Ctrl-C gets one, once Device.wait has the signals."""
    main = threading.main_thread().ident
    assert main is not None
    before = signal.getsignal(signal.SIGTERM)
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.02):
            if signal.getsignal(signal.SIGTERM) is not before:
                signal.pthread_kill(main, signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("page", pages_that_need("kernel"), ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    with needs_what_it_asks_for(), interrupted_when_it_waits():
        assert run(page, available="kernel") == len(blocks(page))
