"""Loss terms against plain NumPy and torch oracles (paper, Eq. 7-15)."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eimf import losses


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensors(rng, *shapes):
    return [torch.tensor(rng.standard_normal(shape), dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_softmax_loss_equals_cross_entropy_with_gradients(rng):
    query, table = tensors(rng, (6, 5), (11, 5))
    target = torch.tensor([1, 4, 4, 9, 10, 2])
    excluded = torch.tensor([0, 3, 7])
    keep = torch.tensor([True, True, False, True, True, False])
    losses.softmax_loss(query, table, target, excluded, keep).backward()
    fast = query.grad.clone(), table.grad.clone()
    query.grad = table.grad = None
    scores = query @ table.T
    scores[:, [0, 3, 7]] = -torch.inf
    expected = F.cross_entropy(scores[keep], target[keep])
    expected.backward()
    assert losses.softmax_loss(query, table, target, excluded, keep).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(fast, (query.grad, table.grad))


def test_softmax_loss_scales_the_gradient_it_computed_ahead(rng):
    query, table = tensors(rng, (3, 4), (7, 4))
    target, excluded = torch.tensor([1, 2, 3]), torch.tensor([0])
    assert torch.autograd.gradcheck(lambda q, t: 0.3 * losses.softmax_loss(q, t, target, excluded) ** 2, (query, table))


def test_a_target_that_is_no_class_has_no_loss_and_no_nan(rng):
    """An untitled target is excluded from the title softmax, so its own loss is infinite; with weight 0 it gave NaN."""
    query, table = tensors(rng, (2, 4), (5, 4))
    loss = losses.softmax_loss(query, table, torch.tensor([3, 1]), torch.tensor([0, 3]), torch.tensor([False, True]))
    loss.backward()
    alone = losses.softmax_loss(query[1:], table, torch.tensor([1]), torch.tensor([0, 3]))
    assert loss.item() == pytest.approx(alone.item())
    assert torch.isfinite(query.grad).all() and torch.isfinite(table.grad).all() and not query.grad[0].any()


def test_no_row_counts(rng):
    query, table = tensors(rng, (2, 4), (5, 4))
    assert losses.softmax_loss(query, table, torch.tensor([1, 2]), torch.tensor([0]), torch.zeros(2, dtype=bool)).item() == 0


def info_nce_oracle(a, b, not_negative, temperature, keep):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    values = []
    for i in np.flatnonzero(keep):
        positive = np.exp(a[i] @ b[i] / temperature)
        negatives = sum(np.exp(a[i] @ b[j] / temperature) for j in range(len(b)) if j != i and keep[j] and not not_negative[i, j])
        values.append(-np.log(positive / (positive + negatives)))
    return np.mean(values)


def test_info_nce(rng):
    a, b = tensors(rng, (8, 5), (8, 5))
    target, teacher = np.array([1, 2, 1, 3, 4, 5, 5, 6]), np.array([0, 0, 1, 2, 3, 4, 5, 3])
    not_negative = (target[:, None] == target) | (teacher[:, None] == teacher)
    keep = np.array([True] * 6 + [False, True])
    found = losses.alignment(a, b, torch.tensor(not_negative), 0.1, torch.tensor(keep))[0].item()
    assert found == pytest.approx(info_nce_oracle(a.detach().numpy(), b.detach().numpy(), not_negative, 0.1, keep))


def test_masked_pairs_do_not_push_apart(rng):
    """Two rows with one target: without the mask the loss of identical vectors would be log 2, with it 0."""
    a = torch.ones(2, 3)
    everything = torch.ones(2, 2, dtype=bool)
    assert losses.alignment(a, a, everything, 0.1, torch.ones(2, dtype=bool))[0].item() == pytest.approx(0, abs=1e-6)
    assert losses.alignment(a, a, ~everything, 0.1, torch.ones(2, dtype=bool))[0].item() == pytest.approx(np.log(2))


def test_cosine_distance(rng):
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    b = torch.tensor([[2.0, 0], [-1, 0], [0, 5]])
    everything = torch.ones(3, 3, dtype=bool)
    assert losses.alignment(a, b, everything, 0.1, torch.tensor([True, True, True]))[1].item() == pytest.approx(1.0)
    assert losses.alignment(a, b, everything, 0.1, torch.tensor([True, False, False]))[1].item() == pytest.approx(0.0)


def test_a_padded_row_never_wins_the_read_out():
    """Real interests all point away from the target; the padded zero row has the largest dot product."""
    interests = torch.tensor([[[-1.0, 0], [-3, 0], [0, 0]]])
    target, mask = torch.tensor([[1.0, 0]]), torch.tensor([[True, True, False]])
    assert losses.read_out(interests, target, mask).tolist() == [[-1, 0]]
    soft = losses.read_out(interests, target, mask, soft=True)
    weight = np.exp([-1, -3]) / np.exp([-1, -3]).sum()
    assert soft[0, 0].item() == pytest.approx(weight @ [-1, -3])


def sample(query, table, target, negatives):
    """What a sampled loss takes."""
    return query, table[target], table[negatives], negatives == target[:, None]


def test_hard_negatives_are_remis_formula(rng):
    query, table = tensors(rng, (4, 5), (30, 5))
    target, negatives = torch.tensor([1, 2, 3, 4]), torch.tensor([7, 9, 2, 20, 21])
    q, t = query.detach().numpy(), table.detach().numpy()
    for hardness in (0.0, 10.0):
        expected = []
        for i in range(4):
            x = np.array([q[i] @ t[j] for j in negatives.numpy() if j != target[i]])
            importance = np.exp(hardness * x)
            positive = np.exp(q[i] @ t[target[i]])
            expected.append(-np.log(positive / (positive + (importance * np.exp(x)).sum() / importance.mean())))
        found = losses.hard_negative_loss(*sample(query, table, target, negatives), hardness).item()
        assert found == pytest.approx(np.mean(expected))


def flags(**changes):
    return argparse.Namespace(**{"loss": "sampled", "sampling": "uniform", "negatives": 40, "hardness": 10.0, "calibration": 0.75} | changes)


COUNTS = np.array([0, 900, 300, 100, 50, 50, 20, 10, 5, 0, 0, 0])  # of 11 items; three never occur


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_negatives_are_drawn_as_often_as_the_correction_says(sampling):
    loss = losses.RecommendationLoss(flags(sampling=sampling, negatives=200_000), COUNTS, "cpu")
    loss.generator.manual_seed(0)
    found = np.bincount(loss.draw().numpy(), minlength=12)
    expected = loss.log_expected.exp().numpy()
    assert found[0] == 0 and found[1:].min() > 0
    assert expected[0] == 0 and expected.sum() == pytest.approx(200_000)
    assert np.abs(found[1:] - expected[1:]).max() < 5 * np.sqrt(200_000) / 2  # five standard deviations at most
    if sampling == "popularity":
        assert expected[1] / expected[9] == pytest.approx(901)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_the_corrected_sampled_softmax_has_the_full_softmaxs_gradient(rng, sampling):
    """The mean gradient over many draws is near the full softmax's; without the correction it is far away."""
    query, table = tensors(rng, (6, 4), (12, 4))
    target = torch.tensor([1, 1, 3, 9, 2, 11])
    query.data += table.data[target]  # so that the targets' probabilities are far from 0, as in training
    full = torch.autograd.grad(losses.softmax_loss(query, table, target, torch.tensor([0])), (query, table))
    loss = losses.RecommendationLoss(flags(sampling=sampling, negatives=2000), COUNTS, "cpu")
    loss.generator.manual_seed(0)
    draws = [loss.draw() for _ in range(40)]

    def distance(log_expected):
        total = sum(losses.sampled_softmax_loss(*sample(query, table, target, negatives), log_expected[negatives]) for negatives in draws) / len(draws)
        found = torch.autograd.grad(total, (query, table))
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, full))

    assert distance(loss.log_expected.double()) < 0.05
    assert distance(torch.zeros(12)) > 0.2
    negatives = loss.draw()
    assert loss(query, table, target, table[target], negatives, table[negatives]).item() == pytest.approx(losses.softmax_loss(query, table, target, torch.tensor([0])).item(), rel=0.1)


