"""A small data set with a trained run, made through the real stages, for the tests of stage 08."""
import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "stages"
if str(STAGES) not in sys.path:
    sys.path.insert(0, str(STAGES))

from eimf.artifacts import Stage, save_array, save_json, save_lines  # noqa: E402

N_ITEMS, N_USERS, MAX_LEN, RUN = 90, 40, 6, "remi-s0"
CATEGORIES = [["Shop", "Paper"], ["Shop", "Pens"], ["Shop", "Chairs"], []]
TITLES = {1: "Pens &amp; Paper", 2: None, 3: "<img src=x onerror=alert(1)>", 4: "Ünïcode 紙 pen", 5: 'Say "hi" </script>'}


def item_id(number):
    """Ids with characters that a URL or a table could trip over."""
    return {6: "a/b c", 7: "ü-7", 8: "..", 9: "50%"}.get(number, f"B{number:04d}")


def title(number):
    return TITLES.get(number, f"Thing number {number}")


def make_data(folder):
    """01_preprocess by hand, then the real stages 06 (20 steps) and 07 (with its index). Returns the data folder."""
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
    return Path(folder)


def run_stage(script, folder, *arguments, check=True, **kwargs):
    """Run a stage on the tiny data as a user does; returns the finished process."""
    command = [sys.executable, str(STAGES / script), "--data-dir", str(folder), "--dataset", "tiny", "--threads", "1",
               *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **{"env": os.environ | {"COLUMNS": "120"}} | kwargs)
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
    args = argparse.Namespace(dataset="tiny", data_dir=Path(folder))
    return Recommender(Stage("08_serve", args), run, retrieval, threads=1)
