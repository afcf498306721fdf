"""The CUDA path without a GPU: every tensor is where it is needed, and the results are the CPU's. See second_device.py."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from eimf.backbones import BACKBONES
from tiny import make_tiny_bert, write_interests

BEST = ("--recipe", "best")
RUNS = {
    **{f"{backbone}-eimf": ("--backbone", backbone, "--eimf") for backbone in BACKBONES},
    "remi": (),
    "bfloat16": ("--eimf", "--precision", "bfloat16"),
    "best": BEST,
    "best-eimf": ("--eimf", *BEST),
    "random-text": ("--eimf", "--control", "random-text"),
    "sampled": ("--loss", "sampled", "--sampling", "popularity"),
    "hard-negatives": ("--loss", "hard-negatives", "--eimf", "--soft-read-out"),
    "gbce": ("--loss", "gbce", "--dynamic-interests"),
    "cosine": ("--score-temperature", "0.1"),
}


@pytest.fixture(scope="module")
def answers(tiny, tmp_path_factory):
    """{name: what second_device.py printed for it}: all in one process of their own, since its device would be seen by other tests."""
    folder = tmp_path_factory.mktemp("second")
    data = shutil.copytree(tiny, folder / "data", ignore=shutil.ignore_patterns("06_train", "07_evaluate"))
    write_interests(data)
    common = ["--data-dir", str(data), "--dataset", "tiny", "--dim", "16", "--max-iterations", "6", "--validate-every", "3"]
    jobs = {name: ["train", *common, "--run", name, "--precision", "float32", *flags] for name, flags in RUNS.items()}
    jobs["encode"] = ["encode", str(make_tiny_bert(folder / "bert", ["gel", "pen", "desk", "lamp"]))]
    done = subprocess.run([sys.executable, ROOT / "tests" / "second_device.py"], input=json.dumps([*jobs.values()]), capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_training(answers, name):
    answer = answers[name]
    assert "error" not in answer, answer["error"]
    cpu, second = answer["cpu"], answer["second"]
    assert len(cpu["log"]) == 2 and cpu["files"] == second["files"]
    assert ("label_vectors.npy" in cpu["files"]) == ("--eimf" in RUNS[name] and "--control" not in RUNS[name])
    for here, there in zip(cpu["log"], second["log"]):
        assert there == pytest.approx(here, rel=2e-3, abs=1e-5)


def test_text_encoder(answers):
    assert "error" not in answers["encode"], answers["encode"]["error"]
    np.testing.assert_allclose(answers["encode"]["second"], answers["encode"]["cpu"], atol=1e-5)
