"""Serve an exported model: answers on the command line, JSON lines for scripts, or an HTTP server with a page (paper, 3.4).

Reads   01_preprocess/     items.jsonl, users.txt, sequences (for users of the data set and for popularity)
        06_train/<run>/    model.pt2, item_vectors.npy float32 (items + 1, D), item_ids.txt, config.json; where there:
                           label_vectors.npy float32 (labels, D), labels.jsonl {"text", "cluster"}, labels.json {"source"},
                           map_projection.npy float32 (D + 1, 2)
        07_evaluate/<run>/ index.hnsw, index.json, metrics.json                             for retrieval by the index
Writes  nothing, or with --export-vectors DIR
        item_vectors.npy float32 (items, D), items.jsonl {"row", "id", "title"}; interest_vectors.npy float32
        (users * K, D), interests.jsonl {"row", "user", "interest"}; all users of the data set with their whole histories

    python stages/08_serve.py --dataset sample --example               # a test user's history and recommendations
    python stages/08_serve.py --dataset sample --history ID,ID --k 10  # recommendations for any history
    python stages/08_serve.py --dataset sample --lines < in > out      # one JSON object per line, as POST /recommend takes
    python stages/08_serve.py --dataset sample --serve --port 8000     # the API (GET /openapi.json) and a page at /

Prints rank, score, winning interest, id and title of each item, or with --json one JSON object. No text model and no LLM
is used: a history goes through the exported model, and items are ranked by the maximum over its interests. The server
listens on 127.0.0.1 unless told otherwise; if EIMF_TOKEN is set, requests need it as a bearer token.
"""
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from eimf.artifacts import UserError, argument_parser, check_ranges, run, save_array, save_lines
from eimf.data import padded
from eimf.ranking import interests_of
from eimf.recommender import Query, Recommender, choose_run

CHUNK = 256  # lines answered together by --lines: more rank no faster, and answers would come later


def parse(argv):
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--run", help="a run under 06_train; by default the newest finished one that EIMF taught, else the newest")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--history", help="item ids, oldest first, separated by commas; empty for a new user")
    mode.add_argument("--user", help="id of a user of the data set; all recorded events are the history")
    mode.add_argument("--example", action="store_true", help="show the test user whose history has the median length")
    mode.add_argument("--lines", action="store_true", help="read requests as JSON lines from stdin, write answers to stdout")
    mode.add_argument("--export-vectors", type=Path, metavar="DIR", help="write item and interest vectors with their ids")
    mode.add_argument("--serve", action="store_true", help="answer over HTTP until stopped")
    add("--k", type=int, default=20, help="items to recommend; with --lines and --serve the request says it")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--exclude-seen", dest="exclude_seen", action="store_true", default=True,
                      help="leave out items of the history")
    seen.add_argument("--keep-seen", dest="exclude_seen", action="store_false", help="items of the history may come again")
    add("--diversity", type=float, default=0.0, help="0 to 1, ComiRec's lambda on scores scaled to 0..1; 0 ranks by score")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--retrieval", choices=["auto", "exact", "hnsw"], default="auto",
        help="rank all items, or candidates of 07's index; auto takes the index of a large catalogue if 07 found it twice as fast and "
             "0.99 right")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    add("--workers", type=int, default=1, help="server processes that share the port")
    add("--reload-seconds", type=float, default=2.0, help="how often the server looks for a new export")
    add("--threads", type=int, default=0, help="CPU threads; 0 means all cores, and one per worker of the server")
    args = parser.parse_args(argv)
    check_ranges(parser, args, k=1, port=(0, 65535), workers=(1, 64), diversity=(0, 1), reload_seconds=(.05, 3600), threads=0)
    return args


