# SPDX-License-Identifier: MIT
"""`python -m pyublk`: the command."""

from pyublk.cli import main

main(prog_name="pyublk")
