"""The reproduction: what is planned, how runs are shared out, stopped and taken up again, what the report says."""
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import run_all
from eimf.artifacts import UserError
from tiny import write_dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import experiments  # noqa: E402
import paper_merge  # noqa: E402
import paper_numbers  # noqa: E402
import paper_report  # noqa: E402
import reproduce  # noqa: E402
import tune  # noqa: E402
from experiments import CONTROLS, Run, plan  # noqa: E402

# Stands in for every numbered stage: takes a moment, writes down that it started, and leaves the files the runner and the report read.
STAGE = '''
import argparse, fcntl, hashlib, json, os, sys, time
from pathlib import Path
stage = Path(__file__).stem
parser = argparse.ArgumentParser()
for name in ("dataset", "run", "data-dir"):
    parser.add_argument("--" + name)
args, rest = parser.parse_known_args()
root = Path(args.data_dir) / args.dataset
folder = root / stage / (args.run or "")
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open(root.parent / "started.txt", "a") as log:
    log.write(f"{stage} {args.dataset} {args.run or ''}\\n")
if stage == "06_train" and args.run == os.environ.get("FAIL"):
    sys.exit("error: told to fail")
time.sleep(float(os.environ.get("SECONDS", ".05")) if stage == "06_train" else 0)
metrics = [f"{m}@{k}" for m in ("recall", "hr", "ndcg", "ndcg_published") for k in (20, 50)]
inputs = {}
if stage == "01_preprocess":
    untitled = os.environ.get("UNTITLED") == args.dataset
    (folder / "stats.json").write_text(json.dumps({"users": 90, "items": 30, "interactions": 900, "split": "file-order",
                                                   "items_with_title": 0 if untitled else 30}))
    ids = [f"GROCERY_{i}" if untitled else f"B{i:09d}" for i in range(30)]
    (folder / "items.jsonl").write_text("".join(json.dumps({"item": i + 1, "id": name}) + "\\n" for i, name in enumerate(ids)))
    import numpy as np
    np.save(folder / "sequence_items.npy", np.arange(900) % 30 + 1)
    np.save(folder / "sequence_offsets.npy", np.arange(91) * 10)
    np.save(folder / "split.npy", np.repeat([0, 2], [80, 10]))
elif stage == "03_cluster_users":
    (folder / "report.json").write_text(json.dumps({"fraction": .1, "preference": -.5, "clusters": 9}))
elif stage == "04_infer_interests":
    (folder / "usage.json").write_text(json.dumps({"llm": "offline", "prompts": 9, "fallback": 0, "interests_mean": 4.0}))
elif stage == "06_train":
    (folder / "log.jsonl").write_text(json.dumps({"iteration": 100, "seconds": 1.5}) + "\\n")
elif stage == "07_evaluate":
    import numpy as np
    np.save(folder / "test_users.npy", np.arange(80, 90))
    values = np.random.default_rng(len(args.run)).random((10, 8)).astype(np.float32)
    np.save(folder / "test_values.npy", values)
    (folder / "metrics.json").write_text(json.dumps({"columns": metrics, "diversity": {"mean_cosine": .5},
                                                     "test": {"recall@50": float(values[:, 1].mean())}}))
    source = root / "06_train" / args.run
    inputs = {f"06_train/{args.run}/log.jsonl": json.loads((source / "manifest.json").read_text())["outputs"]["log.jsonl"]["sha256"]}
outputs = {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in folder.iterdir()
           if p.is_file() and p.name not in (".lock", "manifest.json")}
(folder / "manifest.json").write_text(json.dumps({"inputs": inputs, "outputs": outputs, "wall_seconds": 1, "peak_memory_mib": 1,
                                                  "summary": {"best_iteration": 50}}))
'''


@pytest.fixture
def copy(tmp_path):
    """The runner beside stages that only pretend: (call, data folder). call(*arguments, **environment) starts a process."""
    (tmp_path / "stages").mkdir()
    shutil.copytree(ROOT / "stages" / "eimf", tmp_path / "stages" / "eimf")
    (tmp_path / "data").mkdir()
    for file in ("experiments.py", "reproduce.py", "paper_merge.py", "paper_numbers.py", "paper_report.py"):
        shutil.copy(ROOT / "data" / file, tmp_path / "data")
    for stage in ("01_preprocess", "02_encode_text", "03_cluster_users", "04_infer_interests", "05_encode_interests", "06_train", "07_evaluate"):
        (tmp_path / "stages" / f"{stage}.py").write_text(STAGE)
    processes = []

    def call(*arguments, **environment):
        process = subprocess.Popen([sys.executable, str(tmp_path / "data/reproduce.py"), "--jobs", "2", "--datasets", "Office", *arguments], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)
        processes.append(process)
        return process

    yield call, tmp_path / "data"
    for process in processes:
        process.kill()


