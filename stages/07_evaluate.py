"""Evaluate exported models on validation and test users, and build the search index (paper, 4.1 and 3.4).

Reads   01_preprocess/     sequences, split
        06_train/<run>/    model.pt2, item_vectors.npy float32 (items + 1, D), config.json, log.jsonl
Writes  07_evaluate/<run>/
        metrics.json       "test" and "valid": means of recall, ndcg, hr at 5, 10, 20, 50, and ndcg_published at 20, 50;
                           "ann": the index against exact search; "diversity" of the interests
        test_users.npy     int64 (U,) user numbers; test_values.npy float32 (U, metrics), columns named in metrics.json;
                           test_ranked.npy int32 (U, 50), the items as ranked, -1 where there is none
        index.hnsw, index.json   HNSW index over the item vectors (label = item number) and the facts to check it by
        report.md, report.html   the same as text and as a page with plots
        07_evaluate/summary.json, summary.md   runs evaluated on the present data and with the same --remove-seen: mean and standard
                           deviation over seeds

    python stages/07_evaluate.py --dataset sample                  # every finished run
    python stages/07_evaluate.py --dataset sample --run remi-s0    # one run
    torchrun --standalone --nproc-per-node 2 -- stages/07_evaluate.py --dataset sample    # the processes share the users

Prints the summary table. Only the exported archive is used, never the model's class, so what is measured is what is
served. Shapes: U users, K interests, L history length, D dimension.
"""
import re
import time

import hnswlib
import numpy as np
import torch

from eimf import parallel, report
from eimf.artifacts import (Stage, UserError, argument_parser, atomic, check_ranges, command, load_array, load_json, load_lines, run,
                            save_array, save_json, sha256)
from eimf.data import load_interactions, padded, range_positions
from eimf.export import load_export
from eimf.metrics import hit_matrix, ndcg_published, per_user
from eimf.published import published
from eimf.ranking import interests_of, rank, targets_of
from eimf.statistics import bootstrap

CUTOFFS = (5, 10, 20, 50)
SHOWN = ("recall@20", "recall@50", "ndcg@20", "ndcg@50", "hr@20", "hr@50")


def parse(argv):
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--run", nargs="+", help="names of runs under 06_train; by default all finished ones")
    add("--remove-seen", action="store_true", help="leave the user's history out of the ranking (paper: keeps it)")
    add("--hnsw-m", type=int, default=16, help="links per node of the HNSW graph")
    add("--hnsw-ef", type=int, default=200, help="candidates kept while building and searching the HNSW graph")
    add("--threads", type=int, default=0, help="CPU threads; 0 means all cores")
    args = parser.parse_args(argv)
    check_ranges(parser, args, hnsw_m=2, hnsw_ef=1, threads=0)
    return args


def evaluate(interactions, part, model, item_vectors, args, max_len):
    """Metrics of one part. Returns (users, names, values (U, metrics), ranked (U, 50), winner (U, 50), interests, routing)."""
    users, start, middle, end = interactions.evaluation_ranges(part)
    if not len(users):
        raise UserError(f"there are no {part} users; stage 01 needs at least 10 users to split 8:1:1")
    start, middle, end = map(parallel.share, (start, middle, end))
    interests, routing = interests_of(model, padded(interactions.items, start, middle, max_len))
    seen = None
    if args.remove_seen:
        seen = np.concatenate([[0], np.cumsum(middle - start)]), interactions.items[range_positions(start, middle)].astype(np.int64)
    ranked, _, winner = rank(interests, item_vectors, max(CUTOFFS), seen, args.threads)
    targets = targets_of(interactions.items, middle, end)
    hits, n_targets = hit_matrix(ranked, *targets)
    columns = per_user(hits, n_targets, CUTOFFS)
    columns |= {f"ndcg_published@{k}": ndcg_published(ranked, *targets, k) for k in (20, 50)}
    by_user = np.stack(list(columns.values()), 1), ranked, winner, interests, routing
    return users, list(columns), *(parallel.gather(torch.from_numpy(rows), len(users)).numpy() for rows in by_user)


def build_index(folder, item_vectors, args):
    """Build and save the HNSW index; its sidecar holds what hnswlib does not check on load, and ef, which it forgets."""
    n, dim = item_vectors.shape[0] - 1, item_vectors.shape[1]
    index = hnswlib.Index(space="ip", dim=dim)
    index.init_index(max_elements=n, M=args.hnsw_m, ef_construction=args.hnsw_ef, random_seed=0)
    # One thread inserts in a fixed order, so the file is the same on every run.
    index.add_items(item_vectors[1:], np.arange(1, n + 1), num_threads=1)
    with atomic(folder / "index.hnsw", "wb") as file:
        index.save_index(file.name)
    save_json(folder / "index.json", {"space": "ip", "dim": dim, "items": n, "m": args.hnsw_m, "ef": args.hnsw_ef,
                                      "sha256": sha256(folder / "index.hnsw")})
    return index


