# SPDX-License-Identifier: MIT
"""Pauses between the attempts to reach something that is away."""

import random

#: Seconds of the first pause at most, and of the longest.
FIRST, LONGEST = 0.1, 5.0


def longer(pause: float, first: float = FIRST, longest: float = LONGEST) -> float:
    """The seconds of the next pause after one of so many; 0: of the first."""
    return min(longest, max(first, 2 * pause))


def drawn(pause: float) -> float:
    """A pause of between half and all of these seconds, so that all who wait for a server do not
    come at once when it is back."""
    return random.uniform(pause / 2, pause)
