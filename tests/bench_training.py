"""Measure training: steps per second of stage 06, beside the public REMI loop in the same run, and the cost of more items.

    python tests/bench_training.py                  # data/results/training.json, which `python data/make_results.py` shows; 6 minutes
    python tests/bench_training.py --grow           # instead: more items and users, up to a million items; 5 minutes a round
    python tests/bench_training.py --items 1000000  # one size alone, printed and not saved
    python tests/bench_training.py --raw-dir DIR    # instead: how long EIMF(REMI) takes on the real Beauty to its best validation

Data sets are random, in the shape of Beauty's (17,890 training users, 12,101 items, MiniLM's 384 dimensions, 537 clusters of 16
interests). A rate is that of `python stages/06_train.py` itself: the seconds between its first and second validation, the checkpoint
between them included. The rounds are interleaved, and the median is reported. The peer is what a step of REMI's authors' code does at its
settings (github.com/Tokkiu/REMI: 1,280 sampled negatives, batch 128), written anew, as shipped and without the matrices that it makes and
never uses.
"""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import eimf_core
import numpy as np
import torch
import torch.nn.functional as F
from tiny import ROOT, STAGES, finished_stage
from torch import nn

from eimf.artifacts import load_json, load_lines, machine, save_array, save_json, save_lines

sys.path.insert(0, str(ROOT / "data"))
from experiments import TRAIN  # noqa: E402

USERS, ITEMS, TEXT, CLUSTERS, PER_CLUSTER = 22363, 12101, 384, 537, 16


def make_dataset(data_dir, items, users=USERS, seed=0):
    """Stages 01, 02, 03 and 05 of a random data set named by its number of items."""
    rng, name = np.random.default_rng(seed), f"items{items}-users{users}"
    lengths = 5 + rng.geometric(.2, users)
    split = (np.arange(users) % 10 > 7) + (np.arange(users) % 10 > 8)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events = np.minimum((items ** rng.random(offsets[-1])).astype(np.int32), items)  # popularity falls as 1 / rank

    def write01(folder):
        save_lines(folder / "items.jsonl", ({"item": i, "id": f"I{i}", "title": f"t{i}", "categories": [], "brand": None}
                                            for i in range(1, items + 1)))
        save_lines(folder / "users.txt", (f"U{u}" for u in range(users)))
        save_array(folder / "sequence_items.npy", events)
        save_array(folder / "sequence_times.npy", np.arange(len(events), dtype=np.int64))
        save_array(folder / "sequence_offsets.npy", offsets)
        save_array(folder / "split.npy", split.astype(np.uint8))
        save_json(folder / "stats.json", {"users": users, "items": items, "split": "random", "interactions": len(events)})

    def unit(n):
        x = rng.standard_normal((n, TEXT), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def write02(folder):
        text = unit(items + 1)
        text[0] = 0
        save_array(folder / "item_text.npy", text)
        save_array(folder / "item_has_text.npy", np.arange(items + 1) > 0)

    finished_stage(data_dir, name, "01_preprocess", write01)
    finished_stage(data_dir, name, "02_encode_text", write02)
    clusters = np.where(split == 0, rng.integers(0, CLUSTERS, users), -1).astype(np.int32)
    finished_stage(data_dir, name, "03_cluster_users", lambda folder: save_array(folder / "cluster_of_user.npy", clusters))
    offsets05 = np.arange(CLUSTERS + 1, dtype=np.int64) * PER_CLUSTER
    finished_stage(data_dir, name, "05_encode_interests", lambda folder: (
        save_array(folder / "interest_vectors.npy", unit(CLUSTERS * PER_CLUSTER)),
        save_array(folder / "interest_offsets.npy", offsets05)))
    return name


def steps_per_second(data_dir, dataset, steps, threads, *flags):
    """Rate of stage 06 over the second of two stretches of `steps` steps, validation of the tiny part included."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder).name
        command = [sys.executable, STAGES / "06_train.py", "--data-dir", data_dir, "--dataset", dataset, "--run", run, "--threads", threads,
                   "--max-iterations", 2 * steps, "--validate-every", steps, *flags]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        log = [json.loads(line) for line in open(data_dir / dataset / "06_train" / run / "log.jsonl")]
        return steps / (log[1]["seconds"] - log[0]["seconds"] - log[1]["validation_seconds"])


def time_to_best(raw_dir, data_dir, threads=2):
    """Train EIMF(REMI) on Beauty, file-order split, with the reproduction's settings. Dict; seconds count from the first step on."""
    dataset, run = "Beauty-file-order", "time-to-best"

    def stage(script, *flags):
        command = [str(c) for c in (sys.executable, STAGES / script, "--data-dir", data_dir, "--dataset", dataset, *flags)]
        if subprocess.run(command).returncode:
            sys.exit(f"error: {' '.join(command)} failed")

    stage("01_preprocess.py", "--source", "Beauty", "--raw-dir", raw_dir, "--split", "file-order", "--skip-done")
    for script in ("02_encode_text.py", "03_cluster_users.py", "04_infer_interests.py", "05_encode_interests.py"):
        stage(script, "--skip-done")
    folder = data_dir / dataset / "06_train" / run
    try:
        stage("06_train.py", "--run", run, "--backbone", "remi", "--eimf", *TRAIN.split(), "--threads", threads)
        log, best = load_lines(folder / "log.jsonl"), load_json(folder / "config.json")["best_iteration"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    at_best = next(entry for entry in log if entry["iteration"] == best)
    return {"what": f"EIMF(REMI) on Beauty, {TRAIN}", "threads": threads, "best_iteration": best, "recall@50": at_best["valid"]["recall@50"],
            "seconds_to_best": at_best["seconds"], "iterations": log[-1]["iteration"], "seconds_to_stop": log[-1]["seconds"],
            "validation_seconds": round(sum(entry["validation_seconds"] for entry in log), 2)}


class PublicREMI(nn.Module):
    """REMI as its authors' code computes it: all positions, padding included, and every array kept for autograd."""

    def __init__(self, items, dim=64, interests=4, length=20):
        super().__init__()
        self.items = nn.Embedding(items + 1, dim, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, length, dim))
        self.hidden, self.heads = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, interests, bias=False)

    def forward(self, history, target, mask):
        x = self.items(history) * mask[:, :, None]
        scores = self.heads(torch.tanh(self.hidden(x + self.position.repeat(len(x), 1, 1)))).transpose(1, 2).contiguous()
        padded = mask[:, None].repeat(1, scores.shape[1], 1)
        routing = torch.where(padded == 0, torch.full_like(scores, -2.0 ** 32 + 1), scores).softmax(2)
        interests, wanted = routing @ x, self.items(target)
        chosen = (interests @ wanted[:, :, None]).squeeze(2).softmax(1).argmax(1)
        return interests.flatten(0, 1)[chosen + torch.arange(len(x)) * scores.shape[1]], routing


