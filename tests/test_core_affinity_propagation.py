"""eimf_core.affinity_propagation against scikit-learn and against the plain loops."""
import itertools
import signal
import threading
import time
import warnings

import eimf_core
import numpy as np
import pytest
from sklearn.cluster import affinity_propagation as sklearn_affinity_propagation
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import euclidean_distances


def blobs(seed, n, d, centres=15, spread=1.0):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((centres, d))[rng.integers(0, centres, n)] + spread * rng.standard_normal((n, d))).astype(np.float32)


def similarities(x):
    return -euclidean_distances(x.astype(np.float64), squared=True)


def oracle(s, preference, **options):
    """scikit-learn's (exemplars, labels, iterations) on float64 similarities."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        return sklearn_affinity_propagation(s.copy(), preference=preference, return_n_iter=True, random_state=0, **options)


def net_similarity(s, preference, exemplars, labels):
    members = np.setdiff1d(np.arange(len(s)), exemplars)
    return s[members, exemplars[labels[members]]].sum() + np.broadcast_to(preference, len(s))[exemplars].sum()


def check_shape_of(result, n):
    """What must hold for every result."""
    assert result.exemplars.dtype == result.labels.dtype == np.int64
    assert (np.diff(result.exemplars) > 0).all() and len(result.labels) == n
    np.testing.assert_array_equal(result.labels[result.exemplars], np.arange(len(result.exemplars)))


def assert_same_clusters(result, exemplars, labels):
    """Equal partitions and exemplars, but either member of a pair may be its exemplar: both serve equally, scikit-learn draws."""
    sizes = np.bincount(labels)
    free = np.isin(labels, np.flatnonzero(sizes == 2))
    np.testing.assert_array_equal(np.setdiff1d(result.exemplars, np.flatnonzero(free)), np.setdiff1d(exemplars, np.flatnonzero(free)))
    canonical = [np.unique(part, return_index=True)[1][part] for part in (result.labels, labels)]  # cluster -> its first member
    np.testing.assert_array_equal(*canonical)


@pytest.mark.parametrize("n, d, quantile, damping", [
    (60, 2, 0.5, 0.5), (60, 1, 0.5, 0.5), (300, 7, 0.5, 0.5), (500, 16, 0.1, 0.7), (500, 65, 0.5, 0.9), (900, 4, 0.01, 0.8), (900, 33, 0.6, 0.5)])
def test_equals_scikit_learn(n, d, quantile, damping):
    x = blobs(n + d, n, d)
    s = similarities(x)
    preference = float(np.quantile(s, quantile))
    exemplars, labels, iterations = oracle(s, preference, damping=damping, max_iter=500)
    for result in (eimf_core.affinity_propagation(x, preference, damping=damping, max_iter=500),
                   eimf_core.affinity_propagation(s.astype(np.float32), preference, damping=damping, max_iter=500, precomputed=True)):
        check_shape_of(result, n)
        assert result.converged and result.n_iter == iterations
        assert_same_clusters(result, exemplars, labels)
        assert result.net_similarity == pytest.approx(net_similarity(s, preference, exemplars, labels), rel=1e-5)


def test_equals_scikit_learn_with_lists_that_must_grow():
    """n above the length of the stored neighbour lists, few large clusters: rows are scanned past their first 64 neighbours."""
    x = blobs(5, 1200, 6, centres=4)
    s = similarities(x)
    for preference in (-400.0, -3000.0):
        exemplars, labels, iterations = oracle(s, preference, damping=0.7)
        result = eimf_core.affinity_propagation(x, preference, damping=0.7)
        assert 1 < len(exemplars) < 20 and result.converged and result.n_iter == iterations
        np.testing.assert_array_equal(result.exemplars, exemplars)
        np.testing.assert_array_equal(result.labels, labels)


@pytest.mark.parametrize("preference, damping", [(-100.0, 0.5), (-300.0, 0.8)])
def test_lists_and_the_matrix_of_similarities_give_the_same(preference, damping):
    """A memory limit below the matrix's 36 MB forbids it; the run then goes on with longer lists."""
    x = blobs(15, 3000, 6, centres=60)
    with_matrix = eimf_core.affinity_propagation(x, preference, damping=damping)
    limit = 34_000_000
    with_lists = eimf_core.affinity_propagation(x, preference, damping=damping, memory_limit=limit)
    assert with_lists.peak_bytes <= limit < 3000 * 3000 * 4 < with_matrix.peak_bytes and with_matrix.converged
    np.testing.assert_array_equal(with_lists.labels, with_matrix.labels)
    np.testing.assert_array_equal(with_lists.exemplars, with_matrix.exemplars)
    assert with_lists.n_iter == with_matrix.n_iter and with_lists.net_similarity == pytest.approx(with_matrix.net_similarity, rel=1e-9)


