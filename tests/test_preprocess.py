"""Stage 01 against a slow re-implementation, published counts, and broken input of every kind."""
import csv
import gzip
import io
import json
import resource
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from eimf.artifacts import UserError, load_array, load_json, load_lines
from eimf.data import load_interactions, load_user_ids, range_positions
from eimf.readers import FORMATS, Report, category_names, clean, detect, milliseconds, read_events, read_items
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

ALL_PARTS = ("items.jsonl", "users.txt", "sequence_items.npy", "sequence_times.npy", "sequence_offsets.npy", "split.npy",
             "stats.json")


@pytest.fixture(scope="module")
def stage(load_script):
    return load_script("stages/01_preprocess.py")


@pytest.fixture
def preprocess(stage, tmp_path):
    """Run the stage on text or bytes written to a file of the given name; returns its folder."""
    def call(content, *arguments, name="log.csv", items=None, items_name="items.csv", dataset="d"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = ["--data-dir", tmp_path, "--dataset", dataset, "--interactions", path, *arguments]
        if items is not None:
            (tmp_path / items_name).write_bytes(items if isinstance(items, bytes) else items.encode())
            options += ["--items", tmp_path / items_name]
        stage.main([str(option) for option in options])
        return tmp_path / dataset / "01_preprocess"
    return call


def csv_text(events, header=("user_id", "item_id", "timestamp")):
    file = io.StringIO()
    csv.writer(file).writerows([header, *events])
    return file.getvalue()


def dense(users=12, items=6):
    """Every user has every item, a second apart, so that nothing is filtered out."""
    return [(f"u{u}", f"i{i}", 100 * u + i) for u in range(users) for i in range(items)]


def read_back(folder):
    """What a stage wrote, as {user id: [(item id, time), ...]} in order, and the item ids by number."""
    items = [row["id"] for row in load_lines(folder / "items.jsonl")]
    flat, times = load_array(folder / "sequence_items.npy"), load_array(folder / "sequence_times.npy")
    offsets, users = load_array(folder / "sequence_offsets.npy"), load_user_ids(folder)
    assert len(users) == len(offsets) - 1 and offsets[0] == 0 and offsets[-1] == len(flat) == len(times)
    return {user: [(items[i - 1], int(t)) for i, t in zip(flat[a:b], times[a:b])]
            for user, a, b in zip(users, offsets, offsets[1:])}, items


# ---- the rules, against a re-implementation that does one thing at a time


def slow_filter(events, minimum, repeat):
    """(sequences by user, item ids by number) of a list of (user, item, time), without NumPy."""
    first_user = {user: n for n, user in reversed(list(enumerate(user for user, _, _ in events)))}
    first_item = {item: n for n, item in reversed(list(enumerate(item for _, item, _ in events)))}
    events = list(dict.fromkeys(events))
    while True:
        before = len(events)
        count = Counter(item for _, item, _ in events)
        events = [event for event in events if count[event[1]] >= minimum]
        count = Counter(user for user, _, _ in events)
        events = [event for event in events if count[event[0]] >= minimum]
        if not repeat or len(events) == before:
            break
    sequences = {}
    for user, item, time in sorted(events, key=lambda event: (first_user[event[0]], event[2])):
        sequences.setdefault(user, []).append((item, time))
    count = Counter(item for _, item, _ in events)
    return sequences, sorted(count, key=lambda item: (-count[item], first_item[item]))


EVENTS = st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.sampled_from("uvwxyz"), st.integers(-3, 3)), max_size=120)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, minimum=st.integers(1, 4), repeat=st.booleans(),
       split=st.sampled_from(["file-order", "random", "leave-one-out"]))
def test_equals_the_slow_way(preprocess, events, minimum, repeat, split):
    expected, numbered = slow_filter(events, minimum, repeat)
    arguments = ["--min-interactions", minimum, "--split", split] + ["--k-core"] * repeat
    if not expected or (len(expected) < 10 and split != "leave-one-out"):
        with pytest.raises(UserError, match="nothing is left|needs at least 10|no lines of data"):
            preprocess(csv_text(events), *arguments)
        return
    folder = preprocess(csv_text(events), *arguments)
    sequences, items = read_back(folder)
    assert sequences == expected
    assert list(sequences) == list(expected)  # the users' order
    assert items == numbered
    stats = load_json(folder / "stats.json")
    kept = sum(map(len, expected.values()))
    assert (stats["users"], stats["items"], stats["interactions"]) == (len(expected), len(numbered), kept)
    assert stats["mean_length"] == pytest.approx(kept / len(expected), abs=5e-4)
    assert stats["duplicates_dropped"] == len(events) - len(set(events))
    assert stats["events_read"] == len(events) == kept + stats["filtered_out"] + stats["duplicates_dropped"]
    parts = load_array(folder / "split.npy")
    n, train, valid = len(expected), int(0.8 * len(expected)), int(0.1 * len(expected))
    if split == "leave-one-out":
        assert not parts.any()
    else:
        assert np.bincount(parts, minlength=3).tolist() == [train, valid, n - train - valid]
    if split == "file-order":
        assert parts.tolist() == [0] * train + [1] * valid + [2] * (n - train - valid)


