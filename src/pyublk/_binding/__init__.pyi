"""The parts of `pyublk._native`, for type checkers: `x.pyi` says what `x.pxi` gives to Python.

At run time there is only `pyublk._native`, which has all of it.
"""
