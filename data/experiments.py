"""What `bash run_all.sh --reproduce` runs: the paper's experiments and the ones it lacks, as plain data.

A run is one training and its evaluation: a data set under one split, a variant of stages 03-04, a model, a seed. Its folders
are `<data set>[-<split>][-<variant>]/06_train/<model>-s<seed>/` and `.../07_evaluate/<model>-s<seed>/`. To add an experiment, add a line
to MODELS, VARIANTS or GROUPS.
"""
import json
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The paper's name of a data set -> the name in its raw files' names. `sample` is the built-in one, for trying this out.
DATASETS = {"Office": "Office_Products", "Beauty": "Beauty", "Grocery": "Grocery_and_Gourmet_Food", "sample": "sample"}
PAPER = ("Office", "Beauty", "Grocery")

# Arguments of stage 06 that all runs share.
TRAIN = "--text-dim 128 --max-iterations 8000"

BASELINES = ("pop", "dnn", "gru4rec", "sasrec", "bert4rec", "llm2bert4rec", "mind", "comirec-sa", "remi")
OTHERS = ("comirec-dr", "sine", "bert4rec-cloze")  # backbones that the paper's tables do not have
TAUGHT = ("remi", "bert4rec", "sasrec", "mind")  # backbones with EIMF, Table 4
ALL = tuple(b for b in (*BASELINES, *OTHERS) if b != "pop")
CONTROLS = ("remi-eimf-random-text", "remi-eimf-shuffled-clusters")
ABLATIONS = ("remi-eimf-no-alignment", "remi-eimf-no-semantic-prediction", "remi-eimf-no-align-item", "remi-eimf-no-align-user")

BEST = ("remi-best", "remi-best-eimf", "remi-best-eimf-random-text", "remi-best-eimf-shuffled-clusters")

# Model -> arguments of stage 06.
MODELS = {b: f"--backbone {b}" for b in (*BASELINES, *OTHERS)}
MODELS |= {f"{b}-eimf": f"--backbone {b} --eimf" for b in ALL}
MODELS |= {m: f"--backbone remi --eimf --control {m.removeprefix('remi-eimf-')}" for m in CONTROLS}
MODELS |= {m: f"--backbone remi --eimf --{m.removeprefix('remi-eimf-')}" for m in ABLATIONS}
# `--recipe best` spelled out: the flags tell which recipe a published result had. With all of the text vectors' dimensions, as without TRAIN.
RECIPE = "--item-text add --horizon 100 --dropout 0.3 --event-dropout 0.3 --average 0.998 --text-dim 0"
MODELS |= {m: f"{MODELS[m.replace('-best', '')]} {RECIPE}" for m in BEST}
# With the settings that data/tune.py chose for the backbone on the data set; EIMF takes its backbone's, and has no search of its own.
TUNED = tuple(f"{b}-tuned{eimf}" for b in ALL for eimf in ("", "-eimf"))
MODELS |= {m: f"--backbone {m.partition('-tuned')[0]} TUNED" + " --eimf" * m.endswith("-eimf") for m in TUNED}
NEED_TEXT = {m for m, flags in MODELS.items() if "--eimf" in flags} | {"llm2bert4rec", "llm2bert4rec-tuned", "remi-best"}  # stages 02-05 come first

# Variant -> arguments of stages 03 and 04 in place of the main ones, and further ones of 06. The main variant, "", has 3 % typical users (stage 03's
# default) and recorded LLM answers where there are any for the data set, else the offline summariser.
VARIANTS = {
    "": ("", "", ""),
    "random-typical": ("--typical random", "", "--control random-typical-users"),
    "phrases": ("", "--llm offline", ""),
    "every-user": ("--preference 0", "", ""),  # no user is nearer to another than to itself, so each is a cluster
    **{f"typical-{share}": (f"--typical-fraction {share / 100:g}", "", "") for share in (80, 65, 50, 35, 20, 5)},
}
PREFERENCES = ("every-user", *(v for v in VARIANTS if v.startswith("typical-")))


@dataclass(frozen=True)
class Group:
    """Runs that belong together. Seed s of a group has priority rank + s: runs of a lower one are made first."""
    name: str
    rank: int
    datasets: tuple
    models: tuple
    splits: tuple = ("file-order",)
    variants: tuple = ("",)