def test_similarities_of_many_points_are_kept_by_halves():
    """The same as from a whole matrix, which is given here with its rows weighted as repeated points are; the same bits for all thread counts."""
    n, preference = 5801, -600.0
    x = blobs(17, n, 6, centres=60)
    weight = np.ones(n)
    weight[[3, 40, 5800]] = 2, 3, 2
    x64 = x.astype(float)
    norms = (x64**2).sum(1)
    s = weight[:, None] * np.minimum(0, 2 * x64 @ x64.T - norms[:, None] - norms)
    given = eimf_core.affinity_propagation(s.astype(np.float32), preference, damping=0.8, precomputed=True)
    repeated = np.repeat(np.arange(n), weight.astype(int) - 1)
    runs = [eimf_core.affinity_propagation(np.vstack([x, x[repeated]]), preference, damping=0.8, n_threads=t) for t in (1, 7)]
    assert given.converged and 1 < len(given.exemplars) < 60 and n * n * 2 < runs[0].peak_bytes < n * n * 3
    np.testing.assert_array_equal(runs[0].exemplars, given.exemplars)
    np.testing.assert_array_equal(runs[0].labels, np.concatenate([given.labels, given.labels[repeated]]))
    assert runs[0].n_iter == given.n_iter and runs[0].net_similarity == pytest.approx(given.net_similarity, rel=1e-6)
    assert_same_result(runs[1], runs[0])


@pytest.mark.parametrize("preference", [-3000.0, -30000.0])
def test_same_bits_for_all_thread_counts_with_the_matrix(preference):
    x = blobs(16, 1500, 12, centres=9)
    runs = [eimf_core.affinity_propagation(x, preference, damping=0.7, n_threads=t) for t in (1, 2, 7)]
    assert runs[0].peak_bytes > 1500 * 1500 * 4
    for run in runs[1:]:
        assert_same_result(run, runs[0])


def test_preference_per_point():
    x = blobs(6, 250, 5)
    s = similarities(x)
    preference = np.random.default_rng(0).uniform(-300, -20, 250)
    exemplars, labels, _ = oracle(s, preference, damping=0.6)
    for given in (preference, preference.astype(np.float32)):
        result = eimf_core.affinity_propagation(x, given, damping=0.6)
        np.testing.assert_array_equal(result.exemplars, exemplars)
        np.testing.assert_array_equal(result.labels, labels)


def test_asymmetric_similarities_with_positive_values():
    s = np.random.default_rng(1).standard_normal((180, 180))
    exemplars, labels, iterations = oracle(s, -1.0, damping=0.8, max_iter=1000)
    result = eimf_core.affinity_propagation(s.astype(np.float32), -1.0, damping=0.8, max_iter=1000, precomputed=True)
    np.testing.assert_array_equal(result.exemplars, exemplars)
    np.testing.assert_array_equal(result.labels, labels)
    assert result.n_iter == iterations


