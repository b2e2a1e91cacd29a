"""A C compiler for any machine and an old C library: zig's, called as Python's build calls gcc.

It runs as a program, `compiler.py TRIPLE HEADERS... -- ARGUMENTS`, which is what CC is set to. The
build runs in one interpreter for all targets, and what it says of itself is taken out.
"""

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

#: Of the interpreter that runs the build: where its libraries are. And what zig does not know;
#: clang does not let one function of a module be replaced by another module's anyway.
DROPPED = ("-L", "-Wl,-rpath", "-Wl,--rpath", "-fno-semantic-interposition")


def translated(arguments: Sequence[str], headers: Sequence[str], own: str) -> list[str]:
    """Return a compiler's arguments for a target.

    Args:
        arguments: as setuptools gives them.
        headers: directories of the target's Python.h.
        own: that of the interpreter that runs the build.
    """
    kept = [word for word in arguments if word != f"-I{own}" and not word.startswith(DROPPED)]
    # Debugging data names the directories of this machine, and is most of the file.
    end = ["-g0"] if "-c" in kept else ["-Wl,-s"]
    return [*(f"-I{directory}" for directory in headers), *kept, *end]


def main(words: Sequence[str]) -> None:
    import ziglang  # type: ignore[import-untyped, import-not-found, unused-ignore]

    at = words.index("--")
    triple, *headers = words[:at]
    zig = Path(str(ziglang.__file__)).with_name("zig")
    arguments = translated(words[at + 1 :], headers, sysconfig.get_path("include"))
    os.execv(zig, [str(zig), "cc", "-target", triple, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
