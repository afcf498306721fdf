"""Stage 04: what prompts see, where answers come from, and what happens when things go wrong."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_server import GOOD, ChatServer, chat
from tiny import STAGES, call_stage, finished_stage, run_stage, write_dataset

import eimf.chat
import eimf.prompts
from eimf.artifacts import UserError, load_json, load_lines, save_array
from eimf.interests import parse_interests
from eimf.llm import Journal, Request, record

KEY = "sk-secret-0123456789abcdef"
SCRIPT = "04_infer_interests.py"
ITEMS = [
    {"title": f"Brand{i} {word} {i}", "categories": ["Office", word]}
    for i, word in enumerate(["pen", "lamp", "chair", "paper", "ink", "desk", "glue", "tape"] * 3)
] + [{"categories": ["Office", "Paper"]}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits, and no key or server from the surroundings."""
    monkeypatch.setattr(eimf.chat, "BACK_OFF", 0.02)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DASHSCOPE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def histories(n_users, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, len(ITEMS) + 1, rng.integers(5, 12)).tolist() for _ in range(n_users)]


def dataset(tmp_path, n_users=12, typical=None, kind="random", name="tiny"):
    """A data set whose users 0, 10, 20, .. are in the test part and 1, 11, .. in validation; typical users as given or all training users."""
    split = [2 if u % 10 == 0 else 1 if u % 10 == 1 else 0 for u in range(n_users)]
    events = histories(n_users)
    write_dataset(tmp_path, ITEMS, events, split, kind, name)
    typical = [u for u in range(n_users) if kind == "leave-one-out" or split[u] == 0] if typical is None else typical
    finished_stage(
        tmp_path, name, "03_cluster_users", lambda f: save_array(f / "typical_users.npy", np.array(typical, dtype=np.int64))
    )
    return events, typical


def infer(tmp_path, *arguments, name="tiny"):
    return call_stage(SCRIPT, "--data-dir", tmp_path, "--dataset", name, *arguments)


def online(server, *arguments):
    return ("--llm", "openai", "--base-url", server.url, "--model", "m", "--concurrency", 8, *arguments)


def rows(tmp_path, file="interests.jsonl", name="tiny"):
    return load_lines(tmp_path / name / "04_infer_interests" / file)


def prompt_of(line):
    return line["body"]["messages"][0]["content"]


# ---------------------------------------------------------------- what a prompt sees


@pytest.mark.parametrize("kind", ["random", "file-order", "leave-one-out"])
@pytest.mark.parametrize("prefix", [False, True])
def test_prompts_hold_exactly_what_training_may_see(tmp_path, kind, prefix):
    events, typical = dataset(tmp_path, kind=kind)
    assert infer(tmp_path, "--item-text", "title", *(["--prefix-only"] if prefix else [])) == 0
    requests, seen = rows(tmp_path, "requests.jsonl"), np.load(tmp_path / "tiny/04_infer_interests/seen_events.npy")
    offsets = np.cumsum([0, *map(len, events)])
    assert len(requests) == len(typical) == len(seen)
    for line, user, (start, end) in zip(requests, typical, seen, strict=True):
        visible = events[user][:-2] if kind == "leave-one-out" else events[user]
        visible = visible[: max(1, int(0.8 * len(visible)))] if prefix else visible
        shown = re.search(r"\[(.*)\]", prompt_of(line))[1]
        assert shown == ", ".join(f"{ITEMS[i - 1]['title']} (I{i})" for i in visible if ITEMS[i - 1].get("title"))
        assert re.fullmatch(rf"tiny/U{user}#[0-9a-f]{{16}}", line["custom_id"])
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert offsets[user] <= start < end == offsets[user] + len(visible)
    report = load_json(tmp_path / "tiny/04_infer_interests/leakage.json")
    assert (
        report["prompts"] == len(typical) and report["held_out_positions"] == report["events_of_validation_and_test_users"] == 0
    )


def test_typical_users_outside_training_are_refused(tmp_path):
    dataset(tmp_path, typical=[2, 10])
    with pytest.raises(UserError, match="user 10 is no training user"):
        infer(tmp_path)
    assert not (tmp_path / "tiny/04_infer_interests/interests.jsonl").exists()


def test_the_leakage_report_is_independent_of_the_ranges(tmp_path, monkeypatch):
    """A mistake in `training_ranges` is found: the report goes back to the split itself."""
    dataset(tmp_path, typical=[2, 3])
    from eimf.data import Interactions

    whole = Interactions.training_ranges
    monkeypatch.setattr(Interactions, "training_ranges", lambda self: (whole(self)[0], whole(self)[1] - 1, whole(self)[2]))
    with pytest.raises(UserError, match="must not.*events_of_other_users"):
        infer(tmp_path)


def test_long_histories_keep_their_newest_items(tmp_path):
    events, typical = dataset(tmp_path, typical=[2, 3])
    assert infer(tmp_path, "--max-prompt-tokens", 120, "--item-text", "title") == 0
    for line, user in zip(rows(tmp_path, "requests.jsonl"), typical, strict=True):
        shown = [int(i) for i in re.findall(r"\(I(\d+)\)", prompt_of(line))]
        titled = [i for i in events[user] if ITEMS[i - 1].get("title")]
        assert 0 < len(shown) < len(titled) and shown == titled[-len(shown) :]
        assert len(prompt_of(line)) / 4 <= 120
    assert load_json(tmp_path / "tiny/04_infer_interests/usage.json")["truncated_histories"] == 2


def test_items_are_shown_by_title_or_with_their_category(tmp_path):
    events, typical = dataset(tmp_path, typical=[2])
    for fields, shown in (("title", "{title} (I{i})"), ("title,categories", "{title} [{path}] (I{i})")):
        assert infer(tmp_path, "--item-text", fields) == 0
        items = [(i, ITEMS[i - 1]) for i in events[2] if fields != "title" or ITEMS[i - 1].get("title")]
        expected = [shown.format(title=item.get("title", ""), path=" > ".join(item["categories"]), i=i).strip() for i, item in items]
        assert f"[{', '.join(expected)}]" in prompt_of(rows(tmp_path, "requests.jsonl")[0])


# ---------------------------------------------------------------- offline


def test_offline_is_deterministic_and_stamped(tmp_path):
    _, typical = dataset(tmp_path)
    assert infer(tmp_path) == 0
    first = (tmp_path / "tiny/04_infer_interests/interests.jsonl").read_bytes()
    journal = (tmp_path / "tiny/04_infer_interests/responses.jsonl").read_bytes()
    assert infer(tmp_path) == 0
    assert (tmp_path / "tiny/04_infer_interests/interests.jsonl").read_bytes() == first
    assert (tmp_path / "tiny/04_infer_interests/responses.jsonl").read_bytes() == journal
    found = rows(tmp_path)
    assert [r["user"] for r in found] == typical and [r["id"] for r in found] == [f"U{u}" for u in typical]
    assert {(r["source"], r["model"], r["outcome"]) for r in found} == {("offline", "offline", "ok")}
    assert all(1 <= len(r["interests"]) <= 20 and len(set(r["interests"])) == len(r["interests"]) for r in found)
    usage = load_json(tmp_path / "tiny/04_infer_interests/usage.json")
    assert usage["llm"] == "offline" and usage["sources"] == {"offline": len(typical)} and usage["fallback"] == 0


