"""The reproduction's report from its numbers (paper_numbers.py): Markdown, and one self-contained HTML page with plots.

Every sentence that says what was found is made from the numbers; `headline` is the first. Blocks are ("h2", text), ("p", text),
("list", items), ("table", header, rows, caption) and ("figure", name, HTML figure); a table cell's first line is its value, further
lines are small print.
"""
import html
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np

from eimf.artifacts import atomic, save_json
from eimf.report import COLOURS, figure, html_page, markdown_table, p_value
from experiments import ABLATIONS, ALL, BASELINES, BEST, CONTROLS, NAMES, NEED_TEXT, OTHERS, PREFERENCES, TAUGHT, folder_of, settled, strongest

LABELS = {"pop": "Pop", "dnn": "DNN", "gru4rec": "GRU4Rec", "sasrec": "SASRec", "bert4rec": "BERT4Rec", "llm2bert4rec": "LLM2BERT4Rec",
          "mind": "MIND", "comirec-sa": "ComiRec-SA", "remi": "REMI", "comirec-dr": "ComiRec-DR", "sine": "SINE", "bert4rec-cloze": "BERT4Rec, cloze task"}
LABELS |= {f"{b}-eimf": f"EIMF({LABELS[b]})" for b in ALL}
LABELS |= {f"{b}-tuned": f"{LABELS[b]}, tuned" for b in ALL} | {f"{b}-tuned-eimf": f"EIMF({LABELS[b]}), tuned" for b in ALL}
LABELS |= dict(zip(CONTROLS, ("random text vectors", "shuffled clusters")))
LABELS |= dict(zip(BEST, ("REMI, best recipe", "EIMF(REMI), best recipe", "random text vectors, best recipe", "shuffled clusters, best recipe")))
LABELS |= dict(zip(ABLATIONS, ("without alignment", "without semantic prediction", "without item alignment", "without user alignment")))
VARIANT_LABELS = {"random-typical": "random typical users", "phrases": "category phrases instead of LLM answers", "every-user": "every user prompted"}
SHOWN = {"recall@20": "Recall@20", "recall@50": "Recall@50", "hr@20": "HR@20", "hr@50": "HR@50"}
NDCG = {"ndcg@20": "NDCG@20", "ndcg@50": "NDCG@50", "ndcg_published@20": "set order @20", "ndcg_published@50": "set order @50"}
PARTS = {"history": "histories of {} events", "target": "targets seen {} times"}
TEXT_COLUMNS = ("data", "split", "model", "against", "verdict", "part", "command", "typical users", "settings kept")
GROUPS = dict(zip(NAMES, ("Table 1", "Does EIMF help?", "both splits", "further controls", "Best recipe", "Table 2", "Table 3", "Figure 3", "Figure 4", "Table 4",
                          "All backbones, tuned")))
HOW_TO_READ = (
    "How to read this. Ours is the mean over seeds ± its standard deviation over seeds. Brackets are 95 % bootstrap intervals over test users: of "
    "the difference from the paper where there is a published number (the paper gives no spread of its own), else of our mean. \"Better\" and "
    "\"worse\" are said only if two paired tests agree at .05: Student's t over test users, each user's values averaged over seeds, and Student's t "
    "over seeds, paired by seed. Both are adjusted by Holm's method over the comparisons of a table within one data set and split; where one p-value "
    "is given it is the larger. The metric tested is Recall@50, by which models are selected on validation users.")
ABOUT_CONTROLS = (
    "Random text: vectors of the same shapes without meaning. Shuffled clusters: the same interests for the wrong users. Random typical users: as "
    "many, drawn at random. Category phrases: the offline summariser's words in place of the LLM's.")
ABOUT_BEST = (
    "Settings that the paper does not have, chosen on validation users: what --recipe best of stage 06 sets. The controls have them too.")
ABOUT_TUNED = (
    "On a data set each backbone had the same number of trainings (data/tune.py), on validation users of the file-order split: one setting "
    "after the other, kept if validation Recall@50 rose. EIMF takes the settings of its backbone and was not tuned. No text in the item vectors, but for LLM2BERT4Rec.")
ABOUT_SPLITS = (
    "The published numbers use the file-order split, whose test users share late items; the random split tells what to expect on new users. Set "
    "order repeats the published NDCG computation, which ignores ranks; it is there for the published columns only.")
DEVIATIONS = (
    "Affinity propagation is Frey and Dueck's. Algorithm 1 as printed adds p to every similarity, where it cancels out, and updates only the "
    "availabilities' diagonal.",
    "Typical users are chosen by their share (3 %, the preference p is found by bisection), because p depends on the encoder's scale.",
    "The text encoder is the bundled MiniLM, not BERT-base.",
    "Text reaches training: one learned map, shared by titles and interests, over frozen vectors. The published code maps each string by a fresh "
    "random matrix and resets the parameters after that.",
    "The minus signs of Eq. 9 and 14 are added; Eq. 13 is read with the implicit interests.",
    "The read-out of explicit interests sums each interest with what self-attention adds to it.",
    "In-batch negatives that share the target item or the typical user are masked.",
    "Models are trained with a softmax over all items, REMI too, whose paper samples hard negatives; of the tuned ones, those have hard negatives "
    "whose settings say so.",
    "InfoNCE asks each text vector to find its behavioural vector among those of the batch; the published code asks the other way round.",
    "Items without a title are left out of every text term.",
    "NDCG is the rank-aware one. The published NDCG columns come from code that loses the rank order; \"set order\" repeats that computation.",
)


def label(variant, model):
    if not variant:
        return LABELS.get(model, model)
    share = variant.removeprefix("typical-")
    return LABELS.get(model, model) + ", " + VARIANT_LABELS.get(variant, f"{share} % typical users")


def number(value):
    """.2018, as the paper prints it."""
    return f"{value:.4f}".replace("0.", ".", 1)


def signed(value):
    return ("+" if value >= 0 else "−") + number(abs(value))


def interval(low, high):
    return f"[{signed(low)}, {signed(high)}]" if low is not None else "no interval"


def other_runs(c):
    """What to say of a comparison whose runs are not those of the tables; "" of the others."""
    return f"of other runs than the tables', whose gain is {signed(c['table_gain'])}" if "table_gain" in c else ""


def whisker(c):
    """Ends of a comparison's interval as distances from its gain, for errorbar; NaN, of which it draws nothing, where there is no interval."""
    return [[np.nan], [np.nan]] if c["low"] is None else [[c["gain"] - c["low"]], [c["high"] - c["gain"]]]


def p_values(c):
    seeds = f"over {c['seeds']} seeds {p_value(c['p_seeds_holm'])}" if c["p_seeds_holm"] is not None else "one seed"
    return f"over users {p_value(c['p_users_holm'])}, {seeds}"


def together_text(c):
    return (f"The {len(c['backbones'])} backbones together, tuned, on {where(c)}: EIMF adds {signed(c['gain'])} Recall@50 to their mean "
            f"{interval(c['low'], c['high'])}; {p_values(c)}: {c['verdict']}.")


class Numbers:
    """Look-ups in the collected numbers."""

    def __init__(self, numbers):
        self.all = numbers
        self.models = {(m["dataset"], m["split"], m["variant"], m["model"]): m for m in numbers["models"]}
        self.places = list(dict.fromkeys(key[:2] for key in self.models))

    def comparisons(self, family, **facts):
        return [c for c in self.all["comparisons"] if c["family"] == family and all(c.get(k) == v for k, v in facts.items())]

    def published(self, dataset):
        return self.all["datasets"].get(dataset, {}).get("published", {})


def headline(n):
    """Does EIMF beat its backbone and both controls: on which data, by how much, at which p. The paragraph, and a list of details."""
    opponents = {"remi": "its backbone", CONTROLS[0]: "the control with random text", CONTROLS[1]: "the control with shuffled clusters"}
    table = {}
    for place in n.places:
        found = {c["b"][1]: c for c in n.comparisons("help", dataset=place[0], split=place[1]) if c["b"][0] == "" and c["b"][1] in opponents}
        if found:
            table[place] = found
    if not table:
        return "Whether EIMF helps cannot be said yet: no run of EIMF(REMI) together with its backbone or a control has finished.", []
    def clauses(b, kind):
        found = [(p, table[p][b]) for p in table if b in table[p]]
        return listed([f"{p[0]}, {p[1]} ({signed(c['gain'])}, {p_value(worst_p(c))})" for p, c in found if kind_of(c["verdict"]) == kind])

    all_three = [p for p, found in table.items() if len(found) == 3 and all(c["verdict"] == "better" for c in found.values())]
    unfinished = [p for p, found in table.items() if len(found) < 3]
    others = [p for p in table if p not in all_three and p not in unfinished]
    first = ("EIMF(REMI) beats its backbone and both controls on " + listed(map(", ".join, all_three)) if all_three else
             "On none of the data sets run so far does EIMF(REMI) significantly beat its backbone and both controls")
    sentences = [first + (", not on " + listed(map(", ".join, others)) if all_three and others else "") + "."]
    for b, what in opponents.items():
        said = [f"{words} {clauses(b, kind)}" for kind, words in KINDS.items() if clauses(b, kind)]
        sentences.append(f"Against {what} it is {'; '.join(said)}." if said else f"Against {what} nothing has been run yet.")
    if unfinished:
        sentences.append(f"Not all of these runs are finished on {listed(map(', '.join, unfinished))}.")
    details = [f"{', '.join(place)}, against {opponents[b]}: {signed(c['gain'])} Recall@50, 95 % interval " + (
        f"{signed(c['low'])} to {signed(c['high'])}" if c["low"] is not None else "unknown") + f", {p_values(c)}: {c['verdict']}" + (
        f" ({other_runs(c)})" if other_runs(c) else "") + "." for place, found in table.items() for b, c in found.items()]
    return " ".join(sentences), details