@pytest.mark.parametrize("diagonal", [np.nan, np.inf, -np.inf, 1e30])
def test_the_diagonal_of_given_similarities_is_ignored(diagonal):
    """By lists, by all similarities with rows that are read whole (unrelated ones need it), and where no iterations are needed."""
    for s, preference in ((similarities(blobs(3, 700, 5, centres=7)), (-20.0, -20000.0, -1e9)), (-np.random.default_rng(1).random((700, 700)), (-1.0, -5.0))):
        s = s.astype(np.float32)
        other = s.copy()
        np.fill_diagonal(other, diagonal)
        for p in preference:
            options = {"damping": 0.5, "max_iter": 60, "precomputed": True}
            assert_same_result(eimf_core.affinity_propagation(other, p, **options), eimf_core.affinity_propagation(s, p, **options))
    other[3, 699] = np.nan
    with pytest.raises(ValueError, match="similarities: found NaN in row 3, column 699"):
        eimf_core.affinity_propagation(other, -20.0, precomputed=True)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_plain_loops(seed):
    rng = np.random.default_rng(seed)
    s = -rng.random((70, 70)).astype(np.float32)
    preference = -rng.random(70)
    reference = eimf_core._affinity_propagation_reference(s, preference, damping=0.75, max_iter=400)
    result = eimf_core.affinity_propagation(s, preference, damping=0.75, max_iter=400, precomputed=True)
    assert reference.converged and result.n_iter == reference.n_iter
    np.testing.assert_array_equal(result.labels, reference.labels)
    np.testing.assert_array_equal(result.exemplars, reference.exemplars)
    assert result.net_similarity == pytest.approx(reference.net_similarity, rel=1e-6)


def exemplar_counts(s, preference, damping, iterations):
    """The number of exemplars after each iteration, by the definition. The core's tiny steps between preferences included: they grow."""
    s, n, counts = s.astype(np.float64), len(s), []
    s[np.diag_indices(n)] = -np.inf
    size = np.maximum(np.abs(preference), np.abs(s.max(axis=1)))
    reversed_bits = np.array([int(f"{k:032b}"[::-1], 2) for k in range(n)])
    s[np.diag_indices(n)] = preference - size * 2.0 ** -32 * (reversed_bits / 2.0 ** 32)  # how ties are decided
    r, a = np.zeros((n, n)), np.zeros((n, n))
    for _ in range(iterations):
        value = a + s
        best = value.argmax(axis=1)
        first = value[np.arange(n), best]
        value[np.arange(n), best] = -np.inf
        new = s - first[:, None]
        new[np.arange(n), best] = s[np.arange(n), best] - value.max(axis=1)
        r = damping * r + (1 - damping) * new
        positive = np.maximum(r, 0)
        positive[np.diag_indices(n)] = r.diagonal()
        new = positive.sum(axis=0) - positive
        diagonal = new.diagonal().copy()
        new = np.minimum(new, 0)
        new[np.diag_indices(n)] = diagonal
        a = damping * a + (1 - damping) * new
        counts.append(int((a.diagonal() + r.diagonal() > 0).sum()))
    return counts


@pytest.mark.parametrize("times, damping", [(0.05, 0.5), (0.3, 0.7), (1, 0.5), (5, 0.6), (5, 0.8), (20, 0.6)])
@pytest.mark.parametrize("kind", ["blobs", "spread", "random"])
def test_low_preferences_take_the_course_of_the_definition(kind, times, damping):
    """Preferences of so many times the lowest similarity. Columns' values decide most here, so rows are searched in each of the ways there are
    with the matrix; on unrelated similarities the best pairs lie anywhere in a row. A pair that a bound wrongly leaves out changes the
    numbers of exemplars of some iteration."""
    rng = np.random.default_rng(1)
    n = 700
    s = -rng.random((n, n)).astype(np.float32) if kind == "random" else similarities(blobs(1, n, 5, centres=7 if kind == "blobs" else 1)).astype(np.float32)
    preference = times * float(s.min()) * (1 + 0.1 * rng.random(n))
    counts = []
    eimf_core.affinity_propagation(s, preference, damping=damping, precomputed=True, max_iter=60, convergence_iter=60, n_threads=2,
                                   progress=lambda iteration, exemplars: counts.append(exemplars) if iteration else None)
    assert counts == exemplar_counts(s, preference, damping, 60)[:len(counts)]
    assert len(counts) == 60 or times == 20  # so low a preference can be answered without iterations


def test_same_bits_for_all_thread_counts():
    x = blobs(2, 3000, 12, centres=40)
    runs = [eimf_core.affinity_propagation(x, -60.0, n_threads=t) for t in (1, 2, 7, 1)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.exemplars, runs[0].exemplars)
        np.testing.assert_array_equal(run.labels, runs[0].labels)
        assert (run.n_iter, run.net_similarity) == (runs[0].n_iter, runs[0].net_similarity)


