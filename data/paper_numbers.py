"""Every number of the reproduction's report, computed from the finished runs' files.

`collect` returns one JSON-ready object; paper_report.py only formats it.

    datasets     data set -> counts of stage 01 (file-order split) and the paper's; where its interests come from
    models       one entry for each (data set, split, variant, model): metrics with mean, interval over test users and standard
                 deviation over seeds; cost; commit, machine and commands behind it
    comparisons  pairs of models on the same test users and seeds: gain in Recall@50, interval, p-values as they are and
                 adjusted by Holm within the table, data set and split; verdict. After publishing see also paper_merge.agreeing
    together     the same of EIMF's gain over all tuned backbones of a data set and split, of which each user's mean is taken
    tuning       data set -> what data/tune.py found
    clusters     folder -> what stages 03 and 04 did: typical users, preference, LLM calls
    remaining    group -> runs left and their estimated seconds (reproduce.py fills it in)
"""
import re
import shlex
from collections import defaultdict

import numpy as np

from eimf.artifacts import load_array, load_json, load_lines
from eimf.data import load_interactions, range_positions
from eimf.published import BEST_PREFERENCE, STATISTICS, published
from eimf.statistics import LEVEL, bootstrap, holm, paired_p
from experiments import ABLATIONS, ALL, BASELINES, BEST, CONTROLS, PAPER, PREFERENCES, TAUGHT, folder_of, settled, strongest, tuning

METRICS = ("recall@20", "recall@50", "hr@20", "hr@50", "ndcg@20", "ndcg@50", "ndcg_published@20", "ndcg_published@50")
TESTED = "recall@50"  # the one metric that is tested; the paper selects models by it too
HISTORY_BINS = ((1, 4), (5, 9), (10, None))  # events of a test user's history
COLD_BINS = ((0, 0), (1, 4), (5, 19), (20, None))  # training interactions of a target item
MAIN = ("", "remi-eimf")


def rounded(value, digits=5):
    return None if value is None else round(float(value), digits)


def significant(p):
    """A p-value to three digits. They are cut before Holm's correction, so that it comes out the same from the stored ones."""
    return None if p is None else float(f"{p:.3g}")


def bin_name(low, high):
    return f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"


class Results:
    """Values of finished runs: `self[key]` is {seed: float64 (U, metrics)}, key (data set, split, variant, model)."""

    def __init__(self, data_dir, done):
        self.data_dir, self.runs, self.values = data_dir, defaultdict(dict), defaultdict(dict)
        self.users, self._data = {}, {}
        for run in sorted(done, key=lambda r: r.seed):
            folder = data_dir / run.folder / "07_evaluate" / run.name
            columns, key = load_json(folder / "metrics.json")["columns"], (run.dataset, run.split, run.variant, run.model)
            values = load_array(folder / "test_values.npy").astype(np.float64)
            self.runs[key][run.seed] = run
            self.values[key][run.seed] = values[:, [columns.index(m) for m in METRICS]]
            self.users[key] = load_array(folder / "test_users.npy")

    def tested(self, key, seeds=()):
        """{seed: TESTED of each user, (U,)}. Popularity has no seed, so its one run stands for all of `seeds`."""
        found = {seed: values[:, METRICS.index(TESTED)] for seed, values in self.values[key].items()}
        return dict.fromkeys(seeds, found[0]) if key[3] == "pop" and seeds else found

    def interactions(self, folder):
        if folder not in self._data:
            data = load_interactions(self.data_dir / folder / "01_preprocess")
            self._data[folder] = data, data.training_counts(), data.evaluation_ranges("test")
        return self._data[folder]

    def by_part(self, key):
        """TESTED within parts of the test users or of the target items: {(kind, bin): {seed: (U,), NaN where not in the part}}."""
        parts = defaultdict(dict)
        for seed, run in self.runs[key].items():
            data, counts, (users, start, middle, end) = self.interactions(run.folder)
            for low, high in HISTORY_BINS:
                length = middle - start
                inside = (length >= low) & (length <= (high or length.max()))
                parts["history", bin_name(low, high)][seed] = np.where(inside, self.tested(key)[seed], np.nan)
            path = self.data_dir / run.folder / "07_evaluate" / run.name / "test_ranked.npy"
            if not path.is_file() or not np.array_equal(users, self.users[key]):
                continue
            row, item = np.repeat(np.arange(len(users)), end - middle), data.items[range_positions(middle, end)]
            hit = (load_array(path)[row] == item[:, None]).any(1)
            for low, high in COLD_BINS:
                inside = (counts[item] >= low) & (counts[item] <= (high if high is not None else counts.max()))
                found, of = (np.bincount(row[inside], w, minlength=len(users)) for w in (hit[inside], np.ones(inside.sum())))
                with np.errstate(invalid="ignore"):
                    parts["target", bin_name(low, high)][seed] = found / of  # 0 / 0: the user has no such target
        return parts


