# SPDX-License-Identifier: MIT
"""Targets served by nbdkit: `plugin.py`, which it runs, what that calls, and disks made of both."""

from pathlib import Path

#: What nbdkit is given: ``nbdkit python PLUGIN target=ram size=1G``.
PLUGIN = Path(__file__).with_name("plugin.py")
