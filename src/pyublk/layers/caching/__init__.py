# SPDX-License-Identifier: MIT
"""The parts of a cache: what is below it, who works for it, and what it writes down."""
