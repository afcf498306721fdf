"""Fixtures that several test files use."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))


@pytest.fixture(scope="session")
def root():
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """The folder of real data beside the repository; a test that asks for it is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "raw").is_dir():
        pytest.skip(f"no real data: {folder / 'data' / 'raw'} is absent")
    return folder


@pytest.fixture(scope="session")
def load_script():
    """Function that loads a script such as "stages/01_preprocess.py" as a module, to test one of its functions."""
    def load(path):
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture(scope="session")
def run_script():
    """Function that runs a script of the repository as a user does; returns the completed process, text captured."""
    def call(path, *arguments, timeout=120):
        return subprocess.run([sys.executable, str(ROOT / path), *map(str, arguments)], capture_output=True, text=True,
                              timeout=timeout)
    return call


@pytest.fixture(scope="session")
def sample_raw(tmp_path_factory, run_script):
    """Folder with the sample's raw files and its ground truth."""
    folder = tmp_path_factory.mktemp("raw")
    done = run_script("data/make_sample.py", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder
