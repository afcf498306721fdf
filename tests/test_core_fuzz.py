"""Whatever the arguments are: a right answer or a ValueError (TypeError for what is no array argument at all), never a crash."""
import eimf_core
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4).map(tuple)
DTYPES = st.sampled_from([np.float32] * 8 + [np.float64, np.float16, np.int64, np.int32, np.bool_, np.complex64, ">f4", object, "U3"])
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e20, 3e38, -3e38, np.inf, -np.inf, np.nan]


@st.composite
def arrays(draw, shapes=SHAPES, dtypes=DTYPES, values=(0.0, 1.0, -1.0, 0.5, 2.0, -3.0)):
    """An array of any dtype and layout: strided, reversed, transposed, broadcast, unaligned, read-only; rarely with special values."""
    shape, dtype = draw(shapes), np.dtype(draw(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    pool = np.array(SPECIAL if draw(st.integers(0, 9)) == 0 else values)
    plain = rng.choice(pool, size=shape)
    with np.errstate(all="ignore"):
        array = plain.astype(dtype)
    layout = draw(st.sampled_from(["plain"] * 12 + ["fortran", "strided", "reversed", "broadcast", "unaligned", "readonly", "list"]))
    if layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "strided" and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif layout == "reversed" and array.ndim:
        array = array[::-1]
    elif layout == "broadcast":
        array = np.broadcast_to(array, (3, *array.shape))
    elif layout == "unaligned" and dtype.kind in "fi":
        array = np.frombuffer(b"\0" + np.ascontiguousarray(array).tobytes(), np.uint8)[1:].view(dtype).reshape(array.shape)
    elif layout == "readonly":
        array.flags.writeable = False
    return array.tolist() if layout == "list" else array


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        assert str(error)
        return None


OPTIONAL = st.none() | arrays(dtypes=st.sampled_from([np.int64, np.int64, np.int32, np.bool_, np.float32]), values=(-1, 0, 1, 2, 3))
COUNTS = st.sampled_from([0, 1, 2, 3, 7, -1, 2**31, 2**62, 2**64, None, 1.5, "3"])


@settings(max_examples=100, deadline=None)
@given(arrays(), arrays(), COUNTS, OPTIONAL, OPTIONAL, OPTIONAL, st.sampled_from([0, 1, 3, -1, 2**40]), st.sampled_from(["auto", "scalar", "", "avx9"]))
def test_top_n(interests, items, n, indptr, indices, allowed, threads, kernel):
    if isinstance(n, int) and n >= 2**31:
        n = n if np.ndim(interests) != 3 or len(interests) else 3
    if n == 2**31 and np.ndim(interests) == 3:
        n = 2**62  # gigabytes of padding would be a right answer
    found = outcome(eimf_core.top_n, interests, items, n, exclude_indptr=indptr, exclude_indices=indices, allowed=allowed, n_threads=threads, kernel=kernel)
    prepared = outcome(eimf_core.Items, items, kernel=kernel)
    again = None if prepared is None else outcome(eimf_core.top_n, interests, prepared, n, exclude_indptr=indptr, exclude_indices=indices, allowed=allowed, n_threads=threads)
    assert (found is None) == (again is None)
    if found is not None:
        for f, a in zip(found, again, strict=True):
            np.testing.assert_array_equal(f, a)
        expected = eimf_core._top_n_reference(interests, items, n, exclude_indptr=indptr, exclude_indices=indices, allowed=allowed)
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(f, e)


@settings(max_examples=100, deadline=None)
@given(arrays(), st.sampled_from([-1.0, 0.0, 1e300, -1e30, float("nan"), None, "x", [1.0], True]) | arrays(), st.sampled_from([0.5, 0.9, 0.4, 1.0, float("nan"), 0.99]),
       st.sampled_from([1, 5, 200, 0, -1, 2**70, None]), st.booleans(), st.sampled_from([0, 1, 3, -1]), st.sampled_from([0, 1, 10**4, 10**9, -1]))
def test_affinity_propagation(x, preference, damping, max_iter, precomputed, threads, limit):
    found = outcome(eimf_core.affinity_propagation, x, preference, damping=damping, max_iter=max_iter, precomputed=precomputed, n_threads=threads,
                    memory_limit=limit)
    if found is not None:
        assert len(found.exemplars) >= 1 and found.labels.shape == (len(x),) and found.labels.min() == 0
        np.testing.assert_array_equal(found.labels[found.exemplars], np.arange(len(found.exemplars)))
        assert np.isfinite(found.net_similarity)


INTEGERS = arrays(shapes=st.lists(st.sampled_from([0, 1, 2, 3, 4]), min_size=1, max_size=1).map(tuple), dtypes=st.sampled_from([np.int64] * 6 + [np.int32]),
                  values=(-1, 0, 1, 1, 2, 2, 3))


@settings(max_examples=100, deadline=None)
@given(INTEGERS, INTEGERS, arrays(shapes=st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=1).map(tuple)), st.booleans())
def test_sparse(indptr, indices, similarity, ordered):
    if ordered and isinstance(indptr, np.ndarray) and indptr.dtype == np.int64 and indptr.ndim == 1 and indptr.size:
        indptr = np.sort(np.clip(indptr, 0, 3))
        indptr[0] = 0
        if isinstance(indices, np.ndarray):
            indices = np.resize(indices, int(indptr[-1])).copy()
        similarity = -np.ones(int(indptr[-1]), np.float32)
    found = outcome(eimf_core.affinity_propagation_sparse, indptr, indices, similarity, -1.5)
    if found is not None:
        assert found.labels.shape == (len(indptr) - 1,) and (found.labels == -1).sum() == found.n_unassigned


@settings(max_examples=100, deadline=None)
@given(arrays(dtypes=st.sampled_from([np.int64] * 5 + [np.int32]), values=(-1, 0, 1, 2)), arrays(), arrays(dtypes=st.sampled_from([np.int32] * 5 + [np.int64])),
       st.sampled_from([0, 1, 3, -1, 2**62]), st.sampled_from([0.0, 0.5, -1.0, float("inf"), "x"]))
def test_diversify(ids, scores, category, n, penalty):
    if n == 2**62 and np.ndim(ids) == 2 and len(ids) == 0:
        n = 3
    found = outcome(eimf_core.diversify, ids, scores, category, n, penalty=penalty)
    if found is not None:
        assert found[0].shape == found[1].shape == (len(ids), n)


NUMBERS = arrays(shapes=st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=1).map(tuple), dtypes=st.sampled_from([np.int64] * 6 + [np.int32]),
                 values=(-1, 0, 1, 1, 2))


