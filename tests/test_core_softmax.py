"""eimf_core.softmax_loss against the formula in float64, and the stages' use of it against torch's own products."""
import eimf_core
import numpy as np
import pytest
import torch

from eimf import losses


def oracle(queries, items, target, weight, excluded):
    """Losses and gradients in float64."""
    q, x, w = (a.astype(np.float64) for a in (queries, items, weight))
    scores = q @ x.T
    kept = np.ones(len(x), bool)
    kept[excluded] = False
    top = scores[:, kept].max(1, keepdims=True)
    p = np.exp(np.where(kept, scores - top, -np.inf))
    total = p.sum(1, keepdims=True)
    found = (np.log(total) + top)[:, 0] - (q * x[target]).sum(1)
    residual = p / total * w[:, None]
    residual[np.arange(len(q)), target] -= w
    return np.where(w != 0, found, 0), residual @ x, residual.T @ q


def example(users, items, dim, scale=1.0, seed=0):
    rng = np.random.default_rng([seed, users, items, dim])
    weight = rng.random(users, dtype=np.float32)
    weight[users // 2:users // 2 + 1] = 0 if users > 1 else 1
    return (scale * rng.standard_normal((users, dim), dtype=np.float32), rng.standard_normal((items, dim), dtype=np.float32),
            rng.integers(items > 1, items, users), weight, np.arange(0, items - 1, 7)[:items // 2] if items > 1 else np.zeros(0, np.int64))


def close(found, expected, tolerance):
    for f, e in zip(found, expected, strict=True):
        assert np.abs(f - e).max(initial=0) <= tolerance * max(np.abs(e).max(initial=0), 0.5)  # terms of size 1 cancel where there are few items


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 384])
@pytest.mark.parametrize("users, items", [(1, 1), (1, 2), (5, 3), (6, 127), (13, 128), (128, 129), (33, 2500)])
def test_equals_the_formula(users, items, dim):
    arguments = example(users, items, dim, dim ** -0.5)
    arguments = (*arguments[:4], arguments[4][~np.isin(arguments[4], arguments[2])])
    close(eimf_core.softmax_loss(*arguments), oracle(*arguments), 3e-6)


def test_same_bits_for_all_kernels_threads_and_with_frozen_items():
    arguments = example(61, 5000, 50)
    first = eimf_core.softmax_loss(*arguments)
    for kernel in eimf_core.kernels():
        for threads in (1, 2, 7):
            for f, e in zip(eimf_core.softmax_loss(*arguments, kernel=kernel, n_threads=threads), first, strict=True):
                np.testing.assert_array_equal(f, e)
            frozen = eimf_core.softmax_loss(*arguments, item_gradient=False, kernel=kernel, n_threads=threads)
            np.testing.assert_array_equal(frozen[1], first[1])
            assert frozen[2] is None


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 10.0, 100.0, 3000.0])
def test_large_and_small_scores(scale):
    arguments = example(20, 400, 16, scale)
    arguments = (*arguments[:4], arguments[4][~np.isin(arguments[4], arguments[2])])
    close(eimf_core.softmax_loss(*arguments), oracle(*arguments), max(3e-6, 1e-6 * scale))  # a score of s is rounded by s * 2^-24


def test_all_scores_far_below_zero():
    queries, items = np.full((2, 4), 100, np.float32), -np.full((5, 4), 10, np.float32)  # e^-4000 is no float
    found = eimf_core.softmax_loss(queries, items, np.array([1, 2]), np.ones(2, np.float32), np.array([0]))
    np.testing.assert_allclose(found[0], np.log(4), rtol=1e-3)  # of -4000, float32 knows three digits after the point


def test_excluded_target_weight_zero_and_nan():
    queries, items, *_ = example(3, 10, 8)
    ones = np.ones(3, np.float32)
    found = eimf_core.softmax_loss(queries, items, np.array([1, 4, 2]), ones, np.array([4]))
    assert found[0][1] == np.inf and np.isfinite(found[0][[0, 2]]).all() and not found[2][4][0] == 0
    ones[1] = 0
    without = eimf_core.softmax_loss(queries, items, np.array([1, 4, 2]), ones, np.array([4]))
    alone = eimf_core.softmax_loss(queries[[0, 2]], items, np.array([1, 2]), ones[[0, 2]], np.array([4]))
    assert without[0][1] == 0 and not without[1][1].any() and not without[2][4].any()
    np.testing.assert_array_equal(without[0][[0, 2]], alone[0])
    np.testing.assert_allclose(without[2], alone[2], rtol=1e-6)
    queries[0, 3] = np.nan
    found = eimf_core.softmax_loss(queries, items, np.array([1, 4, 2]), ones, np.array([4]))
    assert np.isnan(found[0][0]) and np.isfinite(found[0][2]) and np.isnan(found[1][0]).all() and np.isfinite(found[1][2]).all()


def test_no_users():
    losses_, query, item = eimf_core.softmax_loss(np.zeros((0, 4), np.float32), np.ones((3, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32),
                                                  np.zeros(0, np.int64))
    assert losses_.shape == (0,) and query.shape == (0, 4) and not item.any()


@pytest.mark.parametrize("change, words", [
    ({"target": np.array([3])}, r"target\[0\] is 3; expected an item from 0 to 2"),
    ({"target": np.array([-1])}, r"target\[0\] is -1"),
    ({"target": np.array([0, 1])}, "expected \\(B, D\\), \\(N, D\\), \\(B,\\) and \\(B,\\)"),
    ({"target": np.array([0], np.int32)}, "target: found int32"),
    ({"items": np.zeros((3, 5), np.float32)}, "items \\(3, 5\\)"),
    ({"items": np.zeros((0, 4), np.float32), "target": np.array([0])}, "at least one item"),
    ({"excluded": np.array([9])}, r"excluded\[0\] is 9"),
    ({"excluded": np.arange(3)}, "all 3 items are excluded"),
    ({"queries": np.zeros((1, 4))}, "queries: found float64"),
    ({"kernel": "sse9"}, "this CPU can run"),
    ({"n_threads": -1}, "n_threads is -1"),
])
def test_bad_arguments(change, words):
    arguments = {"queries": np.zeros((1, 4), np.float32), "items": np.zeros((3, 4), np.float32), "target": np.array([1]), "weight": np.ones(1, np.float32),
                 "excluded": np.array([0])}
    with pytest.raises(ValueError, match=words):
        eimf_core.softmax_loss(**(arguments | change))


@pytest.mark.parametrize("frozen", [False, True])
def test_stages_get_what_torch_gives(frozen):
    """losses.softmax_loss takes the core for float32 on a CPU; the same in torch's own products, with gradients and an outer factor."""
    generator = torch.Generator().manual_seed(3)
    query, table = torch.randn(40, 24, generator=generator), torch.randn(900, 24, generator=generator)
    target, keep, excluded = torch.randint(1, 900, (40,), generator=generator), torch.rand(40, generator=generator) < .8, torch.tensor([0])
    results = []
    for core in (True, False):
        q, t = query.clone().requires_grad_(), table.clone().requires_grad_(not frozen)
        weight = keep.float() / keep.sum()
        loss = losses.softmax_loss(q, t, target, excluded, keep) if core else losses._LinearCrossEntropy.apply(q, t, target, weight, excluded, torch.float32)
        (0.3 * loss).backward()
        results.append([loss.detach(), q.grad, *[t.grad] * (not frozen)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
