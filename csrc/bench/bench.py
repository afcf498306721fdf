"""Speed and memory of eimf_core beside scikit-learn, NumPy, torch, faiss and hnswlib, in one interleaved run.

    taskset -c 0 python csrc/bench/bench.py --json data/results/core.json                  # about an hour, 18 GB
    taskset -c 0 python csrc/bench/bench.py --users 4905 --items 12101 --hnsw-items 12101  # minutes
    python csrc/bench/bench.py --threads 2

Every contender runs once per round, the rounds are repeated, and medians are shown. scikit-learn's time per iteration is the
difference of two runs with different iteration limits, so that its start-up does not count; eimf's is the mean over a whole run, growing
lists included. `--clock cpu` measures the process's CPU time: for one thread on a machine that others use too. torch and faiss
(`pip install faiss-cpu`) are left out where they are not installed.

Points: a mixture of clusters on the unit sphere in 384 dimensions, like text vectors, or --vectors FILE.npy. Items for scoring: normal, as
speed does not depend on them. Items for HNSW: a mixture in 16 of 64 dimensions with noise in all, or --item-vectors FILE.npy, as a graph's
speed does depend on them. Peaks (multiply-adds, memory) are measured by bench.cpp, which is compiled for that.

Prints Markdown tables; --json FILE takes the figures for data/make_results.py. What is not measured (--items with no number, say, or another
number of threads, or another kernel) stays in the file as it was.

`bandwidth share`: a program that reads all n^2 float32 similarities once per iteration would need this share of the measured memory
bandwidth to be as fast as eimf; above 1, none can be. `MiB per thread` of scoring: what a call adds to the process, without its results.
"""
import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
KEYS = ("points", "items", "threads", "quantile")  # what tells one row of a table from another
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="*", default=[4905, 14_681, 22_363], help="numbers of points for affinity propagation")
    parser.add_argument("--preferences", type=float, nargs="*", default=[0.5, 0.1, 0.01, 0, 5],
                        help="quantiles of the similarities, or above 1 so many times the lowest one; lower preferences give fewer clusters")
    parser.add_argument("--damping", type=float, default=0.5)
    parser.add_argument("--vectors", help="float32 (n, d) .npy file to take the points from; repeated rows are left out")
    parser.add_argument("--fit-below", type=int, default=6000, help="time scikit-learn's whole fit up to so many points")
    parser.add_argument("--items", type=int, nargs="*", default=[12_101, 100_000, 1_000_000], help="catalogue sizes for scoring")
    parser.add_argument("--softmax-items", type=int, nargs="*", default=[12_101, 100_000], help="catalogue sizes for the softmax loss")
    parser.add_argument("--batch", type=int, default=512, help="users per call")
    parser.add_argument("--hnsw-items", type=int, nargs="*", default=[12_101, 50_000, 100_000, 200_000], help="catalogue sizes for HNSW")
    parser.add_argument("--item-vectors", help="float32 (n, d) .npy file to take HNSW's items from")
    parser.add_argument("--program", help="eimf_bench as CMake builds it with -DEIMF_BENCH=ON, for the peaks (default: compile it)")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    parser.add_argument("--memory-of", nargs=3, metavar=("WHO", "FILE", "P"), help=argparse.SUPPRESS)  # a child process of this script
    return parser.parse_args(argv)


args = parse_arguments(sys.argv[1:])
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before the libraries are loaded
    os.environ[variable] = str(args.threads)

import eimf_core
import hnswlib
import numpy as np
from sklearn.cluster import affinity_propagation
from sklearn.metrics import euclidean_distances

clock = CLOCKS[args.clock]


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


def interleaved(contenders, rounds=None):
    """{name: median seconds} of functions that return seconds."""
    times = {name: [] for name in contenders}
    for _ in range(rounds or args.rounds):
        for name, function in contenders.items():
            times[name].append(function())
    return {name: statistics.median(values) for name, values in times.items()}


def table(title, columns, rows):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join("" if row.get(c) is None else f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns) + " |")