def test_offline_phrases():
    from eimf.offline import Summarizer

    items = [None] + [
        {"title": t, "categories": c, "brand": None}
        for t, c in [
            ("Pilot G2 Gel Pen, Black", ["Office", "Pens"]),
            ("Pilot Retractable Gel Pen", ["Office", "Pens"]),
            ("Uni Gel Pen Retractable", ["Office", "Pens"]),
            ("Pilot Pen Gel", ["Office", "Pens"]),
            ("Desk Lamp Retractable", ["Office", "Lamps"]),
            ("Yoga mat purple", []),
            ("Yoga mat green", []),
            (None, ["Office", "Chairs"]),
            (None, []),
        ]
    ]
    summarizer = Summarizer(items)
    history = [items[i] for i in (5, 1, 6, 3, 8, 7, 9)]
    groups = summarizer.groups(history)
    assert groups == [("yoga mat", [2, 5]), ("Pens", [1, 3]), ("Chairs", [4]), ("Lamps", [0])]  # larger, then more recent, first
    phrases = summarizer.interests(history)
    assert phrases[1] == "Pens: Gel Retractable Pilot" or set(phrases[1].removeprefix("Pens: ").split()) == {
        "Gel",
        "Retractable",
        "Pilot",
    }
    assert phrases[2] == "Chairs" and len(phrases) == 4
    assert Summarizer(items).interests([items[9]]) == []


def test_items_without_any_text_leave_the_user_without_interests(tmp_path):
    write_dataset(tmp_path, [{}, {}], [[1, 2, 1]] * 2, [0, 0])
    finished_stage(tmp_path, "tiny", "03_cluster_users", lambda f: save_array(f / "typical_users.npy", np.array([0, 1])))
    assert infer(tmp_path) == 4  # everybody is on the fallback
    assert [(r["interests"], r["outcome"], r["notes"]) for r in rows(tmp_path)] == [
        ([], "failed", ["no_text: no item of the history has text"])
    ] * 2


# ---------------------------------------------------------------- recorded answers and batch files


