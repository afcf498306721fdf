"""Write the README's blocks of measured results.

    python data/make_results.py            # writes them
    python data/make_results.py --check    # exits 1 if they are not what data/results/ gives

Reads   data/results/numbers.json, which bash run_all.sh --reproduce --publish writes; core.json, of csrc/bench/bench.py --json; llm.json, of
        tests/measure_llm_throughput.py --out; Office_Products[-file-order].json, summary.json of stage 07 after the command in the README; tuning-*.json, of data/tune.py,
        through numbers.json; serving.json, of tests/measure_serving.py; training.json, of tests/bench_training.py
Writes  the blocks of README.md between the markers of the same names; `results` is that of numbers.json
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "stages"), str(ROOT / "data")]

from eimf.report import markdown_table, p_value  # noqa: E402
from experiments import ALL, CONTROLS, settled  # noqa: E402
from paper_report import other_runs, together_text  # noqa: E402

COLUMNS = {"recall@20": "R@20", "recall@50": "R@50", "ndcg@50": "NDCG@50", "hr@20": "HR@20", "hr@50": "HR@50"}
MODELS = ("pop", "remi", "remi-eimf", *CONTROLS, "remi-best", "remi-best-eimf")
SAID = [*(("remi-eimf", b) for b in ("remi", *CONTROLS)), ("remi-best", "remi"), ("remi-best-eimf", "remi-best")]  # comparisons in words
# csrc/bench's columns as the README shows them: header, format.
CORE = {
    "affinity_propagation": ("Affinity propagation, seconds per iteration", {
        "points": ("points", "d"), "threads": ("threads", "d"), "quantile": ("preference, quantile of the similarities; above 1: times the lowest", "g"),
        "clusters": ("clusters", "d"), "eimf s/iteration": ("eimf", ".4f"), "scikit-learn s/iteration": ("scikit-learn", ".3f"), "ratio": ("ratio", ".0f"), "bandwidth share": ("one pass over all similarities in that time, share of memory bandwidth", ".0%"),
        "fit ratio": ("whole fit, ratio", ".0f"), "eimf MiB": ("eimf MiB", "d"), "memory ratio": ("memory, ratio", ".0f")}),
    "scoring": ("Top 50 of the maximum over K = 4 interests, D = 64, users per second", {
        "items": ("items", "d"), "threads": ("threads", "d"), "eimf users/s": ("eimf", ".0f"), "NumPy users/s": ("NumPy", ".0f"),
        "torch users/s": ("torch", ".0f"), "faiss users/s": ("faiss", ".0f"), "eimf, float products alone users/s": ("eimf, float products alone", ".0f"),
        "share of peak, float products alone": ("of these, share of peak", ".0%"),
        "one user, prepared, ms": ("one user alone, ms", ".2f"), "MiB per thread": ("extra MiB per thread", ".1f")}),
    "softmax": ("Softmax loss over all items with its gradients, 128 users, D = 64, milliseconds", {
        "items": ("items", "d"), "threads": ("threads", "d"), "eimf ms": ("eimf", ".3g"), "torch ms": ("torch cross_entropy", ".3g"), "ratio": ("ratio", ".1f"),
        "share of peak": ("share of peak", ".0%")}),
    "hnsw": ("HNSW at a recall of at least .99 beside the exact kernel", {
        "items": ("items", "d"), "threads": ("threads", "d"), "ef": ("ef", "d"), "recall": ("recall", ".3f"), "hnsw users/s": ("HNSW users/s", ".0f"),
        "exact users/s": ("exact users/s", ".0f"), "hnsw, one user, ms": ("one user, HNSW ms", ".2f"), "exact, one user, ms": ("one user, exact ms", ".2f")}),
}


def spread(mean, sd):
    """"0.2500 ± 0.0100; without the second for a single seed."""
    return f"{mean:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")


def render(path):
    """The main results of the reproduction as Markdown."""
    found, parts = json.loads(path.read_text(encoding="utf-8")), []
    for place in [(d, split) for split in ("file-order", "random") for d in found["datasets"]]:
        models = {m["model"]: m for m in found["models"] if (m["dataset"], m["split"], m["variant"]) == (*place, "")}
        published, rows = found["datasets"][place[0]]["published"] if place[1] == "file-order" else {}, []
        for name in [name for name in MODELS if name in models]:
            metrics = models[name]["metrics"]
            rows.append([name, str(len(models[name]["seeds"])), *(spread(metrics[c]["mean"], metrics[c]["sd"]) for c in COLUMNS)])
            if name in published:
                rows.append([f"*paper, {name}*", "", *(f"*{published[name][c]:.4f}*" if c in published[name] else "" for c in COLUMNS)])
        if not rows:
            continue
        said = []
        for c in found["comparisons"]:
            (variant_a, a), (variant_b, b) = c["a"], c["b"]
            strongest = c["family"] == "strongest"
            told = strongest or (c["family"] in ("help", "best") and (a, b) in SAID and not variant_a and not variant_b)
            if told and (c["dataset"], c["split"]) == place:
                tests = [f"95 % interval {c['low']:+.4f} to {c['high']:+.4f}"] if c["low"] is not None else []
                tests.append(f"{c['seeds']} seed{'s' * (c['seeds'] > 1)}")
                p_values = [f"over {what} {p_value(c[f'p_{what}_holm'])}" for what in ("users", "seeds") if c[f"p_{what}_holm"] is not None]
                tests += [", ".join(p_values)] * bool(p_values) + [other_runs(c)] * bool(other_runs(c))
                said.append(f"- {a} against {b}{', the strongest tuned backbone' * strongest}, R@50: {c['gain']:+.4f} ({'; '.join(tests)}): **{c['verdict']}**.")
        parts.append("\n\n".join([f"**{place[0]}, {place[1]} split**", markdown_table(["model", "seeds", *COLUMNS.values()], rows), *["\n".join(said)] * bool(said)]))
    return "\n\n".join([*parts, found["headline"]])