def compare(family, a, b, a_values, b_values, **facts):
    """Model a against b, each {seed: (U,)} over the same users: one comparison, None without a common seed or any user."""
    seeds = sorted(a_values.keys() & b_values.keys())
    if not seeds or len(a_values[seeds[0]]) != len(b_values[seeds[0]]):
        return None
    gains = np.stack([a_values[s] - b_values[s] for s in seeds])  # (S, U)
    gains = gains[:, np.isfinite(gains).all(0)]
    if not gains.shape[1]:
        return None
    mean, low, high = bootstrap(gains.mean(0))
    return {"family": family, "dataset": a[0], "split": a[1], "a": list(a[2:]), "b": list(b[2:]), **facts, "gain": rounded(mean),
            "low": rounded(low), "high": rounded(high), "seeds": len(seeds), "users": gains.shape[1],
            "gain_by_seed": [rounded(g) for g in gains.mean(1)],
            "p_users": significant(paired_p(gains.mean(0))), "p_seeds": significant(paired_p(gains.mean(1)))}


def compare_by_seed(family, a, b, a_entry, b_entry):
    """`compare` of two entries of `models`, where the values of single users are not at hand: without interval and test over users."""
    a_values, b_values = (dict(zip(entry["seeds"], entry["by_seed"])) for entry in (a_entry, b_entry))
    if b[3] == "pop":
        b_values = dict.fromkeys(a_values, b_values[0])  # it has no seed
    gains = [a_values[s] - b_values[s] for s in sorted(a_values.keys() & b_values.keys())]
    return {"family": family, "dataset": a[0], "split": a[1], "a": list(a[2:]), "b": list(b[2:]), "gain": rounded(np.mean(gains)), "low": None, "high": None,
            "seeds": len(gains), "users": a_entry["users"], "gain_by_seed": [rounded(g) for g in gains], "p_users": None,
            "p_seeds": significant(paired_p(gains))} if gains else None


def adjust(comparisons):
    """Holm's correction, for both tests, and the verdict; in place.

    What is corrected for together: the comparisons of one table of the report within one data set and split. So a verdict on one data
    set does not depend on which runs of another have finished.
    """
    together = defaultdict(list)
    for c in comparisons:
        together[c["family"], c["dataset"], c["split"]].append(c)
    for members in together.values():
        for test in ("p_users", "p_seeds"):
            for c, p in zip(members, holm([c[test] for c in members])):
                c[test + "_holm"] = p
    for c in comparisons:
        c["verdict"] = verdict(c)
        for test in ("p_users_holm", "p_seeds_holm"):
            c[test] = significant(c[test])
    return comparisons


def verdict(c):
    """"better" or "worse" only if both tests say so after Holm's correction; with one seed there is only one of them."""
    over_seeds, direction = c["p_seeds_holm"], "better" if c["gain"] > 0 else "worse"
    if c["p_users_holm"] is None:
        return "not tested" if over_seeds is None else f"{direction if over_seeds < 1 - LEVEL else 'not significant'} over seeds, not tested over users"
    over_users = c["p_users_holm"] < 1 - LEVEL
    if over_seeds is None:
        return f"{direction} with one seed, spread of training unknown" if over_users else "not significant"
    if over_users and over_seeds < 1 - LEVEL:
        return direction
    if over_users:
        return "not significant over seeds"
    return "not significant over users" if over_seeds < 1 - LEVEL else "not significant"


