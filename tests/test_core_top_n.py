"""eimf_core.top_n against NumPy, and every kernel and thread count against the plain loop, bit for bit."""
import threading

import eimf_core
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

KERNELS = eimf_core.kernels()
DIMS = [1, 7, 8, 9, 15, 16, 17, 63, 64, 65]


def vectors(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def csr(lists):
    indptr = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return {"exclude_indptr": indptr, "exclude_indices": np.array([i for row in lists for i in row], np.int64)}


def oracle(interests, items, n, excluded=None, allowed=None):
    """Ids, scores and winners by NumPy in float64, best first, ties by lower id."""
    every = np.einsum("bkd,nd->bkn", interests.astype(np.float64), items.astype(np.float64))
    scores, winner = every.max(axis=1), every.argmax(axis=1)
    for user, row in enumerate(excluded or []):
        scores[user, list(row)] = -np.inf
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    top = np.take_along_axis(scores, order, axis=1)
    ids, won = np.where(top == -np.inf, -1, order), np.where(top == -np.inf, -1, np.take_along_axis(winner, order, axis=1))
    pad = [(0, 0), (0, max(0, n - items.shape[0]))]
    return (np.pad(ids, pad, constant_values=-1), np.pad(top, pad, constant_values=-np.inf), np.pad(won, pad, constant_values=-1))


def assert_equal(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        np.testing.assert_array_equal(f.view(np.uint32) if f.dtype == np.float32 else f, e.view(np.uint32) if e.dtype == np.float32 else e)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("k", [1, 3, 4, 8, 9])
def test_equals_numpy(d, k):
    interests, items = vectors(d, 13, k, d), vectors(d + 100, 317, d)
    ids, scores, winner = eimf_core.top_n(interests, items, 20)
    assert (ids.dtype, scores.dtype, winner.dtype) == (np.int64, np.float32, np.int32)
    expected = oracle(interests, items, 20)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(winner, expected[2])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_same_bits_for_all_kernels_and_threads(kernel, threads):
    for d, k, users, n_items, n in [(64, 4, 45, 1000, 50), (1, 64, 3, 200, 5), (65, 3, 20, 97, 97), (9, 16, 11, 49, 3), (385, 1, 19, 300, 65)]:
        interests, items = vectors(d, users, k, d), vectors(k, n_items, d)
        assert_equal(eimf_core.top_n(interests, items, n, kernel=kernel, n_threads=threads), eimf_core._top_n_reference(interests, items, n))


@pytest.mark.parametrize("n_items", [1, 2, 3, 8, 23, 24, 25, 47, 48, 49, 96, 97])
def test_panel_edges_and_n_above_items(n_items):
    interests, items = vectors(1, 3, 2, 5), vectors(2, n_items, 5)
    for kernel in KERNELS:
        found = eimf_core.top_n(interests, items, 60, kernel=kernel)
        np.testing.assert_array_equal(found[0], oracle(interests, items, 60)[0])
        assert (found[0][:, n_items:] == -1).all() and (found[1][:, n_items:] == -np.inf).all() and (found[2][:, n_items:] == -1).all()


def assert_bounds_change_nothing(interests, items, n, **options):
    """The scan by 8-bit integers, where the CPU has one, against float products alone; also on prepared items."""
    expected = eimf_core.top_n(interests, items, n, kernel="scalar", **options)
    for catalogue in (items, eimf_core.Items(items)):
        assert_equal(eimf_core.top_n(interests, catalogue, n, **options), expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 9, 17])
@pytest.mark.parametrize("d", [15, 16, 17, 50, 64, 257])
def test_bounds_by_integers_change_nothing(k, d):
    interests, items = vectors(d, 130, k, d), vectors(k, 1500, d)
    assert_bounds_change_nothing(interests, items, 20)
    assert_bounds_change_nothing(interests, items * np.exp(2 * vectors(3, 1500, 1)), 90)  # lengths far apart
    assert_bounds_change_nothing(interests * np.exp(3 * vectors(4, 130, k, 1)), items + 1, 5)
    lists = [np.random.default_rng(u).integers(0, 1500, 200) for u in range(130)]
    assert_bounds_change_nothing(interests, items, 20, allowed=np.arange(1500) % 7 < 3, **csr(lists))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e17])