GROUPS = (
    Group("headline", 0, PAPER, ("remi", "remi-eimf", *CONTROLS)),
    Group("splits", 1, PAPER, ("remi", "remi-eimf", *CONTROLS), splits=("random",)),
    Group("controls", 1, PAPER, ("remi-eimf",), variants=("random-typical",)),
    Group("controls", 1, ("Office",), ("remi-eimf",), variants=("phrases",)),
    Group("best", 1, PAPER, BEST, splits=("file-order", "random")),
    Group("table2", 2, ("Beauty", "Grocery"), (*BASELINES, "remi-eimf")),
    Group("table3", 2, ("Office",), (*BASELINES, "remi-eimf")),
    Group("fig3", 3, PAPER, ("remi-eimf", *ABLATIONS)),
    Group("fig4", 3, ("Office",), ("remi-eimf",), variants=("", *PREFERENCES)),
    Group("table4", 3, ("Office", "Beauty"), (*TAUGHT, *(f"{b}-eimf" for b in TAUGHT))),
    Group("backbones", 3, PAPER, TUNED, splits=("file-order", "random")),
    Group("splits", 6, PAPER, BASELINES, splits=("random",)),
)
# The sample stands in for every data set of a group.
NAMES = ("table1", *dict.fromkeys(g.name for g in GROUPS))

GUESSED_SECONDS = {"Office": 150, "Beauty": 300, "Grocery": 250, "sample": 60}  # of a backbone alone, until one is measured
GUESSED_EIMF = 2.2  # an EIMF run takes so many times as long


def folder_of(dataset, split, variant=""):
    """Name of the data folder."""
    return "-".join(filter(None, [DATASETS[dataset], split if split != "random" else "", variant]))


def tuning_path(dataset):
    """Where data/tune.py keeps what it found for a data set."""
    return Path(__file__).parent / "results" / f"tuning-{dataset}.json"


@cache
def tuning(dataset):
    """{backbone: what data/tune.py found}, empty if it was not run on the data set."""
    path = tuning_path(dataset)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def strongest(found):
    """The backbone with the highest validation Recall@50 in what `tuning` returns, not empty."""
    return max(found, key=lambda b: found[b]["recall@50"])


def settled(dataset, model):
    """`model`, or the same without "-tuned" where tuning kept the default settings: that run serves for both."""
    backbone, _, rest = model.partition("-tuned")
    return backbone + rest if tuning(dataset).get(backbone, {}).get("flags") == "" else model


def arguments(dataset, model):
    """Arguments of stage 06 for a model on a data set; None if they are to be tuned and are not."""
    if "TUNED" not in MODELS[model]:
        return MODELS[model]
    found = tuning(dataset).get(model.partition("-tuned")[0])
    return found and MODELS[model].replace("TUNED", found["flags"])


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""
    dataset: str
    split: str
    variant: str
    model: str
    seed: int

    @property
    def folder(self):
        return folder_of(self.dataset, self.split, self.variant)

    @property
    def name(self):
        return f"{self.model}-s{self.seed}"


def training(run, shared=TRAIN):
    """Stage 06's command of a run; the model's own flags win over the shared ones."""
    return ["stages/06_train.py", "--dataset", run.folder, "--run", run.name, *shlex.split(shared), *shlex.split(arguments(run.dataset, run.model)),
            *shlex.split(VARIANTS[run.variant][2]), "--seed", str(run.seed)]


def plan(datasets=PAPER, only=NAMES, seeds=5, recorded=("Office",)):
    """All runs asked for: {Run: (priority, groups)}, by priority.

    `recorded` names the data sets with LLM answers; elsewhere the variant "phrases" is the main one and is left out.
    """
    found = {}
    for group in GROUPS:
        if group.name not in only:
            continue
        for dataset in datasets:
            if dataset not in group.datasets and dataset in PAPER:
                continue
            for split in group.splits:
                for variant in group.variants:
                    if variant == "phrases" and dataset not in recorded:
                        continue
                    for model in (settled(dataset, m) for m in group.models if arguments(dataset, m) is not None):
                        for seed in range(1 if model == "pop" else seeds):
                            run = Run(dataset, split, variant, model, seed)
                            rank, groups = found.get(run, (group.rank + seed, ()))
                            found[run] = (min(rank, group.rank + seed), tuple(dict.fromkeys((*groups, group.name))))
    return dict(sorted(found.items(), key=lambda entry: entry[1][0]))