def test_types(preprocess):
    folder = preprocess(csv_text(dense()))
    found = {name: load_array(folder / name).dtype.str for name in ALL_PARTS if name.endswith(".npy")}
    assert found == {"sequence_items.npy": "<i4", "sequence_times.npy": "<i8", "sequence_offsets.npy": "<i8",
                     "split.npy": "|u1"}
    assert [row["item"] for row in load_lines(folder / "items.jsonl")] == list(range(1, 7))


def test_one_pass_and_k_core_differ(preprocess):
    """Dropping the user `rare` leaves item i6 with one event: kept by the paper's single pass, dropped by --k-core."""
    events = dense() + [("u0", "i6", 900), ("rare", "i6", 901)]
    sequences, items = read_back(preprocess(csv_text(events), "--min-interactions", 2))
    assert "rare" not in sequences and "i6" in items
    sequences, items = read_back(preprocess(csv_text(events), "--min-interactions", 2, "--k-core"))
    assert "rare" not in sequences and "i6" not in items


def test_same_item_at_another_time_is_another_event(preprocess):
    events = dense() + [("u0", "i0", 5000), ("u0", "i0", 5000)]
    folder = preprocess(csv_text(events))
    assert [item for item, _ in read_back(folder)[0]["u0"]] == [f"i{i}" for i in range(6)] + ["i0"]
    assert load_json(folder / "stats.json")["duplicates_dropped"] == 1


@pytest.mark.parametrize("n, train, valid", [(10, 8, 1), (11, 8, 1), (19, 15, 1), (29, 23, 2), (4_905, 3_924, 490)])
def test_split_sizes(stage, n, train, valid):
    for kind in ("file-order", "random"):
        split = stage.split_users(n, kind, 0)
        assert split.dtype == np.uint8 and np.bincount(split).tolist() == [train, valid, n - train - valid]
        assert (np.sort(split) == split).all() == (kind == "file-order")


def test_random_split_depends_on_the_seed_alone(preprocess):
    text = csv_text(dense(users=50))
    files = [{name: (preprocess(text, "--seed", seed) / name).read_bytes() for name in ALL_PARTS} for seed in (1, 1, 2)]
    assert files[0] == files[1]
    assert [name for name in ALL_PARTS if files[0][name] != files[2][name]] == ["split.npy"]


def test_leave_one_out_holds_the_last_two_back(preprocess):
    folder = preprocess(csv_text(dense()), "--split", "leave-one-out")
    data = load_interactions(folder)
    names = [None] + [row["id"] for row in load_lines(folder / "items.jsonl")]
    seen = {names[i] for i in data.items[range_positions(*data.training_ranges()[1:])]}
    assert seen == {"i0", "i1", "i2", "i3"}  # every user's i4 and i5 come last
    for part, target in (("valid", "i4"), ("test", "i5")):
        _, start, middle, end = data.evaluation_ranges(part)
        assert [names[i] for i in data.items[range_positions(middle, end)]] == [target] * 12
        assert target not in {names[i] for i in data.items[range_positions(start, middle)]}


@pytest.mark.parametrize("split", ["random", "file-order"])
def test_user_splits_share_no_user(preprocess, split):
    data = load_interactions(preprocess(csv_text(dense(users=40)), "--split", split))
    train = set(data.training_ranges()[0].tolist())
    valid, test = (set(data.evaluation_ranges(part)[0].tolist()) for part in ("valid", "test"))
    assert (len(train), len(valid), len(test)) == (32, 4, 4)
    assert train | valid | test == set(range(40))


# ---- formats: the same events in each of them give the same files


def amazon(events, as_text=json.dumps, names=("reviewerID", "asin", "unixReviewTime"), scale=1):
    return "".join(as_text(dict(zip(names, (user, item, time * scale)), overall=5.0)) + "\n" for user, item, time in events)