KINDS = {"better": "significantly better on", "worse": "significantly worse on", "half": "different by one of the two tests only, which is not "
         "enough, on", "none": "not significantly different on", "untested": "not tested over users on"}


def kind_of(verdict):
    """Key of KINDS for a comparison's verdict."""
    if "not tested" in verdict:
        return "untested"
    return verdict if verdict in ("better", "worse") else "none" if verdict == "not significant" else "half"


def worst_p(c):
    """The larger of the adjusted p-values; None if there is none."""
    return max((p for p in (c["p_users_holm"], c["p_seeds_holm"]) if p is not None), default=None)


def listed(names):
    """"a, b and c"; "" for nothing."""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def cell(entry, metric, paper=None):
    """Ours, with the standard deviation over seeds; the interval; the paper's number and the difference with its interval."""
    if entry is None:
        return "not run" + (f"\npaper {number(paper)}" if paper is not None else "")
    m = entry["metrics"][metric]
    lines = [number(m["mean"]) + (f" ± {number(m['sd'])}" if m["sd"] is not None else "")]
    if paper is None:
        return "\n".join([*lines, f"[{number(m['low'])}, {number(m['high'])}]"])
    return "\n".join([*lines, f"paper {number(paper)}", f"{signed(m['mean'] - paper)} {interval(m['low'] - paper, m['high'] - paper)}"])


def model_table(n, dataset, split, models, columns, caption, published=True):
    """One row a model; None if nothing of it was run."""
    rows = []
    for model in models:
        entry, paper = n.models.get((dataset, split, "", model)), n.published(dataset).get(model, {}) if published else {}
        if model in NEED_TEXT and dataset in n.all["no_titles"]:
            cells = ["titles not available here" + (f"\npaper {number(paper[m])}" if m in paper else "") for m in columns]
        else:
            cells = [cell(entry, m, paper.get(m)) for m in columns]
        rows.append([label("", model), str(len(entry["seeds"])) if entry else "0", *cells])
    if not any(n.models.get((dataset, split, "", m)) for m in models):
        return []
    return [("table", ["model", "seeds", *columns.values()], rows, caption)]


def comparison_table(found, caption, against="b"):
    """Gains with intervals, both p-values before and after Holm's correction, verdict. The column names model `against`."""
    rows = [[where(c), label(*c[against]), str(c["seeds"]), str(c["users"]), f"{signed(c['gain'])}\n{interval(c['low'], c['high'])}",
             f"{p_value(c['p_users_holm'])}\nraw {p_value(c['p_users'])}" if c["p_users"] is not None else "not tested",
             f"{p_value(c['p_seeds_holm'])}\nraw {p_value(c['p_seeds'])}" if c["p_seeds"] is not None else "one seed",
             "\n".join(filter(None, (c["verdict"], other_runs(c))))] for c in found]
    column = "against" if against == "b" else "model"
    header = ["data", column, "seeds", "users", "gain in Recall@50", "over users", "over seeds", "verdict"]
    return [("table", header, rows, caption)] if rows else []


def where(entry):
    return f"{entry['dataset']}, {entry['split']}"


def new_axes(width, height):
    fig, axis = plt.subplots(figsize=(width, height), constrained_layout=True)
    axis.spines[["top", "right"]].set_visible(False)
    return fig, axis


def plot_gains(found):
    """Forest plot of the comparisons: gain, interval over users, one dot a seed."""
    fig, axis = new_axes(9, .9 + .34 * len(found))
    places = list(dict.fromkeys((c["dataset"], c["split"]) for c in found))
    for y, c in enumerate(reversed(found)):
        colour = COLOURS[places.index((c["dataset"], c["split"])) % len(COLOURS)]
        significant = c["verdict"] in ("better", "worse")
        axis.errorbar(c["gain"], y, xerr=whisker(c), color=colour, linewidth=2.2)
        axis.plot(c["gain_by_seed"], [y + .22] * len(c["gain_by_seed"]), "|", color="#555", markersize=6)
        axis.plot(c["gain"], y, "o", color=colour, markersize=8, markerfacecolor=colour if significant else "white", markeredgewidth=1.6)
    axis.axvline(0, color="#333", linewidth=1)
    axis.set_yticks(range(len(found)), [f"{c['dataset']}, {c['split']}: against {label(*c['b'])}" for c in reversed(found)], fontsize=9)
    axis.set(xlabel="gain of EIMF(REMI) in Recall@50")
    axis.grid(axis="x", alpha=.3)
    return figure(fig, "What EIMF gains, and against what. Bars: 95 % interval over test users; strokes: each seed; filled circles: significant "
                       "over users and over seeds after Holm's correction, open ones: not.")


def plot_ablations(n, places):
    """Recall@50 of the whole model, its parts left out, and the backbone, one panel a data set."""
    fig, axes = plt.subplots(1, len(places), figsize=(max(8, 4.6 * len(places)), 3.2), constrained_layout=True, squeeze=False)
    for axis, place in zip(axes[0], places):
        names = [m for m in ("remi-eimf", *ABLATIONS, "remi") if (*place, "", m) in n.models]
        differences = {c["b"][1]: c for f in ("fig3", "help") for c in n.comparisons(f, dataset=place[0], split=place[1]) if not c["b"][0]}
        ends = []
        for y, model in enumerate(reversed(names)):
            entry, c = n.models[(*place, "", model)], differences.get(model)
            mean = entry["metrics"]["recall@50"]["mean"]
            colour, hatch = {"remi-eimf": (COLOURS[0], ""), "remi": (COLOURS[4], "//")}.get(model, (COLOURS[5], ".."))
            axis.barh(y, mean, color=colour, height=.65, hatch=hatch, edgecolor="white")
            if c:
                low, high = whisker(c)
                axis.errorbar(mean, y, xerr=[high, low], color="#222", capsize=3, linewidth=1)  # the sign is the other way round: the gain is of the whole model
                ends += [mean - high[0]]
            axis.plot(entry["by_seed"], [y] * len(entry["by_seed"]), "o", color="black", markersize=3)
            ends += entry["by_seed"]
        axis.set_yticks(range(len(names)), [label("", m) for m in reversed(names)], fontsize=9)
        axis.set(title=f"{place[0]}, {place[1]}", xlabel="test Recall@50", xlim=(max(0, np.nanmin(ends) - .01), None))
        axis.spines[["top", "right"]].set_visible(False)
    return figure(fig, "Figure 3: what each part of EIMF contributes. Dots: seeds; whiskers: 95 % interval of the difference from EIMF(REMI), "
                       "paired by test user. The axis does not start at 0.")


def plot_preference(n, place):
    """Figure 4: recall against the number of LLM calls, the share of typical users on the second axis."""
    fig, axis = new_axes(9, 4)
    points = [(n.all["clusters"].get(e["folder"]), e) for v in ("", *PREFERENCES) if (e := n.models.get((*place, v, "remi-eimf")))]
    points = sorted((p for p in points if p[0]), key=lambda p: p[0]["calls"])
    calls, mean = [f["calls"] for f, _ in points], [e["metrics"]["recall@50"]["mean"] for _, e in points]
    gains = {c["a"][0]: c for c in n.comparisons("cost", dataset=place[0], split=place[1])}
    found = [gains.get(e["variant"], {"gain": 0, "low": 0, "high": 0}) for _, e in points]
    axis.errorbar(calls, mean, yerr=np.hstack([whisker(c) for c in found]), color=COLOURS[0], marker="o",
                  capsize=3, linewidth=1.6, label="EIMF(REMI)")
    for facts, entry in points:
        axis.plot([facts["calls"]] * len(entry["by_seed"]), entry["by_seed"], ".", color="#444", markersize=4)
    backbone = n.models.get((*place, "", "remi"))
    if backbone:
        axis.axhline(backbone["metrics"]["recall@50"]["mean"], color=COLOURS[1], linestyle="--", label="REMI alone")
        for value in backbone["by_seed"]:
            axis.axhline(value, color=COLOURS[1], linewidth=.6, alpha=.5)
    axis.set(xscale="log", xlabel="LLM calls (one for each typical user)", ylabel="test Recall@50")
    axis.set_xticks(calls, [str(c) for c in calls], fontsize=8)
    axis.minorticks_off()
    top = axis.secondary_xaxis("top")
    top.set_xticks(calls, [f"{100 * f['fraction']:.3g} %\n{preference_text(f)}" for f, _ in points], fontsize=7)
    top.minorticks_off()
    top.set_xlabel("share of training users that are typical users; below it, preference p", fontsize=9)
    axis.legend(frameon=False, fontsize=9, loc="best")
    axis.grid(axis="y", alpha=.3)
    answers = "recorded LLM answers" if points[0][0]["llm"] == "recorded" else f"interests by: {points[0][0]['llm']}"
    return figure(fig, f"Figure 4, {place[0]} ({place[1]}, {answers}): recall against LLM cost. Whiskers: 95 % interval of the gain over REMI alone, "
                       "paired by test user; dots and thin lines: seeds.")


def preference_text(facts):
    return "not searched" if facts["preference"] is None else f"{facts['preference'] + 0:.2g}"  # + 0 turns -0 into 0


def blocks(numbers):
    """The whole report."""
    n = Numbers(numbers)
    paragraph, details = headline(n)
    out = [("p", paragraph)] + [("list", details)] * bool(details)
    out += [("p", HOW_TO_READ)]
    out += table_1(n)
    out += [("h2", "Tables 2 and 3: all models")]
    for dataset in sorted(numbers["datasets"], key=lambda d: d == "Office"):
        title = "Table 3" if dataset == "Office" else "Table 2"
        out += model_table(n, dataset, "file-order", (*BASELINES, "remi-eimf"), SHOWN, f"{title}: {dataset}, file-order split")
    out += comparison_table(n.comparisons("baselines"), "EIMF(REMI) against each other model")
    out += [("h2", "Does EIMF help? The backbone and the controls")]
    found = n.comparisons("help")
    if found:
        out += [("p", ABOUT_CONTROLS), ("figure", "gains", plot_gains(found))]
    out += comparison_table(found, "EIMF(REMI) against its backbone and the controls") or [("p", "Nothing of this has been run yet.")]
    out += best(n)
    out += [("h2", "Table 4: other backbones, with and without EIMF")]
    for dataset, split in n.places:
        if split == "file-order":
            pairs = [m for b in TAUGHT for m in (b, f"{b}-eimf")]
            out += model_table(n, dataset, split, pairs, {m: SHOWN[m] for m in ("recall@50", "hr@50")}, f"Table 4: {dataset}, {split} split")
    out += comparison_table(n.comparisons("table4"), "With EIMF, against the same backbone without", "a")
    out += tuned(n)
    out += [("h2", "Figure 3: ablations")]
    places = [p for p in n.places if any((*p, "", m) in n.models for m in ABLATIONS)]
    out += [("figure", "fig3", plot_ablations(n, places))] if places else []
    out += [("p", "Without alignment nothing of the teaching reaches the backbone: it then learns what REMI alone learns, number for number, so this row "
                  "repeats EIMF's whole gain.")] if places else []
    out += comparison_table(n.comparisons("fig3"), "EIMF(REMI) against itself with a part left out") or [("p", "Nothing of this has been run yet.")]
    out += preference(n) + splits(n) + parts(n) + cost(n)
    out += [("h2", "Where this differs from the paper"), ("ordered", [*DEVIATIONS, *run_deviations(n)])]
    return out + provenance(n)


def best(n):
    out = []
    for dataset, split in n.places:
        models = [m for m in ("remi", "remi-eimf", *BEST) if (dataset, split, "", m) in n.models]
        if any(m in BEST for m in models):
            out += model_table(n, dataset, split, models, SHOWN, f"{dataset}, {split} split", published=split == "file-order")
    found = n.comparisons("best")
    for model in ("remi-best", "remi-best-eimf"):
        out += comparison_table([c for c in found if c["a"][1] == model], f"{label('', model)}, against")
    return [("h2", "Beyond the paper: the best recipe"), ("p", ABOUT_BEST), *out] if out else []


