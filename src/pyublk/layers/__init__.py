# SPDX-License-Identifier: MIT
"""Targets over targets: a layer passes requests on, and changes some of them."""

from pyublk.layers.base import Below, Layer

__all__ = ["Below", "Layer"]