def peaks():
    """GFLOP/s of multiply-adds in registers and GB/s of memory, of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        program = args.program or f"{folder}/bench"
        sources = [str(path) for path in sorted(CSRC.glob("*.cpp")) if path.name != "bindings.cpp"]
        if not args.program:
            subprocess.run(["c++", "-O3", "-std=c++17", "-ffp-contract=off", "-pthread", f"-I{CSRC}", *sources, str(CSRC / "bench" / "bench.cpp"), "-o", program],
                           check=True)
        return json.loads(subprocess.run([program, "--peaks"], check=True, capture_output=True, text=True).stdout)


def points(n, d=384, seed=0):
    if args.vectors:
        x = np.load(args.vectors, allow_pickle=False)
        first = np.sort(np.unique(x, axis=0, return_index=True)[1])  # on repeated points scikit-learn oscillates, and its fit takes all iterations
        return np.ascontiguousarray(x[first[:n]])
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((max(2, n // 40), d))[rng.integers(0, max(2, n // 40), n)] + 0.9 * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def sklearn_similarities(x):
    """Float32, as scikit-learn takes them from float32 points."""
    return -euclidean_distances(x, squared=True)


def sklearn_run(similarities, preference, max_iter, copy=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return affinity_propagation(similarities, preference=preference, max_iter=max_iter, damping=args.damping, random_state=0, copy=copy)


def core_run(x, preference):
    """(mean seconds per iteration, seconds of the whole fit, Clustering)."""
    stamps = []
    start = clock()
    result = eimf_core.affinity_propagation(x, preference, damping=args.damping, n_threads=args.threads,
                                            progress=lambda iteration, _: stamps.append((iteration, clock())))
    total = clock() - start
    steps = [t for iteration, t in stamps if iteration > 0]
    return (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 0.0, total, result


def memory_of(who, x, number):
    """MiB that a run adds to a process that holds its input already, from a process of its own. `number`: the preference, or users of top_n."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, x)
        command = [sys.executable, __file__, "--memory-of", who, file.name, repr(number), "--threads", str(args.threads), "--damping", str(args.damping)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: what is freed goes back at once, so the warm-up hides nothing
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def most_memory():
    """The most MiB this process has held. Not ru_maxrss where it can be helped: that starts from the parent's."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run_for_memory(who, path, number):
    x, number = np.load(path, allow_pickle=False), float(number)
    if who == "top_n":
        interests = np.random.default_rng(0).standard_normal((int(number), 4, x.shape[1]), dtype=np.float32)
        result_bytes = sum(part.nbytes for part in eimf_core.top_n(interests, x[:5000], 50, n_threads=args.threads))  # the code is loaded, too
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the most so far starts anew
    except OSError:
        pass
    before = most_memory()
    if who == "top_n":
        eimf_core.top_n(interests, x, 50, n_threads=args.threads)
        before += result_bytes / (1 << 20)
    elif who == "eimf":
        core_run(x, number)
    else:
        sklearn_run(sklearn_similarities(x), number, 2, copy=False)
    print(most_memory() - before)


def bench_affinity_propagation(memory_gbs):
    rows = []
    for n in args.users:
        x = points(n)
        sample = sklearn_similarities(x[:2000])
        off_diagonal = sample[~np.eye(len(sample), dtype=bool)]
        similarities = sklearn_similarities(x)
        sklearn_memory = memory_of("sklearn", x, -1.0)
        few, many = (2, 12) if n <= args.fit_below else (2, 4)
        for quantile in args.preferences:
            preference = float(np.quantile(off_diagonal, quantile)) if quantile <= 1 else float(quantile * off_diagonal.min())
            runs = []

            def ours(preference=preference, runs=runs, x=x):
                runs.append(core_run(x, preference))
                return runs[-1][0]

            def theirs(preference=preference, s=similarities, few=few, many=many):
                return (timed(lambda: sklearn_run(s, preference, many)) - timed(lambda: sklearn_run(s, preference, few))) / (many - few)

            median = interleaved({"eimf": ours, "sklearn": theirs}, rounds=args.rounds if n <= args.fit_below else min(args.rounds, 3))
            fit, result = statistics.median(r[1] for r in runs), runs[0][2]
            row = {"points": len(x), "quantile": quantile, "threads": args.threads, "preference": preference, "clusters": len(result.exemplars), "converged": result.converged,
                   "eimf s/iteration": median["eimf"], "scikit-learn s/iteration": median["sklearn"], "ratio": median["sklearn"] / median["eimf"],
                   "bandwidth share": 4 * len(x) ** 2 / median["eimf"] / (memory_gbs * 1e9),
                   "eimf fit s": fit, "scikit-learn fit s": None, "fit ratio": None, "eimf MiB": round(memory_of("eimf", x, preference)),
                   "scikit-learn MiB": round(sklearn_memory)}
            row["memory ratio"] = row["scikit-learn MiB"] / max(1, row["eimf MiB"])
            if n <= args.fit_below:
                row["scikit-learn fit s"] = timed(lambda p=preference, x=x: sklearn_run(sklearn_similarities(x), p, 200))
                row["fit ratio"] = row["scikit-learn fit s"] / fit
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    if rows:
        table("Affinity propagation", list(rows[0]), rows)
    return rows


def bench_top_n(peak, n=50, k=4, d=64):
    torch, faiss = optional("torch"), optional("faiss")
    if torch:
        torch.set_num_threads(args.threads)
    if faiss:
        faiss.omp_set_num_threads(args.threads)
    rows = []
    for n_items in args.items:
        rng = np.random.default_rng(0)
        batch = max(64, min(args.batch, int(3e8 / n_items)))
        interests, items = rng.standard_normal((batch, k, d), dtype=np.float32), rng.standard_normal((n_items, d), dtype=np.float32)
        prepared = eimf_core.Items(items)
        expected = eimf_core.top_n(interests, items, n, n_threads=args.threads)[0]
        chunk = max(1, min(batch, int(5e7 / (k * n_items))))

        def numpy_top(a, b, interests=interests, items=items):
            scores = (interests[a:b].reshape(-1, d) @ items.T).reshape(b - a, k, -1).max(axis=1)
            top = np.argpartition(scores, -n, axis=1)[:, -n:]
            return np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1), axis=1)

        def chunked(function, batch=batch, chunk=chunk):
            return np.concatenate([np.asarray(function(a, min(batch, a + chunk))) for a in range(0, batch, chunk)])

        float_kernel = next(name for name in reversed(eimf_core.kernels()) if name not in ("avx2int8", "avx512vnni"))
        contenders = {"eimf": lambda i=interests, t=items: eimf_core.top_n(i, t, n, n_threads=args.threads)[0],
                      "eimf, prepared": lambda i=interests, t=prepared: eimf_core.top_n(i, t, n, n_threads=args.threads)[0],
                      "eimf, float products alone": lambda i=interests, t=items: eimf_core.top_n(i, t, n, n_threads=args.threads, kernel=float_kernel)[0],
                      "NumPy": lambda f=numpy_top, c=chunked: c(f)}
        if torch:
            queries, stored = torch.from_numpy(interests), torch.from_numpy(items)

            def torch_top(a, b, queries=queries, stored=stored, n_items=n_items):
                return torch.topk((queries[a:b].reshape(-1, d) @ stored.T).reshape(-1, k, n_items).amax(1), n)[1]

            contenders["torch"] = lambda f=torch_top, c=chunked: c(f)
        if faiss:
            index = faiss.IndexFlatIP(d)
            index.add(items)

            def merged(index=index, interests=interests, batch=batch):
                scores, ids = (part.reshape(batch, -1) for part in index.search(interests.reshape(-1, d), n))
                order = np.argsort(-scores, axis=1, kind="stable")
                ids = np.take_along_axis(ids, order, axis=1)
                return np.array([row[np.sort(np.unique(row, return_index=True)[1])[:n]] for row in ids])

            contenders["faiss"] = merged
        for name, function in contenders.items():
            same = (np.sort(function(), axis=1) == np.sort(expected, axis=1)).mean()
            if same < 0.999:
                sys.exit(f"{name} finds other items than eimf ({same:.4f} equal); expected the same but for rounding")
        median = interleaved({name: lambda f=function: timed(f) for name, function in contenders.items()})
        one = interests[:1]
        single = {name: [] for name in ("one user, ms", "one user, prepared, ms")}
        for _ in range(100):
            for name, given in zip(single, (items, prepared)):
                start = clock()
                eimf_core.top_n(one, given, n, n_threads=1)
                single[name].append(1e3 * (clock() - start))
        gflops = 2 * batch * k * d * n_items / median["eimf, float products alone"] / 1e9
        rows.append({"items": n_items, "threads": args.threads, "batch": batch, "MiB per thread": memory_of("top_n", items, batch) / args.threads} | {f"{name} users/s": batch / seconds for name, seconds in median.items()}
                    | {f"times {name}": median[name] / median["eimf"] for name in ("NumPy", "torch", "faiss") if name in median}
                    | {"GFLOP/s, float products alone": gflops, "share of peak, float products alone": gflops / (peak * args.threads)} | {name: statistics.median(values) for name, values in single.items()})
        print(rows[-1], file=sys.stderr, flush=True)
    if rows:
        table(f"Top {n} of the maximum over K = {k}, D = {d}", list(rows[0]), rows)
    return rows


def bench_softmax(peak, users=128, d=64):
    """The softmax loss with its gradients, as a training step needs them, beside torch's cross_entropy of a product."""
    torch, rows = optional("torch"), []
    for n_items in args.softmax_items if torch else []:
        torch.set_num_threads(args.threads)
        generator = torch.Generator().manual_seed(0)
        query, table_ = (torch.randn(n, d, generator=generator) / 4 for n in (users, n_items))
        target, weight, none = torch.randint(n_items, (users,), generator=generator), torch.full((users,), 1 / users), torch.zeros(0, dtype=torch.int64)
        q, x = query.clone().requires_grad_(), table_.clone().requires_grad_()

        def theirs(q=q, x=x, target=target):
            q.grad = x.grad = None
            torch.nn.functional.cross_entropy(q @ x.T, target).backward()
            return x.grad

        def ours(given=[a.numpy() for a in (query, table_, target, weight, none)]):
            return eimf_core.softmax_loss(*given, n_threads=args.threads)[2]

        if np.abs(ours() - theirs().numpy()).max() > 1e-6:
            sys.exit("torch finds another gradient than eimf")
        median = interleaved({"eimf": lambda f=ours: timed(f), "torch": lambda f=theirs: timed(f)}, 3 * args.rounds)
        gflops = 6 * users * n_items * d / median["eimf"] / 1e9
        rows.append({"items": n_items, "threads": args.threads, "eimf ms": 1e3 * median["eimf"], "torch ms": 1e3 * median["torch"],
                     "ratio": median["torch"] / median["eimf"], "share of peak": gflops / (peak * args.threads)})
        print(rows[-1], file=sys.stderr, flush=True)
    if rows:
        table(f"Softmax loss and gradients, {users} users, D = {d}", list(rows[0]), rows)
    return rows


def bench_hnsw(n=50, k=4, d=64, users=256, enough=0.99):
    """Where an HNSW graph that finds 99 % of the true top 50 overtakes exact search."""
    rows = []
    vectors = np.load(args.item_vectors, allow_pickle=False).astype(np.float32) if args.item_vectors else None
    for n_items in args.hnsw_items:
        rng = np.random.default_rng(0)
        if vectors is not None:
            items = np.ascontiguousarray(vectors[np.isfinite(vectors).all(1) & (vectors != 0).any(1)][:n_items])
        else:
            groups = n_items // 50 + 1
            latent = rng.standard_normal((groups, 16))[rng.integers(0, groups, n_items)] + 0.5 * rng.standard_normal((n_items, 16))
            items = (latent @ rng.standard_normal((16, d)) / 4 + 0.2 * rng.standard_normal((n_items, d))).astype(np.float32)
        picked = rng.integers(0, len(items), (users, k, 3))
        interests = np.ascontiguousarray(items[picked].mean(axis=2))  # near items, as trained interests are
        prepared, truth = eimf_core.Items(items), eimf_core.top_n(interests, items, n, n_threads=args.threads)[0]
        index = hnswlib.Index(space="ip", dim=items.shape[1])
        index.init_index(max_elements=len(items), M=16, ef_construction=200, random_seed=0)
        build = timed(lambda index=index, items=items: index.add_items(items, num_threads=args.threads))

        def search(queries, threads, index=index, items=items):
            """Each interest's n, merged: the best n of the union by the maximum over interests."""
            labels, distance = index.knn_query(queries.reshape(-1, items.shape[1]), n, num_threads=threads)
            labels, distance = labels.reshape(len(queries), -1).astype(np.int64), distance.reshape(len(queries), -1)
            order = np.argsort(distance, axis=1, kind="stable")
            found = np.full((len(queries), n), -1)
            for row, (ids, at) in enumerate(zip(labels, order)):
                distinct = ids[at][np.sort(np.unique(ids[at], return_index=True)[1])[:n]]
                found[row, :len(distinct)] = distinct
            return found

        for ef in (50, 100, 200, 400, 800, 1600, 3200, 6400):
            index.set_ef(ef)
            found = search(interests, args.threads)
            recall = float(np.mean([len(np.intersect1d(a, b)) / n for a, b in zip(found, truth)]))
            if recall >= enough:
                break
        contenders = {"hnsw": lambda q=interests, f=search: timed(lambda: f(q, args.threads)),
                      "exact": lambda q=interests, t=items: timed(lambda: eimf_core.top_n(q, t, n, n_threads=args.threads)),
                      "hnsw, one user": lambda q=interests, f=search: timed(lambda: [f(q[u:u + 1], 1) for u in range(32)]) / 32,
                      "exact, one user": lambda q=interests, t=prepared: timed(lambda: [eimf_core.top_n(q[u:u + 1], t, n, n_threads=1) for u in range(32)]) / 32}
        median = interleaved(contenders)
        rows.append({"items": len(items), "threads": args.threads, "ef": ef, "recall": recall, "build s": build, "hnsw users/s": users / median["hnsw"], "exact users/s": users / median["exact"],
                     "exact / hnsw": median["hnsw"] / median["exact"], "hnsw, one user, ms": 1e3 * median["hnsw, one user"],
                     "exact, one user, ms": 1e3 * median["exact, one user"], "exact / hnsw, one user": median["hnsw, one user"] / median["exact, one user"]})
        print(rows[-1], file=sys.stderr, flush=True)
    if rows:
        table(f"HNSW (M = 16, ef for a recall of {enough}) beside exact search", list(rows[0]), rows)
    return rows


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    if args.memory_of:
        return run_for_memory(*args.memory_of)
    machine = peaks() | {"cpu": processor(), "kernel": eimf_core.kernels()[-1], "threads": args.threads, "clock": args.clock, "rounds": args.rounds,
                         "load": round(os.getloadavg()[0], 1), "versions": {p: version(p) for p in ("eimf-core", "numpy", "scikit-learn", "torch", "faiss-cpu", "hnswlib")}}
    print(machine)
    for name, bench in (("affinity_propagation", lambda: bench_affinity_propagation(machine["memory_gbs"])),
                        ("scoring", lambda: bench_top_n(machine["fma_gflops"])), ("softmax", lambda: bench_softmax(machine["fma_gflops"])),
                        ("hnsw", bench_hnsw)):
        rows = bench()
        if rows and args.json:
            kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
            tables = kept.get(name, {})  # by kind of processor
            merged = {tuple(row.get(key) for key in KEYS): row for row in tables.get(machine["kernel"], {}).get("rows", []) + rows}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(kept | {name: tables | {machine["kernel"]: {"machine": machine, "rows": list(merged.values())}}}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
