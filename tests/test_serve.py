"""Stage 08: ranking against a brute-force oracle, reasons, fallbacks, the command line, and the HTTP interface."""
import json
import shutil

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from serving import MAX_LEN, N_ITEMS, RUN, item_id, load_recommender, load_stage, make_data, run_stage, title

from eimf.artifacts import UserError, load_json, save_json
from eimf.recommender import Query
from eimf.service import LIMITS, application


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def recommender(data):
    return load_recommender(data)


@pytest.fixture(scope="module")
def client(recommender):
    with TestClient(application(recommender), raise_server_exceptions=False) as client:
        yield client


def ids(*numbers):
    return tuple(item_id(n) for n in numbers)


def oracle(data, history, k, exclude):
    """Item numbers, scores and winning interests by plain NumPy over the export's own interests."""
    trained = data / "tiny" / "06_train" / RUN
    vectors = np.load(trained / "item_vectors.npy").astype(np.float64)
    row = list(history)[-MAX_LEN:]
    row = torch.tensor([row + [0] * (MAX_LEN - len(row))])
    interests = torch.export.load(trained / "model.pt2").module()(row)[0][0].detach().numpy().astype(np.float64)
    scores = interests @ vectors.T  # (K, N + 1)
    order = [n for n in np.argsort(-scores.max(0), kind="stable").tolist() if n and n not in exclude][:k]
    return order, scores.max(0)[order], scores.argmax(0)[order]


@pytest.mark.parametrize("retrieval", ["exact", "hnsw"])
@pytest.mark.parametrize("history, k, exclude_seen, extra", [
    ([5, 40, 7], 10, True, []), ([5, 40, 7], 10, False, []), ([1], 3, True, [2, 3, 4]), (list(range(1, 31)), 20, True, []),
    ([8, 8, 8, 30], N_ITEMS, True, []), (list(range(1, N_ITEMS - 3)), 20, True, [N_ITEMS]), ([4], N_ITEMS + 50, False, [])])
def test_ranking_equals_brute_force(data, retrieval, history, k, exclude_seen, extra):
    answer = load_recommender(data, retrieval).recommend([Query(ids(*history), k, exclude_seen, ids(*extra))])[0]
    items, scores, winner = oracle(data, history, k, set(extra) | (set(history) if exclude_seen else set()))
    assert answer.items.tolist() == items  # never fewer than k while candidates remain
    np.testing.assert_allclose(answer.scores, scores, rtol=1e-5)
    assert answer.winner.tolist() == winner.tolist()
    assert answer.fallback is None


def test_newest_events_count_and_repeats_are_kept(data, recommender):
    long, newest, other = [11, 12, 13, 20, 20, 20, 21, 22, 23], [20, 20, 20, 21, 22, 23], [20, 21, 22, 23]
    answers = recommender.recommend([Query(ids(*h), 5, exclude_seen=False) for h in (long, newest, other)])
    assert answers[0].items.tolist() == answers[1].items.tolist() == oracle(data, long, 5, set())[0]
    assert np.array_equal(answers[0].interests, answers[1].interests)
    assert not np.allclose(answers[1].interests, answers[2].interests)  # repeats are part of the history
    seen = recommender.recommend([Query(ids(*long), N_ITEMS)])[0]
    assert not set(long) & set(seen.items.tolist())  # events older than max_len were seen all the same


def test_batch_equals_single(recommender):
    rng = np.random.default_rng(1)
    queries = [Query(ids(*rng.integers(1, N_ITEMS + 1, n)), int(k), bool(s)) for n, k, s in
               zip(rng.integers(0, 12, 40), rng.integers(1, 30, 40), rng.integers(0, 2, 40))]
    for together, query in zip(recommender.recommend(queries), queries):
        alone = recommender.recommend([query])[0]
        assert together.items.tolist() == alone.items.tolist()
        assert len(alone.items) == query.k
        np.testing.assert_allclose(together.scores, alone.scores, rtol=1e-5)