def test_bounds_by_integers_at_the_ends_of_the_range(scale):
    interests, items = vectors(0, 40, 4, 32), vectors(1, 800, 32)
    assert_bounds_change_nothing(interests, items * np.float32(scale), 10)
    assert_bounds_change_nothing(interests * np.float32(scale), items, 10)
    mixed = np.where(np.arange(800)[:, None] % 3, items, items * np.float32(scale))
    assert_bounds_change_nothing(interests, mixed, 10)
    assert_bounds_change_nothing(np.where(np.arange(40)[:, None, None] % 3, interests, interests * np.float32(scale)), mixed, 10)


def test_bounds_by_integers_when_they_separate_nothing():
    """Equal and nearly equal scores, for which all items must be scored in float, and zeros."""
    interests = vectors(0, 70, 2, 20)
    assert_bounds_change_nothing(interests, np.ones((20000, 20), np.float32), 12)
    assert_bounds_change_nothing(interests, np.tile(vectors(1, 4, 20), (500, 1)), 100)
    assert_bounds_change_nothing(interests, np.ones((9000, 20), np.float32) + 1e-6 * vectors(2, 9000, 20), 12)
    assert_bounds_change_nothing(np.zeros_like(interests), vectors(3, 2000, 20), 12)
    assert_bounds_change_nothing(interests, np.zeros((2000, 20), np.float32), 12)
    assert_bounds_change_nothing(interests, np.where(np.arange(2000)[:, None] == 777, vectors(3, 2000, 20), 0).astype(np.float32), 12)
    rising = np.linspace(1, 2, 3000, dtype=np.float32)[:, None] * np.ones((1, 20), np.float32)
    assert_bounds_change_nothing(np.abs(interests), rising, 12)  # each item is better than all before it
    assert_bounds_change_nothing(-np.abs(interests), rising, 12)


def test_bounds_by_integers_when_all_rounding_goes_one_way():
    """The worst case for the bounds: what quantizing takes from the best item, or its user, points along the other vector."""
    exact = np.full((2000, 64), 50, np.float32)
    exact[np.arange(2000), 1 + np.arange(2000) % 63] += 30  # 3,307 with a vector of ones
    exact[:, 0] = 127  # so that one step is 1
    for place in (0, 1000, 1999):
        rounded = exact.copy()
        rounded[place, 1:] = 50.49  # 3,308, and 3,277 once it is rounded
        ones = np.ones((64, 1, 64), np.float32)
        assert (oracle(ones, rounded, 1)[0] == place).all()
        assert_bounds_change_nothing(ones, rounded, 1)
        # Now the users are rounded: they like (0, 1, 1, ...) by 3,181 steps, of which 31 get lost, and (25, 0, 0, ...) by 0.9 less, of which none.
        users = np.repeat(rounded[place][None, None], 64, axis=0)
        items = np.zeros((2000, 64), np.float32)
        items[:, 0] = (63 * 50.49 - 0.9) / 127
        items[place] = (np.arange(64) > 0).astype(np.float32)
        assert (oracle(users, items, 1)[0] == place).all()
        assert_bounds_change_nothing(users, items, 1)


def test_bounds_by_16_bit_sums_when_all_rounding_goes_one_way():
    """The same where integers end at 90 and halves of 64 dimensions are at most 178 long; a step is 1. Bounds 5 % too tight lose the best item."""
    items = np.full((2000, 256), 20, np.float32)
    items[:, 0] = 90
    items[np.arange(2000), 1 + np.arange(2000) % 255] += 63
    items[np.arange(2000), 1 + np.arange(1, 2001) % 255] += 64  # 149,229 with the user
    user = np.full((1, 1, 256), 27, np.float32)
    user[..., 0] = 90
    for place in (0, 1000, 1999):
        rounded = items.copy()
        rounded[place, 1:] = 20.499  # 149,236, and 145,800 once it is rounded
        assert (oracle(user, rounded, 1)[0] == place).all()
        assert_bounds_change_nothing(np.repeat(user, 64, axis=0), rounded, 1)
        # Now the user is rounded: all items but one like what is added to it, that one what is taken away.
        rounded_user = np.array([90, 0.499] + 127 * [20.499] + 127 * [20.501], np.float32).reshape(1, 1, 256)
        sign = np.array([0] + 128 * [1] + 127 * [-1], np.float32)
        liked = np.tile(-27 * sign, (2000, 1))
        liked[place] *= -1
        liked[:, 0] = 90
        assert (oracle(rounded_user, liked, 1)[0] == place).all()
        assert_bounds_change_nothing(np.repeat(rounded_user, 64, axis=0), liked, 1)


