"""Small data sets and models that tests make for themselves."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "stages"
if str(STAGES) not in sys.path:
    sys.path.insert(0, str(STAGES))

from eimf.artifacts import Stage, save_array, save_json, save_lines  # noqa: E402


def run_stage(script, *arguments, env=None, check=True, timeout=300):
    """Run a stage as a user does. Returns the finished process with its text output; fails on an unexpected exit code."""
    command = [sys.executable, str(STAGES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | (env or {}))
    assert not check or done.returncode == 0, f"{script} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def call_stage(script, *arguments):
    """Run a stage in this process, which saves the seconds that importing torch takes. Returns what `main` returns."""
    spec = importlib.util.spec_from_file_location("stage_" + script.removesuffix(".py"), STAGES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(a) for a in arguments])


def finished_stage(data_dir, dataset, name, write, **arguments):
    """A finished stage folder whose files `write(folder)` makes."""
    stage = Stage(name, argparse.Namespace(dataset=dataset, data_dir=Path(data_dir), **arguments))
    folder = stage.begin()
    write(folder)
    stage.finish()
    return folder


def write_dataset(data_dir, items, histories, split, kind="random", dataset="tiny"):
    """A `01_preprocess` folder. items: dicts with any of id, title, categories, brand; histories: lists of item numbers."""

    def write(folder):
        save_lines(
            folder / "items.jsonl",
            [
                {
                    "item": i,
                    "id": item.get("id", f"I{i}"),
                    "title": item.get("title"),
                    "categories": item.get("categories", []),
                    "brand": item.get("brand"),
                }
                for i, item in enumerate(items, 1)
            ],
        )
        save_lines(folder / "users.txt", [f"U{u}" for u in range(len(histories))])
        save_array(folder / "sequence_items.npy", np.array([i for h in histories for i in h], dtype=np.int32))
        save_array(folder / "sequence_times.npy", np.array([t for h in histories for t in range(len(h))], dtype=np.int64))
        save_array(folder / "sequence_offsets.npy", np.cumsum([0, *map(len, histories)]).astype(np.int64))
        save_array(folder / "split.npy", np.array(split, dtype=np.uint8))
        save_json(
            folder / "stats.json",
            {"users": len(histories), "items": len(items), "split": kind, "interactions": sum(map(len, histories))},
        )

    return finished_stage(data_dir, dataset, "01_preprocess", write)


def write_interests(data_dir, dataset="tiny"):
    """A `04_infer_interests` folder with a text for each vector of the data set's 05_encode_interests."""

    def write(folder):
        offsets = np.load(Path(data_dir) / dataset / "05_encode_interests" / "interest_offsets.npy")
        save_lines(folder / "interests.jsonl", ({"interests": [f"text {i}" for i in range(n)]} for n in np.diff(offsets)))
        save_json(folder / "usage.json", {"llm": "offline"})

    return finished_stage(data_dir, dataset, "04_infer_interests", write)


def make_tiny_bert(folder, words, seed=0):
    """A randomly initialised BERT of 32 dimensions with a word-piece vocabulary of `words` and letters."""
    import torch
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789&.,-'")
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *("##" + c for c in letters)])
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