def tuned(n):
    """What tuning found, and every backbone with and without EIMF by it."""
    out = []
    for dataset, found in n.all["tuning"].items():
        rows = [[LABELS[b], number(f["trials"][0]["recall@50"]), number(f["recall@50"]), f"`{f['flags']}`" if f["flags"] else "its defaults",
                 f"{len(f['trials'])}", f"{sum(t['minutes'] for t in f['trials']):.0f}"] for b, f in found.items()]
        out += [("table", ["model", "default", "tuned", "settings kept", "trainings", "minutes"], rows,
                 f"{dataset}: validation Recall@50 of one seed, file-order split, before and after tuning")]
    for dataset, split in n.places:
        pairs = [settled(dataset, f"{b}-tuned{eimf}") for b in n.all["tuning"].get(dataset, ()) for eimf in ("", "-eimf")]
        pairs = [m for m in pairs if (dataset, split, "", m) in n.models]
        out += model_table(n, dataset, split, pairs, SHOWN, f"{dataset}, {split} split, tuned", published=False)
    out += comparison_table(n.comparisons("taught"), "Tuned, with EIMF, against the same without (REMI with default settings: see above)", "a")
    out += [("list", [together_text(c) for c in found])] if (found := n.all.get("together")) else []
    out += comparison_table(n.comparisons("tuned"), "Tuned, against the same with default settings", "a")
    out += comparison_table(n.comparisons("strongest"), "Against the tuned backbone that is strongest on validation users: "
                            + listed(f"{LABELS[strongest(found)]} on {d}" for d, found in n.all["tuning"].items()), "a")
    return [("h2", "Every backbone, tuned, with and without EIMF"), ("p", ABOUT_TUNED), *out] if out else []


def table_1(n):
    names = {"users": "users", "items": "items", "interactions": "interactions"}
    rows = []
    for dataset, facts in n.all["datasets"].items():
        paper = dict(zip(names, facts["paper"] or ()))
        ours = facts["stats"]
        rows.append([dataset, *(f"{ours[k]:,}" + (f"\npaper {paper[k]:,}\n{ours[k] - paper[k]:+,}" if paper else "") for k in names),
                     f"{ours['interactions'] / ours['users']:.2f}", f"{100 * ours['interactions'] / ours['users'] / ours['items']:.3f} %",
                     f"{ours.get('items_with_title', 0):,}"])
    return [("h2", "Table 1: data"), ("table", ["data", *names, "events a user", "density", "titled items"], rows, "after filtering")]


def preference(n):
    out = [("h2", "Figure 4: preference, typical users and LLM calls")]
    for place in [p for p in n.places if any((*p, v, "remi-eimf") in n.models for v in PREFERENCES)]:
        out += [("figure", f"fig4-{place[0].lower()}", plot_preference(n, place))]
        rows = []
        for variant in ("", *PREFERENCES):
            entry = n.models.get((*place, variant, "remi-eimf"))
            facts = n.all["clusters"].get(entry["folder"]) if entry else None
            if facts:
                rows.append([label(variant, "remi-eimf").partition(", ")[2] or "main", preference_text(facts), f"{100 * facts['fraction']:.1f} %",
                             f"{facts['calls']:,}", str(len(entry["seeds"])), cell(entry, "recall@50"), cell(entry, "hr@50")])
        best = n.all["datasets"].get(place[0], {}).get("best_preference")
        paper = f". The paper's best: Recall@50 {number(best[1])} at p = {best[0]}, on its own encoder's scale" if best else ""
        out += [("table", ["typical users", "p", "share", "LLM calls", "seeds", "Recall@50", "HR@50"], rows, ", ".join(place) + paper)]
    tables = comparison_table(n.comparisons("cost"), "Each choice of typical users, against REMI alone", "a")
    tables += comparison_table(n.comparisons("fig4"), "Each choice of typical users, against the main one", "a")
    return out + (tables if len(out) > 1 else [("p", "Nothing of this has been run yet.")])


def splits(n):
    out = [("h2", "Both splits, and NDCG"), ("p", ABOUT_SPLITS)]
    for dataset in n.all["datasets"]:
        for split in ("file-order", "random"):
            models = [m for m in (*BASELINES, *OTHERS, "remi-eimf", *CONTROLS) if (dataset, split, "", m) in n.models]
            columns = (SHOWN if split == "random" else {}) | NDCG
            out += model_table(n, dataset, split, models, columns, f"{dataset}, {split} split", published=split == "file-order")
    return out