def test_unknown_and_empty_histories_get_popular_items(data, recommender):
    source = data / "tiny" / "01_preprocess"
    events, split = np.load(source / "sequence_items.npy").reshape(-1, 12), np.load(source / "split.npy")
    counts = np.bincount(events[split == 0].ravel(), minlength=N_ITEMS + 1)
    expected = sorted(range(1, N_ITEMS + 1), key=lambda n: (-counts[n], n))
    empty, unknown, mixed = recommender.recommend([Query((), 7), Query(("x", "y", "x"), 7, exclude_items=ids(expected[0], expected[2])),
                                                   Query(("x", item_id(9)), 7, exclude_items=("z", "x"))])
    assert empty.items.tolist() == expected[:7]
    assert empty.scores.tolist() == counts[expected[:7]].tolist()
    assert unknown.items.tolist() == [n for n in expected if n not in (expected[0], expected[2])][:7]
    assert (empty.fallback, unknown.fallback, mixed.fallback) == ("popular", "popular", None)
    assert (empty.unknown, unknown.unknown, mixed.unknown) == ([], ["x", "y"], ["x", "z"])
    described = recommender.describe(empty)
    assert described["interests"] == [] and all(item["interest"] is None for item in described["items"])


def test_reasons_are_the_closest_history_items(data, recommender):
    history = [3, 50, 70, 50, 14]
    answer = recommender.recommend([Query(ids(*history), 30)])[0]
    vectors = np.load(data / "tiny" / "06_train" / RUN / "item_vectors.npy")
    for interest in recommender.describe(answer)["interests"]:
        vector = answer.interests[interest["interest"]]
        cosine = {n: vectors[n] @ vector / np.linalg.norm(vectors[n]) / np.linalg.norm(vector) for n in history}
        assert [i["id"] for i in interest["because_of"]] == list(ids(*sorted(cosine, key=lambda n: -cosine[n])[:3]))


def test_titles_are_text(recommender):
    assert recommender.item(1) == {"id": "B0001", "title": "Pens & Paper"}  # the raw file holds an HTML entity
    assert recommender.item(2) == {"id": "B0002", "title": None}


# ---- folders that do not fit ----

@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


def replace(copy, folder, name, content):
    """Put other content into a finished stage's file, with a manifest that agrees."""
    path = copy / "tiny" / folder / name
    path.write_bytes(content)
    manifest = load_json(path.parent / "manifest.json")
    manifest["outputs"][name]["bytes"] = len(content)
    save_json(path.parent / "manifest.json", manifest)


def test_a_stage_that_is_not_finished_is_named(copy):
    (copy / "tiny" / "06_train" / RUN / "manifest.json").unlink()
    done = run_stage("08_serve.py", copy, "--run", RUN, "--history", "", check=False)
    assert done.returncode == 1 and "06_train.py" in done.stderr and "Traceback" not in done.stderr
    done = run_stage("08_serve.py", copy, "--history", "", check=False)
    assert done.returncode == 1 and "no finished run" in done.stderr and "Traceback" not in done.stderr


def test_an_export_of_other_items_is_refused(copy):
    path = copy / "tiny" / "06_train" / RUN / "item_ids.txt"
    replace(copy, f"06_train/{RUN}", "item_ids.txt", path.read_bytes().replace(b"B0010", b"B9910"))
    with pytest.raises(UserError, match="other items"):
        load_recommender(copy)


def test_an_index_that_does_not_fit_is_refused(copy):
    path = copy / "tiny" / "07_evaluate" / RUN / "index.json"
    facts = load_json(path)
    for key, wrong in (("dim", 17), ("items", 91), ("space", "l2"), ("sha256", "0" * 64)):
        replace(copy, f"07_evaluate/{RUN}", "index.json", json.dumps(facts | {key: wrong}).encode())
        with pytest.raises(UserError, match=f"{key} is .*07_evaluate.py"):
            load_recommender(copy, "hnsw")
    assert load_recommender(copy).index is None  # exact search does not need it