@pytest.mark.parametrize("d", [16, 64, 65, 200])
def test_bounds_by_integers_at_the_largest_sums(d):
    """All of a vector's length in few or many equal components, as often as not along the user's own: 16-bit sums must not overflow."""
    rng = np.random.default_rng(d)
    same = np.array([np.isin(np.arange(d), rng.permutation(d)[:m]) if m % 2 else (np.arange(d) % 4 < 2) & (np.arange(d) < 2 * m)
                     for m in np.arange(150) % d + 1], np.float32)
    same *= np.where(rng.random(same.shape) < 0.5, -1, 1) * rng.uniform(0.97, 1, same.shape)
    items = np.concatenate([same, -same, 0.1 * vectors(d, 1500, d)])[rng.permutation(1800)].astype(np.float32)
    for users in (same[:, None], np.stack([same, -same, same[::-1]], axis=1), np.repeat(same[:, None], 6, axis=1)):
        assert_bounds_change_nothing(np.ascontiguousarray(users, dtype=np.float32), items, 7)


def test_ties_go_to_the_lower_id_and_the_lower_interest():
    items = np.tile(vectors(3, 5, 8), (40, 1))  # 200 items, five different ones
    interests = np.repeat(vectors(4, 6, 1, 8), 3, axis=1)  # three equal interests
    for kernel in KERNELS:
        ids, scores, winner = eimf_core.top_n(interests, items, 100, kernel=kernel)
        np.testing.assert_array_equal(ids, oracle(interests, items, 100)[0])
        assert (winner == 0).all()
    ids = eimf_core.top_n(np.zeros((2, 2, 4), np.float32), np.array([[0.0], [-0.0]] * 100, np.float32) * np.ones((1, 4), np.float32), 150)[0]
    np.testing.assert_array_equal(ids, np.tile(np.arange(150), (2, 1)))  # -0 equals 0


def test_rising_scores_pass_the_threshold_every_time():
    """The worst case for the buffer of candidates: each item is better than all before it."""
    items = np.arange(5000, dtype=np.float32)[:, None]
    ids = eimf_core.top_n(np.ones((3, 1, 1), np.float32), items, 7)[0]
    np.testing.assert_array_equal(ids, np.tile(np.arange(4999, 4992, -1), (3, 1)))
    ids = eimf_core.top_n(-np.ones((1, 1, 1), np.float32), items, 7)[0]
    np.testing.assert_array_equal(ids, [np.arange(7)])


def test_exclusions_in_any_order_and_repeated():
    interests, items = vectors(5, 4, 4, 16), vectors(6, 300, 16)
    plain = oracle(interests, items, 300)[0]
    lists = [list(plain[0, :120][::-1]) * 2, [], list(range(300)), list(plain[3, 1:])]
    for kernel in KERNELS:
        ids, scores, winner = eimf_core.top_n(interests, items, 50, kernel=kernel, **csr(lists))
        expected = oracle(interests, items, 50, lists)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(winner, expected[2])
    assert (ids[2] == -1).all() and (scores[2] == -np.inf).all()  # everything excluded
    assert ids[3, 0] == plain[3, 0] and (ids[3, 1:] == -1).all()  # one item remains


def test_allowed_mask():
    interests, items = vectors(7, 5, 2, 9), vectors(8, 250, 9)
    allowed = np.random.default_rng(9).random(250) < 0.3
    lists = [[int(np.flatnonzero(allowed)[0])]] * 5
    np.testing.assert_array_equal(eimf_core.top_n(interests, items, 100, allowed=allowed)[0], oracle(interests, items, 100, allowed=allowed)[0])
    np.testing.assert_array_equal(eimf_core.top_n(interests, items, 100, allowed=allowed, **csr(lists))[0],
                                  oracle(interests, items, 100, lists, allowed)[0])
    assert (eimf_core.top_n(interests, items, 4, allowed=np.zeros(250, bool))[0] == -1).all()


def test_empty_sizes():
    for users, n_items, n in [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)]:
        ids, scores, winner = eimf_core.top_n(vectors(0, users, 2, 4), vectors(1, n_items, 4), n)
        assert ids.shape == scores.shape == winner.shape == (users, n) and (ids == (-1 if n_items == 0 else ids)).all()