def write_batch(path, answers, **extra):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt") as file:
        for custom_id, content in answers.items():
            body = json.loads(chat(content))
            file.write(
                json.dumps(
                    {"id": "b", "custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None} | extra
                )
                + "\n"
            )
    return path


def test_recorded_by_user(tmp_path):
    events, typical = dataset(tmp_path, typical=[2, 3, 4])
    path = write_batch(tmp_path / "r.jsonl.gz", {"Other_Name/U2": GOOD, "Other_Name/U4": "I'm sorry, I cannot do that."})
    assert infer(tmp_path, "--llm", "recorded", "--responses", path, "--match", "user", "--max-fallback", 0.9) == 0
    found = rows(tmp_path)
    titles = [
        list(dict.fromkeys(ITEMS[i - 1]["title"] for i in reversed(events[u]) if ITEMS[i - 1].get("title"))) for u in (3, 4)
    ]
    assert found[0]["interests"] == ["gel pens", "desk lamps"] and (found[0]["outcome"], found[0]["source"]) == ("ok", "recorded")
    assert found[1]["interests"] == titles[0] and (found[1]["outcome"], found[1]["source"]) == ("failed", "titles")
    assert found[1]["notes"] == ["no_recording: no recorded answer, matched by user"]
    assert found[2]["interests"] == titles[1] and (found[2]["outcome"], found[2]["source"]) == ("refused", "titles")
    usage = load_json(tmp_path / "tiny/04_infer_interests/usage.json")
    assert usage["outcomes"] == {"failed": 1, "ok": 1, "refused": 1} and usage["fallback"] == 2
    assert usage["failed_because"] == {"no_recording": 1}
    assert infer(tmp_path, "--llm", "recorded", "--responses", path, "--match", "user") == 4  # more than half on the fallback


@pytest.mark.parametrize("arguments,kind", [((), "leave-one-out"), (("--prefix-only",), "random")])
def test_recorded_by_user_is_refused_where_it_would_leak(tmp_path, arguments, kind):
    dataset(tmp_path, kind=kind)
    path = write_batch(tmp_path / "r.jsonl", {f"x/U{u}": GOOD for u in range(12)})
    with pytest.raises(UserError, match="may have read whole histories"):
        infer(tmp_path, "--llm", "recorded", "--responses", path, "--match", "user", *arguments)
    assert infer(tmp_path, "--llm", "recorded", "--responses", path, "--match", "user", "--allow-seen-histories", *arguments) == 0
    assert "perhaps" in load_json(tmp_path / "tiny/04_infer_interests/leakage.json")["answers_saw_more_than_the_prompt"]


def test_export_and_import_match_by_hash(tmp_path):
    _, typical = dataset(tmp_path, typical=[2, 3, 4, 5])
    model = ("--llm", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    batch = tmp_path / "batch.jsonl"
    assert not infer(tmp_path, *model, "--export-requests", batch)
    assert not (tmp_path / "tiny/04_infer_interests").exists()
    lines = load_lines(batch)
    assert [set(line) for line in lines] == [{"custom_id", "method", "url", "body"}] * 4
    assert [set(line["body"]) for line in lines] == [{"model", "messages", "temperature", "max_tokens"}] * 4
    answers = write_batch(
        tmp_path / "out.jsonl",
        {line["custom_id"]: '{"1": "%s"}' % f"taste of {line['custom_id'].split('#')[0]}" for line in lines[:3]},
    )
    with open(answers, "a") as file:
        file.write(
            json.dumps({"custom_id": lines[3]["custom_id"], "response": {"status_code": 500, "body": None}, "error": None}) + "\n"
        )
    assert infer(tmp_path, *model, "--import-responses", answers) == 3  # one is missing, nothing was called
    assert infer(tmp_path, *model, "--import-responses", answers, "--finish-anyway") == 0
    assert [r["interests"][0] for r in rows(tmp_path)][:3] == [f"taste of tiny/U{u}" for u in (2, 3, 4)]
    assert [r["source"] for r in rows(tmp_path)] == ["openai"] * 3 + ["titles"]
    # the same prompts in another split's folder: the journal's answers are taken; another prompt, temperature or model takes none
    dataset(tmp_path, typical=[4, 5, 2], name="tiny2")
    journal = tmp_path / "tiny/04_infer_interests/responses.jsonl"
    assert infer(tmp_path, *model, "--import-responses", journal, "--finish-anyway", name="tiny2") == 0
    assert [r["source"] for r in rows(tmp_path, name="tiny2")] == ["openai", "titles", "openai"]
    for other in (("--temperature", 0.5), ("--max-tokens", 99), ("--item-text", "title,categories")):
        dataset(tmp_path, typical=[2, 3], name="tiny3")
        assert infer(tmp_path, *model, "--import-responses", journal, *other, "--finish-anyway", name="tiny3") == 4
        assert {r["source"] for r in rows(tmp_path, name="tiny3")} == {"titles"}


def test_shards_of_an_export_are_disjoint_and_complete(tmp_path):
    dataset(tmp_path, n_users=40)
    model = ("--llm", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    whole, parts = tmp_path / "whole.jsonl", [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]
    infer(tmp_path, *model, "--export-requests", whole)
    for i, part in enumerate(parts, 1):
        infer(tmp_path, *model, "--export-requests", part, "--shard", f"{i}/3")
    lines = [line["custom_id"] for part in parts for line in load_lines(part)]
    assert len(set(lines)) == len(lines) == 32 and set(lines) == {line["custom_id"] for line in load_lines(whole)}


def test_a_file_that_is_no_batch_output_is_named(tmp_path):
    dataset(tmp_path)
    (tmp_path / "r.jsonl").write_text('{"custom_id": "a/b", "response": null, "error": null}\n{"user": 3}\n')
    with pytest.raises(UserError, match=r"r\.jsonl:2: no line of OpenAI's Batch output"):
        infer(tmp_path, "--llm", "recorded", "--responses", tmp_path / "r.jsonl", "--match", "user")
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(UserError, match="cannot be read to its end"):
        infer(tmp_path, "--llm", "recorded", "--responses", tmp_path / "r.jsonl.gz", "--match", "user")


# ---------------------------------------------------------------- the protocol and its faults


def test_only_the_protocols_fields_are_sent(tmp_path, monkeypatch):
    dataset(tmp_path, typical=[2, 3])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(lambda n, body: GOOD) as server:
        assert infer(tmp_path, *online(server, "--temperature", 0.3, "--max-tokens", 50)) == 0
    assert len(server.calls) == 2
    for (_, body), (path, headers) in zip(server.calls, server.headers, strict=True):
        assert set(body) == {"model", "messages", "temperature", "max_tokens"} and path == "/v1/chat/completions"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 50) and headers[
            "Authorization"
        ] == f"Bearer {KEY}"
    usage = load_json(tmp_path / "tiny/04_infer_interests/usage.json")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["outcomes"]) == (200, 20, {"ok": 2})
    assert rows(tmp_path)[0]["model"] == "served-model"


def fail_first(action):
    """Every distinct prompt gets `action` once and is answered well the second time."""
    seen, lock = set(), threading.Lock()

    def behave(number, body):
        text = body["messages"][0]["content"]
        with lock:
            first = text not in seen
            seen.add(text)
        return action if first else GOOD

    return behave


FAULTS = {
    "429": {"status": 429, "body": b'{"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}'},
    "429 with Retry-After": {"status": 429, "headers": {"Retry-After": "0.05"}},
    "429 with a date": {"status": 429, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}},
    "429 with nonsense": {"status": 429, "headers": {"Retry-After": "soon"}},
    "500": {"status": 500, "body": b"Internal Server Error", "headers": {"Content-Type": "text/plain"}},
    "503": {"status": 503, "body": b'{"error": "overloaded"}'},
    "reset": {"kind": "reset"},
    "hang": {"kind": "hang"},
    "drip": {"kind": "drip", "body": chat(GOOD)},
    "drip headers": {"kind": "drip headers"},
    "truncated body": {"kind": "truncated", "body": chat(GOOD)},
    "cut JSON": {"body": chat(GOOD)[:80]},
    "wrong content type": {"body": b"plain words", "headers": {"Content-Type": "text/plain"}},
    "HTML error page": {
        "body": b"<html><title>502</title><body>Bad gateway</body></html>",
        "headers": {"Content-Type": "text/html"},
    },
    "HTML with status 502": {"status": 502, "body": b"<html>Bad gateway</html>", "headers": {"Content-Type": "text/html"}},
    "JSON but no completion": {"body": b'{"choices": []}'},
    "error in a 200": {"body": b'{"error": {"message": "busy"}}'},
    "not UTF-8": {"body": b"\xff\xfe\x00"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_transient_fault_is_overcome(tmp_path, fault):
    slow = fault in ("hang", "drip", "drip headers")  # such answers would never end, or after seconds
    _, typical = dataset(tmp_path, typical=[2, 3, 4] if slow else None)
    with ChatServer(fail_first(FAULTS[fault])) as server:
        assert infer(tmp_path, *online(server, "--read-timeout", 1 if slow else 120, "--attempts", 20)) == 0
    assert {(r["outcome"], r["source"]) for r in rows(tmp_path)} == {("ok", "openai")} and len(rows(tmp_path)) == len(typical)
    calls = load_json(tmp_path / "tiny/04_infer_interests/manifest.json")["summary"]["calls"]
    if slow:  # on a busy machine a good answer may be too late as well
        assert calls["calls"] == len(server.calls) >= 2 * len(typical)
        assert calls["retries"] == len(server.calls) - len(typical) and calls["failed"] == 0
        return
    assert len(server.calls) == 2 * len(typical)
    limited = fault in ("503",) or fault.startswith("429")
    assert calls == {
        "calls": 2 * len(typical),
        "failed": 0,
        "retries": 0 if limited else len(typical),
        "rate_limited": len(typical) if limited else 0,
    }


@pytest.mark.parametrize(
    "content,outcome",
    [("I'm sorry, but I cannot help with that.", "refused"), ("```json\n" + GOOD + "\n```", "repaired"), ("Hmm?", "unparsable")],
)
def test_outcomes_of_answers(tmp_path, content, outcome):
    dataset(tmp_path, typical=[2, 3])
    with ChatServer(lambda n, body: content) as server:
        assert infer(tmp_path, *online(server, "--max-fallback", 1)) == 0
    usable = outcome == "repaired"
    assert {(r["outcome"], r["source"]) for r in rows(tmp_path)} == {(outcome, "openai" if usable else "titles")}
    assert len(server.calls) == (2 if usable else 4)  # an unusable answer is asked for once more
    assert content in {r["response"]["body"]["choices"][0]["message"]["content"] for r in rows(tmp_path, "responses.jsonl")}
    with ChatServer(lambda n, body: GOOD) as server:  # the next run does not ask a third time
        assert infer(tmp_path, *online(server, "--max-fallback", 1)) == 0
    assert not server.calls


def test_a_second_answer_that_can_be_used_is_used(tmp_path):
    dataset(tmp_path, typical=[2, 3])
    with ChatServer(fail_first("Hmm?")) as server:
        assert infer(tmp_path, *online(server)) == 0
    assert {r["outcome"] for r in rows(tmp_path)} == {"ok"}


def test_truncated_filtered_and_refused_by_field(tmp_path):
    _, typical = dataset(tmp_path, typical=[2, 3, 4, 5])
    answers = [chat(GOOD), chat('{"1": "gel pens", "2": "des', "length"), chat(None, refusal="No."), b""]
    order, lock = {}, threading.Lock()

    def behave(number, body):
        with lock:
            place = order.setdefault(body["messages"][0]["content"], len(order))
        if place == 3:
            return {"status": 400, "body": b'{"error": {"code": "data_inspection_failed", "message": "inappropriate content"}}'}
        return {"body": answers[place]}

    with ChatServer(behave) as server:
        assert infer(tmp_path, *online(server, "--concurrency", 1, "--max-fallback", 1)) == 0
    assert [r["outcome"] for r in rows(tmp_path)] == ["ok", "truncated", "refused", "refused"]
    assert [r["source"] for r in rows(tmp_path)] == ["openai", "openai", "titles", "titles"]
    assert rows(tmp_path)[1]["interests"] == ["gel pens"]
    assert "data_inspection_failed" in rows(tmp_path)[3]["notes"][0]


def test_a_request_the_server_rejects_is_recorded_not_repeated(tmp_path):
    dataset(tmp_path, typical=[2, 3, 4])

    def behave(number, body):
        if number == 1:
            return {"status": 400, "body": b'{"error": {"message": "maximum context length is 10 tokens"}}'}
        return GOOD

    with ChatServer(behave) as server:
        assert infer(tmp_path, *online(server, "--concurrency", 1)) == 0
        assert len(server.calls) == 3
        assert infer(tmp_path, *online(server)) == 0
        assert len(server.calls) == 3
        assert [r["outcome"] for r in rows(tmp_path)] == ["ok", "failed", "ok"]
        assert rows(tmp_path)[1]["notes"] == ["rejected: 400: maximum context length is 10 tokens"]
        assert infer(tmp_path, *online(server, "--retry-failed")) == 0
    assert [r["outcome"] for r in rows(tmp_path)] == ["ok", "ok", "ok"]


def test_response_format_is_dropped_when_refused(tmp_path):
    _, typical = dataset(tmp_path)

    def behave(number, body):
        if "response_format" in body:
            return {"status": 400, "body": b'{"error": {"message": "response_format is not supported"}}'}
        return GOOD

    with ChatServer(behave) as server:
        assert infer(tmp_path, *online(server, "--json-mode", "--concurrency", 2)) == 0
    assert server.calls[0][1]["response_format"] == {"type": "json_object"}
    assert sum("response_format" in body for _, body in server.calls) <= 2 and len(rows(tmp_path)) == len(typical)
    with ChatServer(lambda n, body: GOOD) as server:
        dataset(tmp_path, name="second")
        assert infer(tmp_path, *online(server, "--json-mode"), name="second") == 0
    assert all(body["response_format"] == {"type": "json_object"} for _, body in server.calls)


def test_retry_after_holds_all_calls(tmp_path, monkeypatch):
    """Call 3 is told to wait a second; call 2 is on its way then, and all others come a second later or more."""
    _, typical = dataset(tmp_path)
    paused = threading.Event()
    leave = eimf.chat.Gate.leave

    def watched(gate, entered, **how):
        leave(gate, entered, **how)
        if how.get("pause"):
            paused.set()

    monkeypatch.setattr(eimf.chat.Gate, "leave", watched)

    def behave(number, body):
        if number == 3:
            return {"status": 429, "headers": {"Retry-After": "1"}}
        if number > 1:  # the call beside number 3 ends when the client has read what number 3 was told
            paused.wait(60)
        return GOOD

    with ChatServer(behave) as server:
        assert infer(tmp_path, *online(server, "--concurrency", 2)) == 0
    times = [t for t, _ in server.calls]
    assert len(times) == len(typical) + 1 and min(times[4:]) >= times[3] + 1


def test_concurrency_adapts_to_the_server(tmp_path):
    """A server that takes 4 calls at once and refuses the rest: all is answered, and soon few calls are refused."""
    _, typical = dataset(tmp_path, n_users=200)
    server = ChatServer(None)
    refused = []

    def behave(number, body):
        if server.active > 4:
            refused.append(number)
            return {"status": 429}
        return {"body": chat(GOOD), "delay": 0.02}

    server.behave = behave
    with server:
        assert infer(tmp_path, *online(server, "--concurrency", 32)) == 0
    assert {r["outcome"] for r in rows(tmp_path)} == {"ok"} and len(rows(tmp_path)) == len(typical) == 160
    assert len(refused) > 4
    late = [n for n in refused if n > len(server.calls) / 2]
    assert len(late) < 0.25 * len(server.calls) / 2


def test_a_rate_limit_is_never_a_failure(tmp_path):
    """More refusals than attempts, then answers."""
    dataset(tmp_path, typical=[2, 3])
    with ChatServer(lambda n, body: {"status": 429} if n < 7 else GOOD) as server:
        assert infer(tmp_path, *online(server, "--attempts", 2)) == 0
    assert {r["outcome"] for r in rows(tmp_path)} == {"ok"}


# ---------------------------------------------------------------- giving up


def stops(tmp_path, capsys, server, *arguments):
    assert infer(tmp_path, *online(server, *arguments)) == 3
    assert not (tmp_path / "tiny/04_infer_interests/manifest.json").exists()
    assert not (tmp_path / "tiny/04_infer_interests/interests.jsonl").exists()
    return capsys.readouterr().err


def test_a_wrong_key_costs_one_call(tmp_path, capsys, monkeypatch):
    dataset(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    wrong = {"status": 401, "body": json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()}
    with ChatServer(lambda n, body: wrong) as server:
        shown = stops(tmp_path, capsys, server)
    assert len(server.calls) == 1 and "answered 401" in shown and "Check the key" in shown and KEY not in shown


def test_an_endpoint_that_is_down_costs_one_requests_attempts(tmp_path, capsys):
    dataset(tmp_path)
    with ChatServer(None) as server:
        pass  # closed: connections are refused
    assert "gave no answer to the first request in 3 attempts" in stops(tmp_path, capsys, server, "--attempts", 3)
    with ChatServer(lambda n, body: {"status": 500}) as server:
        stops(tmp_path, capsys, server, "--attempts", 3)
    assert len(server.calls) == 3
    with ChatServer(lambda n, body: {"status": 404, "body": b'{"error": {"message": "model m not found"}}'}) as server:
        assert "model m not found" in stops(tmp_path, capsys, server)
    assert len(server.calls) == 1


def test_an_outage_in_the_middle_stops_and_resumes(tmp_path, capsys):
    _, typical = dataset(tmp_path, n_users=60)
    with ChatServer(lambda n, body: GOOD if n < 10 else {"status": 502}) as server:
        shown = stops(tmp_path, capsys, server, "--attempts", 2, "--concurrency", 1, "--give-up-after", 3)
    assert "3 requests in a row failed" in shown and len(server.calls) == 10 + 3 * 2
    with ChatServer(lambda n, body: GOOD) as server:
        assert infer(tmp_path, *online(server)) == 0
    assert len(server.calls) == len(typical) - 10
    assert {r["outcome"] for r in rows(tmp_path)} == {"ok"}


def test_used_up_quota_stops_at_once(tmp_path, capsys):
    dataset(tmp_path)
    quota = {"status": 429, "body": b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'}
    with ChatServer(lambda n, body: GOOD if n < 2 else quota) as server:
        assert "insufficient_quota" in stops(tmp_path, capsys, server, "--concurrency", 1)
    assert len(server.calls) == 3


def test_a_wait_longer_than_patience_stops(tmp_path, capsys):
    dataset(tmp_path)
    with ChatServer(lambda n, body: {"status": 429, "headers": {"Retry-After": "86400"}}) as server:
        assert "asks to wait 86400 s" in stops(tmp_path, capsys, server)
    assert len(server.calls) == 1


def test_a_connection_that_is_never_accepted_is_given_up(tmp_path, capsys):
    """--connect-timeout is a limit of its own: the read time-out is 120 s here."""
    dataset(tmp_path)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for other in (first, second):  # the queue of connections is full after these
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        flags = ("--llm", "openai", "--base-url", url, "--model", "m", "--attempts", 2, "--connect-timeout", 0.2)
        assert infer(tmp_path, *flags) == 3
    assert "in 2 attempts: connecting timed out" in capsys.readouterr().err


def test_a_redirect_is_not_followed(tmp_path, capsys, monkeypatch):
    dataset(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(lambda n, body: GOOD) as target:
        with ChatServer(lambda n, body: {"status": 307, "headers": {"Location": target.url + "/chat/completions"}}) as server:
            assert "redirects" in stops(tmp_path, capsys, server)
    assert not target.calls


# ---------------------------------------------------------------- cost


def test_max_requests_is_exact(tmp_path, capsys):
    _, typical = dataset(tmp_path, n_users=50)
    with ChatServer(lambda n, body: {"body": chat(GOOD), "delay": 0.01}) as server:
        assert "--max-requests 7 reached" in stops(tmp_path, capsys, server, "--max-requests", 7)
        assert len(server.calls) == 7 and len(rows(tmp_path, "responses.jsonl")) == 7
        assert infer(tmp_path, *online(server)) == 0
    assert len(server.calls) == len(typical)


def test_max_cost_is_not_exceeded(tmp_path, capsys):
    dataset(tmp_path, n_users=100)
    prices = (
        "--price-in",
        10,
        "--price-out",
        1000,
        "--max-tokens",
        10,
    )  # an answer costs 100 * 10 + 10 * 1000 millionths = 0.011
    with ChatServer(lambda n, body: {"body": chat(GOOD), "delay": 0.01}) as server:
        shown = stops(tmp_path, capsys, server, *prices, "--max-cost", 0.2)
    assert "--max-cost 0.2 would be exceeded" in shown
    assert 12 <= len(server.calls) <= 18 and len(server.calls) * 0.011 <= 0.2
    assert len(rows(tmp_path, "responses.jsonl")) == len(server.calls)


def test_dry_run_writes_and_calls_nothing(tmp_path, capsys):
    _, typical = dataset(tmp_path)
    with ChatServer(lambda n, body: GOOD) as server:
        assert not infer(tmp_path, *online(server, "--dry-run", "--price-in", 2, "--price-out", 5, "--max-tokens", 100))
        assert not server.calls and not (tmp_path / "tiny/04_infer_interests").exists()
        shown = capsys.readouterr().out
        assert infer(tmp_path, *online(server, "--max-tokens", 100)) == 0
    tokens = sum(-(-len(body["messages"][0]["content"]) // 4) + 8 for _, body in server.calls)
    assert f"{len(typical)} prompts, {len(typical)} without an answer: {tokens} prompt tokens (estimated)" in shown
    assert f"at most {(2 * tokens + 5 * 100 * len(typical)) / 1e6:.4f}" in shown
    infer(tmp_path, *online(server, "--dry-run", "--max-tokens", 100))
    assert f"{len(typical)} prompts, 0 without an answer: 0 prompt tokens" in capsys.readouterr().out


def test_dry_run_counts_with_the_tokenizer(tmp_path, llama, capsys):
    import transformers

    dataset(tmp_path, typical=[2, 3])
    infer(tmp_path, "--llm", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--dry-run", "--tokenizer", llama)
    shown = capsys.readouterr().out
    assert infer(tmp_path, "--item-text", "title") == 0  # offline, for the same prompts
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    prompts = [prompt_of(line) for line in rows(tmp_path, "requests.jsonl")]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 8 for text in prompts)
    assert f"2 prompts, 2 without an answer: {tokens} prompt tokens (counted)" in shown


# ---------------------------------------------------------------- the journal


def test_a_journal_cut_in_the_middle_of_a_line(tmp_path):
    requests = [Request(f"d/u{i}", {"model": "m", "n": i}) for i in range(3)]
    path = tmp_path / "responses.jsonl"
    journal = Journal(path)
    for request in requests[:2]:
        journal.add(record(request, json.loads(chat(GOOD + request.custom_id)), "openai"))
    journal.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole.index(b"\n") - 1):
        path.write_bytes(whole[:-cut])
        journal = Journal(path)
        journal.add(record(requests[2], json.loads(chat("third")), "openai"))
        found = [journal.get(r.key) for r in requests]
        journal.close()
        reread = Journal(path, writable=False)
        assert found == [reread.get(r.key) for r in requests]
        assert found[0]["custom_id"] == "d/u0" and found[2]["custom_id"] == "d/u2"
        assert (found[1] is None) == (reread.unreadable == 1) == (cut > 1)
        reread.close()


def test_an_answer_is_kept_when_a_later_call_fails(tmp_path):
    request = Request("d/u", {"model": "m"})
    journal = Journal(tmp_path / "j")
    journal.add(record(request, None, "openai", {"code": "transport", "message": "x"}))
    assert journal.get(request.key)["error"] and journal.answers(request.key) == 0
    journal.add(record(request, json.loads(chat(GOOD)), "openai"))
    journal.add(record(request, None, "openai", {"code": "transport", "message": "x"}))
    assert journal.get(request.key)["response"] and journal.answers(request.key) == 1
    journal.add(record(request, json.loads(chat("half a pair \ud83d")), "openai"))
    assert journal.answers(request.key) == 2
    journal.close()
    assert Journal(tmp_path / "j", writable=False).answers(request.key) == 2


def test_the_journals_memory_is_constant(tmp_path):
    """Its index lies in a file: 30,000 requests more take no more memory, where a dict would take 7 MiB."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    journal, memory = Journal(tmp_path / "j"), []
    for i in range(40_000):
        if i in (10_000, 39_999):
            memory.append(resident())
        journal.add(record(Request(f"d/u{i}", {"n": i}), {"id": "x"}, "openai"))
    journal.close()
    assert memory[1] - memory[0] < 3, memory
    journal = Journal(tmp_path / "j", writable=False)
    assert len(journal) == 40_000 and journal.get(Request("", {"n": 777}).key)["custom_id"] == "d/u777"
    assert Request("", {"n": 40_000}).key not in journal
    journal.close()


def test_keys_cover_model_messages_and_parameters_only():
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 0.0, "max_tokens": 5}
    key = Request("a/b", body, "b").key
    assert Request("other/user", dict(reversed(body.items())), "user", ({"title": "x"},)).key == key
    changed = [
        body | {"model": "n"},
        body | {"temperature": 0.1},
        body | {"max_tokens": 6},
        body | {"response_format": {"type": "json_object"}},
        body | {"messages": [{"role": "user", "content": "a "}]},
    ]
    assert len({key, *(Request("a/b", b).key for b in changed)}) == 6 and re.fullmatch("[0-9a-f]{64}", key)


def test_answers_serve_every_choice_of_typical_users(tmp_path):
    """Another preference gives other typical users: only those without an answer are asked, unless the request changes."""
    dataset(tmp_path, typical=[2, 3])
    with ChatServer(lambda n, body: GOOD) as server:
        assert infer(tmp_path, *online(server)) == 0
        assert len(server.calls) == 2
        dataset(tmp_path, typical=[5, 3, 4])
        assert infer(tmp_path, *online(server)) == 0
        assert len(server.calls) == 4 and [r["user"] for r in rows(tmp_path)] == [5, 3, 4]
        assert infer(tmp_path, *online(server, "--temperature", 0.7)) == 0
        assert len(server.calls) == 7


def test_a_second_answer_is_asked_for_in_a_later_run_too(tmp_path):
    """A run that was stopped between the first answers and the second ones goes on with the second ones."""
    dataset(tmp_path, typical=[2, 3])
    with ChatServer(lambda n, body: "Hmm?" if n < 2 else GOOD) as server:
        assert infer(tmp_path, *online(server, "--answer-attempts", 1, "--max-fallback", 1)) == 0
        assert {r["source"] for r in rows(tmp_path)} == {"titles"} and len(server.calls) == 2
        assert infer(tmp_path, *online(server)) == 0
    assert {r["outcome"] for r in rows(tmp_path)} == {"ok"} and len(server.calls) == 4


def test_killed_and_run_again(tmp_path):
    """kill -9 in the middle: nothing answered is asked again, and the result is that of an uninterrupted run."""
    _, typical = dataset(tmp_path, n_users=300)

    def answer(body):
        return '{"1": "taste %d"}' % (hash(body["messages"][0]["content"]) % 1000)

    with ChatServer(lambda n, body: {"body": chat(answer(body)), "delay": 0 if n < 60 else 1000}) as server:
        command = [
            sys.executable,
            str(STAGES / SCRIPT),
            "--data-dir",
            str(tmp_path),
            "--dataset",
            "tiny",
            *map(str, online(server)),
        ]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        journal = tmp_path / "tiny/04_infer_interests/responses.jsonl"
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") == 60):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 60 <= len(server.calls) <= 68 < len(typical)  # at most 8 were in flight
    with ChatServer(lambda n, body: answer(body)) as server:
        assert infer(tmp_path, *online(server)) == 0
        assert len(server.calls) == len(typical) - 60
        found = rows(tmp_path)
        dataset(tmp_path, n_users=300, name="whole")
        assert infer(tmp_path, *online(server), name="whole") == 0
    assert [r["interests"] for r in found] == [r["interests"] for r in rows(tmp_path, name="whole")]


def test_an_interrupt_keeps_the_answers_in_flight(tmp_path):
    """Ctrl-C: no new call, and what was under way (and is paid for) is journaled."""
    dataset(tmp_path, n_users=100)
    with ChatServer(lambda n, body: {"body": chat(GOOD), "delay": 0.05 if n < 5 else 1.5}) as server:
        command = [sys.executable, str(STAGES / SCRIPT), "--data-dir", str(tmp_path), "--dataset", "tiny", *map(str, online(server))]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(server.calls) < 9 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=300)[1]
    assert process.returncode == 3 and "interrupted: waiting for the calls in flight" in shown and "Traceback" not in shown
    assert len(rows(tmp_path, "responses.jsonl")) == len(server.calls) < 80


def test_reparse_calls_nothing(tmp_path, monkeypatch):
    dataset(tmp_path, typical=[2, 3, 4])
    with ChatServer(lambda n, body: "no JSON; tastes: gel pens") as server:
        assert infer(tmp_path, *online(server, "--max-fallback", 1)) == 0
    assert {r["outcome"] for r in rows(tmp_path)} == {"unparsable"}
    monkeypatch.setattr(
        eimf.prompts, "parse_interests", lambda text, reason: parse_interests(json.dumps({"1": text.split(": ")[1]}), reason)
    )
    assert infer(tmp_path, *online(server, "--reparse")) == 0  # the server is closed: a call would fail
    assert [(r["outcome"], r["interests"]) for r in rows(tmp_path)] == [("ok", ["gel pens"])] * 3


def test_equal_prompts_are_asked_once(tmp_path):
    write_dataset(tmp_path, ITEMS, [[1, 2, 3]] * 4, [0] * 4)
    finished_stage(tmp_path, "tiny", "03_cluster_users", lambda f: save_array(f / "typical_users.npy", np.arange(4)))
    with ChatServer(lambda n, body: GOOD) as server:
        assert infer(tmp_path, *online(server)) == 0
    assert len(server.calls) == 1 and [r["id"] for r in rows(tmp_path)] == ["U0", "U1", "U2", "U3"]
    assert {r["outcome"] for r in rows(tmp_path)} == {"ok"}


def test_shards_split_the_work_and_are_joined(tmp_path):
    _, typical = dataset(tmp_path, n_users=40)
    with ChatServer(lambda n, body: GOOD) as server:
        sizes = []
        for i in (1, 2, 3):
            assert infer(tmp_path, *online(server, "--shard", f"{i}/3")) == 0
            sizes.append(len(server.calls))
        assert sizes == [11, 22, 32] and len(typical) == 32
        assert not (tmp_path / "tiny/04_infer_interests/interests.jsonl").exists()
        assert infer(tmp_path, *online(server)) == 0
    assert len(server.calls) == 32 and Counter(r["outcome"] for r in rows(tmp_path)) == {"ok": 32}
    for i in (1, 2):
        assert infer(tmp_path, "--task", "partition", "--shard", f"{i}/2") == 0
    assert infer(tmp_path, "--task", "partition", "--reparse") == 0  # joins the shards' answers, asks nothing
    assert Counter(r["source"] for r in rows(tmp_path, "partition/groups.jsonl")) == {"offline": 32}


# ---------------------------------------------------------------- prompts of one's own, the second task


def test_prompt_file(tmp_path):
    events, _ = dataset(tmp_path, typical=[2])
    path = tmp_path / "prompt.txt"
    path.write_text('For {dataset}: {history}. Up to {max_interests}, as {"1": "x"}.')
    with ChatServer(lambda n, body: GOOD) as server:
        assert infer(tmp_path, *online(server, "--prompt-file", path)) == 0
        shown = ", ".join(f"{ITEMS[i - 1]['title']} (I{i})" for i in events[2] if ITEMS[i - 1].get("title"))
        assert server.calls[0][1]["messages"] == [{"role": "user", "content": f'For tiny: [{shown}]. Up to 20, as {{"1": "x"}}.'}]
        path.write_text("About {histroy}")
        with pytest.raises(UserError, match=r"prompt.txt: unknown placeholder \{histroy\}; known are \{history\}"):
            infer(tmp_path, *online(server, "--prompt-file", path))
    assert len(server.calls) == 1


def test_partition_task(tmp_path):
    events, typical = dataset(tmp_path, typical=[2, 3, 4])
    replies = iter(['{"pens": [1], "rest": %s}', '{"pens": [1, 2]}', "nothing"] + ["nothing"] * 9)

    def behave(number, body):
        n = len(re.findall(r"^\d+\. ", body["messages"][0]["content"], re.M))
        reply = next(replies)
        return reply % list(range(2, n + 1)) if "%s" in reply else reply

    with ChatServer(behave) as server:
        assert infer(tmp_path, *online(server, "--task", "partition", "--concurrency", 1, "--max-fallback", 1)) == 0
    found = rows(tmp_path, "partition/groups.jsonl")
    for row, user in zip(found, typical, strict=True):
        shown = [i for i in events[user] if ITEMS[i - 1].get("title")]
        assert (row["user"], row["items"]) == (user, shown)
        assert sorted(i for g in row["groups"] for i in g["items"]) == list(range(1, len(shown) + 1))
    assert (found[0]["outcome"], [g["name"] for g in found[0]["groups"]]) == ("ok", ["pens", "rest"])
    assert found[1]["outcome"] == "unparsable" and found[1]["groups"][0]["name"] == "all"  # two of many placed
    assert (found[2]["outcome"], found[2]["source"]) == ("unparsable", "titles")
    assert infer(tmp_path, "--task", "partition", "--users", "all") == 0  # offline, beside the interests' own folder
    assert len(rows(tmp_path, "partition/groups.jsonl")) == 8
    assert infer(tmp_path) == 0 and len(rows(tmp_path)) == 3


# ---------------------------------------------------------------- the key


def test_the_key_is_nowhere(tmp_path, capsys):
    """The server echoes the key in answers and errors; neither files, output, nor the process list hold it."""
    dataset(tmp_path, n_users=14)
    key_file = tmp_path.parent / f"{tmp_path.name}.key"
    key_file.write_text(KEY + "\n")
    shown = []

    def behave(number, body):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                shown.append(Path(f"/proc/{pid}/cmdline").read_bytes())
            except OSError:
                pass
        if number % 3 == 1:
            return {"status": 500, "body": json.dumps({"error": {"message": f"bad {KEY}"}}).encode()}
        if number % 3 == 2:
            return {"status": 400, "body": json.dumps({"error": {"message": f"rejected {KEY}"}}).encode()}
        return json.dumps({"1": f"taste for {KEY}", "2": "pens"})

    with ChatServer(behave) as server:
        done = run_stage(
            SCRIPT,
            "--data-dir",
            tmp_path,
            "--dataset",
            "tiny",
            *online(server, "--api-key-file", key_file, "--max-fallback", 1, "--concurrency", 2),
            check=False,
        )
    assert done.returncode == 0 and all(h["Authorization"] == f"Bearer {KEY}" for _, h in server.headers)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"[key]" in written and b"taste for" in written
    for place in (written, done.stdout.encode(), done.stderr.encode(), *shown):
        assert KEY.encode() not in place
    assert any(SCRIPT.encode() in line for line in shown)


def test_a_malformed_key_is_not_shown(tmp_path, monkeypatch, capsys):
    dataset(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\nInjected: header")
    with pytest.raises(UserError, match="holds spaces, line ends") as error:
        infer(tmp_path, "--llm", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    assert KEY not in str(error.value)
    for url in (f"http://user:{KEY}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={KEY}"):
        with pytest.raises(UserError, match="must hold no user name") as error:
            infer(tmp_path, "--llm", "openai", "--base-url", url, "--model", "m")
        assert KEY not in str(error.value)


def test_endpoints(monkeypatch, tmp_path):
    find = eimf.chat.find_endpoint
    with pytest.raises(UserError, match="no key for https://api.openai.com/v1: set OPENAI_API_KEY"):
        find(None, "m", None)
    monkeypatch.setenv("DASHSCOPE_API_KEY", "dash")
    assert find(None, None, None) == (eimf.chat.DASHSCOPE, "qwen-turbo", "dash")
    assert find("http://localhost:8000/v1/", "m", None) == (
        "http://localhost:8000/v1",
        "m",
        None,
    )  # its key goes to no other host
    monkeypatch.setenv("OPENAI_API_KEY", "open")
    assert find(None, "m", None) == (eimf.chat.OPENAI, "m", "open") and find(eimf.chat.DASHSCOPE, "q", None)[2] == "dash"
    with pytest.raises(UserError, match="needs --model NAME"):
        find(None, None, None)
    with pytest.raises(UserError, match="expected http"):
        find("localhost:8000", "m", None)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-cost", "1"),
        ("--shard", "4/3"),
        ("--llm", "recorded"),
        ("--users", "all"),
        ("--attempts", "0"),
        ("--api-key", "x"),
        ("--llm", "other"),
    ],
)
def test_wrong_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        call_stage(SCRIPT, *arguments)
    assert exit_.value.code == 2 and "usage:" in capsys.readouterr().err


def test_exit_codes_of_the_process(tmp_path):
    dataset(tmp_path, typical=[2, 3])
    (tmp_path / "none.jsonl").write_text("")
    model = ("--llm", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    for code, flags, shown in (
        (0, (), "2 users by offline"),
        (1, ("--prompt-file", tmp_path / "absent"), "error: "),
        (2, ("--shard", "x"), "usage:"),
        (3, (*model, "--import-responses", tmp_path / "none.jsonl"), "2 of 2 prompts were never asked"),
        (4, (*model, "--import-responses", tmp_path / "none.jsonl", "--finish-anyway"), "2 on the fallback"),
    ):
        done = run_stage(SCRIPT, "--data-dir", tmp_path, "--dataset", "tiny", *flags, check=False)
        assert done.returncode == code and shown in done.stderr and "Traceback" not in done.stderr, done.stderr


# ---------------------------------------------------------------- the recorded answers for Office


@pytest.mark.slow
def test_recorded_office_answers(shared, tmp_path):
    """Every recorded answer parses strictly; any choice of typical users finds its own."""
    path = shared / "llm/Office_Products.responses.jsonl.gz"
    with gzip.open(path, "rt") as file:
        recorded = {
            (d := json.loads(line))["custom_id"].split("/")[1]: d["response"]["body"]["choices"][0]["message"]["content"]
            for line in file
        }
    users = sorted(recorded)
    write_dataset(tmp_path, ITEMS, [[1, 2, 3, 4, 5]] * len(users), [0] * len(users), dataset="office")
    (tmp_path / "office/01_preprocess/users.txt").write_text("\n".join(users) + "\n")
    manifest = load_json(tmp_path / "office/01_preprocess/manifest.json")
    manifest["outputs"]["users.txt"]["bytes"] = (tmp_path / "office/01_preprocess/users.txt").stat().st_size
    (tmp_path / "office/01_preprocess/manifest.json").write_text(json.dumps(manifest))
    typical = np.random.default_rng(0).permutation(len(users))
    finished_stage(tmp_path, "office", "03_cluster_users", lambda f: save_array(f / "typical_users.npy", typical))
    assert infer(tmp_path, "--llm", "recorded", "--responses", path, "--match", "user", name="office") == 0
    found = rows(tmp_path, name="office")
    assert len(found) == 4905 and {(r["outcome"], r["source"], r["model"]) for r in found} == {("ok", "recorded", "recorded-llm")}
    for row in found:
        assert row["interests"] == list(json.loads(recorded[row["id"]]).values())


@pytest.mark.slow
@pytest.mark.parametrize("split", ["random", "file-order"])
def test_recorded_answers_serve_office_with_any_typical_users(shared, tmp_path, run_script, split):
    """The real data set, all training users as typical users in any order, then a few."""
    name, path = "Office_Products", shared / "llm/Office_Products.responses.jsonl.gz"
    raw = shared / "data/raw"
    done = run_script("stages/01_preprocess.py", "--data-dir", tmp_path, "--dataset", name, "--raw-dir", raw, "--split", split)
    assert done.returncode == 0, done.stderr
    with gzip.open(path, "rt") as file:
        recorded = {
            (d := json.loads(line))["custom_id"].split("/")[1]: d["response"]["body"]["choices"][0]["message"]["content"]
            for line in file
        }
    ids = (tmp_path / name / "01_preprocess/users.txt").read_text().split("\n")
    training = np.random.default_rng(1).permutation(np.flatnonzero(np.load(tmp_path / name / "01_preprocess/split.npy") == 0))
    assert len(training) == 3924
    for typical in (training, training[:117], training[-1:]):
        finished_stage(tmp_path, name, "03_cluster_users", lambda folder, t=typical: save_array(folder / "typical_users.npy", t))
        assert infer(tmp_path, "--llm", "recorded", "--responses", path, "--match", "user", name=name) == 0
        found = rows(tmp_path, name=name)
        assert [row["user"] for row in found] == typical.tolist() and [row["id"] for row in found] == [ids[u] for u in typical]
        assert {(row["outcome"], row["source"]) for row in found} == {("ok", "recorded")}
        assert all(row["interests"] == list(json.loads(recorded[row["id"]]).values()) for row in found)
        report = load_json(tmp_path / name / "04_infer_interests/leakage.json")
        assert report["prompts"] == len(typical) and report["events_of_validation_and_test_users"] == 0


# ---------------------------------------------------------------- real models and a real server


def make_tiny_llama(folder):
    """A randomly initialised Llama of one layer with a word tokenizer and a chat template."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", *'{}[]":,.0123456789 abcdefghijklmnopqrstuvwxyz']
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


def test_local_model(tmp_path, llama):
    """The texts equal transformers' own greedy generation of each prompt alone; usage is counted; answers are journaled by model."""
    import torch
    import transformers

    _, typical = dataset(tmp_path, typical=[2, 3, 4])
    arguments = (
        "--llm",
        "local",
        "--model",
        llama,
        "--max-tokens",
        12,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--max-fallback",
        1,
    )
    assert infer(tmp_path, *arguments, "--answer-attempts", 1) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found = {r["custom_id"]: r for r in rows(tmp_path, "responses.jsonl")}
    for line in rows(tmp_path, "requests.jsonl"):
        text = tokenizer.apply_chat_template(line["body"]["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        body = found[line["custom_id"]]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert body["usage"] == {"prompt_tokens": ids.shape[1], "completion_tokens": len(expected)}
        assert body["choices"][0]["finish_reason"] == ("stop" if expected[-1] == 2 else "length")
    size = (tmp_path / "tiny/04_infer_interests/responses.jsonl").stat().st_size
    assert infer(tmp_path, *arguments, "--answer-attempts", 1) == 0
    assert (tmp_path / "tiny/04_infer_interests/responses.jsonl").stat().st_size == size
    with pytest.raises(UserError, match="no config.json there"):
        infer(tmp_path, "--llm", "local", "--model", tmp_path)


def test_local_model_out_of_memory_and_too_long(tmp_path, llama, monkeypatch):
    """A batch that does not fit is halved; a single prompt that does not fit, or is too long for the model, is recorded as failed."""
    import torch

    from eimf.llm import Local

    local = Local(llama, "cpu", batch_size=4)
    body = {"model": local.model, "temperature": 0.0, "max_tokens": 4}
    requests = [Request(f"d/u{i}", body | {"messages": [{"role": "user", "content": "pens " * (i + 1)}]}) for i in range(5)]
    expected = {r["custom_id"]: r for r in local.answers(requests)}
    generate, sizes = local.network.generate, []

    def small(**tokens):
        sizes.append(len(tokens["input_ids"]))
        if sizes[-1] > 1 or "u4" in failing:
            raise torch.cuda.OutOfMemoryError
        return generate(**tokens)

    monkeypatch.setattr(local.network, "generate", small)
    failing = []
    found = {r["custom_id"]: r for r in local.answers(requests)}
    assert sizes == [4, 2, 1, 1, 2, 1, 1, 1] and local.batch_size == 1
    for name, entry in found.items():
        text = entry["response"]["body"]["choices"][0]["message"]["content"]
        assert text == expected[name]["response"]["body"]["choices"][0]["message"]["content"]
    failing.append("u4")
    assert [r["error"]["code"] for r in local.answers(requests[4:])] == ["out_of_memory"]
    long = Request("d/long", requests[0].body | {"max_tokens": 5000})
    assert [r["error"]["code"] for r in local.answers([long])] == ["rejected"]


@pytest.mark.slow
def test_a_real_openai_compatible_server(tmp_path, llama):
    """`transformers serve` on loopback: another implementation of the protocol accepts our requests and we read its answers."""
    pytest.importorskip("openai", reason="transformers serve needs openai and accelerate")
    pytest.importorskip("accelerate", reason="transformers serve needs openai and accelerate")
    import requests

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    _, typical = dataset(tmp_path)
    env, log = os.environ | {"HF_HUB_OFFLINE": "1"}, tmp_path / "server.log"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "transformers.cli.transformers",
            "serve",
            str(llama),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        env=env,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            except requests.RequestException:
                time.sleep(0.3)
        assert (
            infer(
                tmp_path,
                "--llm",
                "openai",
                "--base-url",
                f"http://127.0.0.1:{port}/v1",
                "--model",
                llama,
                "--max-tokens",
                16,
                "--concurrency",
                2,
                "--answer-attempts",
                1,
                "--max-fallback",
                1,
            )
            == 0
        )
    finally:
        server.kill()
        server.wait()
    answers = rows(tmp_path, "responses.jsonl")
    assert len(answers) == len(typical) and all(r["response"]["body"]["object"] == "chat.completion" for r in answers)
    assert all(r["response"]["body"]["usage"]["completion_tokens"] > 0 for r in answers)
    assert {r["outcome"] for r in rows(tmp_path)} <= {
        "truncated",
        "unparsable",
        "repaired",
    }  # a random model seldom says what can be read
    assert len(rows(tmp_path)) == len(typical) and all(r["interests"] for r in rows(tmp_path))