def public_loss(query, table, target, negatives, log_probability, hardness):
    """Hard negatives among sampled ones: the negatives' numbers and their sampling probabilities are gathered for each user."""
    number = negatives.expand(len(query), 1, -1).contiguous()  # (B, 1, S)
    correction = torch.cat([log_probability[target.view(-1)].view_as(target)[:, :, None], log_probability[number.view(-1)].view_as(number)], 2)
    positive = (query * table[target.view(-1)]).sum(1)
    scores = torch.cat([positive.view(-1, 1, 1), (query @ table[number[0, 0]].T)[:, None]], 2)
    _ = scores - correction  # computed, and then not used for hard negatives
    x = scores.flatten(1)
    x = x - x.max(1).values[:, None]
    importance = (hardness * x[:, 1:] - (hardness * x[:, 1:]).max(1).values[:, None]).exp()
    reweighted = (importance * x[:, 1:].exp()).sum(1) / importance.mean(1)
    return -(x[:, 0] - (x[:, 0].exp() + reweighted).log()).mean()


def unused_matrices(days, length=20, most=128):
    """What the public code makes for each user of a batch and no REMI reads: days between events, and a graph of neighbouring events."""
    between, graph = np.zeros((length, length), np.int32), np.zeros((length, length + 2), np.int32)
    for i in range(len(days)):
        for j in range(len(days)):
            span = abs(days[i] - days[j])
            between[i][j] = most if span > most else span
    for i in range(length):
        at = i if i < len(days) else 0
        graph[i][at] = graph[i][at + 1] = graph[i][-1] = 1
    return between.tolist(), graph.tolist()


