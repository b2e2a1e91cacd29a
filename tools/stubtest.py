"""mypy's stubtest for `pyublk._native`, of which the stub is in parts.

stubtest leaves a name that a stub imports to the check of the module that it comes from. At run
time the parts are no modules: here they become one, which has what `_native` exports.
"""

import sys
from pathlib import Path
from types import ModuleType

from mypy import stubtest

from pyublk import _native

ALLOWLIST = "tests/stubtest-allowlist"


def exported(name: str) -> object:
    if name not in _native.__all__:
        raise AttributeError(name)
    return getattr(_native, name)


def main() -> int:
    part = ModuleType("part")
    vars(part)["__getattr__"] = exported
    stubs = Path(_native.__file__).parent.glob("_binding/[a-z]*.pyi")
    names = sorted(f"pyublk._binding.{stub.stem}" for stub in stubs)
    sys.modules.update(dict.fromkeys(names, part))
    words = ["pyublk._native", *names, "--allowlist", ALLOWLIST]
    return stubtest.test_stubs(stubtest.parse_options(words))


if __name__ == "__main__":
    sys.exit(main())