def contrasts(keys):
    """(family, key a, key b) of every comparison that the report makes, for each (data set, split) in `keys`."""
    for place in dict.fromkeys(key[:2] for key in keys):
        main = (*place, *MAIN)
        for b in (("", "remi"), *(("", c) for c in CONTROLS), ("random-typical", "remi-eimf"), ("phrases", "remi-eimf")):
            yield "help", main, (*place, *b)
        for b in TAUGHT[1:]:  # the first is tested under "help"
            yield "table4", (*place, "", f"{b}-eimf"), (*place, "", b)
        for a, b in (("remi-best", "remi"), ("remi-best-eimf", "remi-eimf"), *(("remi-best-eimf", b) for b in BEST if b != "remi-best-eimf")):
            yield "best", (*place, "", a), (*place, "", b)
        found = tuning(place[0])
        tuned = {b + eimf: (*place, "", settled(place[0], f"{b}-tuned{eimf}")) for b in found for eimf in ("", "-eimf")}
        for b in found:
            if found[b]["flags"]:
                yield "tuned", tuned[b], (*place, "", b)
            if tuned[b][3] != "remi":  # it is tested under "help"
                yield "taught", tuned[b + "-eimf"], tuned[b]
        if found:
            for model in ("remi-best", "remi-eimf"):
                yield "strongest", (*place, "", model), tuned[strongest(found)]
        for b in ABLATIONS:
            yield "fig3", main, (*place, "", b)
        for variant in PREFERENCES:
            yield "fig4", (*place, variant, "remi-eimf"), main
        for variant in ("", *PREFERENCES) if any((*place, v, "remi-eimf") in keys for v in PREFERENCES) else ():
            yield "cost", (*place, variant, "remi-eimf"), (*place, "", "remi")
        for b in BASELINES:
            if b != "remi":
                yield "baselines", main, (*place, "", b)


def together(results, place):
    """EIMF's gain over the tuned backbones of a data set and split, the mean of all that have both: a comparison. None below two backbones.

    By the seeds that all have. The backbones are those at hand, not a sample of any, so nothing is tested over them.
    """
    pairs = {b: [(*place, "", settled(place[0], f"{b}-tuned{eimf}")) for eimf in ("-eimf", "")] for b in tuning(place[0])}
    pairs = {b: [results.tested(key) for key in pair] for b, pair in pairs.items() if all(key in results.runs for key in pair)}
    if len(pairs) < 2:
        return None
    seeds = set.intersection(*(set(values) for pair in pairs.values() for values in pair))
    means = [{s: np.mean([pair[side][s] for pair in pairs.values()], axis=0) for s in seeds} for side in (0, 1)]
    found = compare("together", (*place, "", "eimf"), (*place, "", "plain"), *means, backbones=list(pairs))
    return found and {k: v for k, v in adjust([found])[0].items() if k not in ("a", "b")}


def model_entry(results, key, tasks, state):
    """Metrics, cost and provenance of one model."""
    values, runs = results.values[key], results.runs[key]
    mean, low, high = bootstrap(np.mean(list(values.values()), 0))
    by_seed = np.array([v.mean(0) for v in values.values()])  # (S, metrics)
    metrics = {m: {"mean": rounded(mean[n]), "low": rounded(low[n]), "high": rounded(high[n]),
                   "sd": rounded(by_seed[:, n].std(ddof=1)) if len(by_seed) > 1 else None} for n, m in enumerate(METRICS)}
    cost, commits, machines, cosine = defaultdict(list), [], [], []
    for run in runs.values():
        root = results.data_dir / run.folder
        manifest, log = load_json(root / "06_train" / run.name / "manifest.json"), load_lines(root / "06_train" / run.name / "log.jsonl")
        cost["minutes"].append(state.seconds(tasks[run]) / 60)
        cost["iterations"].append(log[-1]["iteration"] if log else 0)
        cost["best_iteration"].append(manifest["summary"]["best_iteration"])
        cost["milliseconds_per_step"].append(1000 * log[-1]["seconds"] / log[-1]["iteration"] if log else 0)
        cost["peak_memory_mib"].append(manifest["peak_memory_mib"])
        cosine.append(load_json(root / "07_evaluate" / run.name / "metrics.json")["diversity"]["mean_cosine"])
        commits.append(manifest.get("commit"))
        machines.append(manifest.get("machine"))
    task = tasks[runs[min(runs)]]
    return {"dataset": key[0], "split": key[1], "variant": key[2], "model": key[3], "folder": task.folder, "seeds": sorted(runs),
            "users": len(results.users[key]), "metrics": metrics, "by_seed": [rounded(v) for v in by_seed[:, METRICS.index(TESTED)]],
            "cosine": rounded(np.mean(cosine), 3) if None not in cosine else None,
            "cost": {name: rounded(np.mean(v), 1) for name, v in cost.items()},
            "commits": sorted({c or "unknown" for c in commits}), "machines": [m for n, m in enumerate(machines) if m and m not in machines[:n]],
            "commands": [shlex.join(["python", *c]) for c in task.commands]}


