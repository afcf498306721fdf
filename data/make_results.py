"""Write the README's results block from measured summaries.

    python data/make_results.py            # copies data/<data set>/07_evaluate/summary.json to data/results/ and renders
    python data/make_results.py --check    # exits 1 if the README's block is not what data/results/ gives

Reads   data/<data set>/07_evaluate/summary.json of the data sets below, where they exist
Writes  data/results/<data set>.json, and the block of README.md between the two `results` markers
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
ORDER = ("pop", "remi", "remi-eimf", "remi-eimf-random-text", "remi-eimf-shuffled-clusters")
BEGIN, END = "<!-- results: python data/make_results.py -->", "<!-- end of results -->"


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
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"error: {readme} must hold the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    updated = f"{before}{BEGIN}\n\n{render(results)}\n\n{END}{rest.split(END)[1]}"
    if args.check:
        sys.exit(0 if updated == text else "error: README.md differs from data/results; run python data/make_results.py")
    readme.write_text(updated, encoding="utf-8")
    print(f"wrote the results block of {readme}")


if __name__ == "__main__":
    main()