def recbole(events, header="user_id:token\titem_id:token\trating:float\ttimestamp:float"):
    return "\n".join([header, *(f"{user}\t{item}\t5.0\t{time}.0" for user, item, time in events)]) + "\n"


SAME = [
    ("reviews.json", amazon(dense()), []),
    ("reviews.json.gz", gzip.compress(amazon(dense()).encode()), []),
    ("literals.json", amazon(dense(), repr), []),
    ("windows.json", amazon(dense()).replace("\n", "\r\n"), []),
    ("mark.json", b"\xef\xbb\xbf" + amazon(dense()).encode(), []),
    ("2023.jsonl", amazon(dense(), names=("user_id", "parent_asin", "timestamp"), scale=1000), []),
    ("text-times.json", amazon([(u, i, str(t)) for u, i, t in dense()]), []),
    ("own-names.json", amazon(dense(), names=("u", "i", "t")),
     ["--user-column", "u", "--item-column", "i", "--time-column", "t"]),
    ("x.inter", recbole(dense()), []),
    ("x.inter.gz", gzip.compress(recbole(dense()).encode()), []),
    ("x.csv", csv_text(dense()), []),
    ("no-name", csv_text(dense()), []),
    ("x.tsv", csv_text(dense()).replace(",", "\t"), []),
    ("x.txt", csv_text(dense()).replace(",", "\t"), ["--format", "tsv"]),
    ("columns.csv", csv_text([(5, t, i, u) for u, i, t in dense()], ("rating", "when", "movie", "who")),
     ["--user-column", "who", "--item-column", "movie", "--time-column", "when"]),
    ("ms.csv", csv_text([(u, i, t * 1000) for u, i, t in dense()]), ["--time-unit", "ms"]),
    ("iso.csv", csv_text([(u, i, f"1970-01-01T00:{t // 60:02}:{t % 60:02}Z") for u, i, t in dense()]), []),
]


@pytest.mark.parametrize("name, content, arguments", SAME, ids=[name for name, _, _ in SAME])
def test_formats_agree(preprocess, name, content, arguments):
    folder = preprocess(content, "--split", "file-order", *arguments, name=name)
    sequences, items = read_back(folder)
    assert sequences == {f"u{u}": [(f"i{i}", 100 * u + i) for i in range(6)] for u in range(12)}
    assert items == [f"i{i}" for i in range(6)]
    assert load_json(folder / "stats.json")["broken_lines"] == 0


def test_fractions_of_a_second_order_events(preprocess):
    events = [(f"u{u}", f"i{i}", 10 + (5 - i) / 8) for u in range(10) for i in range(6)]
    sequences, _ = read_back(preprocess(csv_text(events)))
    assert sequences["u3"] == [(f"i{i}", 10) for i in (5, 4, 3, 2, 1, 0)]


RAW_TITLE = "  Tea &amp; Cup,\n 5&quot;\x07 "
META = {
    "amazon": [{"asin": "i0", "title": RAW_TITLE, "categories": [["A"], ["A", "B &amp; C", "D"], ["X", "Y", "Z"]],
                "brand": "&Uuml;ber"},
               {"asin": "other", "title": "Nobody's", "categories": [["A"]]},
               {"asin": "i1", "categories": [["A"]]},
               {"asin": "i2", "title": "   ", "categories": [], "brand": None},
               {"asin": "i0", "title": "Second", "categories": [["Second"]]},
               {"asin": "i1", "title": "Late title", "categories": [["Late"]], "brand": "Late"}],
    "2018": [{"title": RAW_TITLE, "asin": "i0", "category": ["A", "B &amp; C", "D"], "brand": "&Uuml;ber"},
             {"asin": "i1", "title": "Late title", "category": ["A"], "brand": "Late"}],
    "2023": [{"parent_asin": "i0", "title": RAW_TITLE, "categories": ["A", "B &amp; C", "D"], "store": "&Uuml;ber"},
             {"parent_asin": "i1", "title": "Late title", "categories": ["A"], "store": "Late"}],
}


@pytest.mark.parametrize("kind", META)
@pytest.mark.parametrize("as_text", [json.dumps, repr], ids=["json", "literal"])
def test_item_table(preprocess, kind, as_text):
    folder = preprocess(amazon(dense()), name="r.json", items_name="m.json.gz",
                        items=gzip.compress("\n".join(map(as_text, META[kind])).encode()))
    rows = load_lines(folder / "items.jsonl")
    assert rows[0] == {"item": 1, "id": "i0", "title": 'Tea & Cup, 5"', "categories": ["A", "B & C", "D"], "brand": "Über"}
    assert rows[1] == {"item": 2, "id": "i1", "title": "Late title", "categories": ["A"], "brand": "Late"}
    assert rows[2] == {"item": 3, "id": "i2", "title": None, "categories": [], "brand": None}
    assert load_json(folder / "stats.json")["items_with_title"] == 2