def test_one_and_two_points():
    for points in ([[1.0, 2.0]], [[0.0, 0.0]]):
        result = eimf_core.affinity_propagation(np.array(points, np.float32), -5)
        assert (result.exemplars.tolist(), result.labels.tolist(), result.converged) == ([0], [0], True)
    two = np.array([[0.0], [2.0]], np.float32)  # similarity -4
    below, above = eimf_core.affinity_propagation(two, -5), eimf_core.affinity_propagation(two, -3)
    assert (below.exemplars.tolist(), below.labels.tolist()) == ([0], [0, 0])
    assert (above.exemplars.tolist(), above.labels.tolist()) == ([0, 1], [0, 1])
    assert (below.net_similarity, above.net_similarity) == (-9, -6)


def test_all_similarities_equal():
    one_hot = np.eye(120, dtype=np.float32)  # every similarity is -2
    below, above = eimf_core.affinity_propagation(one_hot, -3), eimf_core.affinity_propagation(one_hot, -1)
    assert below.exemplars.tolist() == [0] and (below.labels == 0).all() and below.converged
    np.testing.assert_array_equal(above.labels, np.arange(120))
    s = np.full((30, 30), -2, np.float32)
    assert eimf_core.affinity_propagation(s, -3, precomputed=True).exemplars.tolist() == [0]
    assert len(eimf_core.affinity_propagation(s, -1, precomputed=True).exemplars) == 30


def test_all_points_equal():
    x = np.ones((50, 4), np.float32)
    result = eimf_core.affinity_propagation(x, -1)
    assert result.exemplars.tolist() == [0] and (result.labels == 0).all() and result.converged and result.net_similarity == -1
    assert len(eimf_core.affinity_propagation(x, 1).exemplars) == 50  # a positive preference: each its own


def best_net_similarity(s, preference, candidates):
    """The optimum by trying every set of exemplars among `candidates`."""
    everyone = np.arange(len(s))
    return max(s[:, chosen].max(axis=1)[np.setdiff1d(everyone, chosen)].sum() + preference * len(chosen)
               for size in range(1, len(candidates) + 1) for chosen in map(list, itertools.combinations(candidates, size)))


@pytest.mark.parametrize("seed", range(6))
def test_merged_duplicates_weigh_as_many_points(seed):
    rng = np.random.default_rng(seed)
    x = np.repeat(blobs(seed, 6, 2), rng.integers(1, 4, 6), axis=0)
    x = x[rng.permutation(len(x))]
    s = similarities(x)
    for preference in (-1.0, -10.0, -60.0):
        result = eimf_core.affinity_propagation(x, preference, damping=0.8, max_iter=1000)
        assert result.converged
        found = net_similarity(s, preference, result.exemplars, result.labels)
        assert result.net_similarity == pytest.approx(found, rel=1e-5)
        first = np.unique(x, axis=0, return_index=True)[1]
        # Weighed by 1 instead, the optimum is up to 60 % away; affinity propagation itself is within a few percent of it.
        assert found == pytest.approx(best_net_similarity(s, preference, first), rel=0.03)
        assert np.isin(result.exemplars, first).all()  # of equal points the first is the exemplar


def test_a_preferred_duplicate_is_the_exemplar():
    x = np.array([[0.0], [0.0], [0.0], [9.0]], np.float32)
    result = eimf_core.affinity_propagation(x, np.array([-3.0, -2.0, -2.0, -3.0]))
    assert result.exemplars.tolist() == [1, 3] and result.labels.tolist() == [0, 0, 0, 1] and result.net_similarity == -5


def test_isolated_pairs_are_decided_without_noise():
    """Either point of a far-away pair would serve; the lower index does, and the run converges."""
    centres = np.arange(20)[:, None] * 1000.0
    x = np.concatenate([centres, centres + 1]).astype(np.float32)  # pair (i, i + 20) has similarity -1
    result = eimf_core.affinity_propagation(x, -50.0)
    assert result.converged
    np.testing.assert_array_equal(result.exemplars, np.arange(20))
    np.testing.assert_array_equal(result.labels, np.tile(np.arange(20), 2))


