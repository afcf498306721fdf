"""The built-in sample: deterministic, in the public format, and as hard as it should be."""
import ast
import gzip
import json
from collections import Counter

import numpy as np
import pytest
from eimf.artifacts import load_json, load_lines
from eimf.data import load_interactions, load_user_ids

FILES = ("reviews_sample_5.json.gz", "meta_sample.json.gz", "sample_truth.json")


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def parsed(text, parse):
    try:
        return parse(text)
    except (ValueError, SyntaxError):
        return None


@pytest.fixture(scope="module")
def sample(sample_raw):
    """(reviews, metadata, truth); None for broken lines."""
    return ([parsed(text, json.loads) for text in lines(sample_raw / FILES[0])],
            [parsed(text, ast.literal_eval) for text in lines(sample_raw / FILES[1])], load_json(sample_raw / FILES[2]))


@pytest.fixture(scope="module")
def folder(sample_raw, run_script, tmp_path_factory):
    """Stage 01's folder of the sample."""
    data = tmp_path_factory.mktemp("data")
    done = run_script("stages/01_preprocess.py", "--data-dir", data, "--raw-dir", sample_raw)
    assert done.returncode == 0, done.stderr
    return data / "sample" / "01_preprocess"


def test_same_seed_same_bytes(sample_raw, run_script, tmp_path):
    small = ["--users", 60, "--items", 200]
    for name, arguments in {"again": [], "a": [*small, "--seed", 1], "b": [*small, "--seed", 1],
                            "c": [*small, "--seed", 2]}.items():
        assert run_script("data/make_sample.py", "--out", tmp_path / name, *arguments).returncode == 0
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == sorted(FILES)
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (sample_raw / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_too_small(run_script, tmp_path):
    done = run_script("data/make_sample.py", "--out", tmp_path, "--users", 5)
    assert done.returncode == 2 and "at least 20 users" in done.stderr


def test_blemishes_of_real_files(sample):
    reviews, metadata, truth = sample
    for rows in (reviews, metadata):
        assert 0 < rows.count(None) < 0.01 * len(rows)
    good = [row for row in reviews if row]
    assert all(row["unixReviewTime"] % 86400 == 0 for row in good)
    assert [row["asin"] for row in good] == sorted(row["asin"] for row in good)
    events = Counter((row["reviewerID"], row["asin"], row["unixReviewTime"]) for row in good)
    assert 5 <= sum(n - 1 for n in events.values()) <= 100  # double lines
    days = Counter((user, time) for user, _, time in events)
    assert 0.2 < sum(n - 1 for n in days.values()) / len(events) < 0.5  # ties
    titles = [row.get("title") for row in metadata if row]
    assert 0.003 < titles.count(None) / len(titles) < 0.03
    assert any("&amp;" in title for title in titles if title)
    assert {row["asin"] for row in good} < set(truth["items"])  # and some items were never reviewed
    assert {row["reviewerID"] for row in good} <= set(truth["users"])


def test_size(folder):
    stats = load_json(folder / "stats.json")
    assert 2900 <= stats["users"] <= 3200 and 1400 <= stats["items"] <= 1650
    assert 7 < stats["mean_length"] < 12
    counts = load_interactions(folder).training_counts()[1:]
    assert np.mean(counts < 10) > 0.2  # many rare items, of which only the text says something


def test_titles_say_the_category(folder, sample):
    """Words of a title are shared inside a leaf category far more than across."""
    leaf = sample[2]["items"]
    rows = [row for row in load_lines(folder / "items.jsonl") if row["title"]]
    words = [set(row["title"].replace(",", "").split()) for row in rows]
    leaves = [leaf[row["id"]] for row in rows]
    assert all(" > ".join(row["categories"]) in (leaves[i], "") for i, row in enumerate(rows))
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(rows), (60_000, 2))
    overlap = np.array([len(words[a] & words[b]) / len(words[a] | words[b]) for a, b in pairs])
    same = np.array([leaves[a] == leaves[b] and a != b for a, b in pairs])
    assert same.sum() > 300
    assert overlap[same].mean() > 4 * overlap[~same].mean()
    assert len({row["title"] for row in rows}) == len(rows)


def test_histories_follow_the_interests(folder, sample):
    """Four events in five are from the user's 2 to 4 interests; runs of one interest are longer than chance."""
    truth = sample[2]
    assert set(map(len, truth["users"].values())) == {2, 3, 4}
    leaf = [None] + [truth["items"][row["id"]] for row in load_lines(folder / "items.jsonl")]
    data = load_interactions(folder)
    inside, repeated, chance = [], [], []
    for user, start, end in zip(load_user_ids(folder), data.offsets, data.offsets[1:]):
        leaves = [leaf[i] for i in data.items[start:end]]
        inside += [name in truth["users"][user] for name in leaves]
        repeated += [a == b for a, b in zip(leaves, leaves[1:])]
        n, counts = len(leaves), Counter(leaves).values()
        chance.append(sum(c * (c - 1) for c in counts) / n / (n - 1))  # of equal neighbours in a shuffled history
    assert 0.75 < np.mean(inside) < 0.9
    assert np.mean(repeated) > np.mean(chance) + 0.03


def test_popularity_alone_is_weak(folder):
    """The 50 most popular items hold less than a fifth of the test users' targets, but more than 50 items at random would."""
    data = load_interactions(folder)
    top = np.argsort(-data.training_counts(), kind="stable")[:50]
    _, _, middle, end = data.evaluation_ranges("test")
    recall = np.mean([np.isin(data.items[a:b], top).mean() for a, b in zip(middle, end)])
    assert 50 / data.n_items < recall < 0.2
