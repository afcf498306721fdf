"""Serve an exported model: one answer on the command line, or an HTTP server (paper, 3.4).

Reads   01_preprocess/     items.jsonl, users.txt, sequences (--user, --example and popularity)
        06_train/<run>/    model.pt2, item_vectors.npy float32 (items + 1, D), item_ids.txt, config.json
        07_evaluate/<run>/ index.hnsw and index.json                                  with --retrieval hnsw only
Writes  nothing

    python stages/08_serve.py --dataset sample --example                  # a test user's history and recommendations
    python stages/08_serve.py --dataset sample --history ID,ID --k 10     # the same for any history
    python stages/08_serve.py --dataset sample --serve --port 8000        # POST /recommend, GET /health

Prints rank, score, winning interest, id and title of each item, or with --json one JSON object. No text model and no LLM
is used: a history goes through the exported model, and items are ranked by the maximum over its interests.
"""
import json
import shutil
import sys

import numpy as np
import torch

from eimf.artifacts import Stage, UserError, argument_parser, load_json, run
from eimf.recommender import Query, Recommender


def parse(argv):
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--run", help="a run under 06_train; by default the newest finished one that EIMF taught, else the newest")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--history", help="item ids, oldest first, separated by commas; empty for a new user")
    mode.add_argument("--user", help="id of a user of the data set; all recorded events are the history")
    mode.add_argument("--example", action="store_true", help="show the test user whose history has the median length")
    mode.add_argument("--serve", action="store_true", help="answer over HTTP until stopped")
    add("--k", type=int, default=20, help="items to recommend")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--exclude-seen", dest="exclude_seen", action="store_true", default=True,
                      help="leave out items of the history")
    seen.add_argument("--keep-seen", dest="exclude_seen", action="store_false", help="items of the history may come again")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--retrieval", choices=["exact", "hnsw"], default="exact", help="rank all items, or candidates of 07's index")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    add("--threads", type=int, default=0, help="CPU threads; 0 means all cores, and one for --serve")
    args = parser.parse_args(argv)
    if args.k < 1:
        parser.error(f"--k must be at least 1, got {args.k}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {args.port}")
    return args


def choose_run(args):
    """The run to serve: --run, else the newest finished run that EIMF taught, else the newest. Says which on stderr."""
    if args.run:
        return args.run
    found = []
    for path in (args.data_dir / args.dataset / "06_train").glob("*/manifest.json"):
        config = load_json(path.parent / "config.json")
        found.append((config["eimf"] and not config["control"], load_json(path)["finished"], path.parent.name))
    if not found:
        raise UserError(f"no finished run in {args.data_dir / args.dataset / '06_train'}. "
                        f"Run: python stages/06_train.py --dataset {args.dataset}")
    taught, _, name = max(found)
    print(f"run {name}, the newest finished one" + (" that EIMF taught" if taught else ""), file=sys.stderr)
    return name


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


def table(answer, held_out=()):
    """Lines for people: what is known of the history, then ranked items."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    lines = []
    if answer["unknown_items"]:
        lines.append("unknown items, ignored: " + ", ".join(answer["unknown_items"]))
    if answer["fallback"]:
        lines.append("no known item in the history, so these are the most popular items (score: events in training)")
    for interest in answer["interests"]:
        because = "; ".join(i["title"] or i["id"] for i in interest["because_of"])
        lines.append(f"interest {interest['interest']}, because of: {because}"[:width])
    wide = max([len(item["id"]) for item in answer["items"]], default=2)
    lines.append(f"{'rank':>4}  {'score':>9}  interest  {'id':<{wide}}  title")
    for item in answer["items"]:
        mark = " *" if item["id"] in held_out else ""
        interest = "-" if item["interest"] is None else item["interest"]
        line = f"{item['rank']:>4}  {item['score']:>9.3f}  {interest:>8}  {item['id']:<{wide}}  {item['title'] or '(no title)'}"
        lines.append(line[:width - len(mark)] + mark)
    return lines


def one_shot(args, recommender):
    """Answer --history, --user or --example on stdout."""
    settings = {"k": args.k, "exclude_seen": args.exclude_seen}
    user, held_out = args.user, []
    if args.example:
        user, ids, held_out = example(recommender)
        query = Query(history=tuple(ids), **settings)
    elif args.user is not None:
        if user not in recommender.users:
            raise UserError(f"--user {user}: no such user among the {len(recommender.users)} of {args.dataset}. "
                            "Ids are the lines of 01_preprocess/users.txt; for anyone else give --history.")
        query = recommender.query_of_user(user, **settings)
    else:
        query = Query(history=tuple(i.strip() for i in args.history.split(",") if i.strip()), **settings)
    answer = recommender.recommend([query])[0]
    result = recommender.describe(answer)
    if user is not None:
        result = {"user": user, "history": [recommender.item(n) for n in answer.history.tolist()]} | result
    if args.example:
        result["held_out"] = held_out
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    if user is not None:
        print(f"user {user}, {len(answer.history)} events, oldest first; the model reads the newest {recommender.max_len}")
        for item in result["history"][-recommender.max_len:]:
            print(f"  {item['id']}  {item['title'] or '(no title)'}"[:118])
    print(*table(result, held_out), sep="\n")
    if args.example:
        found = len({item["id"] for item in result["items"]} & set(held_out))
        print(f"* {found} of the {len(set(held_out))} items that this user took next, which the model has not seen")


def main(argv=None):
    args = parse(argv)
    threads = args.threads or (1 if args.serve else 0)
    if threads:
        torch.set_num_threads(threads)
    name = choose_run(args)
    recommender = Recommender(Stage("08_serve", args), name, args.retrieval, threads)
    if not args.serve:
        return one_shot(args, recommender)
    from eimf import service  # the web framework takes half a second to import, which a one-shot answer need not wait for
    return service.serve(recommender, args.host, args.port)


if __name__ == "__main__":
    run(main)