def render_backbones(path):
    """Every backbone's test Recall@50: the default settings, tuned, both with EIMF, and the paper's."""
    found, parts = json.loads(path.read_text(encoding="utf-8")), []
    for place in [(d, split) for split in ("file-order", "random") for d in found["datasets"]]:
        models = {m["model"]: m for m in found["models"] if (m["dataset"], m["split"], m["variant"]) == (*place, "")}
        published = found["datasets"][place[0]]["published"] if place[1] == "file-order" else {}
        gains = {(c["a"][1], c["b"][1]): c for c in found["comparisons"] if c["family"] in ("help", "taught") and (c["dataset"], c["split"]) == place
                 and not c["a"][0] and not c["b"][0]}
        rows = []
        for b in [b for b in ALL if {b, f"{b}-tuned"} & models.keys()]:
            tuned = [settled(place[0], f"{b}-tuned{eimf}") for eimf in ("", "-eimf")]
            cells = [f"{spread(*(m['metrics']['recall@50'][k] for k in ('mean', 'sd')))} ({len(m['seeds'])})" if (m := models.get(name)) else ""
                     for name in (b, f"{b}-eimf", *tuned)]
            paper = [f"*{published[name]['recall@50']:.4f}*" if name in published else "" for name in (b, f"{b}-eimf")]
            gain = gains.get((tuned[1], tuned[0]))
            rows.append([b, *cells, f"{gain['gain']:+.4f}, {gain['verdict']}" if gain else "", *paper])
        if rows:
            header = ["backbone", "default", "with EIMF", "tuned", "tuned, with EIMF", "gain of EIMF when tuned", "*paper*", "*paper, EIMF*"]
            parts += [f"**{place[0]}, {place[1]} split**", markdown_table(header, rows)]
            parts += [together_text(c) for c in found["together"] if (c["dataset"], c["split"]) == place]
    for dataset, tuning in found["tuning"].items():
        kept = "; ".join(f"{b} `{f['flags']}`" if f["flags"] else f"{b} its defaults" for b, f in tuning.items())
        trainings, minutes = {len(f["trials"]) for f in tuning.values()}, sum(t["minutes"] for f in tuning.values() for t in f["trials"])
        parts.append(f"Tuned on {dataset}'s validation users with {' to '.join(map(str, sorted(trainings)))} trainings of each backbone ({minutes:.0f} minutes in all, one thread each): {kept}.")
    return "\n\n".join(parts)


def render_offline(folder):
    """Office with the offline summariser's interests, from summary.json of stage 07."""
    parts = []
    for path in (folder / "Office_Products-file-order.json", folder / "Office_Products.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [[name, str(len(entry["seeds"])), *(spread(entry["mean"][c], entry["sd"][c]) for c in COLUMNS)]
                for name in MODELS if (entry := found["models"].get(name))]
        said = [f"- {d['model']} against {d['against']}, R@50: {d['recall@50']:+.4f} (95 % interval over users {d['low']:+.4f} to {d['high']:+.4f}, {d['seeds']} seeds)."
                for d in found["differences"]]
        parts += [f"**Office, {found['split']} split, interests by the offline summariser**", markdown_table(["model", "seeds", *COLUMNS.values()], rows), "\n".join(said)]
    return "\n\n".join(parts)


def render_core(path):
    """The core's speed as Markdown, from csrc/bench's figures."""
    found, parts = json.loads(path.read_text(encoding="utf-8")), []
    for name, measured in [(name, measured) for name in CORE for measured in found.get(name, {}).values()]:
        title, columns = CORE[name]
        machine, rows = measured["machine"], measured["rows"]
        cells = [[format(row[c], style) if row.get(c) is not None else "" for c, (_, style) in columns.items()] for row in rows]
        how = (f"{machine['cpu']}, {machine['kernel']}, {machine['clock']} clock, "
               f"medians of {machine['rounds']}, peak {machine['fma_gflops']:.0f} GFLOP/s and {machine['memory_gbs']:.0f} GB/s, "
               f"load {machine['load']} at the start")
        parts.append(f"**{title}** ({how})\n\n" + markdown_table([header for header, _ in columns.values()], cells))
    return "\n\n".join(parts)


