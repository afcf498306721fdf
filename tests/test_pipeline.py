"""The whole pipeline as a user runs it: run_all.sh on the sample and on real data, in a copy of the repository."""
import re
import time

import numpy as np
import pytest
import torch

from conftest import run_all
from eimf.artifacts import load_json, load_lines
from eimf.data import load_interactions, load_items, load_user_ids, padded
from eimf.export import load_export


@pytest.mark.slow
def test_the_sample_ends_with_a_results_table(sample):
    checkout, printed = sample
    summary = load_json(checkout / "data/sample/07_evaluate/summary.json")["models"]
    assert set(summary) == {"pop", "remi", "remi-eimf"}
    recall = {model: entry["mean"]["recall@20"] for model, entry in summary.items()}
    assert recall["remi"] > 1.5 * recall["pop"] > 0, recall
    assert recall["remi-eimf"] > recall["remi"], recall
    table = (checkout / "data/sample/07_evaluate/summary.md").read_text()
    assert table.strip() in printed and "report.html" in printed and "finished in" in printed


@pytest.mark.slow
def test_interests_of_the_sample_are_purer_than_chance(sample):
    """The ten items nearest to an interest share a leaf category far more often than random items do."""
    checkout, _ = sample
    data = checkout / "data/sample"
    truth = load_json(checkout / "data/raw/sample_truth.json")["items"]
    items, interactions = load_items(data / "01_preprocess"), load_interactions(data / "01_preprocess")
    leaf = np.array([""] + [truth[item["id"]] for item in items[1:]])
    users, start, middle, _ = interactions.evaluation_ranges("test")
    run = data / "06_train/remi-eimf-s0"
    model, vectors = load_export(run / "model.pt2"), np.load(run / "item_vectors.npy")
    interests = model(torch.from_numpy(padded(interactions.items, start, middle, 20)))[0].detach().numpy()
    scores = interests.reshape(-1, vectors.shape[1]) @ vectors[1:].T
    nearest = leaf[1:][np.argsort(-scores, 1)[:, :10]]
    purity = np.mean([max(np.unique(row, return_counts=True)[1]) / 10 for row in nearest])
    rng = np.random.default_rng(0)
    chance = np.mean([max(np.unique(leaf[1:][rng.integers(0, len(leaf) - 1, 10)], return_counts=True)[1]) / 10 for _ in range(500)])
    assert purity > 1.5 * chance, (purity, chance)


@pytest.mark.slow
def test_labels_match_the_true_interests_of_the_typical_users(sample):
    """An explicit interest names a leaf category that its typical user really has far more often than another user's."""
    checkout, _ = sample
    data = checkout / "data/sample"
    truth = load_json(checkout / "data/raw/sample_truth.json")["users"]
    rows = load_lines(data / "04_infer_interests/interests.jsonl")
    assert {row["source"] for row in rows} == {"offline"}

    def share(own):
        hits = [any(text.lower().startswith(leaf.split(" > ")[-1].lower()) for leaf in truth[rows[own(n)]["id"]])
                for n, row in enumerate(rows) for text in row["interests"][:3]]
        return np.mean(hits)

    assert share(lambda n: n) > 3 * share(lambda n: (n + 7) % len(rows)) and share(lambda n: n) > .4


@pytest.mark.slow
def test_nothing_held_out_reaches_clusters_and_prompts(sample):
    checkout, _ = sample
    data = checkout / "data/sample"
    interactions = load_interactions(data / "01_preprocess")
    train = set(interactions.training_ranges()[0].tolist())
    assert len(train) < interactions.n_users
    clusters = np.load(data / "03_cluster_users/cluster_of_user.npy")
    assert set(np.flatnonzero(clusters >= 0).tolist()) <= train
    assert set(np.load(data / "03_cluster_users/typical_users.npy").tolist()) <= train
    user_text = np.load(data / "02_encode_text/user_text.npy")
    others = np.setdiff1d(np.arange(interactions.n_users), list(train))
    assert not user_text[others].any() and user_text[list(train)].any(1).mean() > .99
    ids = load_user_ids(data / "01_preprocess")
    held_out = {ids[u] for u in others}
    asked = {line["custom_id"].split("/", 1)[1].split("#")[0] for line in load_lines(data / "04_infer_interests/requests.jsonl")}
    assert asked and not asked & held_out


