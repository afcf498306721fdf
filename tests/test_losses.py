"""Loss terms against plain NumPy and torch oracles (paper, Eq. 7-15)."""
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
    found = losses.info_nce(a, b, torch.tensor(not_negative), 0.1, torch.tensor(keep)).item()
    assert found == pytest.approx(info_nce_oracle(a.detach().numpy(), b.detach().numpy(), not_negative, 0.1, keep))


def test_masked_pairs_do_not_push_apart(rng):
    """Two rows with one target: without the mask the loss of identical vectors would be log 2, with it 0."""
    a = torch.ones(2, 3)
    everything = torch.ones(2, 2, dtype=bool)
    assert losses.info_nce(a, a, everything, 0.1, torch.ones(2, dtype=bool)).item() == pytest.approx(0, abs=1e-6)
    assert losses.info_nce(a, a, ~everything, 0.1, torch.ones(2, dtype=bool)).item() == pytest.approx(np.log(2))


def test_cosine_distance(rng):
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    b = torch.tensor([[2.0, 0], [-1, 0], [0, 5]])
    assert losses.cosine_distance(a, b, torch.tensor([True, True, True])).item() == pytest.approx(1.0)
    assert losses.cosine_distance(a, b, torch.tensor([True, False, False])).item() == pytest.approx(0.0)


def test_a_padded_row_never_wins_the_read_out():
    """Real interests all point away from the target; the padded zero row has the largest dot product."""
    interests = torch.tensor([[[-1.0, 0], [-3, 0], [0, 0]]])
    target, mask = torch.tensor([[1.0, 0]]), torch.tensor([[True, True, False]])
    assert losses.read_out(interests, target, mask).tolist() == [[-1, 0]]
    soft = losses.read_out(interests, target, mask, soft=True)
    weight = np.exp([-1, -3]) / np.exp([-1, -3]).sum()
    assert soft[0, 0].item() == pytest.approx(weight @ [-1, -3])


def test_sampled_softmax_is_remis_formula(rng):
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
        found = losses.sampled_softmax_loss(query, table, target, negatives, hardness).item()
        assert found == pytest.approx(np.mean(expected))