def parts(n):
    rows, models = [], ("remi", "remi-eimf", *CONTROLS)
    for part in n.all["parts"]:
        c = next(iter(n.comparisons("parts", dataset=part["dataset"], split=part["split"], kind=part["kind"], part=part["part"])), None)
        rows.append([where(part), PARTS[part["kind"]].format(part["part"]), str(part["users"]),
                     *(number(part["recall"][m]) if m in part["recall"] else "" for m in models),
                     *([f"{signed(c['gain'])}\n{interval(c['low'], c['high'])}", f"{c['verdict']}\n{p_value(worst_p(c))}"] if c else [""] * 2)])
    header = ["data", "part", "users", "REMI", "EIMF(REMI)", "random text", "shuffled", "gain of EIMF", "verdict"]
    caption = "Recall@50 within parts of the test users, and of their target items, by how often training has seen these"
    return [("h2", "Short histories and cold items"), ("table", header, rows, caption)] if rows else []


def cost(n):
    rows = [[where(m), label(m["variant"], m["model"]), str(len(m["seeds"])), f"{c['minutes']:.1f}", f"{c['iterations']:,.0f}",
             f"{c['best_iteration']:,.0f}", f"{c['milliseconds_per_step']:.0f}", f"{c['peak_memory_mib']:.0f}",
             "" if m["cosine"] is None else f"{m['cosine']:.2f}"] for m in n.all["models"] if (c := m["cost"]) and m["model"] != "pop"]
    header = ["data", "model", "seeds", "minutes a run", "steps", "best step", "ms a step", "peak MiB", "cosine"]
    caption = ("means over seeds. Minutes include the evaluation; runs shared the machine with each other. Cosine: between the interests of a "
               "test user, mean over pairs")
    return [("h2", "Training cost"), ("table", header, rows, caption)] if rows else []


def run_deviations(n):
    """Numbered with the others, but made from what was run."""
    llm = {}
    for dataset in n.all["datasets"]:
        facts = n.all["clusters"].get(folder_of(dataset, "file-order"))
        if facts:
            llm.setdefault(facts["llm"], []).append(dataset)
    about = {"offline": "the offline summariser's category phrases, no LLM.",
             "recorded": "recorded answers of a large language model under the paper's prompt, not qwen-turbo."}
    out = [f"Explicit interests on {listed(names)}: {about.get(kind, kind + '.')}" for kind, names in llm.items()]
    shared = n.all["train_args"]
    out += [f"All models share the training arguments `{shared}`." if shared else "All models are trained with stage 06's defaults."]
    out += [f"{d} has no item titles here, so its EIMF cells are empty; with the public metadata the same command fills them."
            for d in n.all["no_titles"]]
    out += [f"{d}'s item ids here are not Amazon's, so its file order, and with it the file-order split, is not the published one; its difference from the "
            "paper says little." for d in n.all["foreign_ids"]]
    return out + [f"{d}'s counts differ from the paper's, so it is another version of the data."
                  for d, facts in n.all["datasets"].items() if facts["paper"] and not facts["matches"]]


def provenance(n):
    out = [("h2", "What is behind each number"),
           ("p", "RAW_DIR and LLM_DIR stand for the folders of raw files and recorded answers. The first seed's command is shown; the others "
                 "differ in --seed and --run. The runs may be of several machines and commits. A comparison is of the runs in the tables "
                 "where it does not say otherwise. Not tested over users: the two models were run in different data folders.")]
    machines = list(dict.fromkeys(str(m) for e in n.all["models"] for m in e["machines"]))
    unique = {str(m): m for e in n.all["models"] for m in e["machines"]}.values()
    described = [f"{m['cpu']}, {m['cores']} cores, {m['gpu'] or 'no GPU'}" for m in unique]
    out += [("list", [f"machine {i + 1}: {text}" for i, text in enumerate(described)])] if described else []
    rows = [[f"{where(e)}: {label(e['variant'], e['model'])}", ", ".join(map(str, e["seeds"])), ", ".join(e["commits"]),
             ", ".join(str(machines.index(str(m)) + 1) for m in e["machines"]) or "unknown",
             f"{e['cost']['minutes'] * len(e['seeds']):.0f}", e["commands"][0]] for e in n.all["models"]]
    caption = "then python stages/07_evaluate.py with the same --dataset and --run"
    out += [("table", ["model", "seeds", "commit", "machine", "minutes", "command"], rows, caption)] if rows else []
    left = n.all["remaining"]
    if any(runs for runs, _ in left.values()):
        total = sum(s for _, s in left.values())
        out += [("h2", "What remains to be run"),
                ("list", [f"{GROUPS[g]} (`--only {g}`): {runs} runs, about {s / 3600:.1f} hours one after the other"
                          for g, (runs, s) in left.items() if runs]),
                ("p", f"Together about {total / 3600:.0f} hours of one run at a time on this machine; the same command goes on.")]
    return out


