"""The compiled core, which dloop can do without; all else stands in pyproject.toml.

DLOOP_NO_EXTENSIONS=1 leaves it out; DLOOP_REQUIRE_EXTENSION=1 makes a failure to build it fatal.
"""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = "dloop._core"


class BuildCore(build_ext):
    """Build the extension; where that fails, say so loudly and go on without it."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if wanted("DLOOP_REQUIRE_EXTENSION"):
                raise
            self.extensions.clear()  # there is nothing to copy into an editable install
            print(
                f"\n{'*' * 79}\n"
                f"WARNING: dloop's compiled core could not be built ({error}). dloop is\n"
                "installed without it and will use its core in pure Python, which does the same\n"
                "but takes several times as long per step. For the compiled core install a C\n"
                "compiler and Python's headers, then reinstall dloop with pip's --no-cache-dir\n"
                "and --force-reinstall; DLOOP_REQUIRE_EXTENSION=1 makes this failure fatal, and\n"
                "dloop.BACKEND_REASON tells what is in use.\n"
                f"{'*' * 79}\n",
                file=sys.stderr,
            )


def wanted(variable):
    return os.environ.get(variable, "") not in ("", "0")


def extensions():
    if wanted("DLOOP_NO_EXTENSIONS"):
        return []
    from Cython.Build import cythonize

    core = Extension(CORE, ["dloop/_core.pyx"])
    return cythonize([core], build_dir="build/cython")


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCore})
