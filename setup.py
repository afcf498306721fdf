"""Builds the one thing that is installed: the extension module `eimf_core` with its type stub.

Metadata and dependencies are in pyproject.toml. `EIMF_NATIVE=1 pip install .` adds -march=native; without it the wheel runs on
every CPU of its kind and picks the instruction set at run time.
"""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc").glob("*.cpp"))
HEADERS = sorted(path.relative_to(HERE).as_posix() for pattern in ("*.h", "*.hpp", "*.inc") for path in (HERE / "csrc").glob(pattern))
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]

COMPILER_HINT = ("no working C++17 compiler was found ({}). Install one and run the same command again: "
                 "`apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora, RHEL), `xcode-select --install` (macOS).")
HEADER_HINT = ("Python.h was not found in {}. Install Python's headers and run the same command again: "
               "`apt install python3-dev` (Debian, Ubuntu), `dnf install python3-devel` (Fedora, RHEL); with pyenv or conda they come along.")
PYBIND11_HINT = ("this Python has no pybind11, which building here needs. Run `pip install .` instead, which fetches it for the build alone, "
                 "or `pip install pybind11` and the same command again.")


def check_tools(compiler):
    """End with one sentence if Python.h or a C++17 compiler is missing. `compiler` is the command, as a list."""
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        sys.exit("error: " + HEADER_HINT.format(include))
    if shutil.which(compiler[0]) is None:
        sys.exit("error: " + COMPILER_HINT.format(f"`{compiler[0]}` is not on the PATH"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <optional>\nint main() { std::optional<int> x = 1; return *x - 1; }\n")
        probe = subprocess.run([*compiler, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))],
                               capture_output=True, text=True)
    if probe.returncode:
        lines = probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"]
        sys.exit("error: " + COMPILER_HINT.format(f"`{' '.join(compiler)}` cannot compile C++17: {lines[0]}"))


class Build(build_ext):
    def build_extensions(self):
        check_tools(list(self.compiler.compiler_cxx))
        try:
            import pybind11
            from pybind11.setup_helpers import ParallelCompile
        except ImportError:
            sys.exit("error: " + PYBIND11_HINT)
        self.compiler.add_include_dir(pybind11.get_include())
        # The compiler object takes its C command for C++ sources too; name the C++ one.
        self.compiler.set_executable("compiler_so", [*self.compiler.compiler_cxx, *self.compiler.compiler_so[1:]])
        with ParallelCompile():  # one file on each core
            super().build_extensions()


native = ["-march=native"] if os.environ.get("EIMF_NATIVE") == "1" else []
version = re.search(r'#define EIMF_VERSION "(.+)"', (HERE / "csrc" / "eimf.h").read_text())[1]
setup(
    version=version,
    py_modules=[],
    packages=["eimf_core-stubs"],  # PEP 561: type information for a module that is one compiled file
    package_dir={"eimf_core-stubs": "csrc/stubs"},
    package_data={"eimf_core-stubs": ["*.pyi"]},
    ext_modules=[Extension("eimf_core", SOURCES, depends=HEADERS, include_dirs=["csrc"], define_macros=[("EIMF_LOCAL", None)], language="c++",
                           extra_compile_args=FLAGS + native, extra_link_args=["-pthread"])],
    cmdclass={"build_ext": Build},
)
