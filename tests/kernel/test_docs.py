"""The examples of the documentation that need a real disk."""

import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from pages import blocks, pages_that_need, run


@pytest.mark.parametrize("page", pages_that_need("kernel"), ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    # An example that serves until Ctrl-C gets one.
    interrupt = threading.Timer(8, signal.raise_signal, (signal.SIGINT,))
    interrupt.start()
    try:
        assert run(page, available="kernel") == len(blocks(page))
    finally:
        interrupt.cancel()
        interrupt.join()
