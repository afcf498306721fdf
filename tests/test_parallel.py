"""Stages that torchrun starts as two processes: the same results as one, one error line, resume after a lost process."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import N_ITEMS, TRAIN_FLAGS
from eimf import parallel
from eimf.artifacts import UserError, load_json, load_lines, save_json, save_lines
from tiny import call_stage, finished_stage, make_tiny_bert, run_stage, write_dataset

PATIENCE = 600  # seconds after which a process that does not end is taken for hung


def torchrun(root, script, *arguments):
    """Start two processes of a stage; stderr is torchrun's and theirs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", root / "stages" / script]
    return subprocess.Popen([*map(str, [*command, *arguments])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def flags(tiny, *extra):
    return ["--data-dir", tiny, "--dataset", "tiny", *TRAIN_FLAGS, "--eimf", "--precision", "float32", *extra]


def assert_same_training(one, two):
    logs = [load_lines(folder / "log.jsonl") for folder in (one, two)]
    assert len(logs[0]) > 5
    for a, b in zip(*logs, strict=True):
        assert a["iteration"] == b["iteration"] and set(a["loss"]) == set(b["loss"]) == {
            "recommendation", "regulariser", "semantic", "align_user", "align_item"}
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5, abs=2e-6)
        assert b["valid"] == pytest.approx(a["valid"], abs=1e-6)
    np.testing.assert_allclose(*(np.load(folder / "item_vectors.npy") for folder in (one, two)), atol=1e-5)


@pytest.fixture(scope="module")
def pair(tiny, root):
    """Folders of one training, by one process and by two."""
    run_stage("06_train.py", *flags(tiny, "--run", "one"), timeout=PATIENCE)
    code, output, errors = finish(torchrun(root, "06_train.py", *flags(tiny, "--run", "two")))
    assert code == 0 and output.count("best at iteration") == 1, output + errors
    return [tiny / "tiny" / "06_train" / name for name in ("one", "two")]


def test_two_processes_learn_what_one_does(pair):
    """EIMF with REMI: masks of untitled targets differ by rank, negatives of the alignment come from both."""
    assert_same_training(*pair)
    for manifest in (load_json(folder / "manifest.json") for folder in pair):
        assert set(manifest["outputs"]) >= {"model.pt2", "item_vectors.npy", "config.json", "log.jsonl"}


def rank_process(process, rank):
    """The process id of a rank that torchrun started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and f"RANK={rank}\0" in "\0" + (stat.parent / "environ").read_text():
                return int(stat.parent.name)
        except (OSError, UnicodeDecodeError):  # it ended meanwhile, or is another user's
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds the processes in /proc")
def test_a_lost_process_ends_the_run_and_one_process_goes_on(tiny, root):
    """kill -9 of rank 1: an error line, no result; a plain start ends with what was never interrupted, here with sampled negatives."""
    options = flags(tiny, "--loss", "sampled", "--negatives", "20", "--max-iterations", "240", "--patience", "99")
    run_stage("06_train.py", *options, "--run", "whole", timeout=PATIENCE)
    whole, folder = (tiny / "tiny" / "06_train" / name for name in ("whole", "lost"))
    process = torchrun(root, "06_train.py", *options, "--run", "lost")
    deadline = time.monotonic() + PATIENCE
    while not (folder / "checkpoint" / "last.safetensors").is_file():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(.01)
    os.kill(rank_process(process, 1), signal.SIGKILL)
    code, output, errors = finish(process)
    reported = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(reported) == 1 and reported[0].startswith(f"error: {parallel.LOST}"), errors
    assert "best at iteration" not in output and not (folder / "manifest.json").exists()
    done = run_stage("06_train.py", *options, "--run", "lost", timeout=PATIENCE)
    assert "going on from iteration" in done.stderr
    assert_same_training(whole, folder)


def test_a_report_that_was_begun_is_printed_before_the_process_may_end(monkeypatch):
    """torchrun's SIGTERM came while a rank was about to print why it stopped: another thread then ended the process without a word."""
    asked, ended, printed = threading.Event(), threading.Event(), []

    class Store:
        def __init__(self):
            self.count = 0

        def add(self, name, amount):
            self.count += amount
            if self.count == 1:
                asked.set()
                ended.wait(.5)  # time for the other thread to return too early
            return self.count

    monkeypatch.setattr(parallel, "_store", Store())
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=printed.append, flush=lambda: None))
    first = threading.Thread(target=parallel.report, args=["error: a peer is gone"])
    first.start()
    assert asked.wait(PATIENCE)
    parallel.report("error: told to stop")
    ended.set()
    assert "".join(printed) == "error: a peer is gone\n"
    first.join()


def test_a_rank_ends_without_the_interpreters_shutdown(root):
    """There threads of torch.distributed could abort a process whose work is done; output must still be written out."""
    script = "import atexit, os; from eimf import artifacts; atexit.register(os.abort); artifacts.run(lambda: print('written'))"
    ends = [subprocess.run([sys.executable, "-c", script], env=os.environ | {"WORLD_SIZE": world, "PYTHONPATH": str(root / "stages")},
                           capture_output=True, text=True, timeout=PATIENCE) for world in ("1", "2")]
    assert [end.returncode for end in ends] == [-signal.SIGABRT, 0] and ends[1].stdout == "written\n"


