"""A small data set with a trained run, made through the real stages, for the tests of stage 08."""
import argparse
import contextlib
import http.client
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "stages"
if str(STAGES) not in sys.path:
    sys.path.insert(0, str(STAGES))

from eimf.artifacts import Stage, load_json, save_array, save_json, save_lines, sha256  # noqa: E402

N_ITEMS, N_USERS, MAX_LEN, RUN = 90, 40, 6, "remi-s0"
JSON = {"content-type": "application/json"}
CATEGORIES = [["Shop", "Paper"], ["Shop", "Pens"], ["Shop", "Chairs"], []]
TITLES = {1: "Pens &amp; Paper", 2: None, 3: "<img src=x onerror=alert(1)>", 4: "Ünïcode 紙 pen", 5: 'Say "hi" </script>'}


def item_id(number):
    """Ids with characters that a URL or a table could trip over."""
    return {6: "a/b c", 7: "ü-7", 8: "..", 9: "50%"}.get(number, f"B{number:04d}")


def title(number):
    return TITLES.get(number, f"Thing number {number}")


_made = []


def make_data(factory):
    """01_preprocess by hand, then the real stages 06 (20 steps) and 07 (with its index). Returns the data folder.

    `factory` is pytest's tmp_path_factory; all test files of a session share one folder.
    """
    if _made:
        return _made[0]
    folder = factory.mktemp("serving")
    rng = np.random.default_rng(0)
    histories = [(rng.choice(N_ITEMS // 3, 12, replace=False) + 1 + N_ITEMS // 3 * (u % 3)).tolist() for u in range(N_USERS)]
    args = argparse.Namespace(dataset="tiny", data_dir=Path(folder))
    stage = Stage("01_preprocess", args)
    out = stage.begin()
    save_lines(out / "items.jsonl", [{"item": n, "id": item_id(n), "title": title(n), "categories": CATEGORIES[n % 4],
                                      "brand": None} for n in range(1, N_ITEMS + 1)])
    save_lines(out / "users.txt", [f"U{u}" for u in range(N_USERS)])
    save_array(out / "sequence_items.npy", np.array(histories, dtype=np.int32).ravel())
    save_array(out / "sequence_times.npy", np.arange(12 * N_USERS, dtype=np.int64))
    save_array(out / "sequence_offsets.npy", np.arange(N_USERS + 1, dtype=np.int64) * 12)
    save_array(out / "split.npy", np.repeat([0, 1, 2], [N_USERS - 10, 5, 5]).astype(np.uint8))
    save_json(out / "stats.json", {"users": N_USERS, "items": N_ITEMS, "interactions": 12 * N_USERS, "split": "random"})
    stage.finish()
    run_stage("06_train.py", folder, "--dim", 16, "--interests", 3, "--max-len", MAX_LEN, "--max-iterations", 20,
              "--validate-every", 10, "--run", RUN)
    run_stage("07_evaluate.py", folder)
    add_reasons(folder / "tiny" / "06_train" / RUN)
    _made.append(folder)
    return folder


def add_reasons(trained):
    """Labels and a map projection, as the export of a taught run has them, with vectors that are easy to reason about."""
    rng = np.random.default_rng(2)
    save_array(trained / "label_vectors.npy", rng.standard_normal((12, 16)).astype(np.float32))
    save_lines(trained / "labels.jsonl", [{"text": f"likes <b>things</b> of kind {n}", "cluster": n // 3} for n in range(12)])
    save_json(trained / "labels.json", {"source": "offline"})
    save_array(trained / "map_projection.npy", rng.standard_normal((17, 2)).astype(np.float32))
    rewrite_manifest(trained, "label_vectors.npy", "labels.jsonl", "labels.json", "map_projection.npy")


def rewrite_manifest(folder, *files, **changes):
    """Make a finished stage's manifest record the present content of its files, and of `files` too."""
    manifest = load_json(folder / "manifest.json")
    manifest["outputs"] = {f: {"bytes": (folder / f).stat().st_size, "sha256": sha256(folder / f)} for f in {*manifest["outputs"], *files}}
    save_json(folder / "manifest.json", manifest | changes)


def run_stage(script, folder, *arguments, check=True, **kwargs):
    """Run a stage on the tiny data as a user does; returns the finished process."""
    command = [sys.executable, str(STAGES / script), "--data-dir", str(folder), "--dataset", "tiny", "--threads", "1",
               *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **{"env": os.environ | {"COLUMNS": "120"}} | kwargs)
    assert not check or done.returncode == 0, f"{script} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def load_stage(script):
    """A numbered script as a module, to test one of its functions."""
    spec = importlib.util.spec_from_file_location("stage_" + script.removesuffix(".py"), STAGES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_recommender(folder, retrieval="exact", run=RUN):
    from eimf.recommender import Recommender
    return Recommender(folder, "tiny", run, retrieval, threads=1)


def oracle(data, history, k, exclude):
    """Item numbers, scores and winning interests by plain NumPy over the export's own interests."""
    import torch
    trained = data / "tiny" / "06_train" / RUN
    vectors = np.load(trained / "item_vectors.npy").astype(np.float64)
    row = list(history)[-MAX_LEN:]
    row = torch.tensor([row + [0] * (MAX_LEN - len(row))])
    interests = torch.export.load(trained / "model.pt2").module()(row)[0][0].detach().numpy().astype(np.float64)
    # Not a matrix product: some round equal rows differently, and one event makes all interests equal.
    scores = (interests[:, None] * vectors).sum(2)  # (K, N + 1)
    order = [n for n in np.argsort(-scores.max(0), kind="stable").tolist() if n and n not in exclude][:k]
    return order, scores.max(0)[order], scores.argmax(0)[order]


def ids(*numbers):
    return tuple(item_id(n) for n in numbers)


@contextlib.contextmanager
def running(data, *arguments, env=None, port=0):
    """A server process; yields (process, port)."""
    command = [sys.executable, str(STAGES / "08_serve.py"), "--data-dir", str(data), "--dataset", "tiny", "--serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {}))
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"serving run .* on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("the server ended: " + "".join(lines))
        port = int(found[1])
        for _ in range(300):  # with several workers, the address is known before the first of them answers
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
                if ask(port, None, "/health", "GET", timeout=60)[0] == 200:
                    break
            time.sleep(.1)
        yield process, port
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(port, body=b'{"history": ["B0005", "B0040"], "k": 5}', path="/recommend", method="POST", timeout=60):
    """One request on a connection of its own: (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, JSON)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()
