# SPDX-License-Identifier: MIT
"""The files of a release: a source distribution, and a wheel for each interpreter and machine.

From the bottom up: `targets` (what is built for), `headers` (Python's, from Debian's packages),
`compiler` (zig's, for any machine and an old C library), `building`, `checking`, `roots`
(interpreters that this machine does not have), `trying` (the unit tests, on what was built).
"""