def cluster_facts(data_dir, folder):
    """What stages 03 and 04 did in a data folder, None if they did not run."""
    try:
        report, usage = load_json(data_dir / folder / "03_cluster_users/report.json"), load_json(data_dir / folder / "04_infer_interests/usage.json")
    except (FileNotFoundError, ValueError):
        return None
    return {"fraction": rounded(report["fraction"]), "preference": report.get("preference"), "clusters": report["clusters"], "llm": usage["llm"],
            "calls": usage["prompts"], "fallback": usage["fallback"], "interests": rounded(usage.get("interests_mean"), 2)}


def has_foreign_ids(folder):
    """Whether the items of one of the paper's data sets have other ids than Amazon's ten characters."""
    items = load_lines(folder / "01_preprocess" / "items.jsonl")
    return any(not re.fullmatch("[0-9A-Z]{10}", item["id"]) for item in items)


def collect(args, runs, tasks, state):
    """All numbers, but for "remaining", which is empty. `tasks`: {Run: Task}."""
    results = Results(args.data_dir, [run for run in runs if state.outcome(tasks[run]) == "done"])
    keys = list(dict.fromkeys((r.dataset, r.split, r.variant, r.model) for r in runs if (r.dataset, r.split, r.variant, r.model) in results.runs))
    datasets, clusters = {}, {}
    for dataset in args.datasets:
        path = args.data_dir / folder_of(dataset, "file-order") / "01_preprocess" / "stats.json"
        if path.is_file():
            stats = load_json(path)
            name, rows = published(stats)
            datasets[dataset] = {"stats": {k: v for k, v in stats.items() if isinstance(v, (int, float))}, "matches": name,
                                 "paper": STATISTICS.get(dataset), "published": rows, "best_preference": BEST_PREFERENCE.get(dataset)}
    for folder in dict.fromkeys(r.folder for r in runs):
        facts = cluster_facts(args.data_dir, folder)
        if facts:
            clusters[folder] = facts
    comparisons = []
    for family, a, b in contrasts(keys):
        if a in results.runs and b in results.runs:
            comparisons.append(compare(family, a, b, results.tested(a), results.tested(b, results.runs[a])))
    parts = []
    for place in dict.fromkeys(key[:2] for key in keys):
        found = {m: results.by_part((*place, "", m)) for m in ("remi", "remi-eimf", *CONTROLS) if (*place, "", m) in results.runs}
        for kind, name in next(iter(found.values()), {}):
            row = {m: values[kind, name] for m, values in found.items() if (kind, name) in values}
            users = int(np.isfinite(next(iter(next(iter(row.values())).values()))).sum())
            if users:
                parts.append({"dataset": place[0], "split": place[1], "kind": kind, "part": name, "users": users, "recall": {
                    m: rounded(np.nanmean([np.nanmean(v) for v in seeds.values()])) for m, seeds in row.items()}})
            if {"remi", "remi-eimf"} <= row.keys():
                comparisons.append(compare("parts", (*place, *MAIN), (*place, "", "remi"), row["remi-eimf"], row["remi"], kind=kind, part=name))
    return {"datasets": datasets, "models": [model_entry(results, key, tasks, state) for key in keys],
            "comparisons": adjust([c for c in comparisons if c]),
            "together": [c for place in dict.fromkeys(key[:2] for key in keys) if (c := together(results, place))], "parts": parts, "clusters": clusters,
            "tuning": {d: found for d in args.datasets if (found := tuning(d))},
            "no_titles": sorted(d for d, facts in datasets.items() if not facts["stats"].get("items_with_title")),
            "foreign_ids": sorted(d for d in datasets if d in PAPER and has_foreign_ids(args.data_dir / folder_of(d, "file-order"))),
            "remaining": {}, "seeds": args.seeds, "train_args": args.train_args,
            "asked": {"datasets": list(args.datasets), "groups": list(args.only)}}