def test_recbole_items(preprocess):
    items = ("item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token\n"
             "i0\tThe \"Best\" pen\t'Office', 'Pens'\tPenfold\n" "i1\t\"Unclosed\t\t\n")
    folder = preprocess(recbole(dense()), name="x.inter", items=items, items_name="x.item")
    rows = load_lines(folder / "items.jsonl")
    assert rows[0] == {"item": 1, "id": "i0", "title": 'The "Best" pen', "categories": ["Office", "Pens"],
                       "brand": "Penfold"}
    assert rows[1] == {"item": 2, "id": "i1", "title": '"Unclosed', "categories": [], "brand": None}


def test_titles_beside_the_interactions(preprocess):
    events = [(u, i, t, f"Title, of {i}", "A > B|C") for u, i, t in dense()]
    text = csv_text(events, ("user_id", "item_id", "timestamp", "name", "categories"))
    folder = preprocess(text, "--title-column", "name")
    rows = load_lines(folder / "items.jsonl")
    assert [row["title"] for row in rows] == [f"Title, of i{i}" for i in range(6)]
    assert rows[0]["categories"] == ["A > B", "C"]


def test_csv_interactions_with_json_items(preprocess):
    """Flags name the CSV's columns, not the metadata's fields."""
    events = csv_text(dense(), ("user_id", "movie", "timestamp"))
    folder = preprocess(events, "--item-column", "movie", items=json.dumps(META["2023"][0]), items_name="m.jsonl")
    assert load_lines(folder / "items.jsonl")[0]["title"] == 'Tea & Cup, 5"'


# ---- properties of the parsers

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1).filter(str.strip)
ROWS = st.lists(st.tuples(TEXT, TEXT, st.integers(-2**53, 2**53)), min_size=1, max_size=20)


def parse(path, form, scale=1):
    report = Report(path)
    users, items, times, user_index, item_index = read_events(path, form, FORMATS[form], scale, report)
    user_ids, item_ids = list(user_index), list(item_index)
    return [(user_ids[u], item_ids[i], t) for u, i, t in zip(users, items, times)], report


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(rows=ROWS)
@pytest.mark.parametrize("as_text", [json.dumps, lambda row: json.dumps(row, ensure_ascii=False), repr],
                         ids=["json", "utf-8", "literal"])
def test_amazon_round_trip(tmp_path, rows, as_text):
    path = tmp_path / "x.json"
    path.write_text(amazon(rows, as_text), encoding="utf-8", newline="\n")
    assert parse(path, "amazon")[0] == rows


@PROPERTY
@given(rows=ROWS)
@pytest.mark.parametrize("form, delimiter", [("csv", ","), ("tsv", "\t")])
def test_delimited_round_trip(tmp_path, rows, form, delimiter):
    path = tmp_path / f"x.{form}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("user_id", "item_id", "timestamp"), *rows])
    assert parse(path, form)[0] == rows


@PROPERTY
@given(rows=ROWS)
def test_recbole_round_trip(tmp_path, rows):
    path = tmp_path / "x.inter"
    path.write_text(recbole([(user, item, time) for user, item, time in rows]).replace(".0\n", "\n"), encoding="utf-8",
                    newline="\n")
    assert parse(path, "recbole")[0] == rows


FRAGMENTS = st.sampled_from([
    b"user_id,item_id,timestamp\n", b"user_id\titem_id\ttimestamp\n", b'{"reviewerID": "a", ', b'"asin": ', b'"b"',
    b'"unixReviewTime": ', b"'", b'"', b",", b"\t", b"\n", b"\r", b"\x00", b"}", b"{", b"[", b"1", b"nan", b"1e999", b"-", b"\\",
    b"\xff\xfe", b"\x1f\x8b", b"\xed\xa0\x80", b"\\ud800", "é".encode(), b"9" * 30])


@PROPERTY
@given(content=st.one_of(st.binary(max_size=200), st.lists(FRAGMENTS, max_size=40).map(b"".join),
                         st.binary(max_size=100).map(gzip.compress)))
