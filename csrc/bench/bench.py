"""Speed of eimf_core beside scikit-learn, NumPy, torch and faiss, in one interleaved run; prints Markdown tables.

    taskset -c 0 python csrc/bench/bench.py --threads 1
    python csrc/bench/bench.py --threads 2 --users 4905 --items 12101

Every contender runs once per round, the rounds are repeated, and medians are shown. scikit-learn's time per iteration is the
difference of two runs with different iteration limits, so that its start-up does not count; --fit also runs it to the end.
`--clock cpu` measures the process's CPU time: for one thread on a machine that others use at the same time. torch and faiss are
left out where they are not installed. Points: a mixture of clusters on the unit sphere in 384 dimensions, like text vectors, or
--vectors FILE.npy.
"""
import argparse
import gc
import importlib
import os
import statistics
import sys
import time
import warnings


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="*", default=[4905], help="numbers of points for affinity propagation")
    parser.add_argument("--preferences", type=float, nargs="*", default=[0.5, 0.1, 0.01],
                        help="quantiles of the similarities; lower gives fewer clusters")
    parser.add_argument("--damping", type=float, default=0.5)
    parser.add_argument("--vectors", help="float32 (n, d) .npy file to take the points from")
    parser.add_argument("--fit", action="store_true", help="also time whole fits")
    parser.add_argument("--items", type=int, nargs="*", default=[12101, 100_000], help="catalogue sizes for scoring")
    parser.add_argument("--batch", type=int, default=512, help="users per call")
    return parser.parse_args(argv)


args = parse_arguments(sys.argv[1:])
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before the libraries are loaded
    os.environ[variable] = str(args.threads)

import eimf_core
import numpy as np
from sklearn.cluster import affinity_propagation
from sklearn.metrics import euclidean_distances

clock = time.perf_counter if args.clock == "wall" else time.process_time


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def timed(function):
    gc.collect()
    start = clock()
    function()
    return clock() - start


def interleaved(contenders):
    """{name: median seconds} of functions that return seconds, or of plain functions that are timed."""
    times = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, function in contenders.items():
            times[name].append(function())
    return {name: statistics.median(values) for name, values in times.items()}