def test_hnsw_falls_back_to_exact_search(data, monkeypatch):
    recommender = load_recommender(data, "hnsw")
    expected = load_recommender(data).recommend([Query(ids(5, 6), 20)])[0].items.tolist()

    class Broken:
        def __init__(self, labels):
            self.labels = labels

        def set_ef(self, ef):
            pass

        def knn_query(self, data, k, num_threads):
            if self.labels is None:
                raise RuntimeError("Cannot return the results in a contiguous 2D array")
            return np.full((len(data), k), self.labels), None

    for labels in (None, 5):  # a graph that reaches too few items; one that reaches a single item, which is excluded
        monkeypatch.setattr(recommender, "index", Broken(labels))
        assert recommender.recommend([Query(ids(5, 6), 20)])[0].items.tolist() == expected


# ---- command line ----

def test_one_shot_json_and_table(data):
    done = run_stage("08_serve.py", data, "--history", f"{item_id(5)}, nope,{item_id(40)}", "--k", 4, "--json")
    answer = json.loads(done.stdout)
    items, scores, winner = oracle(data, [5, 40], 4, {5, 40})
    assert [(i["rank"], i["id"], i["interest"]) for i in answer["items"]] == list(zip(range(1, 5), ids(*items), winner.tolist()))
    np.testing.assert_allclose([i["score"] for i in answer["items"]], scores, rtol=1e-5)
    assert answer["unknown_items"] == ["nope"] and answer["run"] == RUN
    assert f"run {RUN}" in done.stderr
    lines = run_stage("08_serve.py", data, "--history", f"{item_id(5)},nope,{item_id(40)}", "--k", 4).stdout.splitlines()
    assert "unknown items, ignored: nope" in lines
    start = next(n for n, line in enumerate(lines) if line.split()[:2] == ["rank", "score"]) + 1
    assert [line.split()[3] for line in lines[start:start + 4]] == list(ids(*items))


def test_one_shot_user_and_example(data):
    user = json.loads(run_stage("08_serve.py", data, "--user", "U3", "--keep-seen", "--json").stdout)
    events = np.load(data / "tiny" / "01_preprocess" / "sequence_items.npy")[36:48].tolist()
    assert [i["id"] for i in user["history"]] == list(ids(*events))
    assert [i["id"] for i in user["items"]] == list(ids(*oracle(data, events, 20, set())[0]))
    example = json.loads(run_stage("08_serve.py", data, "--example", "--json").stdout)
    events = np.load(data / "tiny" / "01_preprocess" / "sequence_items.npy").reshape(-1, 12)[int(example["user"][1:])].tolist()
    assert int(example["user"][1:]) >= 35  # a test user
    assert [i["id"] for i in example["history"]] == list(ids(*events[:9])) and example["held_out"] == list(ids(*events[9:]))
    assert run_stage("08_serve.py", data, "--example").stdout.count("\n") > 20
    missing = run_stage("08_serve.py", data, "--user", "nobody", check=False)
    assert missing.returncode == 1 and "nobody" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.parametrize("arguments", [[], ["--history", "x", "--user", "y"], ["--history", "x", "--k", "0"], ["--serve", "--port", "-1"]])