def ended(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out + err


def started(data, stage="06_train"):
    return [line.split(" ", 1)[1].strip() for line in (data / "started.txt").read_text().splitlines() if line.startswith(stage)]


def test_plan_orders_by_information_and_shares_runs(tuning_file):
    runs = plan()
    assert [rank for rank, _ in runs.values()] == sorted(rank for rank, _ in runs.values())
    first = [run for run, (rank, _) in runs.items() if rank == 0]
    assert {(r.dataset, r.model, r.seed) for r in first} == set(itertools.product(
        ("Office", "Beauty", "Grocery"), ("remi", "remi-eimf", "remi-eimf-random-text", "remi-eimf-shuffled-clusters"), (0,)))
    shared = runs[Run("Office", "file-order", "", "remi-eimf", 0)][1]
    assert set(shared) == {"headline", "table3", "fig3", "fig4", "table4"}  # one training serves them all
    assert {r.seed for r in runs if r.model == "pop"} == {0} and {r.seed for r in runs if r.model == "remi"} == {0, 1, 2, 3, 4}
    assert all(r.dataset == "Office" for r in runs if r.variant == "phrases")
    assert not any(r.variant == "phrases" for r in plan(recorded=()))
    only = plan(only=("table3",), seeds=2)
    assert {r.dataset for r in only} == {"Office"} and len(only) == 1 + 2 * 9
    assert {r.dataset for r in plan(("sample",), seeds=1)} == {"sample"} and len(plan(("sample",), ("fig4",), 1)) == 8
    assert Run("Office", "random", "", "remi", 3).folder == "Office_Products"
    assert Run("Office", "file-order", "typical-20", "remi-eimf", 3).folder == "Office_Products-file-order-typical-20"


def test_stage_06_accepts_every_model(load_script, capsys):
    """The plan's flags are parsed by stage 06 itself."""
    module, refused = load_script("stages/06_train.py"), []
    for model, flags in experiments.MODELS.items():
        try:
            args = module.parse([*flags.replace("TUNED", "--horizon 100").split(), *experiments.TRAIN.split()])
        except SystemExit:
            refused.append((model, capsys.readouterr().err.splitlines()[-1]))
            continue
        assert args.eimf == ("eimf" in model) and args.backbone == re.sub("-(eimf|best|tuned).*", "", model)
    assert not refused


def test_the_best_models_have_the_best_recipe(load_script):
    """Their flags are spelled out, so that results of an earlier recipe are not taken for those of the present one."""
    module = load_script("stages/06_train.py")
    spelled, named = (vars(module.parse(flags.split())) for flags in (experiments.MODELS["remi-best-eimf"], "--recipe best --eimf"))
    assert {k: v for k, v in spelled.items() if k not in ("recipe", "run")} == {k: v for k, v in named.items() if k not in ("recipe", "run")}


@pytest.fixture
def tuning_file(tmp_path, monkeypatch):
    """data/tune.py's file for a data set, in an empty folder."""
    monkeypatch.setattr(experiments, "tuning_path", lambda dataset: tmp_path / f"{dataset}.json")
    experiments.tuning.cache_clear()
    yield experiments.tuning_path("sample")
    experiments.tuning.cache_clear()


def test_tuning_is_greedy_and_gives_all_the_same_trainings(monkeypatch, tuning_file):
    """A made-up validation score: the horizon helps, dropout helps most at .3, whatever else costs a little."""
    asked = []

    def trial(args, dataset, backbone, number, flags):
        asked.append((backbone, number))
        score = .1 + .02 * ("--horizon" in flags) + .01 * ("--dropout 0.3" in flags) - .001 * ("--loss" in flags) - .002 * ("--learning-rate" in flags)
        return {"flags": flags, "recall@50": score - .001 * ("--event-dropout" in flags), "best_iteration": 200, "minutes": 1.0}

    monkeypatch.setattr(tune, "trial", trial)
    args = tune.parse(["--backbones", "sasrec,mind"])
    for backbone in args.backbones:
        found = tune.tune(args, "sample", backbone, {})
        assert found["flags"] == "--horizon 100 --dropout 0.3" and found["recall@50"] == pytest.approx(.13)
        assert [t["flags"] for t in found["trials"]][:4] == ["", "--horizon 100", "--horizon 100 --dropout 0.3", "--horizon 100 --dropout 0.5"]
    assert asked == [(b, n) for b in ("sasrec", "mind") for n in range(len(tune.TRIALS))]


def test_tuned_models_are_planned_with_what_was_found(tuning_file):
    assert not [r for r in plan(("sample",), ("backbones",), 1)] and experiments.arguments("sample", "mind-tuned") is None
    tuning_file.write_text(json.dumps({"mind": {"flags": "--horizon 100", "recall@50": .2, "trials": []}}))
    experiments.tuning.cache_clear()
    assert {r.model for r in plan(("sample",), ("backbones",), 1)} == {"mind-tuned", "mind-tuned-eimf"}
    assert experiments.arguments("sample", "mind-tuned-eimf") == "--backbone mind --horizon 100 --eimf"
    tuning_file.write_text(json.dumps({"mind": {"flags": "", "recall@50": .2, "trials": []}}))  # the default run serves for both
    experiments.tuning.cache_clear()
    assert {r.model for r in plan(("sample",), ("backbones",), 1)} == {"mind", "mind-eimf"}


def test_tuned_models_in_the_report(tuning_file):
    """The strongest on validation users is what the best recipe and EIMF are held against."""
    tuning_file.write_text(json.dumps({b: {"flags": "--dropout 0.3", "recall@50": v, "trials": [{"recall@50": .1, "minutes": 2.0}]}
                                       for b, v in (("mind", .2), ("sasrec", .3))}))
    keys = [("sample", "random", "", m) for m in ("mind", "mind-tuned", "sasrec-tuned", "sasrec-tuned-eimf", "remi-best")]
    found = [(f, a[3], b[3]) for f, a, b in paper_numbers.contrasts(keys) if a in keys and b in keys]
    assert found == [("tuned", "mind-tuned", "mind"), ("taught", "sasrec-tuned-eimf", "sasrec-tuned"), ("strongest", "remi-best", "sasrec-tuned")]
    text = paper_report.to_markdown("t", paper_report.blocks(numbers([]) | {"tuning": {"sample": experiments.tuning("sample")}}))
    assert "| MIND | .1000 | .2000 | `--dropout 0.3` | 1 | 2 |" in text


def test_budgets_are_read(capsys):
    assert [reproduce.duration(t) for t in ("2h", "90m", "1h30m", "45s", "1.5h")] == [7200, 5400, 5400, 45, 5400]
    for wrong in (["--budget", "2"], ["--budget", "soon"], ["--only", "table9"], ["--datasets", "Toys"], ["--seeds", "0"]):
        with pytest.raises(SystemExit) as stop:
            reproduce.parse(wrong)
        assert stop.value.code == 2
    assert "none of table1" in capsys.readouterr().err


def test_recorded_answers_are_found_and_reach_stage_04(tmp_path):
    (tmp_path / "Office_Products.responses.jsonl.gz").write_bytes(b"")
    args = reproduce.parse(["--llm-dir", str(tmp_path)])
    answers = reproduce.recorded_answers(args)
    assert answers == {"Office": "Office_Products.responses.jsonl.gz"}
    tasks = {t.label: t for t in reproduce.tasks_of(plan(recorded=answers), args, answers)}

    def infer(folder):
        return " ".join(next(c for c in tasks[f"{folder}/text"].commands if "04_infer" in c[0]))

    assert infer("Office_Products-file-order").endswith("--llm recorded --responses LLM_DIR/Office_Products.responses.jsonl.gz --match user")
    assert infer("Office_Products-file-order-phrases").endswith("--llm offline") and "recorded" not in infer("Beauty-file-order")
    assert "--typical random" in " ".join(tasks["Beauty-file-order-random-typical/text"].commands[1])


def test_everything_runs_once_and_again_only_if_something_changed(copy):
    call, data = copy
    out = ended(call("--only", "headline,controls", "--seeds", "2"))
    runs = started(data)
    assert len(runs) == len(set(runs)) == 10 and re.search(r"about \d+ min left", out)  # random typical users among them
    order = [runs.index(f"Office_Products-file-order remi-s{seed}") for seed in (0, 1)]
    assert order[0] < 4 <= order[1]  # seed 0 of every model comes first
    assert sorted(started(data, "01")) == sorted(started(data, "05")) and len(started(data, "01")) == 2
    path = data / "Office_Products-file-order/06_train/remi-s0/manifest.json"  # as if it had been trained again by hand
    path.write_text(path.read_text().replace('"log.jsonl": {"sha256": "', '"log.jsonl": {"sha256": "0'))
    assert "13 of 14 tasks are done, 1 to go" in ended(call("--only", "headline,controls", "--seeds", "2"))
    assert started(data) == [*runs, "Office_Products-file-order remi-s0"]
    ended(call("--only", "headline", "--seeds", "1", "--train-args", "--dim 32"))  # other settings: these four are stale
    assert len(started(data)) == 15


def test_two_processes_share_the_runs(copy):
    call, data = copy
    arguments = ("--only", "headline", "--seeds", "4")
    both = [call(*arguments, SECONDS="1"), call(*arguments, SECONDS="1")]
    outs = [ended(process) for process in both]
    runs = started(data)
    assert len(runs) == len(set(runs)) == 16
    assert len(started(data, "01")) == len(started(data, "02")) == 1
    shares = [len(re.findall(r"/remi.*?: test Recall", out)) for out in outs]
    assert "ids here are not Amazon's" not in (data / "reproduction/report.md").read_text()
    assert sum(shares) == 16 and min(shares) > 0, shares
    assert all("report:" in out for out in outs)


def test_killed_and_taken_up_again(copy):
    """kill -9 of the runner: its children end on their own, and nothing is run at the same time by two."""
    call, data = copy
    process = call("--only", "headline", "--seeds", "2", SECONDS="1")
    wait_for(lambda: (data / "started.txt").exists() and len(started(data)) >= 3)
    process.kill()
    process.wait()
    ended(call("--only", "headline", "--seeds", "2", SECONDS="1"))
    runs = started(data)
    assert set(runs) == {f"Office_Products-file-order {m}-s{s}" for m in ("remi", "remi-eimf", *experiments.CONTROLS) for s in (0, 1)}
    assert len(list((data / "Office_Products-file-order/07_evaluate").glob("*/manifest.json"))) == 8


def test_stopped_softly_it_leaves_no_process_behind(copy):
    call, data = copy
    process = call("--only", "headline", "--seeds", "2", SECONDS="60")
    wait_for(lambda: (data / "started.txt").exists() and len(started(data)) >= 2)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in ended(process, 130)
    for lock in (data / "reproduction").rglob("*.lock"):
        assert subprocess.run(["flock", "--nonblock", str(lock), "true"]).returncode == 0, lock


def test_the_budget_takes_the_most_informative_first(copy):
    call, data = copy
    out = ended(call("--only", "headline,table3,fig3", "--seeds", "3", "--budget", "25s", SECONDS="5"), 3)
    runs = [run.split()[-1] for run in started(data)]
    assert "the budget of" in out and 1 <= len(runs) <= 10
    ranks = [rank for run in runs for r, (rank, _) in plan(("Office",), ("headline", "table3", "fig3"), 3).items() if r.name == run]
    assert ranks == sorted(ranks)
    assert "report:" in out


def test_a_failed_run_is_named_and_the_others_go_on(copy):
    call, data = copy
    out = ended(call("--only", "headline", "--seeds", "1", FAIL="remi-eimf-s0"), 1)
    assert "remi-eimf-s0: failed with exit code 1: error: told to fail" in out and len(started(data)) == 4
    ended(call("--only", "headline", "--seeds", "1"))  # tried again
    assert len(started(data)) == 5


def test_without_titles_the_eimf_cells_say_so(copy):
    call, data = copy
    out = ended(call("--only", "headline,table1", "--seeds", "1", UNTITLED="Office_Products-file-order"))
    assert "no item has a title" in out and started(data) == ["Office_Products-file-order remi-s0"]
    report = (data / "reproduction/report.md").read_text()
    row = next(line for line in report.splitlines() if line.startswith("| EIMF(REMI) |"))
    assert row.count("titles not available here") == 4 and "Whether EIMF helps cannot be said yet" in report
    assert "Office's item ids here are not Amazon's" in report


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(.1)
    pytest.fail("waited in vain")


def values(seeds, base, gain=0.0, noise=0.0, users=400):
    rng = np.random.default_rng(5)
    return {s: base + gain + noise * rng.standard_normal(users) + .002 * np.random.default_rng(s).standard_normal() for s in range(seeds)}


A, B = ("Office", "file-order", "", "remi-eimf"), ("Office", "file-order", "", "remi")


@pytest.mark.parametrize("seeds, gain, noise, expected", [
    (5, .05, .01, "better"), (5, -.05, .01, "worse"), (5, 0, .3, "not significant"), (2, .003, .001, "not significant over seeds"),
    (1, .05, .01, "better with one seed, spread of training unknown")])
def test_verdicts(seeds, gain, noise, expected):
    base = np.random.default_rng(0).random(400)
    b = values(seeds, base)
    a = {s: v + .004 * np.random.default_rng(s + 50).standard_normal() for s, v in values(seeds, base, gain, noise).items()}
    c, = paper_numbers.adjust([paper_numbers.compare("help", A, B, a, b)])
    assert c["verdict"] == expected, c
    assert c["low"] < c["gain"] < c["high"] and c["seeds"] == seeds and c["users"] == 400


def test_only_common_seeds_are_compared_and_families_are_adjusted_apart():
    base = np.random.default_rng(0).random(400)
    a, b = values(4, base, .01, .1), values(2, base)
    c = paper_numbers.compare("help", A, B, a, b)
    assert c["seeds"] == 2 and paper_numbers.compare("help", A, B, {3: base}, {1: base}) is None
    three = [c | {"family": f, "p_users": p, "p_seeds": None} for f, p in (("help", .02), ("help", .04), ("fig3", .04))]
    adjusted = paper_numbers.adjust(three)
    assert [round(x["p_users_holm"], 6) for x in adjusted] == [.04, .04, .04]


class FinishedRuns:
    """As much of paper_numbers.Results as `together` asks for."""

    def __init__(self, values):
        self.runs = values

    def tested(self, key):
        return self.runs[key]


def test_all_tuned_backbones_together(monkeypatch):
    """The gain is the mean over the backbones that have both models, by the seeds that all of them have."""
    place, base = ("Office", "random"), np.random.default_rng(0).random(400)
    monkeypatch.setattr(paper_numbers, "tuning", lambda dataset: dict.fromkeys(("dnn", "mind", "sine", "gru4rec"), {"flags": "--dropout 0.3"}))
    monkeypatch.setattr(experiments, "tuning", paper_numbers.tuning)
    runs = {}
    for b, gain, seeds in (("dnn", .06, 4), ("mind", -.02, 3), ("sine", .08, 3)):
        runs[(*place, "", f"{b}-tuned")] = values(seeds, base)
        runs[(*place, "", f"{b}-tuned-eimf")] = values(seeds, base, gain, .01)
    runs[(*place, "", "gru4rec-tuned")] = values(3, base)  # has no model with EIMF yet
    c = paper_numbers.together(FinishedRuns(runs), place)
    assert c["backbones"] == ["dnn", "mind", "sine"] and (c["seeds"], c["users"]) == (3, 400) and c["verdict"] == "better"
    assert c["gain"] == pytest.approx(.04, abs=.002) and c["low"] < c["gain"] < c["high"] and c["p_users"] == c["p_users_holm"]
    text = paper_report.together_text(c)
    assert text.startswith("The 3 backbones together, tuned, on Office, random: EIMF adds +.0") and text.endswith(": better.")
    only = {key: v for key, v in runs.items() if "dnn" in key[3]}
    assert paper_numbers.together(FinishedRuns(only), place) is None


def comparison(dataset, b, verdict, gain=.02, split="file-order", seeds=5):
    p = {"better": .001, "worse": .001, "not significant": .4, "not significant over seeds": .2}[verdict]
    return {"family": "help", "dataset": dataset, "split": split, "a": ["", "remi-eimf"], "b": ["", b], "gain": gain, "low": gain - .01, "high": gain + .01,
            "seeds": seeds, "users": 491, "gain_by_seed": [gain] * seeds, "p_users": p, "p_seeds": p, "p_users_holm": p / 2, "p_seeds_holm": p, "verdict": verdict}


def numbers(comparisons):
    models = [{"dataset": d, "split": s, "variant": "", "model": m, "folder": "x", "seeds": [0, 1], "users": 491, "by_seed": [.2, .21], "cosine": .9,
               "metrics": {k: {"mean": .2, "low": .19, "high": .21, "sd": .01} for k in paper_numbers.METRICS}, "commits": ["abc"],
               "machines": [{"cpu": "CPU", "cores": 2, "gpu": None}], "commands": ["python stages/06_train.py --seed 0"],
               "cost": dict.fromkeys(("minutes", "iterations", "best_iteration", "milliseconds_per_step", "peak_memory_mib"), 2.0)}
              for d, s in dict.fromkeys((c["dataset"], c["split"]) for c in comparisons) for m in ("remi", "remi-eimf")]
    stats = {"users": 4905, "items": 2420, "interactions": 53258, "items_with_title": 2417}
    return {"datasets": {"Office": {"stats": stats, "matches": "Office", "paper": (4905, 2420, 53258), "best_preference": (-2, .2492),
                                    "published": {"remi-eimf": {"recall@50": .2296}}}},
            "models": models, "comparisons": comparisons, "parts": [], "clusters": {}, "tuning": {}, "foreign_ids": [], "no_titles": [], "remaining": {"fig3": [4, 3600.0]}, "seeds": 5,
            "train_args": "--patience 20", "asked": {}}


OPPONENTS = ("remi", *experiments.CONTROLS)


def test_headline_when_all_three_are_beaten():
    text, details = paper_report.headline(paper_report.Numbers(numbers([comparison("Office", b, "better") for b in OPPONENTS])))
    assert text.startswith("EIMF(REMI) beats its backbone and both controls on Office, file-order.")
    assert "Against its backbone it is significantly better on Office, file-order (+.0200, p = .001)." in text
    assert len(details) == 3 and "95 % interval +.0100 to +.0300, over users p = .0005, over 5 seeds p = .001: better." in details[0]


def test_headline_when_a_control_is_not_beaten():
    found = [comparison("Office", b, "better") for b in OPPONENTS[:2]] + [comparison("Office", OPPONENTS[2], "not significant", .001)]
    text, _ = paper_report.headline(paper_report.Numbers(numbers(found)))
    assert text.startswith("On none of the data sets run so far does EIMF(REMI) significantly beat its backbone and both controls.")
    assert "Against the control with shuffled clusters it is not significantly different on Office, file-order (+.0010, p = .40)." in text
    assert "beats" not in text


def test_headline_tells_data_sets_and_splits_apart():
    found = [comparison("Beauty", b, "better") for b in OPPONENTS] + [comparison("Beauty", b, "not significant", split="random") for b in OPPONENTS]
    found += [comparison("Office", "remi", "not significant over seeds", seeds=2), comparison("Office", OPPONENTS[1], "worse", -.02)]
    text, _ = paper_report.headline(paper_report.Numbers(numbers(found)))
    assert text.startswith("EIMF(REMI) beats its backbone and both controls on Beauty, file-order, not on Beauty, random.")
    assert "different by one of the two tests only, which is not enough, on Office, file-order (+.0200, p = .20)" in text
    assert "significantly worse on Office, file-order (−.0200, p = .001)" in text
    assert "Not all of these runs are finished on Office, file-order." in text


def test_headline_before_anything_has_run():
    assert paper_report.headline(paper_report.Numbers(numbers([])))[0].startswith("Whether EIMF helps cannot be said yet")


def test_pages_hold_numbers_deviations_and_provenance():
    found = paper_report.blocks(numbers([comparison("Office", b, "not significant") for b in OPPONENTS]))
    page, text = paper_report.to_html("t", found), paper_report.to_markdown("t", found)
    for each in (page, text):
        assert ".2000 ± .0100" in each and "paper .2296" in each and "−.0296 [−.0396, −.0196]" in each
        assert "not significant" in each and "abc" in each and "CPU, 2 cores, no GPU" in each and "4 runs, about 1.0 hours" in each
    assert "\n11. NDCG is the rank-aware one." in text and "| model | seeds | Recall@20 |" in text
    assert "src=" not in page and "http-equiv" not in page and page.count("<svg") == 1  # self-contained
    for svg in page.split("<figure>")[1:]:
        ElementTree.fromstring(svg[:svg.index("</svg>") + 6])
    assert len({len(row) for kind, *rest in found if kind == "table" for row in [rest[0], *rest[1]] if rest[2].startswith("EIMF(REMI) against its")}) == 1


def entry(model, seeds, recall=.2, variant=""):
    """A model's entry as it is published."""
    run = Run("Office", "file-order", variant, model, 0)
    return {"dataset": run.dataset, "split": run.split, "variant": variant, "model": model, "folder": run.folder, "seeds": list(range(seeds)), "users": 491,
            "by_seed": [recall] * seeds, "commands": [shlex.join(["python", *experiments.training(run)])]}


def collected(models, comparisons=(), **facts):
    """The numbers of one data folder."""
    return numbers([]) | {"models": models, "comparisons": list(comparisons), "asked": {"datasets": ["Office"], "groups": ["headline"]}} | facts


def against(b, p, seeds, **facts):
    return comparison("Office", b, "better", seeds=seeds) | {"p_users": p, "p_seeds": None, "p_users_holm": p, "p_seeds_holm": None} | facts


def part(**recall):
    return {"dataset": "Office", "split": "file-order", "kind": "history", "part": "5 to 9", "users": 9, "recall": {m.replace("_", "-"): v for m, v in recall.items()}}


def test_publishing_adds(tuning_file):
    """More seeds stay, of equals the new; parts follow their models; Holm's correction is made over old and new together."""
    same = against("sasrec", .01, 5, family="table4", a=["", "sasrec-eimf"], p_users_holm=.0102)  # as made from more digits than are stored
    old = collected([entry("remi", 5), entry("remi-eimf", 3, .22), entry("dnn", 1), entry("pop", 1), entry(CONTROLS[0], 3), entry("sasrec", 5), entry("sasrec-eimf", 5, .22)],
                    [against("remi", .02, 3), against(CONTROLS[0], .03, 3), same, against("dnn", .01, 1, family="baselines")], parts=[part(remi=.1, remi_eimf=.2)],
                    clusters={f: {"llm": "recorded"} for f in ("Office_Products-file-order", "Office_Products-gone")}, no_titles=["Office"])
    new = collected([entry("remi-eimf", 4, .32), entry("remi", 4, .3), entry("dnn", 1, .31), entry(CONTROLS[1], 4, .3)],
                    [against("remi", .01, 4), against(CONTROLS[1], .04, 4)], parts=[part(remi=.3, remi_eimf=.4)], seeds=2)
    before = json.dumps([old, new])
    merged, dropped = paper_merge.merge(old, new)
    assert json.dumps([old, new]) == before
    assert [(m["model"], len(m["seeds"]), m["by_seed"][0]) for m in merged["models"]] == [
        ("remi", 5, .2), ("remi-eimf", 4, .32), (CONTROLS[0], 3, .2), (CONTROLS[1], 4, .3), ("pop", 1, .2), ("dnn", 1, .31), ("sasrec", 5, .2), ("sasrec-eimf", 5, .22)]
    assert [(c["b"][1], c["seeds"], c["gain"], c.get("table_gain"), c["p_users_holm"]) for c in merged["comparisons"]] == [
        ("remi", 4, .02, .12, .03), (CONTROLS[0], 3, .02, .12, .06), (CONTROLS[1], 4, .02, None, .06), ("sasrec", 5, .02, None, .0102),
        ("pop", 4, .12, None, None), ("dnn", 1, .01, None, None), ("sasrec", 4, .12, None, None)]
    assert merged["comparisons"][1]["verdict"] == "not significant" and merged["comparisons"][0]["verdict"].startswith("better")
    assert [c["verdict"] for c in merged["comparisons"][4:]] == ["better over seeds, not tested over users", "not tested", "better over seeds, not tested over users"]
    assert dropped == ["tests over users in 1 comparisons: of one seed, and of other runs than the published ones"]
    assert merged["parts"] == [part(remi=.1, remi_eimf=.4)] and list(merged["clusters"]) == ["Office_Products-file-order"]
    assert merged["no_titles"] == [] and merged["seeds"] == 5 and merged["asked"]["groups"] == ["headline"]
    assert json.dumps(paper_merge.merge(merged, new)) == json.dumps((merged, []))


def test_a_published_comparison_says_what_the_published_runs_say():
    """Its gain by seed is the difference of the entries'; one of other runs says so; parts have no seeds, so theirs go."""
    at = {"family": "parts", "kind": "history", "part": "5 to 9"}
    models = [entry("remi", 3) | {"by_seed": [.2, .3, .4]}, entry("remi-eimf", 3) | {"by_seed": [.25, .31, .47]}, entry("pop", 1, .1)]

    def published(*comparisons):
        return paper_merge.merge(collected(models, comparisons, parts=[part(remi=.1, remi_eimf=.15)]), collected([]))[0]["comparisons"]
    agrees = against("remi", .02, 3, gain=.04333, gain_by_seed=[.05, .01001, .07])
    assert [c["gain"] for c in published(agrees, against("remi", .01, 1, gain=.05, **at))] == [.04333, pytest.approx(.2433, abs=1e-4), .05]
    found, pop = published(against("remi", .02, 2), against("remi", .01, 1, gain=.06, **at))
    assert (found["gain"], found["table_gain"], found["seeds"], pop["b"][1]) == (.02, .04333, 2, "pop")
    found, pop = published(against("remi", .02, 1))
    assert found["gain_by_seed"] == pytest.approx([.05, .01, .07]) and found["p_users"] is found["low"] is None and 0 < found["p_seeds"] < 1
    assert pop["gain_by_seed"] == pytest.approx([.15, .21, .37])
    texts = [paper_report.blocks(numbers([]) | {"comparisons": published(c)}) for c in (against("remi", .02, 2), against("remi", .02, 1))]
    assert "of other runs than the tables', whose gain is +.0433" in str(texts[0]) and "not tested over users" in str(texts[1]) and "no interval" in str(texts[1])


def test_publishing_keeps_the_larger_comparison_of_backbones_together(monkeypatch):
    for module in (experiments, paper_merge):
        monkeypatch.setattr(module, "tuning", lambda dataset: dict.fromkeys(("dnn", "mind", "sine"), {"flags": ""}))

    def side(backbones, seeds, gain):
        models = [entry(f"{b}{eimf}", seeds) for b in backbones for eimf in ("", "-eimf")]
        return collected(models, together=[{"dataset": "Office", "split": "file-order", "backbones": backbones, "seeds": seeds, "gain": gain}])
    two, three = side(["dnn", "mind"], 5, .1), side(["dnn", "mind", "sine"], 3, .2)
    for old, new, gain in ((two, three, .2), (three, two, .2), (three, side(["dnn", "mind", "sine"], 3, .3), .3), (collected([]), two, .1)):
        assert [c["gain"] for c in paper_merge.merge(old, new)[0]["together"]] == [gain]
    gone = two | {"models": two["models"][1:]}
    assert paper_merge.merge(gone, collected([]))[0]["together"] == []


def test_publishing_drops_what_would_not_be_made_so_now(tuning_file, monkeypatch):
    monkeypatch.setattr(experiments, "tuning_path", lambda dataset: tuning_file if dataset == "Office" else Path("/nowhere"))
    tuning_file.write_text(json.dumps({b: {"flags": "--dropout 0.3", "recall@50": .2} for b in ("mind", "dnn")}))
    experiments.tuning.cache_clear()
    tuned = [against("mind", .01, 1, family="tuned", a=["", "mind-tuned"]), against("dnn", .01, 1, family="tuned", a=["", "dnn-tuned"])]
    old = collected([entry(m, 1) for m in ("mind", "mind-tuned", "dnn", "dnn-tuned")] + [entry("remi", 1) | {"variant": "typical-99"}], tuned)
    tuning_file.write_text(json.dumps({b: {"flags": f"--dropout 0.{n}", "recall@50": .2} for b, n in (("mind", 3), ("dnn", 5))}))
    experiments.tuning.cache_clear()
    merged, dropped = paper_merge.merge(old, collected([]))
    assert {m["model"] for m in merged["models"]} == {"mind", "mind-tuned", "dnn"}
    assert [c["a"][1] for c in merged["comparisons"]] == ["mind-tuned"] and merged["tuning"]["Office"]["dnn"]["flags"] == "--dropout 0.5"
    assert dropped[:2] == ["Office, file-order, dnn-tuned: its settings have changed", "Office, file-order, typical-99, remi: no longer among the experiments"]
    assert dropped[2].startswith("1 comparisons: no longer made")


def test_publishing_refuses_other_data_and_other_interests():
    place, office = "Office_Products-file-order", numbers([])["datasets"]["Office"]
    old = collected([], clusters={place: {"llm": "recorded"}})
    with pytest.raises(UserError, match="Office: users is 4 here but 4905 in what is published"):
        paper_merge.merge(old, collected([], datasets={"Office": office | {"stats": office["stats"] | {"users": 4, "more": 1}}}))
    with pytest.raises(UserError, match=f"{place}: llm is 'offline' here but 'recorded' in what is published"):
        paper_merge.merge(old, collected([], clusters={place: {"llm": "offline"}}))
    with pytest.raises(SystemExit):
        reproduce.parse(["--publish", "--train-args", "--dim 32"])


def test_publishing_from_one_machine_after_the_other(copy):
    """The first runs two seeds; the second, with an empty data folder, adds one of other models, and runs nothing of the first's."""
    call, data = copy
    results = data / "results"

    def publish(*arguments):
        said = ended(call(*arguments, "--publish"))
        return said, (results / "numbers.json").read_text(), (results / "report.md").read_text()

    _, first, report = publish("--only", "headline", "--seeds", "2")
    models = {m["model"]: len(m["seeds"]) for m in json.loads(first)["models"]}
    assert models == dict.fromkeys(("remi", "remi-eimf", *CONTROLS), 2) and json.loads(first)["remaining"] == {}
    assert publish("--only", "headline", "--seeds", "2", "--report")[1:] == (first, report)
    shutil.rmtree(data / "Office_Products-file-order")
    shutil.rmtree(data / "reproduction")
    assert publish("--only", "headline", "--seeds", "2", "--report")[1:] == (first, report)
    assert json.loads(publish("--only", "headline", "--seeds", "3", "--report")[1])["remaining"]["headline"][0] == 4
    said, second, _ = publish("--only", "controls,table4", "--seeds", "1")
    found = json.loads(second)
    assert {m["model"]: len(m["seeds"]) for m in found["models"] if not m["variant"]} == models | dict.fromkeys(
        [m for b in experiments.TAUGHT[1:] for m in (b, f"{b}-eimf")], 1)
    assert len(found["comparisons"]) > len(json.loads(first)["comparisons"]) and "no longer published" not in said
    assert found["remaining"]["headline"][0] == 4 and found["remaining"]["table4"][0] == 12  # of the three seeds once asked for
    assert len(json.loads((data / "reproduction/numbers.json").read_text())["models"]) == len(found["models"])
    ended(call("--only", "controls,table4", "--seeds", "1", "--report"))
    assert len(json.loads((data / "reproduction/numbers.json").read_text())["models"]) < len(found["models"])  # its own alone
    assert publish("--only", "controls,table4", "--seeds", "1")[1] == second


def test_cold_items_and_short_histories_by_hand(tmp_path):
    """Two test users; items 1-3 are seen in training 3, 1 and 0 times. Ranked lists hold items 1 and 3."""
    write_dataset(tmp_path, [{}] * 4, [[1, 1, 1, 2], [1, 2, 4, 4, 2], [4, 2, 4, 2, 4, 2, 4, 3, 1, 2]], [0, 2, 2], dataset="Office_Products")
    run = Run("Office", "random", "", "remi", 0)
    folder = tmp_path / "Office_Products/07_evaluate/remi-s0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"columns": list(paper_numbers.METRICS)}))
    np.save(folder / "test_users.npy", np.array([1, 2]))
    np.save(folder / "test_values.npy", np.full((2, 8), .5, np.float32))
    np.save(folder / "test_ranked.npy", np.array([[1, 3], [1, 3]], np.int32))
    results = paper_numbers.Results(tmp_path, [run])
    parts = results.by_part(("Office", "random", "", "remi"))
    # histories of 4 and 8 events; targets: user 1 item 2 (1 training event, missed); user 2 items 1 (3, hit) and 2 (1, missed)
    np.testing.assert_array_equal(parts["history", "1 to 4"][0], [.5, np.nan])
    np.testing.assert_array_equal(parts["history", "5 to 9"][0], [np.nan, .5])
    np.testing.assert_array_equal(parts["target", "1 to 4"][0], [0, .5])
    assert np.isnan(parts["target", "0"][0]).all() and np.isnan(parts["target", "20 or more"][0]).all()


@pytest.mark.slow
def test_the_sample_from_run_all_to_the_report(sample):
    """run_all.sh --reproduce on the sample with few steps: killed half-way, taken up again, more seeds, then nothing is left to do."""
    checkout, _ = sample
    arguments = ["--reproduce", "--datasets", "sample", "--jobs", "2", "--train-args", "--max-iterations 20 --validate-every 10 --text-dim 32",
                 "--only", "table1,headline,fig3", "--seeds", "1"]
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    process = subprocess.Popen(["bash", "run_all.sh", *arguments], cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root = checkout / "data/sample-file-order"

    def manifests():
        return {p: p.stat().st_mtime_ns for p in root.glob("0?_*/*/manifest.json")}

    for _ in range(6000):
        if list((root / "06_train").glob("*/manifest.json")) or process.poll() is not None:
            break
        time.sleep(.1)
    process.kill()
    process.wait()
    done = run_all(checkout, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((checkout / "data/reproduction/numbers.json").read_text())
    models = {m["model"]: m for m in found["models"]}
    assert set(models) == {"remi", "remi-eimf", *experiments.CONTROLS, *experiments.ABLATIONS}
    assert all(m["seeds"] == [0] for m in models.values())
    before = manifests()
    arguments[-3:] = ["table1,headline", "--seeds", "2"]
    done = run_all(checkout, *arguments)
    assert done.returncode == 0 and before.items() <= manifests().items(), done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((checkout / "data/reproduction/numbers.json").read_text())
    models = {m["model"]: m for m in found["models"]}
    assert set(models) == {"remi", "remi-eimf", *experiments.CONTROLS} and all(m["seeds"] == [0, 1] for m in models.values())
    folders = [np.load(root / f"07_evaluate/remi-s{s}/test_values.npy") for s in (0, 1)]
    column = json.loads((root / "07_evaluate/remi-s0/metrics.json").read_text())["columns"].index("recall@50")
    assert models["remi"]["metrics"]["recall@50"]["mean"] == pytest.approx(np.mean([f[:, column].mean() for f in folders]), abs=1e-5)
    gain, = [c for c in found["comparisons"] if c["family"] == "help" and c["b"] == ["", "remi"]]
    assert gain["gain"] == pytest.approx(models["remi-eimf"]["metrics"]["recall@50"]["mean"] - models["remi"]["metrics"]["recall@50"]["mean"], abs=2e-5)
    cold = [p for p in found["parts"] if p["kind"] == "target"]
    assert cold and all(0 <= p["recall"]["remi-eimf"] <= 1 for p in cold)
    before = manifests()
    done = run_all(checkout, *arguments)
    assert done.returncode == 0 and "0 to go" in done.stdout and manifests() == before


def test_tuning_trains_once(tiny, monkeypatch, tuning_file):
    """Two settings of one backbone, really trained; a second call trains nothing."""
    monkeypatch.setattr(tune, "TRIALS", ("", "--dropout 0.5"))
    monkeypatch.setattr(tune, "folder_of", lambda dataset, split: "tiny")
    arguments = ["--datasets", "sample", "--backbones", "dnn", "--data-dir", str(tiny), "--train-args", "--dim 16 --max-iterations 60 --validate-every 30"]
    tune.main(arguments)
    found = json.loads(tuning_file.read_text())["dnn"]
    assert [t["flags"] for t in found["trials"]] == ["", "--dropout 0.5"] and 0 < found["recall@50"] == max(t["recall@50"] for t in found["trials"])
    times = [p.stat().st_mtime_ns for p in (tiny / "tiny/06_train").glob("dnn-tune-*/model.pt2")]
    tune.main(arguments)
    assert len(times) == 2 and times == [p.stat().st_mtime_ns for p in (tiny / "tiny/06_train").glob("dnn-tune-*/model.pt2")]
    before = tuning_file.read_text()
    shutil.rmtree(tiny / "tiny/06_train/dnn-tune-0")
    tune.main([*arguments, "--reuse"])
    assert tuning_file.read_text() == before and not (tiny / "tiny/06_train/dnn-tune-0").exists()
    with pytest.raises(UserError, match="dnn-tune-0 ended with exit code 2, for the reason above"):
        tune.main([*arguments[:-1], "--dim 0"])
    with pytest.raises(UserError, match="has no output of stage 01"):
        tune.main([*arguments, "--data-dir", str(tiny / "nowhere")])