def example(recommender):
    """(user id, history ids, ids held out) of the test user with the median history length; the first of equals."""
    interactions = recommender.interactions
    users, start, middle, end = interactions.evaluation_ranges("test")
    if not len(users):
        raise UserError("there are no test users; stage 01 needs at least 10 users to split 8:1:1")
    u = np.argsort(middle - start, kind="stable")[len(users) // 2]
    ids = [recommender.ids[n] for n in interactions.items[start[u]:end[u]].tolist()]
    names = {number: name for name, number in recommender.users.items()}
    return names[int(users[u])], ids[:middle[u] - start[u]], ids[middle[u] - start[u]:]


def plain(text):
    """Text without what would move the cursor or change colours on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text or "(no title)")


def table(answer, held_out=()):
    """Lines for people: what is known of the history, then ranked items."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    lines = []
    if answer["unknown_items"]:
        lines.append("unknown items, ignored: " + ", ".join(map(plain, answer["unknown_items"])))
    if answer["fallback"]:
        lines.append("no known item in the history, so these are the most popular items (score: events in training)")
    for interest in answer["interests"]:
        label = interest["label"]
        if label:
            lines.append(f"interest {interest['interest']}: {plain(label['text'])} ({label['of']} of cluster {label['cluster']})"[:width])
        because = "; ".join(plain(i["title"] or i["id"]) for i in interest["because_of"])
        lines.append(f"{'    ' if label else 'interest ' + str(interest['interest']) + ','} because of: {because}"[:width])
    if answer["label_source"]:
        lines.append(f"(interest texts by: {answer['label_source']})")
    wide = max([len(item["id"]) for item in answer["items"]], default=2)
    lines.append(f"{'rank':>4}  {'score':>9}  interest  {'id':<{wide}}  title")
    for item in answer["items"]:
        mark = " *" if item["id"] in held_out else ""
        interest = "-" if item["interest"] is None else item["interest"]
        line = f"{item['rank']:>4}  {item['score']:>9.3f}  {interest:>8}  {plain(item['id']):<{wide}}  {plain(item['title'])}"
        lines.append(line[:width - len(mark)] + mark)
    return lines


def one_shot(args, recommender):
    """Answer --history, --user or --example on stdout."""
    settings = {"k": args.k, "exclude_seen": args.exclude_seen, "diversity": args.diversity}
    user, held_out = args.user, []
    if args.example:
        user, ids, held_out = example(recommender)
        query = Query(history=tuple(ids), **settings)
    elif user is not None:
        if user not in recommender.users:
            raise UserError(f"--user {user}: no such user among the {len(recommender.users)} of {args.dataset}. "
                            "Ids are the lines of 01_preprocess/users.txt; for anyone else give --history.")
        query = Query(user=user, **settings)
    else:
        query = Query(history=tuple(i.strip() for i in args.history.split(",") if i.strip()), **settings)
    result = ({"user": user} if user is not None else {}) | recommender.describe(recommender.recommend([query]))[0]
    if args.example:
        result["held_out"] = held_out
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    if user is not None:
        print(f"user {user}, {len(result['history'])} events, oldest first; the model reads the newest {recommender.max_len}")
        for item in result["history"][-recommender.max_len:]:
            print(f"  {plain(item['id'])}  {plain(item['title'])}"[:118])
    print(*table(result, held_out), sep="\n")
    if args.example:
        found = len({item["id"] for item in result["items"]} & set(held_out))
        print(f"* {found} of the {len(set(held_out))} items that this user took next, which the model has not seen")


def answer_chunk(recommender, lines):
    """(answers as JSON texts, number refused) of JSON lines, see answer_lines."""
    from eimf.recommender import encode, encode_list
    from eimf.service import RecommendRequest, Refused, failed, parse as validate
    queries, out = [], []
    for line in lines:
        try:
            query = validate(RecommendRequest, line).query()
            if query.user is not None and query.user not in recommender.users:
                raise failed(KeyError(query.user))
            queries.append(query)
            out.append(None)
        except Refused as error:
            out.append(encode({"detail": str(error), "code": error.code}))
    refused, ids = len(out) - len(queries), recommender.id_texts
    answers = iter(recommender.recommend(queries))
    for n, error in enumerate(out):
        if error is None:
            a = next(answers)
            scores = ", ".join([f"{score:.6f}" for score in a.scores])
            out[n] = (f'{{"items": [{", ".join([ids[i] for i in a.items])}], "scores": [{scores}], "interests": {a.winner}, '
                      f'"fallback": {encode(a.fallback)}, "unknown_items": {encode_list(a.unknown)}}}')
    return out, refused


_answer = None  # answer_chunk with its recommender, which the processes of answer_lines inherit


def _answer_here(lines):
    return _answer(lines)


@contextlib.contextmanager
def copies(work, number):
    """Connections to `number` copies of this process, which share the memory of what is loaded: send one something, receive work(it)."""
    context, connections = multiprocessing.get_context("fork"), []

    def serve(connection):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; a copy ends when its connection does
        with contextlib.suppress(EOFError, OSError):
            while True:
                connection.send(work(connection.recv()))

    for _ in range(number):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs,), daemon=True).start()
        theirs.close()
        connections.append(ours)
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def answered(work, chunks, connections):
    """work(chunk) of each chunk, in order, by the copies in turn. None has two chunks, or both ends of its pipe could wait to write."""
    waiting = deque()
    try:
        for chunk, connection in zip(chunks, cycle(connections)):
            result = waiting.popleft().recv() if len(waiting) == len(connections) else None
            connection.send(chunk)
            waiting.append(connection)
            if result is not None:
                yield result
        while waiting:
            yield waiting.popleft().recv()
    except (EOFError, ConnectionError):
        raise UserError("a process that answers lines has ended; if the system killed it for memory, give fewer --threads") from None