def test_wrong_usage_exits_2(data, arguments):
    done = run_stage("08_serve.py", data, *arguments, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage:")


def test_the_newest_taught_run_is_served(tmp_path, capsys):
    script = load_stage("08_serve.py")
    args = script.parse(["--data-dir", str(tmp_path), "--dataset", "tiny", "--history", "x"])
    for name, eimf, control, day in [("a", True, None, 1), ("b", True, None, 2), ("c", False, None, 4), ("d", True, "random-text", 5)]:
        folder = tmp_path / "tiny" / "06_train" / name
        folder.mkdir(parents=True)
        save_json(folder / "config.json", {"eimf": eimf, "control": control})
        save_json(folder / "manifest.json", {"finished": f"2026-01-0{day}T00:00:00+0000"})
    (tmp_path / "tiny" / "06_train" / "unfinished").mkdir()
    assert script.choose_run(args) == "b" and "b, the newest" in capsys.readouterr().err
    for name in "ab":
        shutil.rmtree(tmp_path / "tiny" / "06_train" / name)
    assert script.choose_run(args) == "d"


# ---- HTTP ----

def test_recommend_over_http(data, client):
    reply = client.post("/recommend", json={"history": ids(5, 40) + ("nope",), "k": 6})
    assert reply.status_code == 200
    items, scores, winner = oracle(data, [5, 40], 6, {5, 40})
    answer = reply.json()
    assert [(i["id"], i["interest"]) for i in answer["items"]] == list(zip(ids(*items), winner.tolist()))
    assert answer["unknown_items"] == ["nope"] and answer["fallback"] is None
    user = client.post("/recommend", json={"user_id": "U3", "exclude_seen": False}).json()
    events = np.load(data / "tiny" / "01_preprocess" / "sequence_items.npy")[36:48].tolist()
    assert [i["id"] for i in user["items"]] == list(ids(*oracle(data, events, 20, set())[0]))
    assert client.post("/recommend", json={"history": []}).json()["fallback"] == "popular"
    assert client.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("body, status, code", [
    (b"", 422, "invalid_request"), (b"{", 422, "invalid_request"), (b"[]", 422, "invalid_request"),
    (b"\xff\xfe", 422, "invalid_request"), (b"[" * 100_000, 422, "invalid_request"), (b"{}", 422, "invalid_request"),
    (b'{"history": ["\\ud800"]}', 422, "invalid_request"), (b'{"history": [1]}', 422, "invalid_request"),
    (b'{"history": [], "user_id": "U1"}', 422, "invalid_request"), (b'{"history": [], "k": 0}', 422, "invalid_request"),
    (b'{"history": [], "k": 1e400}', 422, "invalid_request"), (b'{"history": [], "k": NaN}', 422, "invalid_request"),
    (b'{"history": [], "k": %s}' % (b"9" * 5000), 422, "invalid_request"), (b'{"history": [], "k": "3"}', 422, "invalid_request"),
    (b'{"history": [], "k": %d}' % (LIMITS["k"] + 1), 422, "invalid_request"), (b'{"history": [], "nope": 1}', 422, "invalid_request"),
    (b'{"history": ["%s"]}' % (b"a" * 257), 422, "invalid_request"),
    (b'{"history": [%s]}' % b",".join([b'"a"'] * (LIMITS["history"] + 1)), 422, "invalid_request"),
    (b'{"user_id": "nobody"}', 404, "unknown_user"), (b" " * (LIMITS["body_bytes"] + 1), 413, "too_large")])
def test_bad_requests_get_flat_errors(client, body, status, code):
    reply = client.post("/recommend", content=body, headers={"content-type": "application/json", "x-request-id": "abc-1"})
    assert reply.status_code == status
    error = reply.json()
    assert set(error) == {"detail", "code", "request_id"} and error["code"] == code
    assert error["request_id"] == reply.headers["x-request-id"] == "abc-1"
    assert isinstance(error["detail"], str) and len(error["detail"]) < 1000


def test_unknown_paths_and_methods_get_flat_errors(client):
    for reply, status in ((client.get("/nope"), 404), (client.get("/recommend"), 405), (client.get("/../../etc/passwd"), 404)):
        assert reply.status_code == status and set(reply.json()) == {"detail", "code", "request_id"}


def test_titles_reach_the_client_unchanged(client):
    reply = client.post("/recommend", json={"history": [], "k": N_ITEMS})
    found = {item["id"]: item["title"] for item in reply.json()["items"]}
    assert found == {item_id(n): "Pens & Paper" if n == 1 else title(n) for n in range(1, N_ITEMS + 1)}
