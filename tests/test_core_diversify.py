"""eimf_core.diversify against a plain greedy loop."""
import eimf_core
import numpy as np
import pytest


def oracle(ids, scores, category, n, penalty):
    chosen = np.full((len(ids), n), -1, np.int64)
    for user, row in enumerate(ids):
        left, taken = [j for j in range(len(row)) if row[j] >= 0], []
        while left and len(taken) < n:
            value = [float(scores[user, j]) - penalty * sum(category[row[j]] == category[i] != -1 for i in taken) for j in left]
            taken.append(row[left.pop(int(np.argmax(value)))])
        chosen[user, :len(taken)] = taken
    return chosen


@pytest.mark.parametrize("penalty", [0.0, 0.125, 1.0, 1000.0])
@pytest.mark.parametrize("n", [1, 7, 40, 60])
def test_equals_the_greedy_loop(penalty, n):
    rng = np.random.default_rng(n)
    interests, items = rng.standard_normal((150, 3, 8), dtype=np.float32), rng.standard_normal((45, 8), dtype=np.float32)
    category = rng.integers(-1, 6, 45).astype(np.int32)
    ids, scores, _ = eimf_core.top_n(interests, items, 50)  # 5 of the 50 are padding
    for threads in (1, 2, 7):
        chosen, chosen_scores = eimf_core.diversify(ids, scores, category, n, penalty=penalty, n_threads=threads)
        np.testing.assert_array_equal(chosen, oracle(ids, scores, category, n, penalty))
        position = [[list(row).index(i) for i in picked if i >= 0] for row, picked in zip(ids, chosen, strict=True)]
        for user, where in enumerate(position):
            np.testing.assert_array_equal(chosen_scores[user, :len(where)], scores[user, where])
            assert (chosen_scores[user, len(where):] == -np.inf).all()


def test_effect():
    ids, scores = np.array([[0, 1, 2, 3]], np.int64), np.array([[4, 3, 2, 1]], np.float32)
    category = np.array([5, 5, 5, 9], np.int32)
    assert eimf_core.diversify(ids, scores, category, 4, penalty=0.0)[0].tolist() == [[0, 1, 2, 3]]
    assert eimf_core.diversify(ids, scores, category, 4, penalty=2.5)[0].tolist() == [[0, 3, 1, 2]]
    assert eimf_core.diversify(ids, scores, np.full(4, -1, np.int32), 4, penalty=2.5)[0].tolist() == [[0, 1, 2, 3]]  # no category: never shared
    assert eimf_core.diversify(ids, np.zeros((1, 4), np.float32), category, 3, penalty=1.0)[0].tolist() == [[0, 3, 1]]  # ties by order


@pytest.mark.parametrize("change, words", [
    ({"ids": np.array([[9]], np.int64)}, "found 9 for user 0; expected -1 or an item id below 3"),
    ({"ids": np.array([[-2]], np.int64)}, "found -2"),
    ({"scores": np.array([[np.nan]], np.float32)}, "scores: found nan"),
    ({"scores": np.zeros((1, 2), np.float32)}, "the same"),
    ({"category": np.zeros(3, np.int64)}, "category: found int64"),
    ({"penalty": -1.0}, "penalty is -1"),
    ({"penalty": float("nan")}, "penalty is nan"),
    ({"n": -1}, "n is -1"),
    ({"n": 10**13}, r"results of shape \(1, 10000000000000\) do not fit into memory"),
    ({"n_threads": -1}, "n_threads is -1"),
])
def test_bad_arguments(change, words):
    arguments = {"ids": np.array([[0]], np.int64), "scores": np.zeros((1, 1), np.float32), "category": np.zeros(3, np.int32), "n": 1, "penalty": 0.5}
    with pytest.raises(ValueError, match=words):
        eimf_core.diversify(**(arguments | change))
