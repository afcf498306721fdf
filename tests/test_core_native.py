"""The C and C++ side: CMake package, examples, the C API under sanitizers, and the Arm build."""
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(str(path) for path in CSRC.glob("*.cpp") if path.name != "bindings.cpp")
CHECK = ROOT / "tests" / "core_check.cpp"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CSRC}"]

RECOMMEND = "item 1, score 0.80, interest 1\nitem 3, score 0.70, interest 1\nitem 2, score 0.50, interest 0\n"
CLUSTER = "3 clusters, converged, net similarity -66.0\n" + "".join(f"point {i} -> exemplar {i // 3 * 3}\n" for i in range(9))


def command(*words, **options):
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert run.returncode == 0, f"{' '.join(map(str, words))}\n{run.stdout}{run.stderr}"
    return run.stdout


def compiled(folder, compiler, *flags, sources=SOURCES):
    """Object files of the sources, the core's by default, made two at a time."""
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source, to: command(compiler, *FLAGS, *flags, "-c", source, "-o", to), sources, objects))
    return objects


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run_examples(build):
    assert command(build / "recommend") == RECOMMEND
    assert command(build / "cluster") == CLUSTER


def c_project(folder, *lines):
    """A project without C++ of its own, where `lines` make the core known."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text("\n".join(["cmake_minimum_required(VERSION 3.16)", "project(app LANGUAGES C)", *lines,
                                                     f"add_executable(app {CSRC / 'examples' / 'recommend.c'})", "target_link_libraries(app PRIVATE eimf::eimf)"]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shared, build_type", [("OFF", "Release"), ("ON", "Debug")])
def test_examples_against_the_installed_package(tmp_path, shared, build_type):
    cmake = tool("cmake")
    command(cmake, "-S", CSRC, "-B", tmp_path / "build", f"-DBUILD_SHARED_LIBS={shared}", f"-DCMAKE_BUILD_TYPE={build_type}",
            "-DCMAKE_INSTALL_INCLUDEDIR=include/eimf-0.1")
    command(cmake, "--build", tmp_path / "build", "-j2")
    command(cmake, "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    assert (tmp_path / "prefix" / "include" / "eimf-0.1" / "eimf.h").is_file()
    command(cmake, "-S", CSRC / "examples", "-B", tmp_path / "examples", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    command(cmake, "--build", tmp_path / "examples")
    run_examples(tmp_path / "examples")
    command(cmake, "-S", c_project(tmp_path / "c", "find_package(eimf 0.1 REQUIRED)"), "-B", tmp_path / "app", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    command(cmake, "--build", tmp_path / "app")
    assert command(tmp_path / "app" / "app") == RECOMMEND
    if shared == "ON" and sys.platform == "linux":
        shown = command(tool("nm"), "-D", "--defined-only", *(tmp_path / "prefix").rglob("libeimf.so")).split()[2::3]
        declared = set(re.findall(r"^[a-z].*?\b(eimf_\w+)\(", (CSRC / "eimf.h").read_text(), re.MULTILINE))
        assert len(shown) > 15 and set(shown) == declared


@pytest.mark.slow
def test_examples_by_fetch_content(tmp_path):
    """Within a project in C, which links a program of its own too."""
    cmake = tool("cmake")
    source = c_project(tmp_path / "c", f"add_subdirectory({CSRC / 'examples'} examples)")
    command(cmake, "-S", source, "-B", tmp_path / "build", f"-DEIMF_SOURCE={CSRC}", "-DCMAKE_BUILD_TYPE=Debug")
    command(cmake, "--build", tmp_path / "build", "-j2")
    run_examples(tmp_path / "build" / "examples")
    assert command(tmp_path / "build" / "app") == RECOMMEND


def test_examples_without_cmake(tmp_path):
    """As an embedder without CMake does: compile the sources beside the program."""
    compiler = tool("c++")
    objects = compiled(tmp_path, compiler, "-O0")
    command(tool("cc"), "-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "-c", CSRC / "examples" / "recommend.c",
            "-o", tmp_path / "recommend-main.o")
    command(compiler, tmp_path / "recommend-main.o", *objects, "-pthread", "-o", tmp_path / "recommend")
    command(compiler, *FLAGS, CSRC / "examples" / "cluster.cpp", *objects, "-o", tmp_path / "cluster")
    run_examples(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_c_api_under_sanitizers(tmp_path, sanitizer):
    compiler = tool("c++")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if subprocess.run([compiler, *flags, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {sanitizer} sanitizer")
    objects = compiled(tmp_path, compiler, *flags, "-g1", "-O1", sources=[*SOURCES, CHECK])
    command(compiler, *flags, "-pthread", *objects, "-o", tmp_path / "check")
    size = ["quick"] if sanitizer == "thread" else []  # slow under that one
    assert command(tmp_path / "check", *size) == "all checks passed\n"
    assert command(tmp_path / "check", "halves") == "all checks passed\n"


@pytest.mark.slow
def test_arm_build(tmp_path):
    """Compiles for aarch64 where a cross compiler is installed, and runs under qemu-user where that is."""
    compiler = tool("aarch64-linux-gnu-g++")
    command(compiler, "-static", "-pthread", *compiled(tmp_path, compiler, "-O1", sources=[*SOURCES, CHECK]), "-o", tmp_path / "check")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu:
        assert command(qemu, tmp_path / "check", "quick") == "all checks passed\n"
