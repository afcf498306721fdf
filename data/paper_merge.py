"""Add the numbers of one data folder to the published ones, entry by entry: what was run on machines that are gone stays published.

Of two entries for one thing that with more seeds stays, of equals the new one. A published entry goes when experiments.py would no longer
make it so. A comparison says what the entries beside it say, or that it is of other runs. `old` and `new` are as paper_numbers.collect returns them; neither is changed.
"""
import shlex
from collections import defaultdict

from eimf.artifacts import UserError
from experiments import DATASETS, NAMES, Run, plan, settled, training, tuning
from paper_numbers import MAIN, adjust, compare_by_seed, contrasts


def key_of(model):
    return model["dataset"], model["split"], model["variant"], model["model"]


def compared(c):
    """What a comparison is of: family, keys of both models, part."""
    return c["family"], (c["dataset"], c["split"], *c["a"]), (c["dataset"], c["split"], *c["b"]), c.get("kind"), c.get("part")


def check(old, new):
    """Raise UserError unless both are of the same data, and of interests of the same kind."""
    pairs = [(d, old["datasets"][d]["stats"], new["datasets"][d]["stats"]) for d in old["datasets"].keys() & new["datasets"]]
    pairs += [(f, *({"llm": side["clusters"][f]["llm"]} for side in (old, new))) for f in old["clusters"].keys() & new["clusters"]]
    for name, before, now in sorted(pairs, key=lambda pair: pair[0]):
        for fact in [f for f in before if f in now and before[f] != now[f]]:
            raise UserError(f"{name}: {fact} is {now[fact]!r} here but {before[fact]!r} in what is published, so these do not belong together; give the same "
                            "--raw-dir and --llm-dir, leave the data set out by --datasets, or first take its entries out of data/results/numbers.json")


def outdated(model, keys):
    """Why a published model would not be made so now; None if it would."""
    if key_of(model) not in keys:
        return "no longer among the experiments"
    now = shlex.join(["python", *training(Run(*key_of(model), model["seeds"][0]))])
    return None if model["commands"][0] == now else "its settings have changed"


def known(c):
    """How much a comparison of several backbones together is made from."""
    return len(c["backbones"]), c["seeds"]


def merge(old, new):
    """`old` with `new` added, but "remaining" is new's; and a list of what of `old` was dropped, and why."""
    check(old, new)
    runs = plan(tuple(DATASETS), seeds=1, recorded=DATASETS)
    keys = dict.fromkeys((r.dataset, r.split, r.variant, r.model) for r in runs)  # in the order that `collect` has
    kept = {key_of(m): m for m in old["models"] if not outdated(m, keys)}
    fresh = {key_of(m): m for m in new["models"] if key_of(m) not in kept or len(m["seeds"]) >= len(kept[key_of(m)]["seeds"])}
    models = [(kept | fresh)[k] for k in keys if k in kept or k in fresh]

    parts = {}  # each model's number comes from where its entry does
    for numbers, chosen in ((old, kept.keys() - fresh), (new, fresh.keys())):
        for p in numbers["parts"]:
            at = p["dataset"], p["split"], p["kind"], p["part"]
            if recall := {m: v for m, v in p["recall"].items() if (*at[:2], "", m) in chosen}:
                parts[at] = p | {"recall": parts[at]["recall"] | recall if at in parts else recall}
    order = list(dict.fromkeys(key_of(m)[:2] for m in models))
    parts = {at: parts[at] for at in sorted(parts, key=lambda at: order.index(at[:2]))}

    made = [(*c, None, None) for c in contrasts([key_of(m) for m in models])]
    made += [("parts", (*at[:2], *MAIN), (*at[:2], "", "remi"), *at[2:]) for at in parts]
    candidates = defaultdict(list)
    for c in (*new["comparisons"], *(c for c in old["comparisons"] if {*compared(c)[1:3]} <= kept.keys())):
        candidates[compared(c)].append(c)
    entries = {key_of(m): m for m in models}
    comparisons = [c for of in made if (c := agreeing(of, candidates[of], entries, parts))]

    together = {}
    for numbers, chosen in ((old, kept), (new, kept | fresh)):
        for c in numbers.get("together", ()):  # the first published numbers have none
            at = c["dataset"], c["split"]
            of = [(*at, "", settled(at[0], f"{b}-tuned{eimf}")) for b in c["backbones"] for eimf in ("", "-eimf")]
            if chosen.keys() >= set(of) and (at not in together or known(c) >= known(together[at])):
                together[at] = c

    dropped = [f"{', '.join(filter(None, key_of(m)))}: {why}" for m in old["models"] if (why := outdated(m, keys))]
    if gone := {compared(c) for c in old["comparisons"]} - {compared(c) for c in comparisons}:
        dropped.append(f"{len(gone)} comparisons: no longer made, of models that were dropped, or not what the published runs say")
    tested = {compared(c) for c in old["comparisons"] if c["p_users"] is not None}
    if untested := tested & {compared(c) for c in comparisons if c["p_users"] is None}:
        dropped.append(f"tests over users in {len(untested)} comparisons: of one seed, and of other runs than the published ones")
    datasets, clusters, folders = old["datasets"] | new["datasets"], old["clusters"] | new["clusters"], {r.folder for r in runs}
    return new | {
        "datasets": {d: datasets[d] for d in DATASETS if d in datasets}, "models": models, "comparisons": readjusted(old["comparisons"], comparisons),
        "together": [together[at] for at in order if at in together],
        "parts": list(parts.values()), "clusters": {f: clusters[f] for f in clusters if f in folders},
        "tuning": {d: tuning(d) for d in DATASETS if tuning(d)}, "seeds": max(old["seeds"], new["seeds"]),
        **{flag: sorted(d for d in datasets if d in (new if d in new["datasets"] else old)[flag]) for flag in ("no_titles", "foreign_ids")},
        "asked": {k: [x for x in known if x in old["asked"][k] + new["asked"][k]] for k, known in (("datasets", DATASETS), ("groups", NAMES))}}, dropped


def agreeing(of, candidates, entries, parts):
    """Of the comparisons of one thing, the one that says what the published entries say; None if there is nothing to say.

    If none does, one of other runs and several seeds, with the entries' gain beside its own ("table_gain"). Else one from the entries' means by
    seed, which says nothing over users.
    """
    family, a, b, kind, part = of
    if family == "parts":
        recall = parts[(*a[:2], kind, part)]["recall"]
        return next((c for c in candidates if {a[3], b[3]} <= recall.keys() and same([c["gain"]], [recall[a[3]] - recall[b[3]]])), None)
    now = compare_by_seed(family, a, b, entries[a], entries[b]) if a in entries and b in entries else None
    if now is None:
        return None
    candidates = sorted(({k: v for k, v in c.items() if k != "table_gain"} for c in candidates if c["p_users"] is not None), key=lambda c: -c["seeds"])
    for c in candidates:
        if same(c["gain_by_seed"], now["gain_by_seed"]):
            return c
    if candidates and candidates[0]["seeds"] > 1:
        return candidates[0] | {"table_gain": now["gain"]}
    return now


def same(gains, others):
    """Whether gains are equal but for the rounding of what they come from."""
    return len(gains) == len(others) and all(abs(x - y) < 2e-5 for x, y in zip(gains, others))


def readjusted(before, now):
    """`now` with Holm's correction made anew in every group that differs from `before`; the other groups' comes from more digits."""
    def together(c):
        return c["family"], c["dataset"], c["split"]

    changed = {together(c) for c in now if c not in before} | {together(c) for c in before if c not in now}
    adjust([c for c in now if together(c) in changed])
    return now