def test_grid_full_of_ties_converges_deterministically():
    grid = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2).astype(np.float32)
    runs = [eimf_core.affinity_propagation(grid, -12.0, damping=0.8, max_iter=1000, n_threads=t) for t in (1, 2, 7)]
    assert runs[0].converged and 5 < len(runs[0].exemplars) < 60
    for run in runs[1:]:
        np.testing.assert_array_equal(run.labels, runs[0].labels)
    check_shape_of(runs[0], len(grid))


@pytest.mark.parametrize("preference", [-1e30, -1e9])
def test_very_low_preference_gives_one_cluster(preference):
    x = blobs(4, 400, 3)
    result = eimf_core.affinity_propagation(x, preference)
    assert result.exemplars.tolist() == [int(np.argmax(similarities(x).sum(axis=0)))] and result.converged and (result.labels == 0).all()
    s = similarities(x).astype(np.float32)
    assert eimf_core.affinity_propagation(s, preference, precomputed=True).exemplars.tolist() == result.exemplars.tolist()


def test_very_high_preference_gives_every_point_its_own_cluster():
    x = blobs(4, 100, 3)
    for preference in (0.0, 1e9, -1e-12):
        np.testing.assert_array_equal(eimf_core.affinity_propagation(x, preference).labels, np.arange(100))


def test_no_convergence_is_reported_with_a_usable_state():
    x = blobs(7, 300, 4)
    for max_iter in (1, 2, 5, 14):
        result = eimf_core.affinity_propagation(x, -50.0, max_iter=max_iter)
        assert not result.converged and result.n_iter == max_iter and len(result.exemplars) >= 1
        check_shape_of(result, 300)
        assert result.labels.min() == 0
        assert result.net_similarity == pytest.approx(net_similarity(similarities(x), -50.0, result.exemplars, result.labels), rel=1e-5)


def test_far_from_the_origin():
    """Distances must not drown in the norms."""
    x = blobs(8, 300, 5)
    near, far = eimf_core.affinity_propagation(x, -60.0), eimf_core.affinity_propagation(x + np.float32(1000), -60.0)
    exact = eimf_core.affinity_propagation(similarities(x + np.float32(1000)).astype(np.float32), -60.0, precomputed=True)
    np.testing.assert_array_equal(far.labels, exact.labels)
    np.testing.assert_array_equal(far.labels, near.labels)


# ------------------------------------------------------------------------------------------------------------- sparse


def neighbour_graph(s, k):
    """CSR graph of each row's k most similar others."""
    order = np.argsort(-np.where(np.eye(len(s), dtype=bool), -np.inf, s), axis=1, kind="stable")[:, :k]
    order.sort(axis=1)
    indptr = np.arange(0, order.size + 1, k, dtype=np.int64)
    return indptr, order.ravel().astype(np.int64), np.take_along_axis(s, order, axis=1).ravel().astype(np.float32)


def test_sparse_with_all_edges_equals_dense():
    s = similarities(blobs(9, 220, 4)).astype(np.float32)
    dense = eimf_core.affinity_propagation(s, -50.0, damping=0.7, precomputed=True)
    sparse = eimf_core.affinity_propagation_sparse(*neighbour_graph(s, 219), -50.0, damping=0.7)
    np.testing.assert_array_equal(sparse.labels, dense.labels)
    assert (sparse.n_iter, sparse.n_unassigned) == (dense.n_iter, 0)


def test_sparse_is_close_to_dense_and_stays_on_edges():
    s = similarities(blobs(10, 800, 6, centres=40)).astype(np.float32)
    dense = eimf_core.affinity_propagation(s, -30.0, damping=0.8, precomputed=True)
    indptr, indices, values = neighbour_graph(s, 60)
    runs = [eimf_core.affinity_propagation_sparse(indptr, indices, values, -30.0, damping=0.8, n_threads=t) for t in (1, 2, 7)]
    sparse = runs[0]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.labels, sparse.labels)
    assert dense.converged and sparse.converged and sparse.n_unassigned == 0
    assert sparse.net_similarity == pytest.approx(dense.net_similarity, rel=0.01)
    for i, label in enumerate(sparse.labels):
        exemplar = sparse.exemplars[label]
        assert exemplar == i or exemplar in indices[indptr[i]:indptr[i + 1]]


