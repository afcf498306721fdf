"""The split rules: who sees which events."""
import numpy as np
import pytest
from eimf.artifacts import save_array, save_json, save_lines
from eimf.data import (TEST, TRAIN, VALID, Interactions, load_interactions, load_items, load_user_ids, padded,
                       range_positions)
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=25)


def make(lengths, split, kind):
    """Events are their own positions + 1, so that an item tells where it stood."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n = int(offsets[-1])
    return Interactions(np.arange(1, n + 1, dtype=np.int32), offsets, np.array(split, np.uint8), n, kind)


def slices(data, start, end):
    return [data.items[a:b].tolist() for a, b in zip(start, end)]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5))
def test_user_split(lengths, seed):
    split = np.random.default_rng(seed).integers(0, 3, len(lengths))
    data = make(lengths, split, "random")
    history = [data.items[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]

    users, start, end = data.training_ranges()
    assert users.tolist() == [u for u in range(len(lengths)) if split[u] == TRAIN and lengths[u]]
    assert slices(data, start, end) == [history[u] for u in users]

    for part, number in (("valid", VALID), ("test", TEST)):
        users, start, middle, end = data.evaluation_ranges(part)
        assert users.tolist() == [u for u in range(len(lengths)) if split[u] == number and lengths[u] > 1]
        for u, seen, targets in zip(users, slices(data, start, middle), slices(data, middle, end)):
            assert seen == history[u][:int(0.8 * lengths[u])] and targets == history[u][int(0.8 * lengths[u]):]
            assert seen and targets


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_leave_one_out(lengths):
    """Training sees all but the last two; validation's target is the last but one, the test's the last."""
    data = make(lengths, np.zeros(len(lengths)), "leave-one-out")
    history = [data.items[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]

    users, start, end = data.training_ranges()
    assert users.tolist() == [u for u, n in enumerate(lengths) if n > 2]
    assert slices(data, start, end) == [history[u][:-2] for u in users]

    for part, back in (("valid", 2), ("test", 1)):
        users, start, middle, end = data.evaluation_ranges(part)
        assert users.tolist() == [u for u, n in enumerate(lengths) if n > back]
        assert slices(data, middle, end) == [[history[u][-back]] for u in users]
        assert slices(data, start, middle) == [history[u][:-back] for u in users]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), kind=st.sampled_from(["random", "file-order", "leave-one-out"]))
def test_no_target_is_seen_in_training(lengths, seed, kind):
    split = np.random.default_rng(seed).integers(0, 3, len(lengths)) if kind != "leave-one-out" else np.zeros(len(lengths))
    data = make(lengths, split, kind)
    seen = set(range_positions(*data.training_ranges()[1:]).tolist())
    for part in ("valid", "test"):
        _, _, middle, end = data.evaluation_ranges(part)
        assert not seen & set(range_positions(middle, end).tolist())
    counts = data.training_counts()
    assert counts.shape == (data.n_items + 1,) and counts[0] == 0
    assert set(np.flatnonzero(counts) - 1) == seen  # item i is the event at position i - 1


@settings(max_examples=100, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=10))
def test_range_positions(ranges):
    start = np.array([a for a, _ in ranges], np.int64)
    end = start + np.array([n for _, n in ranges], np.int64)
    found = range_positions(start, end)
    assert found.dtype == np.int64
    assert found.tolist() == [i for a, n in ranges for i in range(a, a + n)]


@settings(max_examples=100, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=10), max_len=st.integers(1, 25))
def test_padded(ranges, max_len):
    items = np.arange(1, 51, dtype=np.int32)
    start, end = np.array([a for a, _ in ranges]), np.array([a + n for a, n in ranges])
    found = padded(items, start, end, max_len)
    assert found.dtype == np.int64 and found.shape == (len(ranges), max_len)
    for row, (a, n) in zip(found, ranges):
        newest = items[a:a + n].tolist()[-max_len:]
        assert row.tolist() == newest + [0] * (max_len - len(newest))


def test_padded_at_the_end_of_the_array():
    """The columns past the last event are not read: they would lie outside the array."""
    items = np.array([5, 6, 7], np.int32)
    assert padded(items, np.array([1]), np.array([3]), 4).tolist() == [[6, 7, 0, 0]]
    assert padded(items, np.array([3]), np.array([3]), 2).tolist() == [[0, 0]]


def test_one_event_is_no_test_case():
    """A user with a single event would be evaluated with an empty history."""
    data = make([1, 2, 5], [TEST, TEST, TEST], "random")
    users, start, middle, end = data.evaluation_ranges("test")
    assert (users.tolist(), (middle - start).tolist(), (end - middle).tolist()) == ([1, 2], [1, 4], [1, 1])


def test_unknown_part():
    with pytest.raises(KeyError):
        make([5], [TEST], "random").evaluation_ranges("train-ish")


def test_reading(tmp_path):
    save_array(tmp_path / "sequence_items.npy", np.array([2, 1, 2], np.int32))
    save_array(tmp_path / "sequence_offsets.npy", np.array([0, 1, 3], np.int64))
    save_array(tmp_path / "split.npy", np.array([0, 2], np.uint8))
    save_json(tmp_path / "stats.json", {"items": 2, "split": "file-order"})
    save_lines(tmp_path / "users.txt", ["zoë", "u 2"])
    save_lines(tmp_path / "items.jsonl", [{"item": 1, "id": "a"}, {"item": 2, "id": "b"}])
    data = load_interactions(tmp_path)
    assert (data.n_users, data.n_items, data.kind, data.items.tolist()) == (2, 2, "file-order", [2, 1, 2])
    assert load_user_ids(tmp_path) == ["zoë", "u 2"]
    assert load_items(tmp_path)[0] is None and load_items(tmp_path)[2]["id"] == "b"
