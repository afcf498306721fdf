"""Stage 07: what it measures, the index it saves, the report it writes."""
import shutil
from xml.etree import ElementTree

import hnswlib
import numpy as np
import pytest
import torch

from eimf.artifacts import UserError, load_json, save_json, sha256
from eimf.data import load_interactions
from eimf.export import load_export
from eimf.published import published


@pytest.fixture(scope="module")
def evaluated(finished, train, tiny, run_script):
    """Evaluation folder of an EIMF run, its backbone and popularity on the tiny data set."""
    for arguments in (["--backbone", "pop"], []):
        done, _ = train(*arguments)
        assert done.returncode == 0, done.stderr
    done = run_script("stages/07_evaluate.py", "--data-dir", tiny, "--dataset", "tiny", "--run", "remi-eimf-s0", "remi-s0", "pop-s0")
    assert done.returncode == 0, done.stderr
    return tiny / "tiny" / "07_evaluate", done.stdout


def ranked_by_hand(tiny, run, keep_seen=True):
    """Full ranking of every test user, one user at a time: (targets, ranked item numbers) of each."""
    data = load_interactions(tiny / "tiny" / "01_preprocess")
    model, items = load_export(run / "model.pt2"), np.load(run / "item_vectors.npy")
    for user in np.flatnonzero(data.split == 2):
        events = data.items[data.offsets[user]:data.offsets[user + 1]]
        cut = int(len(events) * .8)
        history = torch.zeros(1, 20, dtype=torch.int64)
        seen = events[:cut][-20:]
        history[0, :len(seen)] = torch.tensor(seen.astype(np.int64))
        interests = model(history)[0][0].detach().numpy()
        scores = (interests @ items.T).max(0)
        scores[0] = -np.inf
        if not keep_seen:
            scores[events[:cut]] = -np.inf
        yield set(events[cut:].tolist()), np.argsort(-scores, kind="stable")


def test_metrics_by_hand(evaluated, tiny):
    folder, _ = evaluated
    for name in ("remi-eimf-s0", "pop-s0"):
        metrics = load_json(folder / name / "metrics.json")["test"]
        recall, hit = [], []
        for targets, order in ranked_by_hand(tiny, tiny / "tiny" / "06_train" / name):
            found = len(targets & set(order[:20].tolist()))
            recall.append(found / len(targets))
            hit.append(found > 0)
        assert metrics["users"] == len(recall) == 20
        assert metrics["recall@20"] == pytest.approx(np.mean(recall), abs=1e-6)
        assert metrics["hr@20"] == pytest.approx(np.mean(hit), abs=1e-6)


def test_seen_items_leave_the_ranking_on_request(evaluated, tiny, run_script):
    shutil.copytree(tiny, copy := tiny.parent / "tiny-unseen", dirs_exist_ok=True)
    done = run_script("stages/07_evaluate.py", "--data-dir", copy, "--dataset", "tiny", "--run", "remi-eimf-s0", "--remove-seen")
    assert done.returncode == 0, done.stderr
    found = load_json(copy / "tiny" / "07_evaluate" / "remi-eimf-s0" / "metrics.json")["test"]["recall@20"]
    expected = np.mean([len(t & set(order[:20].tolist())) / len(t) for t, order in
                        ranked_by_hand(tiny, tiny / "tiny" / "06_train" / "remi-eimf-s0", keep_seen=False)])
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != load_json(evaluated[0] / "remi-eimf-s0" / "metrics.json")["test"]["recall@20"]


def test_per_user_values_have_the_reported_means(evaluated):
    folder, _ = evaluated
    metrics = load_json(folder / "remi-eimf-s0" / "metrics.json")
    values, users = (np.load(folder / "remi-eimf-s0" / f"test_{n}.npy") for n in ("values", "users"))
    assert values.dtype == np.float32 and values.shape == (len(users), len(metrics["columns"]))
    for column, name in enumerate(metrics["columns"]):
        assert values[:, column].mean() == pytest.approx(metrics["test"][name], abs=1e-5)


