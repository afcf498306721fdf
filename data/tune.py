"""Tune every backbone on validation users, each with the same budget: the settings that `--only backbones` of the reproduction runs.

    python data/tune.py --datasets Office,Beauty --data-dir DIR

One setting after the other, in the order of TRIALS: it is kept if validation Recall@50 rises (file-order split, seed 0, without EIMF).
The folders must hold stage 01's output, and 02's for llm2bert4rec: `bash run_all.sh --reproduce --only table1,table4` makes them.

Reads   <data-dir>/<data set>-file-order/01_preprocess/, 02_encode_text/
Writes  <data-dir>/<data set>-file-order/06_train/<backbone>-tune-<trial>/; what is done is skipped
        data/results/tuning-<data set>.json  backbone -> flags that were kept, and what each trial gave
"""
import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))

import experiments  # noqa: E402
from eimf.artifacts import UserError, load_json, load_lines, run as run_main, save_json  # noqa: E402
from eimf.backbones import BACKBONES  # noqa: E402
from experiments import DATASETS, folder_of  # noqa: E402

# The first is every backbone's own default. Dropout acts on the history's vectors in all of them.
TRIALS = ("", "--horizon 100", "--dropout 0.3", "--dropout 0.5", "--learning-rate 0.003", "--loss hard-negatives", "--event-dropout 0.3")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--datasets", default="Office,Beauty", help=f"of {', '.join(DATASETS)} (default: %(default)s)")
    add("--backbones", default=",".join(BACKBONES), help="default: all")
    add("--data-dir", type=Path, default=ROOT / "data", help="folder that holds all data sets")
    add("--train-args", default=experiments.TRAIN, help="arguments of stage 06 for all runs (default: %(default)r)")
    add("--reuse", action="store_true", help="take trials that data/results/tuning-<data set>.json has from there, whatever machine and "
        "--train-args they had, and train the others")
    add("--threads", type=int, default=1, help="CPU threads of a training (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, known in (("datasets", DATASETS), ("backbones", BACKBONES)):
        setattr(args, name, getattr(args, name).split(","))
        if unknown := [c for c in getattr(args, name) if c not in known]:
            parser.error(f"--{name}: {unknown[0]!r} is none of {', '.join(known)}")
    return args


def merged(flags, more):
    """Flags with those of `more` in place of the same ones: "--a 1 --b 2", "--a 3" -> "--b 2 --a 3"."""
    words = shlex.split(flags) + shlex.split(more)
    return " ".join(f"{name} {value}" for name, value in dict(zip(words[::2], words[1::2])).items())


def trial(args, dataset, backbone, number, flags):
    """Train once: its line of the table."""
    folder, name = folder_of(dataset, "file-order"), f"{backbone}-tune-{number}"
    done = subprocess.run([sys.executable, str(ROOT / "stages/06_train.py"), "--data-dir", str(args.data_dir), "--dataset", folder, "--run", name,
                           "--backbone", backbone, *shlex.split(merged(args.train_args, flags)), "--threads", str(args.threads), "--skip-done"],
                          stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"training {folder}/06_train/{name} ended with exit code {done.returncode}, for the reason above; the same command goes on")
    run = args.data_dir / folder / "06_train" / name
    config = load_json(run / "config.json")
    return {"flags": flags, "recall@50": round(config["valid"]["recall@50"], 5), "best_iteration": config["best_iteration"],
            "minutes": round(load_lines(run / "log.jsonl")[-1]["seconds"] / 60, 1)}


def tune(args, dataset, backbone, known):
    """All trials of one backbone, greedily. known: {flags: line} of those that are not to be trained again."""
    best, lines = None, []
    for number, change in enumerate(TRIALS):
        flags = merged(best["flags"] if best else "", change)
        line = known.get(flags) or trial(args, dataset, backbone, number, flags)
        lines.append(line)
        if best is None or line["recall@50"] > best["recall@50"]:
            best = line
        print(f"{dataset} {backbone} {change or 'default'}: {line['recall@50']:.4f}{' kept' if best is line else ''}, "
              f"{line['minutes']} min", flush=True)
    return {"flags": best["flags"], "recall@50": best["recall@50"], "trials": lines}


def main(argv=None):
    args = parse(argv)
    for dataset in args.datasets:
        if not (args.data_dir / folder_of(dataset, "file-order") / "01_preprocess" / "manifest.json").is_file():
            raise UserError(f"{args.data_dir / folder_of(dataset, 'file-order')} has no output of stage 01; make it with "
                            f"`bash run_all.sh --reproduce --only table1,table4 --datasets {dataset}`")
        path = experiments.tuning_path(dataset)
        for backbone in args.backbones:
            before = load_json(path) if path.is_file() else {}
            known = {line["flags"]: line for line in before.get(backbone, {}).get("trials", ()) if args.reuse}
            save_json(path, before | {backbone: tune(args, dataset, backbone, known)})


if __name__ == "__main__":
    run_main(main)