def test_a_sampled_target_is_no_negative(rng):
    query, table = tensors(rng, (1, 4), (6, 4))
    target = torch.tensor([3])
    for function, extra in ((losses.sampled_softmax_loss, 0.0), (losses.hard_negative_loss, 5.0), (losses.hard_negative_loss, 0.0)):
        with_target, without = (function(*sample(query, table, target, torch.tensor(n)), extra).item() for n in ([1, 3, 2, 3], [1, 2]))
        assert with_target == pytest.approx(without)
        assert function(*sample(query, table, target, torch.tensor([3, 3])), extra).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_is_gsasrecs_formula(rng, calibration):
    query, table = tensors(rng, (3, 4), (30, 4))
    target, negatives = torch.tensor([1, 2, 3]), torch.tensor([7, 9, 2, 20, 21, 22, 23])
    q, t = query.detach().numpy(), table.detach().numpy()
    alpha = 7 / (29 - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    assert {0.0: beta == pytest.approx(1), 1.0: beta == pytest.approx(alpha)}.get(calibration, alpha < beta < 1)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    expected = [-(np.log(sigmoid(q[i] @ t[target[i]]) ** beta)
                  + sum(np.log(1 - sigmoid(q[i] @ t[j])) for j in negatives.numpy() if j != target[i])) for i in range(3)]
    found = losses.gbce_loss(*sample(query, table, target, negatives), 29, calibration)
    assert found.item() == pytest.approx(np.mean(expected))
    found.backward()
    assert torch.isfinite(query.grad).all() and torch.isfinite(table.grad).all()


def test_gbce_with_all_items_as_negatives_is_the_binary_cross_entropy(rng):
    """alpha = 1, so beta = 1 whatever t is."""
    query, table = tensors(rng, (2, 4), (7, 4))
    target = torch.tensor([1, 5])
    found = losses.gbce_loss(*sample(query, table, target, torch.arange(1, 7)), 6, 1.0).item()
    labels = F.one_hot(target, 7).double()[:, 1:]
    expected = F.binary_cross_entropy_with_logits(query @ table[1:].T, labels, reduction="none").sum(1).mean().item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sampled", "hard-negatives", "gbce"])
def test_each_loss_learns_the_target(loss):
    """Descent on any of them raises the target above all other items."""
    torch.manual_seed(0)
    query, table = torch.randn(8, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    target = torch.arange(1, 9)
    recommendation = losses.RecommendationLoss(flags(loss=loss, negatives=20, hardness=1.0), np.ones(30), "cpu")
    optimizer = torch.optim.Adam([query, table], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        negatives = recommendation.draw()
        recommendation(query, table, target, table[target], negatives, table[negatives]).backward()
        optimizer.step()
    assert ((query @ table[1:].T).argmax(1) + 1).tolist() == target.tolist()


def test_softmax_loss_in_bfloat16_stays_near():
    """Rounded factors: the loss to 1 %, gradients to 2 % of their norm; an excluded target still gives no NaN."""
    g = torch.Generator().manual_seed(0)
    table, query = torch.randn(500, 64, generator=g) * .3, torch.randn(32, 64, generator=g)
    target, excluded = torch.randint(1, 500, (32,), generator=g), torch.tensor([0, 7])
    target[0] = 7
    keep = target != 7
    results = []
    for precision in (torch.float32, torch.bfloat16):
        q, t = query.clone().requires_grad_(), table.clone().requires_grad_()
        loss = losses.softmax_loss(q, t, target, excluded, keep, precision)
        loss.backward()
        results.append((loss.detach(), q.grad, t.grad))
    assert results[0][1].dtype == results[1][2].dtype == torch.float32
    for exact, rounded, tolerance in zip(*results, (.01, .02, .02)):
        assert 0 < (exact - rounded).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_softmax_loss_with_extreme_scores(scale, precision):
    """Scores up to thousands, of either sign: what float64 gives for the same rounded factors, and no infinity or NaN.

    Rows of large positive scores overflow without a shift, the second row's all-negative ones underflow.
    """
    g = torch.Generator().manual_seed(0)
    query = (torch.randn(8, 16, generator=g) * scale).to(precision)
    table = torch.randn(200, 16, generator=g).to(precision)
    table[:, 0] = 1 + table[:, 0].abs()
    query[1] = 0
    query[1, 0] = -10 * scale  # every score is far below 0
    target, excluded = torch.randint(1, 200, (8,), generator=g), torch.tensor([0, 9])
    target[target == 9] = 10
    exact, rounded = ([x.to(dtype).requires_grad_() for x in (query, table)] for dtype in (torch.float64, torch.float32))
    scores = exact[0] @ exact[1].T
    scores[:, excluded] = -torch.inf
    expected, found = F.cross_entropy(scores, target), losses.softmax_loss(*rounded, target, excluded, precision=precision)
    expected.backward()
    found.backward()
    # A score of bfloat16 is known to 1 part in 256, so large ones decide for other items; those of float32 do not.
    tolerance = 1e-4 if precision == torch.float32 else 0.02 if scale <= 1 else None
    assert torch.isfinite(found) and all(torch.isfinite(x.grad).all() for x in rounded)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance or 0.02, abs=1e-6)
    for a, b in zip(exact, rounded):
        assert tolerance is None or (a.grad - b.grad).norm() < tolerance * a.grad.norm()


def test_hard_negatives_have_autograds_gradient(rng):
    query, table = tensors(rng, (4, 5), (30, 5))
    target, negatives = torch.tensor([1, 2, 3, 4]), torch.tensor([7, 9, 2, 20, 21])
    assert (negatives == 2).any()
    for hardness in (0.0, 10.0):
        assert torch.autograd.gradcheck(lambda q, t: 0.3 * losses.hard_negative_loss(*sample(q, t, target, negatives), hardness) ** 2, (query, table))


def test_hard_negatives_with_extreme_scores():
    """Hardness times the scores reaches tens of thousands; float32 keeps to float64."""
    g = torch.Generator().manual_seed(0)
    query, table = torch.randn(8, 16, generator=g, dtype=torch.float64) * 100, torch.randn(60, 16, generator=g, dtype=torch.float64)
    target, negatives = torch.randint(1, 60, (8,), generator=g), torch.randint(1, 60, (40,), generator=g)
    results = []
    for dtype in (torch.float64, torch.float32):
        q, t = (x.detach().to(dtype).requires_grad_() for x in (query, table))
        loss = losses.hard_negative_loss(*sample(q, t, target, negatives), 10.0)
        loss.backward()
        results.append((loss.detach(), q.grad, t.grad))
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 1e-3 * exact.norm()


def test_lookup_is_indexing_with_one_gradient(rng):
    table, = tensors(rng, (9, 3))
    numbers = [torch.tensor([[1, 5, 0], [5, 5, 2]]), torch.tensor([5, 8]), torch.empty(0, dtype=torch.int64)]
    found = losses.lookup(table, *numbers)
    assert [x.shape for x in found] == [(2, 3, 3), (2, 3), (0, 3)] and all(torch.equal(x, table[n]) for x, n in zip(found, numbers))
    sum((x * (i + 1)).sum() for i, x in enumerate(found)).backward()
    assert table.grad.sum(1).tolist() == [0, 3, 3, 0, 0, 3 * (3 + 2), 0, 0, 6]  # the padding has none