def answer_lines(recommender, source, sink, workers):
    """JSON lines in, JSON lines out, in the same order: {"items", "scores", "interests", "fallback", "unknown_items"}, the
    first three lists in rank order, or {"detail", "code"} for a line that cannot be answered. Returns (lines, refused).

    By `workers` processes: threads would answer a fifth fewer, since only one of them at a time runs Python. Elsewhere than on
    Linux a copy of a process that has loaded all this may not compute, and this process answers alone.
    """
    lines = refused = 0
    work, chunks = partial(answer_chunk, recommender), iter(lambda: list(islice(source, CHUNK)), [])
    with copies(work, workers if workers > 1 and sys.platform == "linux" else 0) as connections:
        for out, bad in answered(work, chunks, connections) if connections else map(work, chunks):
            lines, refused = lines + len(out), refused + bad
            sink.write("\n".join(out) + "\n")
            sink.flush()
    return lines, refused


def export_vectors(recommender, folder):
    """Item and interest vectors with their ids, for a vector database or a warehouse."""
    folder.mkdir(parents=True, exist_ok=True)
    save_array(folder / "item_vectors.npy", recommender.vectors[1:])
    save_lines(folder / "items.jsonl", ({"row": n - 1, "id": recommender.ids[n], "title": recommender.titles[n]}
                                        for n in range(1, len(recommender.ids))))
    interactions = recommender.interactions
    history = padded(interactions.items, interactions.offsets[:-1], interactions.offsets[1:], recommender.max_len)
    interests, _ = interests_of(recommender.model, history)  # (U, K, D)
    users, k, dim = interests.shape
    save_array(folder / "interest_vectors.npy", interests.reshape(users * k, dim))
    save_lines(folder / "interests.jsonl", ({"row": u * k + i, "user": user, "interest": i}
                                            for user, u in recommender.users.items() for i in range(k)))
    print(f"{len(recommender.vectors) - 1} item vectors and {users * k} interest vectors ({k} for each of {users} users) of {dim} "
          f"dimensions in {folder}. Score: inner product, maximum over a user's interests.")


def available_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(argv=None):
    args = parse(argv)
    name = args.run
    if name is None:
        name, reason = choose_run(args.data_dir, args.dataset)
        print(f"run {name}, {reason}", file=sys.stderr)
    if args.serve:
        from eimf import server  # the web framework takes half a second to import, which the other modes need not wait for
        if args.host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get("EIMF_TOKEN"):
            print(f"note: {args.host} can be reached by others and EIMF_TOKEN is not set", file=sys.stderr)
        return server.serve({"data_dir": str(args.data_dir.resolve()), "dataset": args.dataset, "run": args.run,
                             "retrieval": args.retrieval, "threads": args.threads or 1, "reload_seconds": args.reload_seconds},
                            args.host, args.port, args.workers)
    threads = args.threads or available_cores()
    # --lines answers in processes of its own, each of which computes alone.
    torch.set_num_threads(1 if args.lines else threads)
    recommender = Recommender(args.data_dir, args.dataset, name, args.retrieval, 1 if args.lines else threads)
    if args.lines:
        gc.freeze()  # the item table stays; looking through it for garbage again and again would take a fifth of the time
        started = time.perf_counter()
        lines, refused = answer_lines(recommender, sys.stdin.buffer, sys.stdout, threads)
        print(f"{lines} lines answered, {refused} of them refused, {lines / (time.perf_counter() - started):,.0f} a second", file=sys.stderr)
    elif args.export_vectors:
        export_vectors(recommender, args.export_vectors)
    else:
        one_shot(args, recommender)
    return None


if __name__ == "__main__":
    run(main)