@example(content=b"user_id,item_id,timestamp\n\n\n")
@example(content=b'{"asin": [], "reviewerID": {}, "unixReviewTime": null}')
@example(content=b"[" * 100_000)
@example(content=b"{" * 100_000)
@example(content=b"{'asin': " + b"-" * 100_000 + b"1}")
@example(content=b'{"asin": 1' + b"0" * 5000 + b"}")
@pytest.mark.parametrize("form", ["auto", *FORMATS])
def test_any_bytes(tmp_path, content, form):
    """Whatever a file holds, it is read or refused with a UserError, as interactions and as items."""
    path = tmp_path / "x"
    path.write_bytes(content)
    for read in (lambda f: read_events(path, f, FORMATS[f], 1000, Report(path)),
                 lambda f: list(read_items(path, f, FORMATS[f], {"a", "b"}, Report(path)))):
        try:
            read(detect(path) if form == "auto" else form)
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("value, expected", [
    (7, 7000), ("7", 7000), (7.0, 7000), ("7.25", 7250), (-1.5, -1500), ("1970-01-02", 86_400_000),
    ("1970-01-01T01:00:00+01:00", 0), ("1970-01-01T00:00:01Z", 1000), (" 7 ", 7000), ("1.4e9", 1_400_000_000_000)])
