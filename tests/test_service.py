"""Stage 08 over HTTP: answers, errors, limits, token, health, metrics, hot reload, load, hostile clients, shutdown."""
import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving import (JSON, N_ITEMS, RUN, STAGES, TITLES, add_reasons, ask, ids, item_id, load_recommender, make_data, oracle, rewrite_manifest,
                     run_stage, running, title)

from eimf import server, service
from eimf.artifacts import load_json
from eimf.recommender import Query


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory)


def settings(data, **changes):
    return {"data_dir": str(data), "dataset": "tiny", "run": None, "retrieval": "exact", "threads": 1, "reload_seconds": 60} | changes


@pytest.fixture(scope="module")
def app(data):
    return service.create(settings(data))


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


# ---- answers ----

def test_recommend(data, client):
    reply = client.post("/recommend", json={"history": ids(5, 40) + ("nope",), "k": 6})
    assert reply.status_code == 200 and reply.headers["x-content-type-options"] == "nosniff"
    items, scores, winner = oracle(data, [5, 40], 6, {5, 40})
    answer = reply.json()
    assert [(i["id"], i["interest"]) for i in answer["items"]] == list(zip(ids(*items), winner.tolist()))
    np.testing.assert_allclose([i["score"] for i in answer["items"]], scores, rtol=1e-4)
    assert answer["unknown_items"] == ["nope"] and answer["fallback"] is None and answer["label_source"] == "offline"
    for item in answer["items"]:
        assert item["because_of"] == [i["id"] for i in answer["interests"][item["interest"]]["because_of"]]
        assert set(item["because_of"]) == set(ids(5, 40))
    own = client.post("/recommend", json={"history": ids(5, 40), "k": 6, "per_interest": 2}).json()
    assert own["items"] == answer["items"] and [[i["rank"] for i in interest["items"]] for interest in own["interests"]] == [[1, 2]] * 3
    assert client.post("/recommend", json={"history": ids(5), "per_interest": 101}).status_code == 422
    user = client.post("/recommend", json={"user_id": "U3", "exclude_seen": False, "explain": False}).json()
    events = np.load(data / "tiny" / "01_preprocess" / "sequence_items.npy")[36:48].tolist()
    assert [i["id"] for i in user["items"]] == list(ids(*oracle(data, events, 20, set())[0])) and "interests" not in user
    assert client.post("/recommend", json={"history": []}).json()["fallback"] == "popular"
    assert len(client.post("/recommend", json={"history": [], "k": 3.0}).json()["items"]) == 3


def test_batch_has_an_answer_or_an_error_for_each_element(client):
    requests = [{"history": ids(5)}, {"history": [1]}, 7, {"user_id": "nobody"}, {"user_id": "U1", "k": 2}, {"history": ids(5), "k": 999}]
    results = client.post("/recommend/batch", json={"requests": requests}).json()["results"]
    assert [r.get("code") for r in results] == [None, "invalid_request", "invalid_request", "unknown_user", None, "invalid_request"]
    assert results[0] == client.post("/recommend", json=requests[0]).json() and len(results[4]["items"]) == 2
    assert all(set(r) == {"detail", "code"} for r in results if "code" in r) and "k" in results[5]["detail"]


def test_search_and_similar(client):
    found = client.get("/items", params={"query": "unicode pen"}).json()["items"]
    assert [i["id"] for i in found] == [item_id(4)] and found[0]["title"] == TITLES[4]
    assert len(client.get("/items").json()["items"]) == 20
    for n in (6, 7, 8, 9):  # ids that hold a slash, an accent, dots and a percent sign
        path = "/items/" + quote(item_id(n), safe="").replace("..", "%2E%2E") + "/similar?k=3"
        reply = client.get(path)
        assert len(reply.json()["items"]) == 3, path
        assert reply.json()["items"][0]["similarity"] >= reply.json()["items"][2]["similarity"]
    assert client.get("/items/nope/similar").json()["code"] == "unknown_item"