def test_a_mistake_is_reported_once(tiny, root):
    code, _, errors = finish(torchrun(root, "06_train.py", *flags(tiny, "--run", "mistake", "--batch-size", "7")))
    reported = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(reported) == 1, errors
    assert reported[0].startswith("error: a batch of 7 users cannot be shared evenly by 2 processes; give a --batch-size that is a multiple of 2")


def test_evaluation_of_shared_users_is_the_same(pair, tiny, root):
    """Every figure, and every user's values in the users' order; only measured speeds may differ."""
    arguments = ["--data-dir", tiny, "--dataset", "tiny", "--run", "one", "--threads", "1"]
    folder = tiny / "tiny" / "07_evaluate" / "one"
    call_stage("07_evaluate.py", *arguments)
    expected, values = load_json(folder / "metrics.json"), np.load(folder / "test_values.npy")
    (folder / "manifest.json").unlink()
    (folder / "metrics.json").unlink()
    code, output, errors = finish(torchrun(root, "07_evaluate.py", *arguments))
    assert code == 0 and output.count("summary:") == 1 and (folder / "manifest.json").is_file(), output + errors
    found = load_json(folder / "metrics.json")
    for result in (expected, found):
        result["ann"] = {k: v for k, v in result["ann"].items() if not k.startswith("users_per_second")}
    assert found == expected and found["test"]["users"] == 20
    np.testing.assert_array_equal(np.load(folder / "test_values.npy"), values)


WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet"]


@pytest.fixture(scope="module")
def titled(tmp_path_factory):
    """A data set with 25 titles of different lengths, one item without, and an encoder."""
    folder = tmp_path_factory.mktemp("titled")
    bert = make_tiny_bert(folder / "bert", WORDS)
    titles = [" ".join(WORDS[(i * k) % 9] for k in range(1 + i % 5)) + f" {i}" for i in range(25)]
    write_dataset(folder, [{"title": t} for t in [*titles, None]], [[1 + u, 2 + u, 26] for u in range(10)], [0] * 10)
    return folder, bert, titles


def test_encoding_of_shared_titles_is_the_same(titled, root):
    data, bert, _ = titled
    arguments = ["--data-dir", data, "--dataset", "tiny", "--encoder", bert, "--device", "cpu", "--batch-size", "3", "--threads", "1"]
    folder = data / "tiny" / "02_encode_text"
    results = []
    for cache, start in (("one", lambda *a: call_stage("02_encode_text.py", *a)), ("two", lambda *a: finish(torchrun(root, "02_encode_text.py", *a)))):
        done = start(*arguments, "--cache-dir", data / cache)
        assert cache == "one" or done[0] == 0, done
        results.append([(folder / name).read_bytes() for name in ("item_text.npy", "user_text.npy", "item_has_text.npy", "encoder.json")])
        summary = load_json(folder / "manifest.json")["summary"]
        assert (summary["encoded"], summary["cached"], summary["items_with_text"]) == (25, 0, 25)
    assert results[0] == results[1]  # the same batches, so the same bits
    vectors = np.load(folder / "item_text.npy")
    assert vectors[1:26].any(1).all() and not vectors[[0, 26]].any()
    call_stage("02_encode_text.py", *arguments, "--cache-dir", data / "two")
    assert load_json(folder / "manifest.json")["summary"]["cached"] == 25  # both processes' vectors are in the shared cache


@pytest.mark.slow
def test_encoding_of_shared_interests_is_the_same(titled, root):
    data, bert, titles = titled
    call_stage("02_encode_text.py", "--data-dir", data, "--dataset", "tiny", "--encoder", bert, "--device", "cpu")
    finished_stage(data, "tiny", "04_infer_interests", lambda folder: (
        save_lines(folder / "interests.jsonl", [{"user": c, "interests": [f"{t} kind" for t in titles[3 * c:3 * c + 3]]} for c in range(4)]),
        save_json(folder / "usage.json", {"llm": "none"})))
    arguments = ["--data-dir", data, "--dataset", "tiny", "--device", "cpu", "--batch-size", "2", "--threads", "1"]
    path = data / "tiny" / "05_encode_interests" / "interest_vectors.npy"
    code, _, errors = finish(torchrun(root, "05_encode_interests.py", *arguments, "--cache-dir", data / "three"))
    assert code == 0, errors
    found = path.read_bytes()
    call_stage("05_encode_interests.py", *arguments, "--cache-dir", data / "four")
    assert found == path.read_bytes() and np.load(path).any(1).sum() == 12


@pytest.mark.parametrize("n, world", [(10, 3), (8, 4), (3, 3), (1000, 7)])
def test_shares_are_all_rows_once(monkeypatch, n, world):
    monkeypatch.setattr(parallel, "_world", world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(parallel, "_rank", rank)
        shares.append(parallel.share(np.arange(n)))
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(UserError, match=f"{world - 1} users cannot be shared by {world} processes"):
        parallel.share(list(range(world - 1)))


def test_a_plain_run_shares_nothing():
    x = torch.randn(N_ITEMS, 3, requires_grad=True)
    assert parallel.gather(x) is x and parallel.total(x) is x and torch.equal(parallel.share(x), x)
    assert (parallel.rank(), parallel.world(), parallel.stop()) == (0, 1, True)


def test_half_set_variables_get_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 but RANK is not set; start several processes with torchrun"):
        parallel.start(None)
