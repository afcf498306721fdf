"""setup.py's sentences for what is missing, and the header in plain C."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import eimf_core
import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


def build(tmp_path, **environment):
    """`setup.py build_ext` into tmp_path; everything before compiling runs as in `pip install .`"""
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"],
                          cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_missing_compiler_is_one_sentence(tmp_path):
    run = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    message = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1 and "no-such-compiler" in message[0] and "apt install g++" in message[0] and "xcode-select" in message[0]


def test_compiler_without_cpp17_is_one_sentence(tmp_path):
    fake = tmp_path / "old-c++"
    fake.write_text("#!/bin/sh\necho \"unrecognized command-line option '-std=c++17'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    run = build(tmp_path, CXX=str(fake))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "cannot compile C++17: unrecognized command-line option" in run.stderr


def test_missing_python_header_is_one_sentence(tmp_path):
    code = ("import sysconfig, runpy, sys; real = sysconfig.get_path; "
            f"sysconfig.get_path = lambda name, *a, **k: {str(tmp_path)!r} if name == 'include' else real(name, *a, **k); "
            "sys.argv = ['setup.py', 'build_ext', '--build-temp', sys.argv[1], '--build-lib', sys.argv[1]]; runpy.run_path('setup.py', run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"error: Python.h was not found in {tmp_path}" in run.stderr and "apt install python3-dev" in run.stderr


def test_missing_pybind11_is_one_sentence(tmp_path):
    code = ("import runpy, sys; sys.modules['pybind11'] = None; "  # None: importing it fails
            "sys.argv = ['setup.py', 'build_ext', '--build-temp', sys.argv[1], '--build-lib', sys.argv[1]]; runpy.run_path('setup.py', run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "error: this Python has no pybind11" in run.stderr and "pip install ." in run.stderr


@pytest.mark.parametrize("language", ["c", "c++"])
def test_header_is_plain_c99_and_cpp(tmp_path, language):
    compiler = shutil.which("cc" if language == "c" else "c++")
    if compiler is None:
        pytest.skip(f"no {language} compiler")
    source = tmp_path / "use.c"
    source.write_text('#include "eimf.h"\nint main(void) { return eimf_ap_defaults().max_iter == 200 ? 0 : 1; }\n')
    standard = "-std=c99" if language == "c" else "-std=c++11"
    run = subprocess.run([compiler, "-x", language, standard, "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-I", CSRC, "-fsyntax-only", source],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_readme_embeds_the_core_as_the_examples_do():
    """Line by line; test_core_native.py builds and runs those."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for language, name in (("cmake", "CMakeLists.txt"), ("c", "recommend.c")):
        example = [line.strip() for line in (CSRC / "examples" / name).read_text().splitlines()]
        lines = re.findall(rf"```{language}\n(.*?)```", readme, re.S)[0].splitlines()
        assert len(lines) > 3 and all(line.split("  #")[0].strip() in example for line in lines)


def test_the_module_shows_no_c_function():
    """Else a program that uses the C library and Python would have both call the same one."""
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("needs nm and ELF")
    shown = subprocess.run([nm, "-D", "--defined-only", eimf_core.__file__], capture_output=True, text=True, check=True).stdout
    assert "PyInit_eimf_core" in shown and " eimf_" not in shown


def test_stub_lists_every_public_name():
    stub = (CSRC / "stubs" / "__init__.pyi").read_text()
    for name in dir(eimf_core):
        if not name.startswith("_"):
            assert f"def {name}(" in stub or f"class {name}:" in stub, name
            assert getattr(eimf_core, name).__doc__, name
    for name in dir(eimf_core.Clustering):
        if not name.startswith("_"):
            assert f"def {name}(self)" in stub, name


def test_version_is_the_headers():
    assert f'#define EIMF_VERSION "{eimf_core.__version__}"' in (CSRC / "eimf.h").read_text()


@pytest.mark.slow
def test_pip_install_from_a_clean_folder(tmp_path):
    """Only the extension and its stub are installed, and it works without the repository."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(CSRC, source / "csrc")
    target = tmp_path / "target"
    run = subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    top = {path.name for path in target.iterdir()}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {name for name in top if not name.endswith(".dist-info")} == {f"eimf_core{suffix}", "eimf_core-stubs"}
    code = "import eimf_core, numpy as np; print(eimf_core.__file__, len(eimf_core.affinity_propagation(np.eye(3, dtype=np.float32), -9.).exemplars))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True)
    assert run.stdout.split()[-1] == "1" and str(target) in run.stdout, run.stderr