def test_map_health_version(data, client):
    points = client.get("/map", params={"limit": 5}).json()["points"]
    popular = client.get("/items", params={"limit": 5}).json()["items"]
    assert points == [i["position"] for i in popular] and len(client.get("/map").json()["points"]) == N_ITEMS
    assert client.get("/health").json() == {"status": "ok", "run": RUN, "refused": False}
    version = client.get("/version").json()
    manifest = load_json(data / "tiny" / "06_train" / RUN / "manifest.json")
    assert version["model_sha256"] == manifest["outputs"]["model.pt2"]["sha256"] and version["items"] == N_ITEMS
    assert version["retrieval"] == "exact" and version["limits"] == service.LIMITS and str(data) not in json.dumps(version)


def test_titles_reach_the_client_unchanged(client):
    reply = client.post("/recommend", json={"history": [], "k": N_ITEMS})
    found = {item["id"]: item["title"] for item in reply.json()["items"]}
    assert found == {item_id(n): "Pens & Paper" if n == 1 else title(n) for n in range(1, N_ITEMS + 1)}
    assert reply.headers["content-type"] == "application/json"


def test_the_page_may_run_only_its_own_script(client):
    reply = client.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", reply.text)  # nothing from the network


# ---- errors and limits ----

@pytest.mark.parametrize("body, status, code", [
    (b"", 422, "invalid_request"), (b"{", 422, "invalid_request"), (b"[]", 422, "invalid_request"),
    (b"\xff\xfe", 422, "invalid_request"), (b"[" * 100_000, 422, "invalid_request"), (b"{}", 422, "invalid_request"),
    (b'{"history": ["\xc3"]}', 422, "invalid_request"), (b'{"a":' * 50_000, 422, "invalid_request"),
    (b'{"history": ["\\ud800"]}', 422, "invalid_request"), (b'{"history": [1]}', 422, "invalid_request"),
    (b'{"history": [], "user_id": "U1"}', 422, "invalid_request"), (b'{"history": null, "user_id": "U1"}', 422, "invalid_request"), (b'{"history": [], "k": 0}', 422, "invalid_request"),
    (b'{"history": [], "k": 1e400}', 422, "invalid_request"), (b'{"history": [], "k": NaN}', 422, "invalid_request"),
    (b'{"history": [], "k": %s}' % (b"9" * 5000), 422, "invalid_request"), (b'{"history": [], "k": "3"}', 422, "invalid_request"),
    (b'{"history": [], "k": true}', 422, "invalid_request"), (b'{"history": [], "k": 2.5}', 422, "invalid_request"), (b'{"history": [], "diversity": NaN}', 422, "invalid_request"),
    (b'{"history": [], "diversity": 1.01}', 422, "invalid_request"), (b'{"history": [], "diversity": -1e-9}', 422, "invalid_request"),
    (b'{"history": [], "k": %d}' % (service.LIMITS["k"] + 1), 422, "invalid_request"), (b'{"history": [], "nope": 1}', 422, "invalid_request"),
    (b'{"history": [""]}', 422, "invalid_request"), (b'{"history": ["%s"]}' % (b"a" * (service.LIMITS["id_characters"] + 1)), 422, "invalid_request"),
    (b'{"history": [%s]}' % b",".join([b'"a"'] * (service.LIMITS["history"] + 1)), 422, "invalid_request"),
    (b'{"history": [], "allow_categories": [%s]}' % b",".join([b'"a"'] * 101), 422, "invalid_request"),
    (b'{"user_id": "nobody"}', 404, "unknown_user"), (b" " * (service.LIMITS["body_bytes"] + 1), 413, "too_large")])
def test_bad_requests_get_flat_errors(client, body, status, code):
    reply = client.post("/recommend", content=body, headers=JSON | {"x-request-id": "abc-1"})
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert set(reply.json()) == {"detail", "code", "request_id"}
    assert reply.json()["request_id"] == reply.headers["x-request-id"] == "abc-1"
    assert 0 < len(reply.json()["detail"]) < 1000


def test_a_body_without_a_length_is_bounded_too(client):
    reply = client.post("/recommend", content=(b" " * 65536 for _ in range(17)), headers=JSON)
    assert reply.status_code == 413