def test_the_saved_index_finds_what_exact_search_finds(evaluated, tiny):
    folder, _ = evaluated
    run, vectors = folder / "remi-eimf-s0", np.load(tiny / "tiny" / "06_train" / "remi-eimf-s0" / "item_vectors.npy")
    side = load_json(run / "index.json")
    assert side["sha256"] == sha256(run / "index.hnsw") and (side["dim"], side["items"], side["space"]) == (16, 60, "ip")
    index = hnswlib.Index(space=side["space"], dim=side["dim"])
    index.load_index(str(run / "index.hnsw"))
    index.set_ef(side["ef"])
    labels, _ = index.knn_query(vectors[5], k=10)
    assert labels[0].tolist() == (1 + np.argsort(-(vectors[1:] @ vectors[5]))[:10]).tolist()
    assert load_json(run / "metrics.json")["ann"]["recall@50"] > .98


def test_merging_interests_keeps_each_item_once(load_script):
    merge = load_script("stages/07_evaluate.py").merge
    labels = np.array([[5, 3, 9, 3, 5, 2]])
    scores = np.array([[.1, .9, .5, .8, .7, .2]])
    assert merge(labels, scores, 3).tolist() == [[3, 5, 9]]
    assert merge(labels, scores, 6).tolist() == [[3, 5, 9, 2, -1, -1]]


def test_a_collapsed_model_is_seen(load_script):
    """Equal interests give cosine 1 and one winner; opposed ones with sharp routing give the other end."""
    diversity = load_script("stages/07_evaluate.py").diversity
    same, uniform = np.ones((3, 2, 4)), np.full((3, 2, 5), .2)
    cosine, entropy, wins = diversity(same, uniform, np.full(3, 5), np.zeros((3, 20), int))
    np.testing.assert_allclose(cosine, 1)
    np.testing.assert_allclose(entropy, 1)
    assert wins.tolist() == [1, 0]
    opposed, sharp = np.stack([np.eye(2, 4)] * 3), np.zeros((3, 2, 5))
    sharp[:, :, 0] = 1
    cosine, entropy, wins = diversity(opposed, sharp, np.full(3, 5), np.tile([0, 1], (3, 10)))
    np.testing.assert_allclose(cosine, 0)
    np.testing.assert_allclose(entropy, 0, atol=1e-9)
    assert wins.tolist() == [.5, .5]


def test_summary_is_the_mean_over_seeds(evaluated, tiny, train, run_script):
    done, _ = train("--seed", "1")
    assert done.returncode == 0, done.stderr
    done = run_script("stages/07_evaluate.py", "--data-dir", tiny, "--dataset", "tiny", "--skip-done")
    assert done.returncode == 0 and "07_evaluate/remi-s0: skipped" in done.stdout, done.stdout + done.stderr
    folder = tiny / "tiny" / "07_evaluate"
    seeds = [load_json(folder / f"remi-s{s}" / "metrics.json")["test"]["recall@50"] for s in (0, 1)]
    entry = load_json(folder / "summary.json")["models"]["remi"]
    assert entry["seeds"] == [0, 1]
    assert entry["mean"]["recall@50"] == pytest.approx(np.mean(seeds), abs=1e-5)
    assert entry["sd"]["recall@50"] == pytest.approx(np.std(seeds, ddof=1), abs=1e-5)