def test_sparse_reports_points_without_an_exemplar():
    # 0 - 1 joined, 2 has no edge, 3 -> 2 only.
    indptr, indices = np.array([0, 1, 2, 2, 3], np.int64), np.array([1, 0, 2], np.int64)
    result = eimf_core.affinity_propagation_sparse(indptr, indices, np.array([-1, -1, -1], np.float32), -2.0)
    assert result.exemplars.tolist() == [0, 2] and result.labels.tolist() == [0, 0, 1, 1] and result.converged
    assert result.n_unassigned == 0
    lone = eimf_core.affinity_propagation_sparse(np.zeros(4, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), -2.0)
    assert lone.labels.tolist() == [0, 1, 2]


def test_sparse_without_convergence_leaves_as_few_points_unassigned_as_any_of_the_last_states():
    """Unassigned points add 0 to a sum of negative similarities, which must not make such a state the best."""
    rng = np.random.default_rng(58)
    x = rng.standard_normal((60, 2))
    indices = np.concatenate([rng.choice(np.delete(np.arange(60), i), 4, replace=False) for i in range(60)])
    graph = np.arange(0, 241, 4, dtype=np.int64), indices.astype(np.int64), -((x[indices] - np.repeat(x, 4, axis=0))**2).sum(axis=1).astype(np.float32)
    result = eimf_core.affinity_propagation_sparse(*graph, -2.0, max_iter=20)  # the best of its last 15 states
    states = [eimf_core.affinity_propagation_sparse(*graph, -2.0, max_iter=t, convergence_iter=3) for t in range(8, 21)]  # the best of three each
    unassigned = [state.n_unassigned for state in states if not state.converged]
    assert not result.converged and len(unassigned) > 5
    assert result.n_unassigned == min(unassigned) == 0


def test_sparse_ignores_self_loops():
    s = similarities(blobs(11, 90, 3)).astype(np.float32)
    indptr, indices, values = neighbour_graph(s, 20)
    with_loops = [np.r_[indices[indptr[i]:indptr[i + 1]], i] for i in range(90)]
    loops = eimf_core.affinity_propagation_sparse(np.arange(0, 90 * 21 + 1, 21, dtype=np.int64), np.concatenate(with_loops).astype(np.int64),
                                                  np.concatenate([s[i, row] for i, row in enumerate(with_loops)]), -20.0)
    np.testing.assert_array_equal(loops.labels, eimf_core.affinity_propagation_sparse(indptr, indices, values, -20.0).labels)


# ---------------------------------------------------------------------------------------------------- arguments, progress


@pytest.mark.parametrize("change, words", [
    ({"x": np.zeros((3, 2))}, "float64.*float32"),
    ({"x": np.zeros(3, np.float32)}, r"\(3,\).*\(n, d\)"),
    ({"x": np.zeros((0, 2), np.float32)}, "0 points"),
    ({"x": np.zeros((3, 0), np.float32)}, "0 dimensions"),
    ({"x": np.zeros((4, 6), np.float32)[:, ::2]}, "not C-contiguous"),
    ({"x": np.array([[1], [np.nan]], np.float32)}, "x: found NaN in row 1, column 0"),
    ({"x": np.array([[np.inf], [0]], np.float32)}, "infinity"),
    ({"x": np.full((3, 2), 1e25, np.float32)}, "overflow"),
    ({"x": np.zeros((3, 2), np.float32), "precomputed": True}, "square"),
    ({"x": None}, "NoneType"),
    ({"preference": np.zeros(4)}, r"preference: found shape \(4,\); expected a number or shape \(3,\)"),
    ({"preference": np.zeros((3, 1))}, "preference"),
    ({"preference": float("nan")}, "finite"),
    ({"preference": -np.inf}, "finite"),
    ({"preference": "low"}, "preference: found str"),
    ({"damping": 0.4}, "damping is 0.4"),
    ({"damping": 1.0}, "damping is 1"),
    ({"damping": float("nan")}, "damping"),
    ({"max_iter": 0}, "max_iter is 0"),
    ({"convergence_iter": -3}, "convergence_iter is -3"),
    ({"n_threads": -2}, "n_threads is -2"),
    ({"memory_limit": 1000}, "memory_limit is 1000"),
    ({"progress": 3}, "progress is not callable"),
])
def test_bad_arguments_are_value_errors(change, words):
    arguments = {"x": np.arange(6, dtype=np.float32).reshape(3, 2), "preference": -1.0} | change
    with pytest.raises(ValueError, match=words):
        eimf_core.affinity_propagation(**arguments)


