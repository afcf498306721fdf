"""Metrics against trec_eval and against plain loops."""
import math

import numpy as np
import pytest

from eimf.metrics import hit_matrix, ndcg_published, per_user


@pytest.fixture(scope="module")
def lists():
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(np.arange(1, 201))[:50] for _ in range(60)])
    targets = [rng.choice(np.arange(1, 201), rng.integers(1, 70), replace=False) for _ in range(60)]
    return ranked, targets, np.repeat(np.arange(60), [len(t) for t in targets]), np.concatenate(targets)


def test_against_trec_eval(lists):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ranked, targets, target_user, target_item = lists
    truth = {str(u): {str(i): 1 for i in t} for u, t in enumerate(targets)}
    found = {str(u): {str(i): 1.0 / (rank + 1) for rank, i in enumerate(row)} for u, row in enumerate(ranked)}
    cuts = "5,10,20,50"
    theirs = pytrec_eval.RelevanceEvaluator(truth, {f"recall.{cuts}", f"ndcg_cut.{cuts}", f"success.{cuts}"}).evaluate(found)
    mine = per_user(*hit_matrix(ranked, target_user, target_item))
    for k in (5, 10, 20, 50):
        for name, key in (("recall", f"recall_{k}"), ("ndcg", f"ndcg_cut_{k}"), ("hr", f"success_{k}")):
            expected = [theirs[str(u)][key] for u in range(len(ranked))]
            np.testing.assert_allclose(mine[f"{name}@{k}"], expected, rtol=1e-6, err_msg=key)


def test_by_hand():
    ranked = np.array([[3, 1, 2], [5, 6, -1], [9, 8, 7]])
    hits, n_targets = hit_matrix(ranked, np.array([0, 0, 0, 1, 2]), np.array([1, 3, 99, 4, 7]))
    assert hits.tolist() == [[True, True, False], [False] * 3, [False, False, True]]
    assert n_targets.tolist() == [3, 1, 1]
    values = per_user(hits, n_targets, (2, 3))
    assert values["recall@2"].tolist() == [2 / 3, 0, 0]
    assert values["hr@3"].tolist() == [1, 0, 1]
    assert values["ndcg@2"].tolist() == [1, 0, 0]
    assert values["ndcg@3"][2] == pytest.approx(1 / 2)  # rank 3: 1 / log2(4), ideal 1
    assert values["ndcg@3"][0] == pytest.approx((1 + 1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / 2))


def test_a_repeated_target_counts_once():
    hits, n_targets = hit_matrix(np.array([[1, 2]]), np.array([0, 0, 0]), np.array([2, 2, 5]))
    assert n_targets.tolist() == [2]
    assert per_user(hits, n_targets, (2,))["recall@2"].tolist() == [0.5]


def test_published_ndcg_is_the_set_order_one(lists):
    """The definition, written as the protocol describes it: positions by set order, ideal over the hits found."""
    ranked, targets, target_user, target_item = lists
    for k in (20, 50):
        expected = []
        for row, wanted in zip(ranked, targets):
            seen, gain, hits = set(), 0.0, 0
            for item in row[:k].tolist():
                seen.add(item)
            for position, item in enumerate(seen):
                if item in set(wanted.tolist()):
                    gain, hits = gain + 1 / math.log2(position + 2), hits + 1
            expected.append(gain / sum(1 / math.log2(p + 2) for p in range(hits)) if hits else 0.0)
        np.testing.assert_allclose(ndcg_published(ranked, target_user, target_item, k), expected, rtol=1e-12)
    true = per_user(*hit_matrix(ranked, target_user, target_item))["ndcg@50"].mean()
    assert abs(np.mean(expected) - true) > 0.01  # it is a different number, which is why it is only shown beside
