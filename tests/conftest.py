"""Fixtures that several test files use."""
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))

from eimf.artifacts import save_array  # noqa: E402
from tiny import finished_stage, write_dataset  # noqa: E402

# A shell starts what it puts in the background with SIGINT ignored; tests of Ctrl-C would then wait for ever, as would the programs they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


N_USERS, N_ITEMS, TEXT_DIM, CLUSTERS = 200, 60, 12, 9  # of the tiny data set
TRAIN_FLAGS = ["--dim", "16", "--max-iterations", "60", "--validate-every", "10", "--threads", "1"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A data folder with finished stages 01, 02, 03 and 05 of 200 users in 4 groups that click within their group."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    histories = [(1 + rng.integers(0, 4) * 15 + rng.integers(0, 15, rng.integers(5, 15))).tolist() for _ in range(N_USERS)]
    split = np.repeat([0, 1, 2], [160, 20, 20])
    write_dataset(root, [{"title": f"item {i}"} for i in range(1, N_ITEMS + 1)], histories, split)

    def encode(folder):
        has = np.ones(N_ITEMS + 1, bool)
        has[[0, 7, 8]] = False
        text = rng.standard_normal((N_ITEMS + 1, TEXT_DIM)).astype(np.float32)
        save_array(folder / "item_text.npy", np.where(has[:, None], text, 0))
        save_array(folder / "item_has_text.npy", has)

    def cluster(folder):
        save_array(folder / "cluster_of_user.npy", np.where(split == 0, rng.integers(-1, CLUSTERS, N_USERS), -1).astype(np.int32))

    def interests(folder):
        counts = rng.integers(1, 6, CLUSTERS)
        save_array(folder / "interest_vectors.npy", rng.standard_normal((counts.sum(), TEXT_DIM)).astype(np.float32))
        save_array(folder / "interest_offsets.npy", np.concatenate([[0], np.cumsum(counts)]))

    for name, write in (("02_encode_text", encode), ("03_cluster_users", cluster), ("05_encode_interests", interests)):
        finished_stage(root, "tiny", name, write)
    return root


@pytest.fixture(scope="session")
def train(tiny, run_script):
    def call(*arguments):
        done = run_script("stages/06_train.py", "--data-dir", tiny, "--dataset", "tiny", *TRAIN_FLAGS, *arguments)
        return done, tiny / "tiny" / "06_train"
    return call


@pytest.fixture(scope="session")
def finished(train):
    """The folder of a finished EIMF run on the tiny data set."""
    done, folder = train("--eimf")
    assert done.returncode == 0, done.stderr
    return folder / "remi-eimf-s0"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory, root):
    """A copy of the repository's tracked files."""
    folder = tmp_path_factory.mktemp("checkout") / "eimf"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        if (root / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, folder / file)
    return folder


def run_all(checkout, *arguments, timeout=1500):
    """run_all.sh within the environment the tests run in."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    return subprocess.run(["bash", "run_all.sh", *map(str, arguments)], cwd=checkout, env=environment, capture_output=True,
                          text=True, timeout=timeout, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def sample(checkout):
    """The checkout after `bash run_all.sh`, and what that printed."""
    done = run_all(checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return checkout, done.stdout


CHECKOUT_FILES = ("test_pipeline.py", "test_readme.py", "test_reproduce.py", "test_serve.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "checkout" not in item.fixturenames)  # what takes longest comes first
    for item in items:
        assert "checkout" not in item.fixturenames or item.path.name in CHECKOUT_FILES, f"{item.path.name} uses the checkout; add it to CHECKOUT_FILES"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process runs all of a file's tests, and all files that use the checkout, so that what they share is made once.

    Groups by pytest-xdist's own marks would say this in a line, but version 3.8 does not see them under pytest 9.2.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "checkout" if Path(file).name in CHECKOUT_FILES else file
    return Scheduling(config, log)


def pytest_addoption(parser):
    parser.addoption("--backbone", action="append", default=[], metavar="FILE.py:ClassName",
                     help="test a backbone of your own too: pytest tests/test_backbones.py --backbone FILE.py:ClassName")