def test_times(value, expected, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")  # the machine's zone does not matter
    time.tzset()
    try:
        assert milliseconds(value, 1000) == expected
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("value", [None, "", "yesterday", float("nan"), float("inf"), "nan", "-inf", 10**30, "9" * 400, [1],
                                   {}, 1e300])
def test_no_times(value):
    with pytest.raises(ValueError, match="the time"):
        milliseconds(value, 1000)


@pytest.mark.parametrize("value, expected", [
    ("A|B, C|D", ["A", "B, C", "D"]), ("A > B, C", ["A", "B, C"]), ("Food, Coffee", ["Food", "Coffee"]), ("One", ["One"]),
    ("", []), (None, []), (7, []), ([], []), ([[]], []), (["A", "", None, 3], ["A"]), ([["A"], ["B", "C"]], ["B", "C"]),
    ("['A', 'B']", ["A", "B"])])
def test_category_names(value, expected):
    assert category_names(value) == expected


def test_clean():
    assert clean("a\u2028b\x00c&lt;&amp;lt;&nbsp;\t d") == "a b c<&lt; d"
    assert clean(" \n") is clean(None) is clean(3) is clean("&nbsp;") is None


# ---- broken lines and broken files


def test_broken_lines_are_counted_and_named(preprocess):
    good = amazon(dense(users=60)).splitlines()
    bad = {50: '{"reviewerID": "u1", "asin":', 120: '{"reviewerID": "u\\n1", "asin": "i1", "unixReviewTime": 1}',
           200: '{"reviewerID": "u1", "unixReviewTime": 1}'}
    lines = good.copy()
    for number, line in bad.items():
        lines.insert(number - 1, line)
    folder = preprocess("\n".join(lines), name="r.json")
    stats = load_json(folder / "stats.json")
    assert (stats["broken_lines"], stats["interactions"]) == (3, 360)
    assert stats["files"][0]["lines"] == 363
    assert [e["line"] for e in stats["files"][0]["examples"]] == list(bad)
    reasons = [e["reason"] for e in stats["files"][0]["examples"]]
    assert "neither JSON" in reasons[0] and "control character in the user id" in reasons[1]
    assert "'asin'" in reasons[2] and "reviewerID, unixReviewTime" in reasons[2]
    assert "3 of 363 lines are broken" in (folder / "stage.log").read_text()


@pytest.mark.parametrize("bad", ["u\n1", "u\r1", "u\x00", "u\x85", "u\u2028", "\ud800", "", "  "])
@pytest.mark.parametrize("column", ["reviewerID", "asin"])
def test_ids_never_break_lines(preprocess, bad, column):
    """users.txt keeps one line per user whatever stands in an id."""
    row = {"reviewerID": "u1", "asin": "i1", "unixReviewTime": 1, column: bad}
    folder = preprocess(amazon(dense(users=60)) + json.dumps(row) + "\n", name="r.json")
    assert load_user_ids(folder) == [f"u{u}" for u in range(60)]
    assert load_json(folder / "stats.json")["broken_lines"] == 1


def test_quote_that_is_not_closed_counts_all_it_swallows(preprocess):
    lines = csv_text(dense(users=200)).splitlines()
    lines[100] = 'u1,"i1,5'
    lines[105] = 'u1,i1",5'
    folder = preprocess("\n".join(lines) + "\n")
    stats = load_json(folder / "stats.json")
    assert stats["broken_lines"] == 6 and stats["events_read"] == 1200 - 6
    assert stats["files"][0]["lines"] == 1200
    assert stats["files"][0]["examples"][0]["line"] == 101


def test_quote_that_would_join_two_rows(preprocess):
    """A lenient CSV reader makes one good row of these two lines and loses the second without a word."""
    lines = csv_text([(*event, "Title") for event in dense(users=60)], ("user_id", "item_id", "timestamp", "title")).splitlines()
    lines[100] = 'u1,i1,5,"Title'
    lines[101] = 'u1,i2,6,"Title'
    stats = load_json(preprocess("\n".join(lines)) / "stats.json")
    assert (stats["broken_lines"], stats["events_read"]) == (2, 358)


def test_id_of_a_broken_line_is_no_user(preprocess):
    """A user or item that only a broken line names gets no number."""
    folder = preprocess(csv_text(dense(users=40)) + "ghost,,5\n,phantom,5\n", "--min-interactions", 1)
    assert "ghost" not in load_user_ids(folder)
    assert "phantom" not in [row["id"] for row in load_lines(folder / "items.jsonl")]


def test_blanks_after_the_commas_of_a_csv_are_named(preprocess):
    text = (preprocess(csv_text(dense()).replace(",", ", ")) / "stage.log").read_text()
    assert "6 item ids begin or end with a blank, such as ' i0'" in text and "user ids" not in text


@pytest.mark.parametrize("arguments, time, warning", [
    ((), "20230113", "write them as 2023-01-13"), ((), "1700000000123", "read as s, see --time-unit"), ((), "1700000000", None),
    (("--time-unit", "ms"), "1700000000123", None), ((), "5", None)])
def test_times_that_cannot_be_meant_are_named(preprocess, arguments, time, warning):
    text = (preprocess(csv_text([(u, i, time) for u, i, _ in dense()]), *arguments) / "stage.log").read_text()
    assert warning in text if warning else "WARNING" not in text


def test_metadata_of_other_items_is_named(preprocess):
    header = ("item_id", "title")
    text = (preprocess(csv_text(dense()), items=csv_text([("I1", "A title")], header)) / "stage.log").read_text()
    assert "no line is about any of the 6 items that are kept, such as 'i0'" in text
    assert "no line" not in (preprocess(csv_text(dense()), items=csv_text([("i1", "A title")], header), dataset="e") / "stage.log").read_text()


GOOD = csv_text(dense())
REFUSED = [
    ("empty", b"", "x.csv", [], "the file is empty"),
    ("blank", b"\n \n", "x.csv", [], "the file is empty"),
    ("header only", "user_id,item_id,timestamp\n", "x.csv", [], "no lines of data"),
    ("no column", GOOD.replace("item_id", "product"), "x.csv", [],
     "no column item_id; columns found: user_id, product, timestamp"),
    ("wrong flag", GOOD, "x.csv", ["--time-column", "when"], "no column when; columns found: user_id, item_id, timestamp"),
    ("no title", GOOD, "x.csv", ["--title-column", "title"], "no column title"),
    ("recbole column", "uid:token\titem_id:token\ttimestamp:float\na\tb\t1\n", "x.inter", [],
     "no column user_id; columns found: uid, item_id"),
    ("json fields", '{"who": 1, "what": 2}\n', "x.json", [], "fields who, what; expected reviewerID, asin, unixReviewTime"),
    ("json array", '[\n{"asin": 1}]', "x.json", [], "a JSON array"),
    ("two per cent", amazon(dense(users=10)) + '{"asin"\n{"a": 1}\n', "x.json", [],
     "2 of 62 lines are broken.*line 61.*line 62"),
    ("wrong format", amazon(dense()), "x.json", ["--format", "recbole"], "no column user_id, item_id, timestamp"),
    ("latin-1", csv_text([(f"é{u}", i, t) for u, i, t in dense()]).encode("latin-1"), "x.csv", [], "not UTF-8"),
    ("utf-16", GOOD.encode("utf-16"), "x.csv", [], "UTF-16 text"),
    ("zip", b"PK\x03\x04" + bytes(60), "x.csv", [], "a zip file; expected UTF-8 text, plain or gzipped"),
    ("parquet", b"PAR1" + b"x" * 60, "x.csv", [], "a parquet file"),
    ("binary", b"user_id,item_id\0,timestamp\n", "x.csv", [], "a binary file"),
    ("carriage returns", GOOD.replace("\n", "\r"), "x.csv", [], "lines end with a carriage return alone"),
    ("control characters", "a\x1b[2J,b\n1,2\n", "x.csv", [], r"columns found: 'a\\x1b\[2J', b"),
    ("many columns", ",".join(f"c{n}" for n in range(500)) + "\n", "x.csv", [], r"c19, \.\.\.\. Name yours"),
    ("long ids", csv_text([(u, f"{i}" * 600, t) for u, i, t in dense()]), "x.csv", [], "has 1,200 characters, at most 1,024"),
    ("cut gzip", gzip.compress(amazon(dense(200)).encode())[:-200], "x.json.gz", [], "incomplete gzip"),
    ("damaged gzip", gzip.compress(amazon(dense()).encode())[:-8] + bytes(8), "x.json.gz", [], "damaged or incomplete gzip"),
    ("html", "<html>\n<body>404 Not Found</body>\n</html>\n", "x.json.gz", [], "no column user_id"),
    ("nothing left", csv_text(dense(users=3)), "x.csv", [], "nothing is left of 18 interactions by 3 users with 6 items"),
    ("few users", csv_text(dense(users=9)), "x.csv", [], "9 users are left"),
    ("minimum", GOOD, "x.csv", ["--min-interactions", "0"], "--min-interactions is 0"),
    ("download", GOOD, "x.csv", ["--download"], "does not go with --interactions"),
]


@pytest.mark.parametrize("content, name, arguments, message", [case[1:] for case in REFUSED],
                         ids=[case[0] for case in REFUSED])
def test_refused(preprocess, tmp_path, content, name, arguments, message):
    with pytest.raises(UserError, match=message):
        preprocess(content, *arguments, name=name)
    assert not (tmp_path / "d" / "01_preprocess" / "manifest.json").exists()


def test_missing_files(stage, tmp_path):
    def call(*arguments):
        with pytest.raises(UserError) as error:
            stage.main(["--data-dir", str(tmp_path), *arguments])
        return str(error.value)
    message = call("--dataset", "Beauty")
    assert "reviews_Beauty_5.json.gz" in message and "Beauty.inter" in message and "--download" in message
    assert "python data/make_sample.py" in call()
    assert "gone.csv: no such file" in call("--interactions", "gone.csv")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "reviews_Tiny_5.json").write_text(amazon(dense()))
    assert "looked for meta_Tiny.json.gz" in call("--dataset", "Tiny")
    assert "gone.json: no such file" in call("--dataset", "Tiny", "--items", "gone.json")