def test_runs_of_other_data_and_other_protocols_are_not_mixed(evaluated, tiny, tmp_path, load_script, capsys):
    module, copy = load_script("stages/07_evaluate.py"), tmp_path / "data"
    shutil.copytree(tiny, copy)
    call = ["--data-dir", str(copy), "--dataset", "tiny", "--threads", "1"]
    root = copy / "tiny" / "07_evaluate"
    module.main([*call, "--run", "remi-s0", "--remove-seen"])
    assert load_json(root / "summary.json")["models"].keys() == {"remi"}
    others = sorted(p.parent.name for p in root.glob("*/manifest.json") if p.parent.name != "remi-s0")
    assert "remi-eimf-s0" in others
    assert f"left out, evaluated on other data or without --remove-seen: {', '.join(others)}" in capsys.readouterr().out
    module.main([*call, "--run", "remi-eimf-s0"])
    assert "or with --remove-seen: remi-s0\n" in (root / "summary.md").read_text()
    split = np.load(copy / "tiny" / "01_preprocess" / "split.npy")
    np.save(copy / "tiny" / "01_preprocess" / "split.npy", split[::-1])
    manifest = copy / "tiny" / "01_preprocess" / "manifest.json"
    digest = sha256(manifest.parent / "split.npy")
    facts = load_json(manifest)
    facts["outputs"]["split.npy"]["sha256"] = digest
    save_json(manifest, facts)
    with pytest.raises(UserError, match="06_train/remi-s0 was made from another 01_preprocess/split.npy than the present one; run stage 06_train again"):
        module.main([*call, "--run", "remi-s0"])
    capsys.readouterr()
    with pytest.raises(UserError, match="no run of the present data"):
        module.main(call)
    assert "left out: 06_train/pop-s0 was made from another" in capsys.readouterr().out


def test_differences_are_paired_by_user(load_script, tmp_path):
    """A gain of .1 for every user is significant; one for half of them and a loss for the others is not."""
    module = load_script("stages/07_evaluate.py")
    rng = np.random.default_rng(0)
    base = rng.random(400)
    groups = {}
    for model, values in (("remi", base), ("remi-eimf", base + .1), ("remi-eimf-random-text", base + .1 + np.tile([.3, -.3], 200))):
        folder = tmp_path / f"{model}-s0"
        folder.mkdir()
        np.save(folder / "test_values.npy", values[:, None])
        np.save(folder / "test_users.npy", np.arange(400))
        groups[model] = [(folder, {"columns": ["recall@50"], "config": {"seed": 0}})]
    by_other = {d["against"]: d for d in module.differences(groups)}
    assert by_other["remi"]["recall@50"] == pytest.approx(.1) and by_other["remi"]["low"] > .09
    assert by_other["remi-eimf-random-text"]["low"] < 0 < by_other["remi-eimf-random-text"]["high"]


def test_the_reports_hold_the_numbers_and_the_plots(evaluated):
    folder, printed = evaluated
    metrics = load_json(folder / "remi-eimf-s0" / "metrics.json")["test"]
    markdown, page = ((folder / "remi-eimf-s0" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for name in ("recall@20", "ndcg@50", "hr@10"):
        assert f"{metrics[name]:.4f}" in markdown and f"{metrics[name]:.4f}" in page
    assert page.count("<svg") == 3 and "http-equiv" not in page and "src=" not in page  # self-contained
    for svg in page.split("<figure>")[1:]:
        ElementTree.fromstring(svg[:svg.index("</svg>") + 6])
    assert f"{metrics['recall@50']:.4f}" in printed
    assert (folder / "pop-s0" / "report.html").exists() and not (folder / "pop-s0" / "index.hnsw").exists()


def test_published_numbers_are_found_by_the_counts():
    name, rows = published({"users": 22363, "items": 12101, "interactions": 198502})
    assert name == "Beauty" and rows["remi-eimf"]["recall@50"] == .3636 and rows["remi-eimf"]["hr@50"] == .4802
    assert published({"users": 22363, "items": 12101, "interactions": 1}) == (None, {})


@pytest.mark.parametrize("damage, message", [
    (lambda run: (run / "model.pt2").write_bytes(b"x" * (run / "model.pt2").stat().st_size), "not a readable exported model"),
    (lambda run: (run / "item_vectors.npy").unlink(), "found no file"),
    (lambda run: shutil.rmtree(run), "06_train has not finished there"),
])
def test_damaged_runs_get_a_sentence(finished, tiny, tmp_path, run_script, damage, message):
    shutil.copytree(tiny / "tiny" / "01_preprocess", tmp_path / "tiny" / "01_preprocess")
    shutil.copytree(finished, tmp_path / "tiny" / "06_train" / "remi-eimf-s0")
    damage(tmp_path / "tiny" / "06_train" / "remi-eimf-s0")
    done = run_script("stages/07_evaluate.py", "--data-dir", tmp_path, "--dataset", "tiny", "--run", "remi-eimf-s0")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
