"""Builds the extension: Cython binding over the C core. Everything else is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = sorted(str(path) for path in Path("src/pyublk/_core").glob("*.c"))
HEADERS = sorted(str(path) for path in Path("src/pyublk/_core").glob("*.h"))
INCLUDES = sorted(str(path) for path in Path("src/pyublk").glob("_native_*.pxi"))

compile_args = ["-std=gnu11", "-O2", "-fno-semantic-interposition"]
link_args = ["-pthread", "-Wl,-z,now"]
if sanitize := os.environ.get("PYUBLK_SANITIZE"):  # for example: address,undefined
    compile_args += [f"-fsanitize={sanitize}", "-g", "-O1", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={sanitize}"]

native = Extension(
    "pyublk._native",
    sources=["src/pyublk/_native.pyx", *CORE],
    depends=[*HEADERS, *INCLUDES],
    include_dirs=["src/pyublk"],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

setup(ext_modules=cythonize([native], build_dir="build/cython"))
