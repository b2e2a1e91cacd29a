"""Builds the extension, a Cython binding over the C core, and the helper program beside it.
Everything else is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from Cython.Build import cythonize
except ImportError:
    # A source distribution has what Cython made. In a checkout that may be older than its source.
    if not Path("PKG-INFO").exists():
        raise SystemExit("a checkout is built with Cython: pip install 'Cython>=3.1,<4'") from None
    cythonize = None

#: Where Cython's C goes; MANIFEST.in puts it into the source distribution.
GENERATED = Path("generated")

CORE = sorted(str(path) for path in Path("src/pyublk/_core").glob("*.c"))
HEADERS = sorted(str(path) for path in Path("src/pyublk/_core").glob("*.h"))
INCLUDES = sorted(str(path) for path in Path("src/pyublk/_binding").glob("*.pxi"))

compile_args = ["-std=gnu11", "-O3", "-fno-semantic-interposition", "-fvisibility=hidden"]
link_args = ["-pthread", "-Wl,-z,now"]
helper_args: list[str] = []
if sanitize := os.environ.get("PYUBLK_SANITIZE"):  # for example: address,undefined
    compile_args += [f"-fsanitize={sanitize}", "-g", "-O1", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={sanitize}"]
if os.environ.get("PYUBLK_COVERAGE"):  # see tools/coverage
    helper_args = ["--coverage", "-fprofile-update=atomic", "-O0"]
    compile_args += helper_args
    link_args += ["--coverage"]

native = Extension(
    "pyublk._native",
    sources=["src/pyublk/_native.pyx", *CORE],
    depends=[*HEADERS, *INCLUDES],
    include_dirs=["src/pyublk"],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)
helper = Extension(
    "pyublk.pyublk-helper",
    sources=[
        *sorted(str(path) for path in Path("src/pyublk/_helper").glob("*.c")),
        "src/pyublk/_core/ring.c",
        "src/pyublk/_core/forked.c",
    ],
    depends=[*HEADERS, *sorted(str(path) for path in Path("src/pyublk/_helper").glob("*.h"))],
    extra_compile_args=["-std=gnu11", "-O2", *helper_args],
    extra_link_args=["-Wl,-z,now", *helper_args],
)


class BuildWithHelper(build_ext):
    """The helper is treated as an extension, so that it is built, installed and edited as they are;
    only that it is linked as a program."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(helper.name.rpartition(".")[2]):
            return os.path.join(*fullname.split("."))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != helper.name:
            super().build_extension(ext)
            return
        objects = self.compiler.compile(
            ext.sources,
            output_dir=os.path.join(self.build_temp, "helper"),
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        program = Path(self.get_ext_fullpath(ext.name))
        program.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_executable(
            objects,
            program.name,
            output_dir=str(program.parent),
            extra_postargs=ext.extra_link_args,
        )


if cythonize is None:
    native.sources[0] = str(GENERATED / Path(native.sources[0]).with_suffix(".c"))
    extensions = [native]
else:
    extensions = cythonize([native], build_dir=str(GENERATED))

setup(
    ext_modules=[*extensions, helper],
    cmdclass={"build_ext": BuildWithHelper},
)