PAGE_STYLE = """
body { max-width: 76rem; } small { color: #666; } td { vertical-align: top; } td:last-child { white-space: normal; min-width: 8rem; }
.left { text-align: left; } table { margin-bottom: 1.2rem; } caption { caption-side: top; font-weight: 600; } .lead { font-size: 1.15rem; }
h2 { margin-top: 2.5rem; } code { font-size: .85em; } @media (prefers-color-scheme: dark) { small { color: #aaa; } }
@media print { body { max-width: none; font-size: 10pt; } .scroll { overflow: visible; } figure, tr { break-inside: avoid; } }
"""


def to_markdown(title, parts_):
    lines = [f"# {title}"]
    for kind, *content in parts_:
        if kind == "table":
            header, rows, caption = content
            cells = [[c.replace("|", "\\|").replace("\n", "<br>") for c in row] for row in rows]
            lines += [f"**{caption[:1].upper() + caption[1:]}**", markdown_table(header, cells)]
        elif kind == "figure":
            name, page = content
            caption = html.unescape(re.search("<figcaption>(.*?)</figcaption>", page, re.S)[1])
            lines += [f"![{caption}]({name}.svg)", f"*{caption}*"]
        elif kind in ("list", "ordered"):
            lines += ["\n".join(f"{i}. {t}" if kind == "ordered" else f"- {t}" for i, t in enumerate(content[0], 1))]
        else:
            lines += [("## " if kind == "h2" else "") + content[0]]
    return "\n\n".join(lines) + "\n"


def to_html(title, parts_):
    def text(value):
        return re.sub("`(.*?)`", r"<code>\1</code>", html.escape(value))

    def cell_html(left, tag, value):
        first, *rest = value.split("\n")
        return f"<{tag}{' class=left' * left}>{text(first)}{''.join(f'<br><small>{text(r)}</small>' for r in rest)}</{tag}>"

    out = [f"<style>{PAGE_STYLE}</style>"]
    for number_, (kind, *content) in enumerate(parts_):
        if kind == "table":
            header, rows, caption = content
            left = [h in TEXT_COLUMNS for h in header]
            head, *body = ("<tr>" + "".join(map(cell_html, left, [tag] * len(row), row)) + "</tr>" for tag, row in
                           [("th", header), *(("td", row) for row in rows)])
            out.append(f'<div class="scroll"><table><caption>{text(caption[:1].upper() + caption[1:])}</caption><thead>{head}</thead>'
                       f'<tbody>{"".join(body)}</tbody></table></div>')
        elif kind == "figure":
            out.append(content[1])
        elif kind in ("list", "ordered"):
            tag = "ol" if kind == "ordered" else "ul"
            out.append(f"<{tag}>" + "".join(f"<li>{text(t)}</li>" for t in content[0]) + f"</{tag}>")
        else:
            out.append(f"<{kind}{' class=lead' * (number_ == 0)}>{text(content[0])}</{kind}>")
    return html_page(title, out)


def write(args, numbers, results):
    """numbers.json, report.md with its figures, report.html; with --publish copies in the folder `results`."""
    folder, title = args.data_dir / "reproduction", "The paper, reproduced and tested"
    folder.mkdir(parents=True, exist_ok=True)
    found = blocks(numbers)
    save_json(folder / "numbers.json", numbers | {"headline": found[0][1]})
    for ending, text in (("md", to_markdown(title, found)), ("html", to_html(title, found))):
        with atomic(folder / f"report.{ending}") as file:
            file.write(text)
    figures = [(f"{name}.svg", page[page.index("<svg"):page.index("</svg>") + 6]) for kind, name, page in (b for b in found if b[0] == "figure")]
    for name, svg in figures:
        with atomic(folder / name) as file:
            file.write(svg + "\n")
    print(found[0][1], f"\nreport: {folder / 'report.html'}")
    if args.publish:
        results.mkdir(parents=True, exist_ok=True)
        for name in ("report.md", "numbers.json", *(name for name, _ in figures)):
            shutil.copyfile(folder / name, results / name)
        print(f"copied to {results}")