@pytest.mark.parametrize("indptr, indices, similarity, words", [
    ([0, 1], [0, 0], [1, 1], "three equal numbers"),
    ([], [], [], r"\(n \+ 1,\)"),
    ([0, 2, 1, 2], [1, 0], [1, 1], "must not fall"),
    ([1, 1, 1], [0], [1], "begin with 0"),
    ([0, 1, 2], [1, 2], [1, 1], r"indices\[1\] is 2; expected a point from 0 to 1"),
    ([0, 2, 2], [1, 1], [1, 1], "row 0 names point 1 twice"),
    ([0, 1, 2], [1, 0], [1, np.nan], "similarity: found NaN"),
])
def test_bad_graphs_are_value_errors(indptr, indices, similarity, words):
    with pytest.raises(ValueError, match=words):
        eimf_core.affinity_propagation_sparse(np.array(indptr, np.int64), np.array(indices, np.int64), np.array(similarity, np.float32), -1.0)


def test_progress_sees_each_iteration_and_its_exception_gets_out():
    x, seen = blobs(0, 100, 3), []
    result = eimf_core.affinity_propagation(x, -50.0, progress=lambda iteration, exemplars: seen.append((iteration, exemplars)))
    steps = [s for s in seen if s[0] > 0]
    assert [s[0] for s in steps] == list(range(1, result.n_iter + 1)) and steps[-1][1] == len(result.exemplars)

    def stop(iteration, exemplars):
        if iteration == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        eimf_core.affinity_propagation(x, -50.0, progress=stop)


@pytest.mark.parametrize("preference", [-50.0, -3000.0])
def test_progress_can_end_the_search_for_neighbours(preference):
    """Iteration 0 is reported within the search, and points whose first run ended there give what new ones give."""
    x, calls = blobs(3, 1500, 6, centres=30), []
    expected = eimf_core.affinity_propagation(x, preference, progress=lambda iteration, _: calls.append(iteration))
    searching = calls.index(1)
    assert calls[:searching] == [0] * searching and searching >= 2 + 1500 // 192

    def stop(*_):
        calls.append(0)
        if len(calls) == 5:
            raise KeyError("enough")

    points = eimf_core.Points(x)
    calls.clear()
    with pytest.raises(KeyError, match="enough"):
        points.affinity_propagation(preference, progress=stop)
    assert len(calls) == 5
    for other in (-20.0, preference):
        assert_same_result(points.affinity_propagation(other), expected if other == preference else eimf_core.affinity_propagation(x, other))


def test_ctrl_c_ends_a_run():
    s = -np.random.default_rng(0).random((1500, 1500)).astype(np.float32)
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        eimf_core.affinity_propagation(s, -0.5, precomputed=True, max_iter=10**6, convergence_iter=10**6)
    assert time.perf_counter() - started < 10