@settings(max_examples=100, deadline=None)
@given(arrays(), arrays(), NUMBERS, arrays(shapes=st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=1).map(tuple)), NUMBERS, st.booleans(), st.booleans(),
       st.sampled_from([0, 1, 3, -1, 2**40]), st.sampled_from(["auto", "scalar", "", "avx9"]))
def test_softmax_loss(queries, items, target, weight, excluded, gradient, fitting, threads, kernel):
    if fitting and isinstance(queries, np.ndarray) and queries.ndim == 2:
        target, weight = np.resize(target, len(queries)).astype(np.int64), np.ones(len(queries), np.float32)
    found = outcome(eimf_core.softmax_loss, queries, items, target, weight, excluded, item_gradient=gradient, n_threads=threads, kernel=kernel)
    if found is not None:
        assert found[0].shape == (len(queries),) and found[1].shape == queries.shape
        assert found[2] is None if not gradient else found[2].shape == items.shape


def test_random_objects_are_no_arrays():
    for thing in (None, 3, "text", b"bytes", object(), [1, 2], {}, memoryview(b"abc"), np.float32(1)):
        with pytest.raises((ValueError, TypeError)):
            eimf_core.top_n(thing, thing, 3)
        with pytest.raises((ValueError, TypeError)):
            eimf_core.Items(thing)
        with pytest.raises((ValueError, TypeError)):
            eimf_core.Points(thing)
        with pytest.raises((ValueError, TypeError)):
            eimf_core.affinity_propagation(thing, -1.0)
        with pytest.raises((ValueError, TypeError)):
            eimf_core.affinity_propagation_sparse(thing, thing, thing, -1.0)
        with pytest.raises((ValueError, TypeError)):
            eimf_core.diversify(thing, thing, thing, 1, penalty=0.0)
        with pytest.raises((ValueError, TypeError)):
            eimf_core.softmax_loss(thing, thing, thing, thing, thing)
