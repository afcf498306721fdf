"""The text encoder and its cache, stages 02 and 05."""

import contextlib
import gzip
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import STAGES, call_stage, finished_stage, make_tiny_bert, run_stage, write_dataset

import eimf.encoder
from eimf.artifacts import UserError, load_json, save_lines
from eimf.encoder import TextEncoder

WORDS = ["pen", "gel", "ink", "paper", "desk", "lamp", "chair", "black", "blue", "office"]
TITLES = ["gel pen", "black ink", "a4 paper 500 sheets", "desk lamp", "blue office chair with 5 casters, black", "pen"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("model") / "bert", WORDS)


def reference(folder, text, pooling="mean", normalize=True):
    """One text through transformers without padding."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=64)
    with torch.no_grad():
        states = model(**tokens).last_hidden_state[0].numpy().astype(np.float64)
    vector = states[0] if pooling == "cls" else states.mean(0)
    return vector / np.linalg.norm(vector) if normalize else vector


@pytest.mark.parametrize("pooling,normalize", [("mean", True), ("cls", True), ("mean", False)])
def test_vectors_equal_the_model_without_padding(bert, pooling, normalize):
    encoder = TextEncoder(str(bert), pooling, "cpu", normalize=normalize)
    vectors = encoder.encode(TITLES)
    assert vectors.dtype == np.float32 and vectors.shape == (6, 32)
    expected = [reference(bert, t, pooling, normalize) for t in TITLES]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_minilm_equals_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from eimf.encoder import find_model

    texts = [*TITLES, "Scotch Adhesive Dot Roller, 0.31 x 49 Feet (6055)", "Tinte für Füller – königsblau", "word " * 400]
    expected = sentence_transformers.SentenceTransformer(str(find_model("minilm")), device="cpu").encode(texts)
    encoder = TextEncoder(device="cpu")
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
    assert encoder.counts["truncated"] == 1


def test_a_vector_depends_on_its_text_alone():
    encoder = TextEncoder(device="cpu")
    together = encoder.encode(TITLES)
    for batch_size in (1, 2):
        encoder.batch_size = batch_size
        np.testing.assert_allclose(encoder.encode(TITLES[::-1])[::-1], together, atol=1e-5)


def test_cache_returns_the_same_bits_and_encodes_only_new_texts(bert, tmp_path, monkeypatch):
    encoder = TextEncoder(str(bert), device="cpu", cache=tmp_path)
    first = encoder.encode([*TITLES, TITLES[0], TITLES[0]])
    assert encoder.counts == {"texts": 8, "unique": 6, "cached": 0, "encoded": 6, "truncated": 0}
    assert (first[6] == first[0]).all() and (first[7] == first[0]).all()
    again = TextEncoder(str(bert), device="cpu", cache=tmp_path)
    batches = []
    forward = again._forward
    monkeypatch.setattr(again, "_forward", lambda texts: batches.append(texts) or forward(texts))
    second = again.encode(["new one", *TITLES])
    assert batches == [["new one"]] and again.counts["cached"] == 6
    assert (second[1:] == first[:6]).all()


def test_settings_that_change_vectors_do_not_share_a_cache(bert, tmp_path):
    other = make_tiny_bert(tmp_path / "other", WORDS, seed=1)
    encoders = [
        TextEncoder(str(bert), device="cpu"),
        TextEncoder(str(bert), "cls", "cpu"),
        TextEncoder(str(other), device="cpu"),
        TextEncoder(str(bert), device="cpu", max_tokens=10),
        TextEncoder(str(bert), device="cpu", normalize=False),
    ]
    assert len({e.fingerprint for e in encoders}) == len(encoders)
    assert TextEncoder(str(bert), device="cpu", batch_size=1).fingerprint == encoders[0].fingerprint


def test_empty_text_is_refused(bert):
    with pytest.raises(ValueError, match="mask its row"):
        TextEncoder(str(bert), device="cpu").encode(["pen", "  "])


def test_no_texts(bert):
    assert TextEncoder(str(bert), device="cpu").encode([]).shape == (0, 32)


def test_damaged_cache_is_named(bert, tmp_path):
    encoder = TextEncoder(str(bert), device="cpu", cache=tmp_path)
    encoder.encode(TITLES)
    path = encoder.cache.path
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE vectors SET value = x'0102'")
    with pytest.raises(UserError, match=f"{path.name}.*2 bytes, expected 128"):
        encoder.encode(TITLES)
    encoder.cache.connection.close()
    path.write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(UserError, match=f"{path.name}.*delete the file"):
        TextEncoder(str(bert), device="cpu", cache=tmp_path)


def test_missing_models_are_one_sentence_and_nothing_is_fetched(tmp_path):
    """Points the hub client at a local port and counts the connections it makes: none."""
    write_dataset(tmp_path, [{"title": "pen"}], [[1, 1]], [0])
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path / "hub")}
    common = ("--data-dir", tmp_path, "--dataset", "tiny", "--encoder")
    done = run_stage("02_encode_text.py", *common, "bert-base-uncased", env=env, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert str(tmp_path / "hub") in done.stderr and "--allow-download" in done.stderr
    with pytest.raises(TimeoutError):
        server.accept()
    done = run_stage("02_encode_text.py", *common, tmp_path / "nowhere", env=env, check=False)
    assert done.returncode == 1 and f"no such folder ({tmp_path / 'nowhere'})" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "empty").mkdir()
    done = run_stage("02_encode_text.py", *common, tmp_path / "empty", env=env, check=False)
    assert done.returncode == 1 and "no config.json in" in done.stderr
    server.close()


def test_incomplete_weights_are_refused(bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(bert, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in weights if "layer.1.attention" in key)
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 1 tensors.*layer.1.attention"):
        TextEncoder(str(broken), device="cpu")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load"):
        TextEncoder(str(broken), device="cpu")


HISTORIES = [[1, 2, 2, 6], [3, 4, 1, 2], [5, 5, 3], [6, 6, 6], [2, 3, 4, 5, 1]]
ITEMS = [{"title": t} for t in TITLES[:5]] + [{"title": None}]


def encode(tmp_path, bert, *extra):
    call_stage("02_encode_text.py", "--data-dir", tmp_path, "--dataset", "tiny", "--encoder", bert, "--device", "cpu", *extra)
    folder = tmp_path / "tiny" / "02_encode_text"
    return (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("item_text", "item_has_text", "user_text"))


@pytest.mark.parametrize("kind", ["random", "leave-one-out"])
def test_stage_02_means_over_what_training_may_see(tmp_path, bert, kind):
    write_dataset(tmp_path, ITEMS, HISTORIES, [0, 1, 2, 0, 0], kind)
    item_text, has_text, user_text = encode(tmp_path, bert)
    vectors = np.array([reference(bert, t) for t in TITLES[:5]])
    assert item_text.dtype == user_text.dtype == np.float32 and has_text.dtype == bool
    np.testing.assert_allclose(item_text[1:6], vectors, atol=1e-5)
    assert not item_text[0].any() and not item_text[6].any()
    assert has_text.tolist() == [False, True, True, True, True, True, False]
    for user, history in enumerate(HISTORIES):
        visible = history[:-2] if kind == "leave-one-out" else history if user in (0, 3, 4) else []
        titled = [vectors[i - 1] for i in visible if i != 6]
        np.testing.assert_allclose(user_text[user], np.mean(titled, axis=0) if titled else np.zeros(32), atol=1e-5)
    assert (tmp_path / "tiny/02_encode_text/item_ids.txt").read_text().split("\n") == [
        "[padding]",
        "I1",
        "I2",
        "I3",
        "I4",
        "I5",
        "I6",
        "",
    ]


def test_stage_02_without_any_title(tmp_path, bert, capsys):
    write_dataset(tmp_path, [{"categories": ["Grocery"]}] * 3, [[1, 2, 3], [3, 2, 1]], [0, 0])
    item_text, has_text, user_text = encode(tmp_path, bert)
    assert item_text.shape == (4, 32) and user_text.shape == (2, 32)
    assert not item_text.any() and not has_text.any() and not user_text.any()
    assert "no item has text" in capsys.readouterr().err
    _, has_text, user_text = encode(tmp_path, bert, "--fields", "title,categories")
    assert has_text[1:].all() and user_text.any()


def test_stage_02_cleans_titles(tmp_path, bert):
    write_dataset(tmp_path, [{"title": "pen &amp;\tink"}, {"title": " \n"}], [[1, 2]], [0])
    item_text, has_text, _ = encode(tmp_path, bert)
    assert has_text.tolist() == [False, True, False]
    np.testing.assert_allclose(item_text[1], reference(bert, "pen & ink"), atol=1e-5)


def test_skip_done_and_second_data_set(tmp_path, bert, capsys):
    write_dataset(tmp_path, ITEMS, HISTORIES, [0] * 5)
    encode(tmp_path, bert)
    encode(tmp_path, bert, "--skip-done")
    assert "skipped" in capsys.readouterr().out
    config = bert / "tokenizer_config.json"
    old = config.read_text()
    config.write_text(old + "\n")
    encode(tmp_path, bert, "--skip-done")
    assert "running, input encoder/tokenizer_config.json changed" in capsys.readouterr().out
    config.write_text(old)
    encode(tmp_path, bert)
    write_dataset(tmp_path, [*ITEMS, {"title": "office paper"}], HISTORIES, [0] * 5, dataset="second")
    call_stage("02_encode_text.py", "--data-dir", tmp_path, "--dataset", "second", "--encoder", bert, "--device", "cpu")
    summary = load_json(tmp_path / "second/02_encode_text/manifest.json")["summary"]
    assert (summary["encoded"], summary["cached"]) == (1, 5)


def test_stage_02_killed_and_run_again_ends_with_the_same_files(tmp_path, bert):
    rng = np.random.default_rng(0)
    items = [{"title": " ".join(rng.choice(WORDS, rng.integers(1, 20)))} for _ in range(700)]
    for name in ("whole", "killed"):
        write_dataset(tmp_path / name, items, HISTORIES, [0] * 5)
    arguments = ("--dataset", "tiny", "--encoder", bert, "--device", "cpu", "--threads", "1", "--batch-size", "3")
    run_stage("02_encode_text.py", "--data-dir", tmp_path / "whole", *arguments)
    command = [sys.executable, str(STAGES / "02_encode_text.py"), "--data-dir", str(tmp_path / "killed"), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    stored = 0
    deadline = time.monotonic() + 120
    while stored < 100 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        for path in (tmp_path / "killed/text_cache").glob("*.sqlite"):
            try:
                with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as connection:
                    stored = connection.execute("SELECT count(*) FROM vectors").fetchone()[0]
            except sqlite3.OperationalError:  # the table is not made yet
                pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 100 <= stored < 690
    assert not (tmp_path / "killed/tiny/02_encode_text/manifest.json").exists()
    run_stage("02_encode_text.py", "--data-dir", tmp_path / "killed", *arguments)
    manifests = [load_json(tmp_path / name / "tiny/02_encode_text/manifest.json") for name in ("whole", "killed")]
    assert manifests[1]["summary"]["cached"] >= stored
    hashes = [{f: e["sha256"] for f, e in m["outputs"].items() if f.endswith(".npy")} for m in manifests]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


def test_two_processes_share_a_cache(tmp_path, bert):
    rng = np.random.default_rng(1)
    items = [{"title": " ".join(rng.choice(WORDS, rng.integers(1, 20)))} for _ in range(600)]
    arguments = ("--encoder", bert, "--device", "cpu", "--batch-size", 2, "--threads", 1)
    processes = []
    for name in ("one", "two"):
        write_dataset(tmp_path, items, HISTORIES, [0] * 5, dataset=name)
        command = [sys.executable, STAGES / "02_encode_text.py", "--data-dir", tmp_path, "--dataset", name, *arguments]
        processes.append(subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True))
    shown = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n\n".join(shown)
    vectors = [np.load(tmp_path / name / "02_encode_text/item_text.npy") for name in ("one", "two")]
    assert (vectors[0] == vectors[1]).all() and vectors[0][1:].any(axis=1).all()


def test_a_cache_that_another_process_is_making_is_waited_for(tmp_path, monkeypatch):
    """sqlite does not wait by itself here: the other connection holds the lock under which it will turn the file to WAL."""
    other = sqlite3.connect(tmp_path / "key.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            other.execute("COMMIT")

    monkeypatch.setattr(eimf.encoder.time, "sleep", sleep)
    cache = eimf.encoder._Cache(tmp_path, "key", 2)
    assert len(waits) == 3 and cache.write({b"k": np.ones(2, np.float32)})[b"k"].tolist() == [1, 1]


def test_a_cache_that_stays_locked_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(eimf.encoder, "LOCK_WAIT", 0)
    other = sqlite3.connect(tmp_path / "key.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"key.sqlite: database is locked. Another process has held it"):
        eimf.encoder._Cache(tmp_path, "key", 2)


def test_the_first_writer_of_a_key_wins(bert, tmp_path):
    """Two processes that encode one text at once go on with the same bits."""
    caches = [TextEncoder(str(bert), device="cpu", cache=tmp_path).cache for _ in range(2)]
    first, second = np.full(32, 0.25, np.float32), np.full(32, 0.5, np.float32)
    assert (caches[0].write({b"key": first})[b"key"] == first).all()
    assert (caches[1].write({b"key": second})[b"key"] == first).all()


def write_interests(tmp_path, rows):
    finished_stage(tmp_path, "tiny", "04_infer_interests", lambda folder: save_lines(folder / "interests.jsonl", rows))


def test_stage_05_is_ragged_and_uses_the_encoder_of_02(tmp_path, bert, capsys):
    write_dataset(tmp_path, ITEMS, HISTORIES, [0] * 5)
    encode(tmp_path, bert, "--pooling", "cls", "--no-normalize")
    write_interests(
        tmp_path,
        [
            {"user": 3, "interests": ["gel pen", "desk"]},
            {"user": 1, "interests": []},
            {"user": 0, "interests": ["desk", "lamp", "gel pen"]},
        ],
    )
    call_stage("05_encode_interests.py", "--data-dir", tmp_path, "--dataset", "tiny", "--device", "cpu")
    folder = tmp_path / "tiny/05_encode_interests"
    vectors, offsets = np.load(folder / "interest_vectors.npy"), np.load(folder / "interest_offsets.npy")
    assert vectors.dtype == np.float32 and offsets.dtype == np.int64 and offsets.tolist() == [0, 2, 2, 5]
    expected = [reference(bert, t, "cls", False) for t in ("gel pen", "desk", "desk", "lamp", "gel pen")]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (vectors[0] == np.load(tmp_path / "tiny/02_encode_text/item_text.npy")[1]).all()  # one cache, the same bits
    assert "1 of 3 clusters have no interest" in capsys.readouterr().err


def test_stage_05_refuses_another_encoder(tmp_path, bert):
    write_dataset(tmp_path, ITEMS, HISTORIES, [0] * 5)
    moving = make_tiny_bert(tmp_path / "moving", WORDS)
    encode(tmp_path, moving)
    write_interests(tmp_path, [{"user": 3, "interests": ["gel pen"]}])
    common = ("--data-dir", tmp_path, "--dataset", "tiny", "--device", "cpu")
    other = make_tiny_bert(tmp_path / "other", WORDS, seed=7)
    with pytest.raises(UserError, match="differing: model.safetensors"):
        call_stage("05_encode_interests.py", *common, "--encoder", other)
    moving.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such folder"):
        call_stage("05_encode_interests.py", *common)
    call_stage("05_encode_interests.py", *common, "--encoder", tmp_path / "moved")


def test_stage_05_names_a_broken_line(tmp_path, bert):
    write_dataset(tmp_path, ITEMS, HISTORIES, [0] * 5)
    encode(tmp_path, bert)
    write_interests(tmp_path, [{"user": 3, "interests": ["pen"]}, {"user": 1, "interests": ["pen", " "]}])
    with pytest.raises(UserError, match="interests.jsonl:2: expected a list of non-empty strings"):
        call_stage("05_encode_interests.py", "--data-dir", tmp_path, "--dataset", "tiny")


@pytest.mark.slow
def test_office_titles(shared, tmp_path):
    """Real titles: unit vectors, and items that shoppers view together are closer than random pairs."""
    with gzip.open(shared / "data/raw/meta_Office_Products.json.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [r for r in rows if r.get("title")][:400]
    vectors = TextEncoder(device="cpu").encode([r["title"] for r in rows])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    row = {r["asin"]: i for i, r in enumerate(rows)}
    pairs = [(i, row[b]) for i, r in enumerate(rows) for b in r.get("related", {}).get("also_viewed", []) if b in row]
    related = np.mean([vectors[i] @ vectors[j] for i, j in pairs])
    assert len(pairs) > 100 and related > (vectors @ vectors.T).mean() + 0.15