def test_memory_preflight_and_peak():
    x = blobs(1, 3000, 16, centres=60)
    result = eimf_core.affinity_propagation(x, -40.0)
    assert 0.1 * eimf_core.affinity_propagation_bytes(3000, 16) < result.peak_bytes < eimf_core.affinity_propagation_bytes(3000, 16)
    assert result.peak_bytes < 3000 * 3000 * 8 / 4  # far below one n x n array
    with pytest.raises(ValueError, match="memory_limit"):
        eimf_core.affinity_propagation(x, -40.0, memory_limit=result.peak_bytes // 2)
    assert eimf_core.affinity_propagation_bytes(10**9, 10**9) > 10**18


@pytest.mark.parametrize("n, centres, share", [(2500, 40, None), (6000, 150, 0.8)])
def test_the_estimated_memory_suffices_at_usual_preferences(n, centres, share):
    """And at 0.8 of what a run takes without a limit, lists start shorter; with the same result."""
    x, limit = blobs(n, n, 16, centres, spread=1.5), eimf_core.affinity_propagation_bytes(n, 16)
    preference = float(np.median(similarities(x[:500])))
    free = eimf_core.affinity_propagation(x, preference, max_iter=20)
    assert free.peak_bytes <= limit
    if share:
        limit = int(share * free.peak_bytes)
    limited = eimf_core.affinity_propagation(x, preference, max_iter=20, memory_limit=limit)
    assert limited.peak_bytes <= limit and limited.n_iter == free.n_iter
    np.testing.assert_array_equal(limited.labels, free.labels)
    np.testing.assert_array_equal(limited.exemplars, free.exemplars)


def assert_same_result(a, b):
    np.testing.assert_array_equal(a.exemplars, b.exemplars)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert (a.n_iter, a.converged, a.net_similarity) == (b.n_iter, b.converged, b.net_similarity)


def test_runs_over_the_same_points_are_as_the_first():
    """Whatever earlier runs left in the neighbour lists: preferences in any order, duplicates, one preference for each, the matrix."""
    x = blobs(8, 1500, 6, centres=30)
    x[[5, 700]] = x[20]
    points = eimf_core.Points(x)
    each = np.random.default_rng(1).uniform(-300, -20, len(x))
    positive = np.where(np.arange(len(x)) == 700, 5.0, -50.0)  # then equal points are not merged
    for preference in (-50.0, -3000.0, -300.0, each, -20.0, positive, -1e5, -300.0):
        options = {"damping": 0.8, "max_iter": 400}
        assert_same_result(points.affinity_propagation(preference, **options), eimf_core.affinity_propagation(x, preference, **options))


@pytest.mark.parametrize("seed", range(6))
def test_net_similarity_does_not_depend_on_the_lists_either(seed):
    """Whether a similarity is read from a list, as long as an earlier run needed it, or computed anew."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, 2), dtype=np.float32)
    lowest = similarities(x).min()
    points = eimf_core.Points(x)
    for preference in rng.permutation([lowest * 3, lowest, lowest / 3, lowest / 20, lowest / 300]):
        assert_same_result(points.affinity_propagation(preference), eimf_core.affinity_propagation(x, preference))


def test_later_runs_search_no_neighbours():
    """Seen in CPU time: the search is 7e9 multiply-adds here, three iterations are some 1e5 steps."""
    points, seconds = eimf_core.Points(blobs(9, 3000, 384, centres=60)), []
    for _ in range(4):
        before = time.process_time()
        result = points.affinity_propagation(-9000.0, max_iter=3, n_threads=1)
        seconds.append(time.process_time() - before)
    assert min(seconds[1:]) < seconds[0] / 2
    with pytest.raises(ValueError, match="memory_limit"):  # counts what earlier runs left
        points.affinity_propagation(-9000.0, memory_limit=result.peak_bytes // 2)
    assert points.affinity_propagation(-9000.0, max_iter=3, n_threads=1, memory_limit=result.peak_bytes).peak_bytes <= result.peak_bytes


def test_points_are_checked_and_one_run_goes_at_a_time():
    x = blobs(10, 300, 5)
    points = eimf_core.Points(x.copy())
    nested = []

    def again(*_):
        with pytest.raises(ValueError, match="another run"):
            points.affinity_propagation(-50.0)
        nested.append(1)

    expected = eimf_core.affinity_propagation(x, -50.0)
    assert_same_result(points.affinity_propagation(-50.0, progress=again), expected)
    assert nested

    def stop(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        points.affinity_propagation(-50.0, progress=stop)
    assert_same_result(points.affinity_propagation(-50.0), expected)  # a run that ended early leaves it usable
    for bad, words in ((x.astype(np.float64), "float64"), (np.full_like(x, np.inf), "infinity"), (x[:0], "0 points"), (x[:, :0], "dimensions"),
                       (x * np.float32(1e30), "overflow")):
        with pytest.raises(ValueError, match=words):
            eimf_core.Points(bad)
    with pytest.raises(ValueError, match="memory"):
        eimf_core.Points(x, memory_limit=10)
    with pytest.raises(ValueError, match="damping"):
        points.affinity_propagation(-50.0, damping=2)