def test_no_traceback(run_script, tmp_path):
    done = run_script("stages/01_preprocess.py", "--data-dir", tmp_path, "--dataset", "x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no interactions in") and "Traceback" not in done.stderr
    done = run_script("stages/01_preprocess.py", "--help")
    assert done.returncode == 0 and "paper: 5" in done.stdout and "None" not in done.stdout
    done = run_script("stages/01_preprocess.py", "--no-such-option")
    assert done.returncode == 2 and "usage:" in done.stderr
    done = run_script("stages/01_preprocess.py", "--data-dir", tmp_path, "--dataset", "x", "--interactions", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_skip_done(preprocess, capsys):
    text = csv_text(dense())
    folder = preprocess(text)
    before = (folder / "manifest.json").stat().st_mtime_ns
    preprocess(text, "--skip-done")
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert "skipped" in capsys.readouterr().out
    preprocess(text, "--skip-done", "--seed", 1)
    assert "--seed was 0 and is 1" in capsys.readouterr().out
    preprocess(text + "u0,i0,7777\n", "--skip-done", "--seed", 1)
    assert "input interactions/log.csv changed" in capsys.readouterr().out
    assert load_json(folder / "manifest.json")["summary"]["interactions"] == 73


def test_inputs_of_one_name_are_told_apart(stage, tmp_path, capsys):
    """Interactions and items may lie in two folders under one file name; a change of either is seen."""
    for folder, text in (("a", csv_text(dense())), ("b", "item_id,title\ni0,One\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text(text)
    arguments = ["--data-dir", str(tmp_path), "--interactions", str(tmp_path / "a" / "x.csv"),
                 "--items", str(tmp_path / "b" / "x.csv"), "--skip-done"]
    stage.main(arguments)
    (tmp_path / "a" / "x.csv").write_text(csv_text(dense(users=13)))
    stage.main(arguments)
    assert "input interactions/x.csv changed" in capsys.readouterr().out


def test_killed_at_any_moment(root, sample_raw, tmp_path, run_script):
    """kill -9 at several moments, then an undisturbed run: the same files as if nothing had happened."""
    def files(folder):
        return {name: (folder / name).read_bytes() for name in ALL_PARTS}
    arguments = ["--data-dir", tmp_path, "--raw-dir", sample_raw, "--source", "sample", "--dataset"]
    assert run_script("stages/01_preprocess.py", *arguments, "whole").returncode == 0
    wall = load_json(tmp_path / "whole" / "01_preprocess" / "manifest.json")["wall_seconds"]
    killed = tmp_path / "killed" / "01_preprocess"
    interrupted = 0
    for moment in (0.05, 0.3, 0.6, 0.9):
        process = subprocess.Popen([sys.executable, root / "stages" / "01_preprocess.py", *map(str, arguments), "killed"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (killed / "stage.log").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment * wall)
        process.kill()
        interrupted += process.wait() != 0
    assert interrupted
    assert run_script("stages/01_preprocess.py", *arguments, "killed").returncode == 0
    assert files(killed) == files(tmp_path / "whole" / "01_preprocess")
    assert sorted(path.name for path in killed.iterdir()) == sorted((*ALL_PARTS, "manifest.json", "stage.log", ".lock"))


def test_source_and_dataset_are_apart(stage, tmp_path):
    """One raw file, two data sets of different splits."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "Tiny.csv").write_text(csv_text(dense()))
    stage.main(["--data-dir", str(tmp_path), "--dataset", "Tiny-loo", "--source", "Tiny", "--split", "leave-one-out"])
    stats = load_json(tmp_path / "Tiny-loo" / "01_preprocess" / "stats.json")
    assert (stats["users"], stats["split"]) == (12, "leave-one-out")


def test_lines_are_data_not_code(preprocess, tmp_path):
    """A line that is a Python expression with an effect is a broken line; the effect does not happen."""
    line = f"{{'asin': __import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()}}\n"
    folder = preprocess(amazon(dense(users=40)) + line, name="r.json", items_name="m.json",
                        items=line + "".join(json.dumps({"asin": f"i{i}"}) + "\n" for i in range(200)))
    assert load_json(folder / "stats.json")["broken_lines"] == 2
    assert not (tmp_path / "made").exists()


# ---- real data

PUBLISHED = {"Beauty": (22_363, 12_101, 198_502, 12_094), "Grocery_and_Gourmet_Food": (14_681, 8_713, 151_254, 0),
             "Office_Products": (4_905, 2_420, 53_258, 2_417)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(shared, run_script, tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script("stages/01_preprocess.py", "--dataset", name, "--data-dir", tmp_path,
                      "--raw-dir", shared / "data" / "raw", "--split", "file-order")
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU seconds: other processes do not change them
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    folder = tmp_path / name / "01_preprocess"
    stats = load_json(folder / "stats.json")
    assert tuple(stats[key] for key in ("users", "items", "interactions", "items_with_title")) == PUBLISHED[name]
    assert stats["broken_lines"] == stats["duplicates_dropped"] == stats["filtered_out"] == 0
    assert f"{stats['interactions']:,}" in done.stdout
    rows = [json.loads(line) for line in gzip.open(shared / "data" / "raw" / f"reviews_{name}_5.json.gz", "rt")]
    expected, numbered = slow_filter([(r["reviewerID"], r["asin"], r["unixReviewTime"]) for r in rows], 5, False)
    sequences, items = read_back(folder)
    assert sequences == expected and list(sequences) == list(expected) and items == numbered


@pytest.mark.slow
def test_memory_at_scale(run_script, tmp_path):
    """Peak memory above that of a tiny run stays below three times the parsed columns (16 bytes an event)."""
    rng = np.random.default_rng(0)
    peak = {}
    for n in (10_000, 2_000_000):
        path = tmp_path / f"{n}.csv"
        columns = rng.integers(0, n // 20, n), rng.integers(0, n // 100, n), rng.integers(1_400_000_000, 1_600_000_000, n)
        with open(path, "w") as file:
            file.write("user_id,item_id,timestamp\n")
            for start in range(0, n, 100_000):
                rows = zip(*(column[start:start + 100_000].tolist() for column in columns))
                file.writelines(f"A{u:012d},B{i:09d},{t}\n" for u, i, t in rows)
        done = run_script("stages/01_preprocess.py", "--interactions", path, "--data-dir", tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        peak[n] = load_json(tmp_path / "sample" / "01_preprocess" / "manifest.json")["peak_memory_mib"] * 2**20
        path.unlink()
    assert peak[2_000_000] - peak[10_000] < 3 * 16 * 2_000_000