def test_other_paths_methods_and_types_get_flat_errors(client):
    replies = [(client.get("/nope"), 404), (client.get("/recommend"), 405), (client.get("/../../etc/passwd"), 404),
               (client.get("/%2e%2e/%2e%2e/etc/passwd"), 404), (client.get("/items/../../etc/passwd"), 404),
               (client.post("/recommend", content=b"{}"), 415), (client.get("/items", params={"limit": 101}), 422),
               (client.get("/items", params={"query": "x" * 201}), 422), (client.get("/map", params={"limit": "many"}), 422),
               (client.post("/recommend/batch", json={"requests": []}), 422),
               (client.post("/recommend/batch", json={"requests": [{}] * 257}), 422)]
    for reply, status in replies:
        assert reply.status_code == status and set(reply.json()) == {"detail", "code", "request_id"}, reply.text


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "é", "<script>", 'a"b'])
def test_request_ids_of_clients_are_used_only_if_plain(client, given):
    used = client.get("/version", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert used != given and re.fullmatch("[0-9a-f]{32}", used)


def test_bearer_token(data, monkeypatch):
    monkeypatch.setenv("EIMF_TOKEN", "s3cret-ü")
    with TestClient(service.create(settings(data)), raise_server_exceptions=False) as client:
        for value in (None, "Bearer wrong", "s3cret-ü", "Basic s3cret-ü", "Bearer "):
            headers = {} if value is None else {"authorization": value.encode()}
            reply = client.post("/recommend", json={"history": []}, headers=headers)
            assert reply.status_code == 401 and reply.json()["code"] == "unauthorized" and reply.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/openapi.json", headers=headers).status_code == 401
        assert client.get("/version", headers={"authorization": "Bearer s3cret-ü".encode()}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_one_failing_query_does_not_take_its_neighbours_along(data, monkeypatch):
    recommender = load_recommender(data)
    real = recommender.recommend
    monkeypatch.setattr(recommender, "recommend", lambda queries: real(queries) if all(q.k != 13 for q in queries) else 1 / 0)
    results = server.answer_all(recommender, [Query(ids(5), k=3), Query(ids(5), k=13), Query(user="nobody"), Query(k=4)])
    assert [len(json.loads(r)["items"]) if isinstance(r, str) else type(r) for r in results] == [3, ZeroDivisionError, KeyError, 4]


def test_health_tells_when_no_recommendation_can_be_made(data, monkeypatch):
    gate = service.create(settings(data))
    with TestClient(gate, raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(gate.live.current, "recommend", lambda queries: 1 / 0)
        gate.service.checked = (0.0, None)
        reply = client.get("/health")
        assert reply.status_code == 503 and reply.json()["code"] == "degraded" and reply.headers["retry-after"]
        failed = client.post("/recommend", json={"history": []})
        assert failed.status_code == 500 and failed.json()["code"] == "internal_error" and "Zero" not in failed.text
        monkeypatch.setattr(server, "SHORT", 0)  # as with a large catalogue
        monkeypatch.setattr(gate.live.current, "recommend", lambda queries: time.sleep(3) or [])  # slow, and a wrong answer
        gate.service.checked = (0.0, None)
        assert "2 seconds" in client.get("/health").json()["detail"]
        monkeypatch.undo()
        gate.service.checked = (0.0, None)
        assert client.get("/health").status_code == 200


def test_more_than_can_wait_is_refused_at_once(data, monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 3)
    with TestClient(service.create(settings(data))) as client:
        reply = client.post("/recommend/batch", json={"requests": [{"history": []}] * 4})
        assert reply.status_code == 503 and reply.json()["code"] == "overloaded"
        assert client.post("/recommend/batch", json={"requests": [{"history": []}] * 3}).status_code == 200


def test_a_large_batch_is_answered_in_parts_and_others_come_in_between(data, monkeypatch):
    monkeypatch.setattr(server, "MAX_ROWS", 100)
    requests = [{"history": ids(n % 60 + 1), "k": 10, "per_interest": 10 * (n % 2)} for n in range(40)]  # rows: 10 and 40 each
    with TestClient(service.create(settings(data))) as client:
        gate = client.app
        single = [client.post("/recommend", json=r).json() for r in requests]
        sizes, recommend = [], gate.live.current.recommend
        monkeypatch.setattr(gate.live.current, "recommend", lambda queries: sizes.append(len(queries)) or recommend(queries))
        assert client.post("/recommend/batch", json={"requests": requests}).json()["results"] == single
        assert sum(sizes) == 40 and max(sizes) <= 5 and gate.service.batcher.waiting == 0
        order = []

        async def both():
            async def ask(name, n):
                await gate.service.batcher.ask([Query(ids(5), k=100)] * n)
                order.append(name)
            await asyncio.gather(ask("large", 20), ask("small", 1))
        client.portal.call(both)
        assert order == ["small", "large"]


def test_a_head_request_a_slash_too_many_and_few_open_files(client, monkeypatch):
    assert [client.head(path).status_code for path in ("/health", "/")] == [200, 200]
    assert client.get("/health/", follow_redirects=False).status_code == 404
    for files, expected in ((100_000, server.MAX_CONNECTIONS), (1024, 768), (128, 64)):
        monkeypatch.setattr(server.resource, "getrlimit", lambda kind: (files, files))
        assert server.most_connections() == expected


def test_metrics_count(data):
    with TestClient(service.create(settings(data))) as client:
        for _ in range(3):
            client.post("/recommend", json={"history": ids(5)})
        client.post("/recommend", json={})
        client.get("/nope")
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['eimf_requests_total{route="/recommend",status="200"}'] == "3"
    assert values['eimf_requests_total{route="/recommend",status="422"}'] == "1"
    assert values['eimf_requests_total{route="other",status="404"}'] == "1"
    assert values["eimf_request_seconds_count"] == values['eimf_request_seconds_bucket{le="+Inf"}'] == "5"
    assert values["eimf_batch_queries_sum"] == "3" and float(values["eimf_resident_memory_bytes"]) > 1e7
    buckets = [float(v) for k, v in values.items() if k.startswith("eimf_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+', line), line


def test_workers_count_together(tmp_path):
    code = """
import sys; sys.path.insert(0, {stages!r})
from eimf.server import Metrics
metrics = Metrics(["/a"], {folder!r}, 3)
metrics.add('eimf_requests_total{{route="/a",status="200"}}', 5)
print("ready", flush=True); input(); print(metrics.render())
""".format(stages=str(STAGES), folder=str(tmp_path))
    workers = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    workers[0].kill()  # its counts stay, and the worker that replaces it takes its place
    workers[0].wait()
    workers[0] = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert workers[0].stdout.readline() == "ready\n"
    for worker in workers:
        assert 'eimf_requests_total{route="/a",status="200"} 20' in worker.communicate("\n")[0]


# ---- hot reload ----

def retrain(data, seed):
    """Train the run again through the real stage 06, as an engineer would while the server runs."""
    run_stage("06_train.py", data, "--dim", 16, "--interests", 3, "--max-len", 6, "--max-iterations", 20, "--validate-every", 10,
              "--run", RUN, "--seed", seed)


def test_a_new_export_is_swapped_in_and_a_broken_one_refused(data, tmp_path, caplog):
    copy = shutil.copytree(data, tmp_path / "data")
    live = server.Live(settings(copy))
    trained = copy / "tiny" / "06_train" / RUN
    first, before = live.current, (trained / "item_vectors.npy").read_bytes()
    assert live.poll() is None
    (trained / "manifest.json").rename(trained / "away")
    assert live.poll() is None and live.current is first  # being written: nothing to load, nothing to complain about
    (trained / "away").rename(trained / "manifest.json")
    (trained / "item_vectors.npy").write_bytes(before[:-4] + b"\x00\x00\xc0\x7f")  # NaN; the manifest does not agree
    (trained / "manifest.json").write_text((trained / "manifest.json").read_text() + " ")
    assert live.poll() == "refused" and live.current is first and "item_vectors.npy" in caplog.text
    assert live.poll() is None  # reported once, not every two seconds
    rewrite_manifest(trained)  # now the manifest agrees, but the vectors are still unusable
    assert live.poll() == "refused" and "NaN" in caplog.text and live.refused
    for broken in ("{", "[]", "{}"):
        (trained / "manifest.json").write_text(broken)
        assert live.poll() == "refused" and live.current is first
    retrain(copy, 1)
    assert live.poll() == "loaded" and live.refused is None
    answer, old = (r.recommend([Query(ids(5, 40), k=6)])[0] for r in (live.current, first))
    assert answer.items == oracle(copy, [5, 40], 6, {5, 40})[0] != old.items


def test_an_export_that_is_copied_file_by_file_is_loaded_once_it_is_complete(data, tmp_path, caplog):
    copy, new = (shutil.copytree(data, tmp_path / name) for name in ("data", "new"))
    retrain(new, 1)
    live = server.Live(settings(copy))
    first, source, target = live.current, new / "tiny" / "06_train" / RUN, copy / "tiny" / "06_train" / RUN
    for file in ("manifest.json", "config.json", "model.pt2"):
        shutil.copy(source / file, target / file)
        assert live.poll() == "refused" and live.poll() is None and live.current is first
    shutil.copytree(source, target, dirs_exist_ok=True)
    assert live.poll() == "loaded" and live.refused is None and live.current.manifest == load_json(source / "manifest.json")


def test_what_keeps_the_server_from_looking_is_logged_once_and_does_not_end_the_looking(data, tmp_path, caplog, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")
    live = server.Live(settings(copy))

    def fail(*arguments):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(server, "fingerprint", fail)
    assert live.poll() == "refused" and live.poll() is None and caplog.text.count("Too many open files") == 1
    monkeypatch.undo()
    assert live.poll() is None and live.refused is None
    trained = copy / "tiny" / "06_train" / RUN
    trained.rename(tmp_path / "away")
    trained.touch()  # a file where the folder was
    assert live.poll() is None
    trained.unlink()
    (tmp_path / "away").rename(trained)
    retrain(copy, 1)
    assert live.poll() == "loaded"


def test_the_run_in_use_is_not_left_while_it_trains_again(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    trained = copy / "tiny" / "06_train" / RUN
    older = shutil.copytree(trained, trained.with_name("older"))
    rewrite_manifest(older, finished="2001-01-01T00:00:00+0000")
    live = server.Live(settings(copy))
    assert live.current.run == RUN
    (trained / "manifest.json").rename(trained / "away")
    assert live.poll() is None and live.current.run == RUN
    (trained / "away").rename(trained / "manifest.json")
    rewrite_manifest(older, finished="2091-01-01T00:00:00+0000")
    assert live.poll() == "loaded" and live.current.run == "older"


# ---- a real server ----

HALF_OPEN = 3000  # connections that never complete a request


def test_no_request_fails_while_exports_are_swapped(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    second = shutil.copytree(data, tmp_path / "second")
    retrain(second, 1)
    add_reasons(second / "tiny" / "06_train" / RUN)
    seen, stop = set(), threading.Event()

    def work():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not stop.is_set():
            connection.request("POST", "/recommend", b'{"history": ["B0005", "B0040"], "k": 5, "explain": false}', JSON)
            reply = connection.getresponse()
            seen.add((reply.status, tuple(i["id"] for i in json.loads(reply.read())["items"])))
        return True

    expected = {(200, ids(*oracle(d, [5, 40], 5, {5, 40})[0])) for d in (copy, second)}
    assert len(expected) == 2
    with running(copy, "--reload-seconds", "0.1") as (_, port), concurrent.futures.ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work) for _ in range(4)]
        for source in (second, data, second):
            # As stage 06 does it: the manifest goes first and comes back last.
            old, new = copy / "tiny" / "06_train" / RUN, source / "tiny" / "06_train" / RUN
            (old / "manifest.json").unlink()
            for path in new.iterdir():
                if path.is_file() and path.name != "manifest.json":
                    shutil.copyfile(path, old / path.name)
            shutil.copyfile(new / "manifest.json", old / "manifest.tmp")
            (old / "manifest.tmp").rename(old / "manifest.json")
            wanted = load_json(new / "manifest.json")["outputs"]["model.pt2"]["sha256"]
            for _ in range(1200):
                if json.loads(ask(port, None, "/version", "GET")[1])["model_sha256"] == wanted:
                    break
                time.sleep(.1)
            else:
                raise AssertionError("the new export was never loaded")
        stop.set()
        assert all(w.result(60) for w in workers)
    assert seen == expected  # every answer was of one export or the other, whole, and none was an error


def test_shutdown_finishes_what_is_in_flight(data):
    with running(data) as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as begun, socket.create_connection(("127.0.0.1", port)) as idle:
            begun.settimeout(60)
            idle.settimeout(60)
            body = b'{"history": ["B0005"], "k": 5}'
            begun.sendall(b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n"
                          b"content-length: %d\r\n\r\n" % len(body))
            assert begun.recv(65536).startswith(b"HTTP/1.1 100")  # the request is in flight: its handler waits for the body
            process.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""  # the shutdown has begun
            begun.sendall(body)
            reply = b"".join(iter(lambda: begun.recv(65536), b""))
            assert reply.startswith(b"HTTP/1.1 200") and b'"items"' in reply
        assert process.wait(30) in (0, -signal.SIGTERM, 143)
        with pytest.raises(OSError):
            ask(port)
    with running(data) as (process, port):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert "Traceback" not in process.stdout.read()


def test_half_open_and_hostile_connections_do_not_stall_others(data):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < HALF_OPEN + 500:
        pytest.skip(f"this system allows a process {hard} open files; the test needs {HALF_OPEN + 500}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, HALF_OPEN + 500), hard))
    before = len(os.listdir("/proc/self/fd"))
    with running(data) as (process, port), contextlib.ExitStack() as stack:
        for n in range(HALF_OPEN):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            connection.sendall((b"", b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{", b"GET / HT")[n % 3])
            if n % 500 == 0:
                assert ask(port)[0] == 200
        assert ask(port)[0] == 200
        newest = connection
        newest.setblocking(False)
        with pytest.raises(BlockingIOError):  # answered beside the half-open ones, not after they were closed
            newest.recv(1)
        for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, b"\x00" * 4096, b"GET /../../../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
                        b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: -5\r\n\r\n{}",
                        b"POST /recommend HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\nZZ\r\n",
                        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 600_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60) as connection:
                connection.sendall(garbage)
                reply = connection.recv(65536)
                assert not reply or re.match(rb"HTTP/1.1 4\d\d ", reply), (garbage[:40], reply[:80])
                assert b"root:" not in reply
        assert ask(port)[0] == 200
        assert process.poll() is None
    assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_connections_that_complete_nothing_are_closed(data):
    """With the limits lowered, in a process of its own: slow headers, slow bodies, silence, and one too many."""
    code = """
import sys; sys.path.insert(0, {stages!r}); sys.argv = ["08_serve.py"]
import runpy
from eimf import server
server.CONNECTION_SECONDS, server.MAX_CONNECTIONS = 4, 20
module = runpy.run_path({stages!r} + "/08_serve.py")
module["main"](["--data-dir", {data!r}, "--dataset", "tiny", "--serve", "--port", "0"])
""".format(stages=str(STAGES), data=str(data))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r":(\d+) with", next(line for line in process.stdout if "serving run" in line))[1])
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(3)]
            slow[0].sendall(b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n")
            with pytest.raises(OSError):
                for _ in range(400):  # a byte now and then does not keep a connection alive
                    slow[0].sendall(b" ")
                    slow[1].sendall(b"G")
                    time.sleep(.1)
            with contextlib.suppress(ConnectionResetError):
                assert slow[2].recv(1) == b""
            steady = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            steady.connect()
            steady.auto_open = False
            started = time.monotonic()
            while time.monotonic() - started < 5:  # a connection that completes responses lives longer than the limit
                steady.request("GET", "/version")
                assert steady.getresponse().read()
                time.sleep(.2)
            many = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(30)]
            assert ask(port)[0] == 200
            with contextlib.suppress(ConnectionResetError):
                assert many[0].recv(1) == b""  # the one that waited longest had to go
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_several_workers_share_the_port_and_the_counters(data):
    with running(data, "--workers", "2") as (process, port):
        for _ in range(20):
            assert ask(port)[0] == 200
        text = ask(port, None, "/metrics", "GET")[1].decode()
        assert int(re.search(r'eimf_requests_total\{route="/recommend",status="200"\} (\d+)', text)[1]) >= 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) is not None


def test_a_taken_port_is_one_sentence(data):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, str(STAGES / "08_serve.py"), "--data-dir", str(data), "--dataset", "tiny", "--serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "error: cannot listen on 127.0.0.1" in done.stderr and "Traceback" not in done.stderr