def public_loop(data_dir, dataset, steps, threads, as_shipped):
    """Steps per second of the public REMI loop, written anew: as shipped, or without the matrices that nothing uses."""
    torch.set_num_threads(threads)
    folder = data_dir / dataset / "01_preprocess"
    events, offsets, split = (np.load(folder / f"{n}.npy") for n in ("sequence_items", "sequence_offsets", "split"))
    histories = {u: events[offsets[u]:offsets[u + 1]].tolist() for u in np.flatnonzero(split == 0).tolist()}
    users, items = list(histories), int(dataset.split("-")[0].removeprefix("items"))
    model = PublicREMI(items)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    log_probability = torch.full((items + 1,), 1 / (items + 1)).log()

    def tensor(values):
        return torch.Tensor(values).long()

    for step in range(steps + 5):
        if step == 5:
            started = time.perf_counter()
        batch, masks, targets, unused = [], [], [], []
        for u in random.sample(users, 128):
            k = random.choice(range(4, len(histories[u])))
            past = histories[u][max(0, k - 20):k]
            batch.append(past + [0] * (20 - len(past)))
            masks.append([1.0] * len(past) + [0.0] * (20 - len(past)))
            targets.append(histories[u][k])
            if as_shipped:
                unused.append(unused_matrices(range(len(past))))
        if as_shipped:
            for matrices in zip(*unused):
                tensor(matrices)
        optimizer.zero_grad()
        target = tensor(targets)
        query, routing = model(tensor(batch), target, tensor(masks))
        drawn = torch.randint(0, items + 1, (1280,))
        drawn = torch.where(torch.bernoulli(torch.ones(1280)).bool(), drawn, drawn)  # the alias method's two draws
        loss = public_loss(query, model.items.weight, target[:, None], drawn, log_probability, 10)
        centred = routing - routing.mean(2, keepdim=True)
        loss += 100 * (torch.bmm(centred, centred.transpose(1, 2)) / 64).diagonal(dim1=1, dim2=2).norm(dim=1).square().sum()
        loss.backward()
        optimizer.step()
    return steps / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--grow", action="store_true", help="measure 10,000 to a million items, and ten times the users, and nothing else")
    parser.add_argument("--items", type=int, help="measure this number of items alone and print the rates")
    parser.add_argument("--raw-dir", type=Path, help="folder of reviews_Beauty_5.json.gz and meta_Beauty.json.gz: measure the time to the best "
                        "validation with 2 threads, and nothing else")
    parser.add_argument("--data-dir", type=Path, help="with --raw-dir: where stages 01 to 05 are kept, or already finished")
    args = parser.parse_args()
    path = ROOT / "data" / "results" / "training.json"
    kernel = eimf_core.kernels()[-1]
    here = {"machine": f"{machine()['cpu']}, {os.cpu_count()} cores, kernel {kernel}", "torch": torch.__version__}

    def keep(what, found):  # by kind of processor
        results = load_json(path) if path.is_file() else {}
        save_json(path, results | {what: results.get(what, {}) | {kernel: here | found}})

    if args.raw_dir:
        with tempfile.TemporaryDirectory() as folder:
            found = time_to_best(args.raw_dir, args.data_dir or Path(folder))
        keep("to_best", found)
        return print(found)
    hard = ("--loss", "hard-negatives")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        dataset = make_dataset(data_dir, args.items or ITEMS)

        def ours(name, *flags, dataset=dataset, steps=args.steps):
            return name, lambda threads: steps_per_second(data_dir, dataset, steps, threads, *flags)

        jobs = [ours("REMI, full softmax"), ours("EIMF(REMI), two full softmaxes", "--eimf"),
                ours("EIMF(REMI), text reduced to 128", "--eimf", "--text-dim", "128"), ours("REMI, 1,280 hard negatives", *hard),
                ("public REMI loop, without what it never uses", lambda threads: public_loop(data_dir, dataset, args.steps, threads, False)),
                ("public REMI loop, as shipped", lambda threads: public_loop(data_dir, dataset, args.steps, threads, True))]
        runs = [(name, threads, job) for name, job in jobs for threads in (1, 2)]
        if args.grow:
            runs = []
            for items, users, steps in ((10_000, USERS, args.steps), (100_000, USERS, args.steps // 2), (1_000_000, USERS, args.steps // 2),
                                        (ITEMS, 10 * USERS, args.steps)):
                grown = make_dataset(data_dir, items, users)
                label = f"{items:,} items, {users:,} users"
                runs.append((f"REMI, full softmax, {label}", 2, ours("", dataset=grown, steps=steps)[1]))
                runs.append((f"REMI, 1,280 hard negatives, {label}", 2, ours("", *hard, dataset=grown, steps=steps)[1]))
        for _ in range(args.rounds):
            for name, threads, job in runs:
                measured.setdefault((name, threads), []).append(job(threads))
                print(f"{name}, {threads} threads: {measured[name, threads][-1]:.1f} steps/s", flush=True)
    rows = [{"what": name, "threads": threads, "steps_per_second": round(statistics.median(rates), 1),
             "spread": [round(min(rates), 1), round(max(rates), 1)]} for (name, threads), rates in measured.items()]
    if not args.items:
        keep("growth" if args.grow else "rates", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