def render_llm(path):
    """The chat client's throughput as a sentence, from the figures of tests/measure_llm_throughput.py."""
    found = json.loads(path.read_text(encoding="utf-8"))
    patient, fast = found["one_second_answers"], found["hundred_thousand_requests"]
    return (f"On one core, the client keeps a server that takes {patient['delay']:g} s for an answer {patient['busy']:.1%} busy at a concurrency of "
            f"{patient['concurrency']} ({patient['requests']:,} requests, start included). Without that delay it makes {fast['per_second']:.0f} requests a "
            f"second, and {fast['requests']:,} of them take {fast['peak_memory_mib']:.0f} MiB at most.")


def render_serving(path):
    """The server's speed as Markdown, from the figures of tests/measure_serving.py."""
    found = json.loads(path.read_text(encoding="utf-8"))
    measured, rows = found["measured"], []
    loads = {name: entry for name, entry in measured.items() if "rate" in entry}
    for name, entry in loads.items():
        rate, highest = entry["rate"], entry["highest"]
        rows.append([name, *(f"{rate[p]:.1f}" for p in ("p50", "p99", "p99.9")), f"{rate['server_cores']:.2f}", f"{highest['per_second']:,.0f}",
                     *(f"{highest[p]:.0f}" for p in ("p50", "p99"))])
    machine = next(iter(loads.values()))
    asked = f"{machine['asked_per_second']:,.0f}"
    parts = [f"{found['dataset']}, run {found['run']}, {found['items']:,} items, {machine['cores']} cores ({machine['cpu']}), of which wrk takes a part; "
             f"{machine['cores_used_by_others']:g} cores were busy with other programs at the start. Latency in milliseconds.",
             markdown_table(["server", *(f"{p} at {asked}/s" for p in ("p50", "p99", "p99.9")), "cores used", "requests/s at most",
                             "p50 then", "p99 then"], rows)]
    if memory := measured.get("memory"):
        first, *_, last = memory["resident_mib"]
        parts.append(f"Memory over {memory['minutes']:g} minutes at {memory['per_second']:,.0f} requests/s ({memory['requests']:,} in all, {memory['errors']} "
                     f"errors): {first:.0f} MiB early, {last:.0f} MiB in the end.")
    if "lines" in measured:
        parts.append(f"`--lines` on all {measured['lines']['cores']} cores: {measured['lines']['per_second']:,} users per second.")
    return "\n\n".join(parts)


def render_training(path):
    """Training speed as Markdown, from the figures of tests/bench_training.py, one kind of processor after the other."""
    found, parts = json.loads(path.read_text(encoding="utf-8")), []
    for measured in found["rates"].values():
        peers = [{r["threads"]: r["steps_per_second"] for r in measured["rows"] if r["what"].startswith("public") and r["what"].endswith(end)}
                 for end in ("never uses", "as shipped")]
        rows = [[r["what"], str(r["threads"]), f"{r['steps_per_second']:.3g}", f"{r['spread'][0]:.3g} to {r['spread'][1]:.3g}",
                 *(f"{r['steps_per_second'] / peer[r['threads']]:.1f}" if peer else "" for peer in peers)] for r in measured["rows"]]
        parts += [markdown_table(["training step of 128 users, Beauty's shape", "threads", "steps per second", "spread", "to the public loop without what it "
                                  "never uses", "to it as shipped"], rows),
                  f"{measured['machine']}, torch {measured['torch']}, medians of {measured['rounds']} interleaved rounds."]
    for run in found.get("to_best", {}).values():
        parts.append(f"{run['what']}, on {run['threads']} threads ({run['machine']}): best validation (R@50 {run['recall@50']:.4f}) at step {run['best_iteration']:,} after "
                     f"{run['seconds_to_best']:.0f} s, stopped after {run['seconds_to_stop']:.0f} s; validations took {run['validation_seconds']:.0f} s of that.")
    for grown in found.get("growth", {}).values():
        rows = [[r["what"], str(r["threads"]), f"{r['steps_per_second']:.3g}"] for r in grown["rows"]]
        parts.append(markdown_table([f"growth, medians of {grown['rounds']}, {grown['machine']}", "threads", "steps per second"], rows))
    return "\n\n".join(parts)


def replaced(text, begin, end, block):
    """`text` with `block` between its two markers; exits unless each is there once."""
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"error: README.md must hold the lines {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the README is not up to date")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = updated = readme.read_text(encoding="utf-8")
    for name, (file, block) in BLOCKS.items():
        updated = replaced(updated, f"<!-- {name}: python data/make_results.py -->", f"<!-- end of {name} -->", block(ROOT / "data" / "results" / file))
    if args.check:
        sys.exit(0 if updated == text else "error: README.md differs from data/results; run python data/make_results.py")
    readme.write_text(updated, encoding="utf-8")
    print(f"wrote the blocks of {readme}")


BLOCKS = {"results": ("numbers.json", render), "backbones": ("numbers.json", render_backbones), "offline": ("", render_offline), "core": ("core.json", render_core), "llm": ("llm.json", render_llm), "serving": ("serving.json", render_serving),
          "training": ("training.json", render_training)}

if __name__ == "__main__":
    main()
