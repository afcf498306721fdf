"""Write the README's results block from measured summaries.

    python data/make_results.py            # copies data/<data set>/07_evaluate/summary.json to data/results/ and renders
    python data/make_results.py --check    # exits 1 if the README's block is not what data/results/ gives

Reads   data/<data set>/07_evaluate/summary.json of the data sets below, where they exist
        data/results/core.json, which csrc/bench/bench.py --json writes; llm.json, of tests/measure_llm_throughput.py --out;
        serving.json, of tests/measure_serving.py
Writes  data/results/<data set>.json, and the blocks of README.md between the two `results` and, if it has them, the `core`, `llm` and
        `serving` markers
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))

from eimf.published import PUBLISHED  # noqa: E402
from eimf.report import markdown_table  # noqa: E402

DATASETS = {"Beauty-file-order": "Beauty", "Office_Products-file-order": "Office", "Beauty": "Beauty", "Office_Products": "Office"}
COLUMNS = {"recall@20": "R@20", "recall@50": "R@50", "ndcg@20": "NDCG@20", "ndcg@50": "NDCG@50", "hr@20": "HR@20", "hr@50": "HR@50"}
ORDER = ("pop", *(recipe + model for recipe in ("remi", "remi-best") for model in ("", "-eimf", "-eimf-random-text", "-eimf-shuffled-clusters")))
BEGIN, END = "<!-- results: python data/make_results.py -->", "<!-- end of results -->"
LLM_BEGIN, LLM_END = "<!-- llm: python data/make_results.py -->", "<!-- end of llm -->"
CORE_BEGIN, CORE_END = "<!-- core: python data/make_results.py -->", "<!-- end of core -->"
SERVING_BEGIN, SERVING_END = "<!-- serving: python data/make_results.py -->", "<!-- end of serving -->"
# csrc/bench's columns as the README shows them: header, format.
CORE = {
    "affinity_propagation": ("Affinity propagation, seconds per iteration", {
        "points": ("points", "d"), "threads": ("threads", "d"), "quantile": ("preference, quantile of the similarities; above 1: times the lowest", "g"),
        "clusters": ("clusters", "d"), "eimf s/iteration": ("eimf", ".4f"), "scikit-learn s/iteration": ("scikit-learn", ".3f"), "ratio": ("ratio", ".0f"),
        "fit ratio": ("whole fit, ratio", ".0f"), "eimf MiB": ("eimf MiB", "d"), "memory ratio": ("memory, ratio", ".0f")}),
    "scoring": ("Top 50 of the maximum over K = 4 interests, D = 64, users per second", {
        "items": ("items", "d"), "threads": ("threads", "d"), "eimf users/s": ("eimf", ".0f"), "NumPy users/s": ("NumPy", ".0f"),
        "torch users/s": ("torch", ".0f"), "faiss users/s": ("faiss", ".0f"), "share of peak": ("eimf, share of peak", ".0%"),
        "one user, prepared, ms": ("one user alone, ms", ".2f")}),
    "hnsw": ("HNSW at a recall of at least .99 beside the exact kernel", {
        "items": ("items", "d"), "threads": ("threads", "d"), "ef": ("ef", "d"), "recall": ("recall", ".3f"), "hnsw users/s": ("HNSW users/s", ".0f"),
        "exact users/s": ("exact users/s", ".0f"), "hnsw, one user, ms": ("one user, HNSW ms", ".2f"), "exact, one user, ms": ("one user, exact ms", ".2f")}),
}


def render(folder):
    """The results as Markdown, from the JSON files in `folder`."""
    parts = []
    for dataset, paper in DATASETS.items():
        path = folder / f"{dataset}.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for model in [m for m in ORDER if m in summary["models"]]:
            entry = summary["models"][model]
            cells = [f"{entry['mean'][c]:.4f}" + (f" ± {entry['sd'][c]:.4f}" if entry["sd"][c] is not None else "") for c in COLUMNS]
            rows.append([model, str(len(entry["seeds"])), *cells])
            if summary["split"] == "file-order" and model in PUBLISHED[paper]:
                values = PUBLISHED[paper][model]
                row = dict(zip(("recall@20", "recall@50", "hr@20", "hr@50"), values))
                rows.append([f"*paper, {model}*", "", *(f"*{row[c]:.4f}*" if c in row else "" for c in COLUMNS)])
        parts.append(f"**{paper}, {summary['split']} split**\n\n" + markdown_table(["model", "seeds", *COLUMNS.values()], rows))
        for d in summary["differences"]:
            verdict = "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "no significant difference"
            parts.append(f"- {d['model']} against {d['against']}, R@50: {d['recall@50']:+.4f} (95 % interval {d['low']:+.4f} to "
                         f"{d['high']:+.4f}, paired by user, {d['seeds']} seeds): **{verdict}**.")
    text = "\n\n".join(parts)
    return text.replace("**.\n\n- ", "**.\n- ")


def render_core(path):
    """The core's speed as Markdown, from csrc/bench's figures."""
    found, parts = json.loads(path.read_text(encoding="utf-8")), []
    for name in [name for name in CORE if name in found]:
        title, columns = CORE[name]
        machine, rows = found[name]["machine"], found[name]["rows"]
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


def replaced(text, begin, end, block):
    """`text` with `block` between its two markers; exits unless each is there once."""
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"error: README.md must hold the lines {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder that holds all data sets")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the README is not up to date")
    args = parser.parse_args(argv)
    results, readme = ROOT / "data" / "results", ROOT / "README.md"
    if not args.check:
        results.mkdir(exist_ok=True)
        for dataset in DATASETS:
            source = args.data_dir / dataset / "07_evaluate" / "summary.json"
            if source.is_file():
                shutil.copyfile(source, results / f"{dataset}.json")
                print(f"copied {source}")
    text = readme.read_text(encoding="utf-8")
    updated = replaced(text, BEGIN, END, render(results))
    if CORE_BEGIN in text or CORE_END in text:
        updated = replaced(updated, CORE_BEGIN, CORE_END, render_core(results / "core.json"))
    if LLM_BEGIN in text or LLM_END in text:
        updated = replaced(updated, LLM_BEGIN, LLM_END, render_llm(results / "llm.json"))
    if SERVING_BEGIN in text or SERVING_END in text:
        updated = replaced(updated, SERVING_BEGIN, SERVING_END, render_serving(results / "serving.json"))
    if args.check:
        sys.exit(0 if updated == text else "error: README.md differs from data/results; run python data/make_results.py")
    readme.write_text(updated, encoding="utf-8")
    print(f"wrote the blocks of {readme}")


if __name__ == "__main__":
    main()
