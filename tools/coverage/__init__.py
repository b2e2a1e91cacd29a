# SPDX-License-Identifier: MIT
"""Which lines of Python, Cython and C the tests run, in one table.

`cython` maps what gcov counted in the generated C back to the source, `rooms` adds up.
"""