def measure_index(index, interests, item_vectors, exact, args):
    """Recall of the index's top 50 against the exact one, and users per second of both, one thread each.

    None if a search cannot return 50 items: inner product is no metric, and vectors that differ in little but length
    (popularity's are one number) leave a graph in which most items cannot be reached.
    """
    users, k, dim = interests.shape
    n = exact.shape[1]
    index.set_ef(max(args.hnsw_ef, n))
    started = time.perf_counter()
    try:
        labels, distances = index.knn_query(interests.reshape(-1, dim), k=min(n, len(item_vectors) - 1), num_threads=1)
    except RuntimeError:
        return None
    approximate = merge(labels.reshape(users, -1), 1 - distances.reshape(users, -1), n)
    hnsw_seconds = time.perf_counter() - started
    started = time.perf_counter()
    rank(interests, item_vectors, n, n_threads=1)
    exact_seconds = time.perf_counter() - started
    pairs = hit_matrix(approximate, np.repeat(np.arange(users), n)[exact.ravel() > 0], exact[exact > 0])
    return {"recall@50": round(float((pairs[0].sum(1) / pairs[1]).mean()), 5), "ef": args.hnsw_ef, "m": args.hnsw_m,
            "users_per_second_hnsw": round(users / hnsw_seconds), "users_per_second_exact": round(users / exact_seconds)}