@pytest.mark.slow
def test_a_second_call_skips_everything(sample):
    checkout, _ = sample
    started = time.time()
    done = run_all(checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("01_preprocess", "02_encode_text", "03_cluster_users", "04_infer_interests", "05_encode_interests",
                  "06_train/remi-s0", "06_train/remi-eimf-s0", "07_evaluate/remi-s0"):
        assert f"{stage}: skipped, arguments and inputs are unchanged" in done.stdout, stage
        manifest = checkout / "data/sample" / stage / "manifest.json"
        assert manifest.stat().st_mtime < started, f"{stage} was written again"


@pytest.mark.slow
def test_the_readme_shows_what_the_sample_prints(sample, root):
    """The same rows and columns, and numbers that agree up to what another machine's arithmetic changes."""
    checkout, _ = sample
    shown = re.search(r"<!-- sample output -->(.*?)<!-- end of sample output -->", (root / "README.md").read_text(), re.S)[1]
    rows = {line.split("|")[1].strip(): [float(x) for x in re.findall(r"0\.\d+", line)]
            for line in shown.splitlines() if re.match(r"\| (pop|remi)[^|]* \| 1 ", line)}
    assert set(rows) == {"pop", "remi", "remi-eimf"}
    summary = load_json(checkout / "data/sample/07_evaluate/summary.json")["models"]
    for model, numbers in rows.items():
        expected = [summary[model]["mean"][m] for m in ("recall@20", "recall@50", "ndcg@20", "ndcg@50", "hr@20", "hr@50")]
        np.testing.assert_allclose(numbers, expected, atol=.04, err_msg=model)


@pytest.mark.slow
def test_office_with_recorded_answers(checkout, shared):
    """Real data, real LLM answers, few steps: published statistics, and every model beats popularity."""
    answers = shared / "llm" / "Office_Products.responses.jsonl.gz"
    done = run_all(checkout, "--dataset", "Office_Products", "--raw-dir", shared / "data/raw", "--split", "file-order", "--llm", "recorded",
                   "--llm-args", f"--responses {answers} --match user", "--train-args", "--max-iterations 1200 --text-dim 128")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data = checkout / "data/Office_Products-file-order"
    stats = load_json(data / "01_preprocess/stats.json")
    assert (stats["users"], stats["items"], stats["interactions"]) == (4905, 2420, 53258)
    clusters = load_json(data / "03_cluster_users/report.json")
    assert clusters["converged"] and .025 < clusters["fraction"] < .035
    rows = load_lines(data / "04_infer_interests/interests.jsonl")
    assert len(rows) == clusters["clusters"] and {row["source"] for row in rows} == {"recorded"}
    recall = {m: e["mean"]["recall@50"] for m, e in load_json(data / "07_evaluate/summary.json")["models"].items()}
    assert min(recall["remi"], recall["remi-eimf"]) > 2 * recall["pop"] > 0, recall
    report = (data / "07_evaluate/remi-eimf-s0/report.html").read_text()
    assert "paper, remi-eimf" in report and "0.2296" in report


@pytest.mark.slow
def test_leave_one_out_hides_the_last_two_events_everywhere(sample):
    """Every user is trained on, but text vectors, prompts and training see only the prefix; one target per user."""
    checkout, _ = sample
    done = run_all(checkout, "--split", "leave-one-out", "--train-args", "--max-iterations 100")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data = checkout / "data/sample-leave-one-out"
    interactions = load_interactions(data / "01_preprocess")
    offsets, items = interactions.offsets, interactions.items
    text, user_text = (np.load(data / "02_encode_text" / f"{n}_text.npy") for n in ("item", "user"))
    has = np.load(data / "02_encode_text/item_has_text.npy")
    for user in range(0, interactions.n_users, 97):
        prefix = items[offsets[user]:offsets[user + 1] - 2]
        prefix = prefix[has[prefix]]
        np.testing.assert_allclose(user_text[user], text[prefix].mean(0) if len(prefix) else 0, atol=1e-5)
    seen = np.load(data / "04_infer_interests/seen_events.npy")
    typical = np.load(data / "03_cluster_users/typical_users.npy")
    assert (seen[:, 1] <= offsets[typical + 1] - 2).all() and (seen[:, 0] >= offsets[typical]).all()
    metrics = load_json(data / "07_evaluate/remi-eimf-s0/metrics.json")
    assert metrics["test"]["users"] == interactions.n_users and metrics["split"] == "leave-one-out"
    values = np.load(data / "07_evaluate/remi-eimf-s0/test_values.npy")[:, metrics["columns"].index("recall@20")]
    assert set(np.unique(values)) == {0, 1}  # one target: found or not
