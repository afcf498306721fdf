"""Add the numbers of one data folder to the published ones, entry by entry: what was run on machines that are gone stays published.

Of two entries for one thing that with more seeds stays, of equals the new one. A published entry goes when experiments.py would no longer
make it so. `old` and `new` are as paper_numbers.collect returns them; neither is changed.
"""
import shlex

from eimf.artifacts import UserError
from experiments import DATASETS, NAMES, Run, plan, settled, training, tuning
from paper_numbers import MAIN, adjust, contrasts


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
    found = {}
    for c in old["comparisons"]:  # it stays while one of its two models does: it says its own number of seeds
        _, a, b, *_ = compared(c)
        if a in kept and b in kept and not (a in fresh and b in fresh):
            found[compared(c)] = c
    for c in new["comparisons"]:
        if c["seeds"] >= found.get(compared(c), c)["seeds"]:
            found[compared(c)] = c
    comparisons = [dict(found[c]) for c in made if c in found]

    together = {}
    for numbers, chosen in ((old, kept), (new, kept | fresh)):
        for c in numbers.get("together", ()):  # the first published numbers have none
            at = c["dataset"], c["split"]
            of = [(*at, "", settled(at[0], f"{b}-tuned{eimf}")) for b in c["backbones"] for eimf in ("", "-eimf")]
            if chosen.keys() >= set(of) and (at not in together or known(c) >= known(together[at])):
                together[at] = c

    dropped = [f"{', '.join(filter(None, key_of(m)))}: {why}" for m in old["models"] if (why := outdated(m, keys))]
    if gone := {compared(c) for c in old["comparisons"]} - {compared(c) for c in comparisons}:
        dropped.append(f"{len(gone)} comparisons: no longer made, or of models that were dropped or both run anew")
    datasets, clusters, folders = old["datasets"] | new["datasets"], old["clusters"] | new["clusters"], {r.folder for r in runs}
    return new | {
        "datasets": {d: datasets[d] for d in DATASETS if d in datasets}, "models": models, "comparisons": readjusted(old["comparisons"], comparisons),
        "together": [together[at] for at in order if at in together],
        "parts": list(parts.values()), "clusters": {f: clusters[f] for f in clusters if f in folders},
        "tuning": {d: tuning(d) for d in DATASETS if tuning(d)}, "seeds": max(old["seeds"], new["seeds"]),
        **{flag: sorted(d for d in datasets if d in (new if d in new["datasets"] else old)[flag]) for flag in ("no_titles", "foreign_ids")},
        "asked": {k: [x for x in known if x in old["asked"][k] + new["asked"][k]] for k, known in (("datasets", DATASETS), ("groups", NAMES))}}, dropped


def readjusted(before, now):
    """`now` with Holm's correction made anew in every group that differs from `before`; the other groups' comes from more digits."""
    def together(c):
        return c["family"], c["dataset"], c["split"]

    changed = {together(c) for c in now if c not in before} | {together(c) for c in before if c not in now}
    adjust([c for c in now if together(c) in changed])
    return now