def merge(labels, scores, n):
    """Top n distinct labels of each row by score: (U, C) candidates -> (U, n), -1 where fewer are left."""
    order = np.argsort(-scores, 1, kind="stable")
    labels = np.take_along_axis(labels.astype(np.int64), order, 1)
    by_label = np.argsort(labels, 1, kind="stable")  # the first of equal labels is the best-scored one
    ordered = np.take_along_axis(labels, by_label, 1)
    repeat = np.zeros_like(labels, dtype=bool)
    np.put_along_axis(repeat, by_label[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    first = np.argsort(repeat, 1, kind="stable")[:, :n]
    return np.where(np.take_along_axis(repeat, first, 1), -1, np.take_along_axis(labels, first, 1))


def diversity(interests, routing, history_length, winner):
    """How different a user's interests are: cosines (pairs,), entropies (U * K,), and each interest's wins (K,)."""
    unit = interests / np.linalg.norm(interests, axis=2, keepdims=True).clip(1e-12)
    cosine = unit @ unit.transpose(0, 2, 1)  # (U, K, K)
    upper = np.triu_indices(interests.shape[1], 1)
    long = history_length > 1  # the entropy over one event says nothing
    p = routing[long]
    entropy = -(p * np.log(p.clip(1e-12))).sum(2) / np.log(history_length[long])[:, None]  # (U, K), 1 = uniform
    wins = np.bincount(winner[winner >= 0], minlength=interests.shape[1])
    return cosine[:, upper[0], upper[1]].ravel(), entropy.ravel(), wins / wins.sum()


def evaluate_run(name, args, interactions, stats, named):
    """Evaluate one run into its folder. A run of other data, which may have been trained on these users, is an error if `named`, else left out."""
    stage = Stage("07_evaluate", args, run=name)
    stage.input("01_preprocess")
    source = stage.input("06_train", run=name)
    if (reason := stage.mismatch()) and not named:
        if parallel.rank() == 0:
            print(f"left out: {reason}")
        return
    if stage.is_done():
        return
    folder = stage.begin() if parallel.rank() == 0 else None
    config, log = load_json(source / "config.json"), load_lines(source / "log.jsonl")
    item_vectors = load_array(source / "item_vectors.npy")
    if item_vectors.shape[0] != interactions.n_items + 1:
        raise UserError(f"{source}: item vectors for {item_vectors.shape[0] - 1} items, data set of {interactions.n_items}; "
                        "train this run again")
    model = load_export(source / "model.pt2")
    result = {"run": name, "config": config, "split": stats["split"], "remove_seen": args.remove_seen}
    for part in ("valid", "test"):
        users, names, values, ranked, winner, interests, routing = evaluate(
            interactions, part, model, item_vectors, args, config["max_len"])
        result[part] = {"users": len(users)} | {n: round(float(v), 6) for n, v in zip(names, values.mean(0))}
    if parallel.rank() > 0:
        return
    save_array(folder / "test_users.npy", users)
    save_array(folder / "test_values.npy", values.astype(np.float32))
    save_array(folder / "test_ranked.npy", ranked.astype(np.int32))
    _, start, middle, _ = interactions.evaluation_ranges("test")
    spread = diversity(interests, routing, np.minimum(middle - start, config["max_len"]), winner[:, :20])
    result["columns"] = names
    result["diversity"] = {"mean_cosine": _mean(spread[0]), "mean_routing_entropy": _mean(spread[1]),
                           "wins": [round(float(w), 4) for w in spread[2]]}
    index = build_index(folder, item_vectors, args)
    exact = ranked if not args.remove_seen else rank(interests, item_vectors, max(CUTOFFS), n_threads=args.threads)[0]
    result["ann"] = measure_index(index, interests, item_vectors, exact, args)
    if result["ann"] is None:
        for file in ("index.hnsw", "index.json"):
            (folder / file).unlink()
    save_json(folder / "metrics.json", result)
    write_report(folder, name, result, log, stats, spread)
    stage.finish({"recall@50": result["test"]["recall@50"]})
    stage.log.info("test Recall@50 %.4f, report in %s", result["test"]["recall@50"], folder / "report.html")


def _mean(values):
    return round(float(values.mean()), 4) if len(values) else None


def write_report(folder, name, result, log, stats, spread):
    """report.md and report.html of one run."""
    model = re.sub(r"-s\d+$", "", name)
    paper, rows = published(stats)
    comparable = stats["split"] == "file-order" and not result["remove_seen"]
    beside = {f"paper, {m}": rows[m] for m in dict.fromkeys((model, "remi", "remi-eimf")) if m in rows} if comparable else {}
    sources = {"test": result["test"], "valid": result["valid"], **beside}
    header = ["", *sources]
    table = [[metric.replace("ndcg_published", "ndcg (set order)"), *(f"{row[metric]:.4f}" if metric in row else "" for row in sources.values())]
             for metric in result["test"] if metric != "users"]
    notes = [f"Data: {stats['users']} users, {stats['items']} items, {stats['interactions']} interactions; split {stats['split']}; "
             f"{result['test']['users']} test users.",
             "ndcg (set order) repeats the published computation, which loses the rank order; it only serves to compare with "
             "the published columns."]
    if paper and not comparable:
        notes.append(f"The published {paper} numbers used the file-order split with seen items kept, so they are not shown beside these.")
    diversity_note = (f"Interests: mean cosine {result['diversity']['mean_cosine']}, mean routing entropy "
                      f"{result['diversity']['mean_routing_entropy']}, share of the top 20 by interest {result['diversity']['wins']}.")
    ann = result["ann"]
    index_note = "No HNSW index: a graph search over these vectors cannot return 50 items."
    if ann:
        index_note = (f"HNSW index (M {ann['m']}, ef {ann['ef']}): finds {ann['recall@50']:.4f} of the exact top 50; "
                      f"{ann['users_per_second_hnsw']} users per second against {ann['users_per_second_exact']} for exact "
                      "search, one thread each.")
    markdown = [f"# {name}", *notes, report.markdown_table(header, table), diversity_note, index_note]
    with atomic(folder / "report.md") as file:
        file.write("\n\n".join(markdown) + "\n")
    parts = [f"<p>{n}</p>" for n in notes] + [report.html_table(header, table), report.plot_metrics(result["test"], beside, name)]
    if log:
        parts.append(report.plot_training(log, result["config"]["best_iteration"]))
    if result["diversity"]["mean_cosine"] is not None:
        parts += [report.plot_diversity(*spread), f"<p>{diversity_note}</p>"]
    with atomic(folder / "report.html") as file:
        file.write(report.html_page(f"{name}: evaluation", [*parts, f"<p>{index_note}</p>"]))


def summarise(root, stats, data, remove_seen):
    """Group the evaluated runs by model, write summary.json and summary.md, return the Markdown table.

    Only runs on the present data, {file of stage 01: SHA-256}, and with the same treatment of seen items stand in one table.
    """
    groups, left_out = {}, []
    for path in sorted(root.glob("*/manifest.json")):
        result, inputs = load_json(path.parent / "metrics.json"), load_json(path)["inputs"]
        if result["remove_seen"] != remove_seen or any(inputs.get(file) != digest for file, digest in data.items()):
            left_out.append(path.parent.name)
            continue
        groups.setdefault(re.sub(r"-s\d+$", "", path.parent.name), []).append((path.parent, result))
    if not groups:
        raise UserError(f"no run of the present data is evaluated in {root}; train with stage 06 first, then call this again")
    _, paper = published(stats)
    summary = {"split": stats["split"], "models": {}}
    rows = []
    for model, runs in sorted(groups.items(), key=lambda g: np.mean([r["test"]["recall@50"] for _, r in g[1]])):
        values = {m: np.array([r["test"][m] for _, r in runs]) for m in runs[0][1]["test"] if m != "users"}
        summary["models"][model] = {
            "seeds": [r["config"]["seed"] for _, r in runs],
            "mean": {m: round(float(v.mean()), 5) for m, v in values.items()},
            "sd": {m: round(float(v.std(ddof=1)), 5) if len(v) > 1 else None for m, v in values.items()},
            "best_iteration": [r["config"]["best_iteration"] for _, r in runs]}
        spread = (lambda v: f" ± {v.std(ddof=1):.4f}") if len(runs) > 1 else (lambda v: "")
        rows.append([model, str(len(runs)), *(f"{values[m].mean():.4f}{spread(values[m])}" for m in SHOWN)])
        if stats["split"] == "file-order" and model in paper:
            rows.append([f"paper, {model}", "", *(f"{paper[model][m]:.4f}" if m in paper[model] else "" for m in SHOWN)])
    summary["differences"] = differences(groups)
    table = report.markdown_table(["model", "seeds", *SHOWN], rows)
    if summary["differences"]:
        lines = [[d["model"], d["against"], f"{d['recall@50']:+.4f}", f"{d['low']:+.4f} .. {d['high']:+.4f}",
                  "yes" if d["low"] > 0 else "no"] for d in summary["differences"]]
        table += "\n\n" + report.markdown_table(["model", "against", "difference in recall@50", "95 % interval over users", "above 0?"], lines)
    if left_out:
        table += f"\n\nleft out, evaluated on other data or {'without' if remove_seen else 'with'} --remove-seen: {', '.join(left_out)}"
    if remove_seen:
        table += "\n\nevaluated with --remove-seen: a user's own history is left out of the ranking"
    save_json(root / "summary.json", summary)
    with atomic(root / "summary.md") as file:
        file.write(table + "\n")
    return table


def differences(groups):
    """EIMF against its backbone and its controls: paired by user, averaged over seeds, bootstrap over users.

    Only groups with the same seeds and the same test users are compared. `low` and `high` bound the 95 % interval.
    """
    found = []
    for model in [m for m in groups if m.endswith("-eimf")]:
        for other in [model.removesuffix("-eimf"), *(m for m in groups if m.startswith(model + "-"))]:
            if other not in groups:
                continue
            (a, users_a, seeds_a), (b, users_b, seeds_b) = (_recall_by_user(groups[m]) for m in (model, other))
            if seeds_a != seeds_b or not np.array_equal(users_a, users_b):
                continue
            gain, low, high = bootstrap(a - b)
            found.append({"model": model, "against": other, "recall@50": round(float(gain), 5),
                          "low": round(float(low), 5), "high": round(float(high), 5), "seeds": len(seeds_a)})
    return found


def _recall_by_user(runs):
    column = runs[0][1]["columns"].index("recall@50")
    values = [load_array(folder / "test_values.npy")[:, column] for folder, _ in runs]
    return np.mean(values, 0), load_array(runs[0][0] / "test_users.npy"), [r["config"]["seed"] for _, r in runs]


def main(argv=None):
    args = parse(argv)
    parallel.start(args)
    data = Stage("07_evaluate", args)
    source = data.input("01_preprocess")
    trained = args.data_dir / args.dataset / "06_train"
    named = bool(args.run)
    names = args.run or sorted(p.parent.name for p in trained.glob("*/manifest.json"))
    if not names:
        raise UserError(f"no finished run in {trained}. Run: {command('06_train', args.dataset, args.data_dir)}")
    del args.run  # a run's manifest must not depend on which other runs were named beside it
    interactions, stats = load_interactions(source), load_json(source / "stats.json")
    for name in names:
        evaluate_run(name, args, interactions, stats, named)
    if not parallel.stop():
        return
    root = args.data_dir / args.dataset / "07_evaluate"
    print(summarise(root, stats, data.inputs, args.remove_seen))
    print(f"\nreports: {root}/<run>/report.html, summary: {root / 'summary.md'}")


if __name__ == "__main__":
    run(main)