def points(n, d=384, seed=0):
    if args.vectors:
        return np.ascontiguousarray(np.load(args.vectors, allow_pickle=False)[:n])
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((max(2, n // 40), d))[rng.integers(0, max(2, n // 40), n)] + 0.9 * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def core_iterations(x, preference):
    """(median seconds per iteration, iterations, seconds of the whole fit, Clustering)."""
    stamps = []
    start = clock()
    result = eimf_core.affinity_propagation(x, preference, damping=args.damping, n_threads=args.threads,
                                            progress=lambda iteration, _: stamps.append((iteration, clock())))
    total = clock() - start
    steps = [t for iteration, t in stamps if iteration > 0]
    return statistics.mean(np.diff(steps)) if len(steps) > 1 else 0.0, result.n_iter, total, result


def bench_affinity_propagation():
    print("| points | preference (quantile) | clusters | eimf s/iteration | scikit-learn s/iteration | ratio | eimf fit s | eimf MiB |"
          + (" scikit-learn fit s | ratio |" if args.fit else ""))
    print("|" + "---|" * (10 if args.fit else 8))
    for n in args.users:
        x = points(n)
        n = len(x)
        s = -euclidean_distances(x[:2000].astype(np.float64), squared=True)
        off_diagonal = s[~np.eye(len(s), dtype=bool)]
        similarities = -euclidean_distances(x, squared=True)

        def sklearn_run(preference, max_iter, similarities=similarities):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return timed(lambda: affinity_propagation(similarities, preference=preference, max_iter=max_iter, damping=args.damping,
                                                          random_state=0))

        for quantile in args.preferences:
            preference = float(np.quantile(off_diagonal, quantile))
            result = []

            def ours(preference=preference, result=result):
                result.append(core_iterations(x, preference))
                return result[-1][0]

            median = interleaved({"core": ours, "sklearn": lambda p=preference: (sklearn_run(p, 5) - sklearn_run(p, 2)) / 3})
            fit = statistics.median(r[2] for r in result)
            row = (f"| {n} | {preference:.3f} ({quantile}) | {len(result[0][3].exemplars)}{'' if result[0][3].converged else ' (not converged)'} | "
                   f"{median['core']:.5f} | {median['sklearn']:.3f} | {median['sklearn'] / median['core']:.0f} | {fit:.2f} | "
                   f"{result[0][3].peak_bytes / 2**20:.0f} |")
            if args.fit:
                whole = sklearn_run(preference, 200)
                row += f" {whole:.2f} | {whole / fit:.0f} |"
            print(row, flush=True)


def bench_top_n(n=50, k=4, d=64):
    torch, faiss = optional("torch"), optional("faiss")
    if torch:
        torch.set_num_threads(args.threads)
    if faiss:
        faiss.omp_set_num_threads(args.threads)
    print(f"\n| items | top {n} of max over K = {k}, D = {d}: users per second | " + " | ".join(["eimf", "NumPy", "torch", "faiss"]) + " | eimf GFLOP/s |")
    print("|" + "---|" * 7)
    for n_items in args.items:
        rng = np.random.default_rng(0)
        batch = max(16, min(args.batch, int(3e8 / n_items)))
        interests, items = rng.standard_normal((batch, k, d), dtype=np.float32), rng.standard_normal((n_items, d), dtype=np.float32)
        expected = eimf_core.top_n(interests, items, n, n_threads=args.threads)[0]
        chunk = max(1, min(batch, int(5e7 / (k * n_items))))

        def numpy_top(a, b):
            scores = (interests[a:b].reshape(-1, d) @ items.T).reshape(b - a, k, -1).max(axis=1)
            top = np.argpartition(scores, -n, axis=1)[:, -n:]
            return np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1), axis=1)

        contenders = {"eimf": lambda: eimf_core.top_n(interests, items, n, n_threads=args.threads)[0],
                      "NumPy": lambda: np.concatenate([numpy_top(a, min(batch, a + chunk)) for a in range(0, batch, chunk)])}
        if torch:
            queries, table = torch.from_numpy(interests), torch.from_numpy(items)
            contenders["torch"] = lambda: torch.cat([torch.topk((queries[a:a + chunk].reshape(-1, d) @ table.T).reshape(-1, k, n_items).amax(1), n)[1]
                                                     for a in range(0, batch, chunk)]).numpy()
        if faiss:
            index = faiss.IndexFlatIP(d)
            index.add(items)

            def merged():
                scores, ids = (part.reshape(batch, -1) for part in index.search(interests.reshape(-1, d), n))
                rows = []
                for user in range(batch):
                    _, first = np.unique(ids[user][np.argsort(-scores[user], kind="stable")], return_index=True)
                    rows.append(ids[user][np.argsort(-scores[user], kind="stable")][np.sort(first)[:n]])
                return np.array(rows)

            contenders["faiss"] = merged
        for name, function in contenders.items():
            same = (np.sort(function(), axis=1) == np.sort(expected, axis=1)).mean()
            if same < 0.999:
                sys.exit(f"{name} finds other items than eimf ({same:.4f} equal); expected the same but for rounding")
        median = interleaved({name: lambda f=function: timed(f) for name, function in contenders.items()})
        cells = " | ".join(f"{batch / median[name]:.0f}" if name in median else "-" for name in ("eimf", "NumPy", "torch", "faiss"))
        print(f"| {n_items} | batches of {batch} | {cells} | {2 * batch * k * d * n_items / median['eimf'] / 1e9:.0f} |", flush=True)
        one = interests[:1]
        single = statistics.median(timed(lambda: eimf_core.top_n(one, items, n, n_threads=1)) for _ in range(30))
        print(f"| {n_items} | one user, one thread: {1e3 * single:.3f} ms | | | | | |", flush=True)


if __name__ == "__main__":
    print(f"eimf_core {eimf_core.__version__} ({eimf_core.kernels()[-1]}), {args.threads} thread(s), {args.clock} clock, medians of {args.rounds} rounds\n")
    bench_affinity_propagation()
    bench_top_n()
