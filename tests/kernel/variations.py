"""What `./run test` leaves to `./run kernel`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def variations(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test; of the variations of one thing only the `quick` ones are in
    `./run test` (`--quick`), all of them in `./run kernel`."""
    values = [*values]
    assert all(value in values for value in quick)
    return [
        value
        if value in quick
        else pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough
        )
        for value in values
    ]