def test_result_does_not_depend_on_the_batch():
    interests, items = vectors(10, 50, 4, 64), vectors(11, 700, 64)
    whole = eimf_core.top_n(interests, items, 30)
    for user in (0, 17, 49):
        assert_equal(eimf_core.top_n(interests[user:user + 1], items, 30), [part[user:user + 1] for part in whole])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes_against_the_plain_loop(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    users, k, d, n_items, n, seed = draw(1, 40), draw(1, 12), draw(1, 40), draw(0, 300), draw(0, 160), draw(0, 2**31)
    rng = np.random.default_rng(seed)
    # Small integers make many exact ties.
    interests, items = (rng.integers(-2, 3, s).astype(np.float32) for s in ((users, k, d), (n_items, d)))
    options = csr([list(rng.integers(0, n_items, draw(0, 30))) if n_items else [] for _ in range(users)])
    if data.draw(st.booleans()):
        options["allowed"] = rng.random(n_items) < 0.7
    expected = eimf_core._top_n_reference(interests, items, n, **options)
    for kernel in KERNELS:
        assert_equal(eimf_core.top_n(interests, items, n, kernel=kernel, n_threads=draw(1, 4), **options), expected)


@pytest.mark.parametrize("change, words", [
    ({"interests": vectors(0, 2, 8)}, r"interests.*\(2, 8\).*\(B, K, D\)"),
    ({"interests": vectors(0, 2, 3, 8).astype(np.float64)}, r"interests.*float64.*float32"),
    ({"interests": [[[1.0]]]}, r"interests: found list"),
    ({"interests": np.asfortranarray(vectors(0, 2, 3, 8))}, "not C-contiguous"),
    ({"interests": vectors(0, 2, 3, 7)}, r"\(2, 3, 7\).*\(10, 8\)"),
    ({"interests": np.full((2, 3, 8), np.nan, np.float32)}, "interests: found NaN in row 0, column 0"),
    ({"interests": np.full((2, 3, 8), np.inf, np.float32)}, "found an infinity"),
    ({"interests": np.full((2, 3, 8), 3e38, np.float32)}, "overflow"),
    ({"interests": vectors(0, 2, 0, 8)}, "K and D must be at least 1"),
    ({"items": vectors(1, 20, 8)[::2]}, "items.*not C-contiguous"),
    ({"items": np.where(np.arange(80).reshape(10, 8) == 43, np.nan, 0).astype(np.float32)}, "items: found NaN in row 5, column 3"),
    ({"n": -1}, "n is -1"),
    ({"n": 2**62}, "do not fit"),
    ({"n": 10**12}, r"results of shape \(2, 1000000000000\) do not fit into memory"),
    ({"n_threads": -1}, "n_threads is -1"),
    ({"kernel": "fast"}, "kernel is 'fast'.*'scalar'"),
    ({"exclude_indptr": np.zeros(3, np.int64)}, "belong together"),
    ({"exclude_indptr": np.array([0, 1], np.int64), "exclude_indices": np.array([1], np.int64)}, "exclude_indptr has shape"),
    ({"exclude_indptr": np.array([0, 1, 1], np.int32), "exclude_indices": np.array([1], np.int64)}, "int32"),
    ({"exclude_indptr": np.array([0, 2, 1], np.int64), "exclude_indices": np.array([1], np.int64)}, "must not fall"),
    ({"exclude_indptr": np.array([-1, 0, 1], np.int64), "exclude_indices": np.array([1], np.int64)}, "expected 0"),
    ({"exclude_indptr": np.array([0, 0, 1], np.int64), "exclude_indices": np.array([10], np.int64)}, r"exclude_indices\[0\] is 10; expected an item id from 0 to 9"),
    ({"allowed": np.ones(9, bool)}, r"allowed: found shape \(9,\)"),
    ({"allowed": np.ones(10, np.uint8)}, "allowed: found uint8"),
])
def test_bad_arguments_are_value_errors(change, words):
    arguments = {"interests": vectors(0, 2, 3, 8), "items": vectors(1, 10, 8), "n": 3} | change
    with pytest.raises(ValueError, match=words):
        eimf_core.top_n(**arguments)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("users, n", [(8, 10), (32, 10), (0, 10), (8, 0)])
def test_items_that_no_answer_needs_are_checked_too(kernel, users, n):
    """Whether or not the kernel reads them: masked ones, and all if nothing is asked for."""
    interests, items, allowed = vectors(0, users, 4, 32), vectors(1, 1000, 32), np.arange(1000) != 7
    expected = eimf_core.top_n(interests, items, n, allowed=allowed, kernel=kernel)
    assert_equal(expected, eimf_core._top_n_reference(interests, items, n, allowed=allowed))
    for value, words in ((np.nan, "items: found NaN in row 7, column 2"), (-np.inf, "items: found an infinity in row 7, column 2")):
        items[7, 2] = value
        for options in ({"allowed": allowed}, {}):
            with pytest.raises(ValueError, match=words):
                eimf_core.top_n(interests, items, n, kernel=kernel, **options)


@pytest.mark.parametrize("kernel", KERNELS)
def test_prepared_items_give_the_same_bits(kernel):
    for d, k, users, n_items, n in [(64, 4, 45, 1000, 50), (1, 64, 3, 200, 5), (65, 3, 20, 97, 97), (9, 16, 11, 49, 3), (7, 2, 4, 0, 5), (8, 1, 0, 5, 2)]:
        interests, items = vectors(d, users, k, d), vectors(k, n_items, d)
        lists = [np.random.default_rng(u).integers(0, n_items, 5) if n_items else [] for u in range(users)]
        allowed = np.arange(n_items) % 97 < 60  # whole panels are left out too
        prepared = eimf_core.Items(items, kernel=kernel)
        assert prepared.shape == items.shape
        for options in ({}, csr(lists), {"allowed": allowed}, csr(lists) | {"allowed": allowed}):
            for threads in (1, 2, 7):
                assert_equal(eimf_core.top_n(interests, prepared, n, n_threads=threads, **options), eimf_core.top_n(interests, items, n, **options))


def test_prepared_items_are_checked_and_keep_their_array():
    items = vectors(1, 100, 8)
    expected = eimf_core.top_n(vectors(0, 2, 3, 8), items, 5)
    prepared = eimf_core.Items(items.copy())
    assert_equal(eimf_core.top_n(vectors(0, 2, 3, 8), prepared, 5), expected)
    with pytest.raises(ValueError, match=r"\(2, 3, 7\).*\(100, 8\)"):
        eimf_core.top_n(vectors(0, 2, 3, 7), prepared, 5)
    with pytest.raises(ValueError, match="overflow"):
        eimf_core.top_n(np.full((2, 3, 8), 3e38, np.float32), prepared, 5)
    for bad, words in ((items.astype(np.float64), "float64"), (np.full_like(items, np.nan), "items: found NaN"), (items[:, :0], "at least 1"), ([1], "list")):
        with pytest.raises(ValueError, match=words):
            eimf_core.Items(bad)
    if len(KERNELS) > 1:
        with pytest.raises(ValueError, match=f"prepared for kernel scalar.*found {KERNELS[-1]}"):
            eimf_core.top_n(vectors(0, 2, 3, 8), eimf_core.Items(items, kernel="scalar"), 5, kernel=KERNELS[-1])


def test_read_only_input_is_taken_and_left_alone():
    interests, items = vectors(0, 2, 3, 8), vectors(1, 10, 8)
    before = interests.copy(), items.copy()
    interests.flags.writeable = items.flags.writeable = False
    eimf_core.top_n(interests, items, 3)
    np.testing.assert_array_equal(interests, before[0])
    np.testing.assert_array_equal(items, before[1])


def test_gil_is_released():
    """Another Python thread makes progress while the kernel works."""
    interests, items = vectors(0, 400, 4, 64), vectors(1, 20000, 64)
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    eimf_core.top_n(interests, items, 10, n_threads=1)
    during = counted[0] - before
    stop.set()
    thread.join()
    assert during > 100


@pytest.mark.slow
def test_ten_million_items():
    """D = 16, so that the items take 640 MB; near ties are told apart by float64 scores of all."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((10_000_000, 16), dtype=np.float32)
    interests = rng.standard_normal((70, 3, 16), dtype=np.float32)  # enough users for bounds from 8-bit products, where there are any
    n = 20
    ids, scores, _ = eimf_core.top_n(interests, items, n, n_threads=2)
    for user in (0, 1, 69):
        best = np.concatenate([(items[at:at + 1_000_000].astype(np.float64) @ interests[user].T.astype(np.float64)).max(axis=1) for at in range(0, len(items), 1_000_000)])
        expected = np.argsort(-best)[:n + 1]
        np.testing.assert_allclose(scores[user], best[expected[:n]], rtol=1e-5)
        np.testing.assert_allclose(best[ids[user]], best[expected[:n]], rtol=1e-5)
        assert len(set(ids[user])) == n
