# SPDX-License-Identifier: MIT
"""The files of a release: a source distribution, and a wheel for each interpreter and machine.

From the bottom up: `targets` (what is built for), `headers` (Python's, from Debian's packages),
`compiler` (zig's, for any machine and an old C library), `debian` and `interpreters` (where these
and interpreters are taken from), `building`, `checking`, `trying` (the unit tests, on what was
built), `emulated` (wheels of the other machine, in an emulated one; `disk` is run there).
"""
