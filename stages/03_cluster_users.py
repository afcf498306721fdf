"""03: cluster the training users by affinity propagation; each cluster's exemplar is its typical user (paper 3.2.1, Eq. 2).

Reads   01_preprocess/   who is a training user (Interactions.training_ranges)
        02_encode_text/  user_text.npy float32 (users, d_t), rows of zeros for users without text
Writes  03_cluster_users/
        cluster_of_user.npy  int32 (users,)      cluster number; -1 for users who are not in training or have no text
        typical_users.npy    int64 (clusters,)   user number of each cluster's exemplar, ascending
        report.json          clusters, fraction, preference, iterations, converged, net_similarity, seconds, cluster sizes,
                             neighbors and assigned_afterwards (users without an edge to a typical user, see below), and each
                             trial of the search for the preference

Similarity is minus the squared Euclidean distance of text vectors. The preference p decides how many clusters there are; it
depends on the encoder's scale, so by default p is searched until --typical-fraction of the clustered users are typical ones. All
trials share one search for neighbours, and each gives what it would give alone.

Above 200,000 users, or with --neighbors k, only each user's k nearest others (HNSW, approximate) can become its typical user, and
the time is no longer quadratic in the users. A user none of whose k became one goes to the nearest typical user afterwards.

--typical random is a control of what the exemplars are worth: as many users as --typical-fraction says, drawn with --seed, take
their place, and every user goes to the nearest of them. Stages 04 and 05 then run as always, and 06 with
--control random-typical-users.

    python stages/03_cluster_users.py --dataset sample
    python stages/03_cluster_users.py --dataset Office_Products --preference -0.3

The last line printed is the number of clusters, their share of the users, p, iterations and convergence.
"""
import functools
import math
import time
import types

import eimf_core
import hnswlib
import numpy as np
from eimf.artifacts import Stage, UserError, argument_parser, check_ranges, load_array, run, save_array, save_json
from eimf.data import load_interactions

MAX_TRIALS = 24  # of the search for p
SPARSE_ABOVE = 200_000  # users; about where searching all pairs takes longer than building the graph
SPARSE_NEIGHBORS = 64  # from 30 on, the net similarity on Office's and Beauty's users is within 0.1 % of the exact form's
HNSW_M, HNSW_EF = 16, 200  # links per node; candidates kept while building, and at least while searching
MEMORY_SHARE = 0.8  # of the memory that is free now


def parse_arguments(argv):
    parser = argument_parser(__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--preference", type=float, metavar="P",
                       help="similarity of a user to itself, negative; the paper's study has -2 to -10 on its encoder's scale (default: searched)")
    group.add_argument("--typical-fraction", type=float, default=0.03, metavar="F", help="search P until this share of users is typical")
    parser.add_argument("--tolerance", type=float, default=0.02, help="accept a number of clusters this close to the target, relatively")
    parser.add_argument("--damping", type=float, default=0.9, help="share of the old messages kept in each update, 0.5 <= damping < 1")
    parser.add_argument("--max-iter", type=int, default=1000, help="iterations of one run at most")
    parser.add_argument("--convergence-iter", type=int, default=15, help="converged when the exemplars have not changed for so many iterations")
    parser.add_argument("--allow-unconverged", action="store_true", help="accept a run that reached --max-iter; its best recent state is used")
    parser.add_argument("--neighbors", type=int, metavar="K",
                        help=f"K nearest others of each user from an HNSW graph instead of all; 0: all (default: all up to {SPARSE_ABOVE:,} users, "
                             f"{SPARSE_NEIGHBORS} above)")
    parser.add_argument("--sample-users", type=int, metavar="N",
                        help="cluster N training users drawn with --seed, then give each other one to the nearest typical user")
    parser.add_argument("--typical", choices=["exemplars", "random"], default="exemplars",
                        help="typical users: affinity propagation's exemplars, or random users as a control")
    parser.add_argument("--seed", type=int, default=0, help="of --sample-users and --typical random")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores; the result does not depend on it")
    args = parser.parse_args(argv)
    check_ranges(parser, args, seed=0, threads=0)
    if args.typical == "random":
        for flag in ("preference", "sample_users", "neighbors"):
            if getattr(args, flag) is not None:
                parser.error(f"--typical random clusters by distance to --typical-fraction of the users; leave out --{flag.replace('_', '-')}")
    if args.preference is not None:
        args.typical_fraction = None
    elif not 0 < args.typical_fraction <= 1:
        parser.error(f"--typical-fraction is {args.typical_fraction}; expected a share above 0 and up to 1")
    if args.tolerance < 0:
        parser.error(f"--tolerance is {args.tolerance}; expected 0 or more")
    if args.neighbors is not None and args.neighbors < 0:
        parser.error(f"--neighbors is {args.neighbors}; expected 0 or more")
    if args.sample_users is not None and args.sample_users < 1:
        parser.error(f"--sample-users is {args.sample_users}; expected 1 or more")
    return args


def free_memory():
    """Bytes that can be taken now, or None if the system does not say: MemAvailable, and the control group's limit."""
    free = None
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            limit = limit.read().strip()
            if limit != "max":
                free = min(free, int(limit) - int(used.read()))
    except (OSError, StopIteration, ValueError):
        pass
    return free


def clustered_users(interactions, user_text):
    """User numbers, int64 ascending: training users with a text vector."""
    if len(user_text) != interactions.n_users:
        raise UserError(f"user_text.npy has {len(user_text)} rows and 01_preprocess {interactions.n_users} users; run stage 02_encode_text again")
    users = interactions.training_ranges()[0]
    if not np.isfinite(user_text[users]).all():
        raise UserError("user_text.npy holds NaN or infinite values; run stage 02_encode_text again")
    with_text = users[(user_text[users] != 0).any(axis=1)]
    if len(with_text) == 0:
        raise UserError(f"none of the {len(users)} training users has a text vector (all rows are zero), so there is nothing to cluster. "
                        "Expected titles for at least some items in the metadata given to stage 01_preprocess")
    return with_text


def check_memory(n, d, neighbors):
    """Bytes that may be taken, 0 if not known. Raises UserError if they will not do."""
    if neighbors:  # the HNSW index, the graph as hnswlib and CSR arrays hold it, and the core's lists and messages
        needed = n * (4 * d + 16 * HNSW_M + 50 * neighbors + 600)
    else:
        needed = eimf_core.affinity_propagation_bytes(n, d)
    free = free_memory()
    if free is not None and needed > MEMORY_SHARE * free:
        raise UserError(f"clustering {n} users with {d} dimensions needs about {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; "
                        f"give --sample-users N with N below {int(n * MEMORY_SHARE * free / needed)}")
    return 0 if free is None else int(MEMORY_SHARE * free)


def neighbor_graph(x, k, threads):
    """CSR arrays (indptr, indices, similarity) of the k nearest others of each row of x, by HNSW.

    Rows are added by one thread: with more, the graph and so the clusters would differ from run to run.
    """
    n = len(x)
    k = min(k, n - 1)
    index = hnswlib.Index(space="l2", dim=x.shape[1])
    index.init_index(max_elements=n, M=HNSW_M, ef_construction=HNSW_EF, random_seed=0)
    index.add_items(x, num_threads=1)
    index.set_ef(max(HNSW_EF, 2 * k + 2))
    indices, similarity = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    for first in range(0, n, 65536):
        last = min(n, first + 65536)
        try:
            found, distance = index.knn_query(x[first:last], k + 1, num_threads=threads or -1)
        except RuntimeError:  # the graph search reached fewer than k + 1
            raise UserError(f"the graph over {n} users does not reach {k} neighbors of each; give a smaller --neighbors") from None
        itself = found == np.arange(first, last)[:, None]
        itself[~itself.any(axis=1), -1] = True  # equal users can crowd it out; then the farthest is dropped
        indices[first:last], similarity[first:last] = found[~itself].reshape(last - first, k), -distance[~itself].reshape(last - first, k)
    return np.arange(n + 1) * k, indices.reshape(-1), similarity.reshape(-1)


def cluster(affinity_propagation, n, preference, args, memory_limit):
    """One run on n points. Returns (Clustering, row for the report)."""
    started = time.perf_counter()
    try:
        result = affinity_propagation(preference, damping=args.damping, max_iter=args.max_iter, n_threads=args.threads,
                                      convergence_iter=args.convergence_iter, memory_limit=memory_limit)
    except ValueError as error:
        raise UserError(f"affinity propagation with preference {preference:.6g}: {error}") from None
    return result, {"preference": preference, "clusters": len(result.exemplars), "fraction": len(result.exemplars) / n,
                    "iterations": result.n_iter, "converged": result.converged, "net_similarity": result.net_similarity,
                    "seconds": round(time.perf_counter() - started, 3)}


def starting_preference(x):
    """Median similarity of up to 4,096 pairs of points, spread over x: a preference of the right order, below 0."""
    i = np.linspace(0, len(x) - 1, min(len(x), 4096)).astype(np.int64)
    distance = np.square(x[i] - x[(i + len(x) // 2) % len(x)], dtype=np.float64).sum(axis=1)
    return -float(np.median(distance)) or -1.0


def search(cluster_at, start, target, tolerance, log):
    """Find p with `target` clusters; so many more or less will do as `tolerance` says.

    cluster_at(p) gives (Clustering, row). Returns (Clustering, row of the chosen trial, rows of all trials).

    More clusters come from a p nearer to 0. log(clusters) is taken as linear in log(-p) between the two trials that enclose the target,
    and as falling with the power 2.5 where there are none yet. The number of clusters is only nearly monotone in p, so the trial
    nearest to the target is kept, and a converged one is preferred to one that is not.
    """
    few, many = None, None  # (log(-p), log(clusters)) of the nearest trials with too few, and with too many clusters
    point, trials, best, chosen = math.log(-start), [], None, None
    while len(trials) < MAX_TRIALS:
        result, row = cluster_at(-math.exp(point))
        trials.append(row)
        log.info("trial %d: preference %.6g, %d clusters (%.2f %%), %d iterations%s, %.1f s", len(trials), row["preference"], row["clusters"],
                 100 * row["fraction"], row["iterations"], "" if row["converged"] else ", not converged", row["seconds"])
        miss = abs(row["clusters"] - target)
        if best is None or (not row["converged"], miss) < (not chosen["converged"], abs(chosen["clusters"] - target)):
            best, chosen = result, row
        if row["converged"] and miss <= tolerance:
            break
        place = point, math.log(row["clusters"])
        if row["clusters"] < target:
            few = place
        else:
            many = place
        if few is None or many is None:
            step = (place[1] - math.log(target)) / 2.5
            point += math.copysign(min(max(abs(step), 0.1) * 1.2 ** len(trials), math.log(8)), step)
        else:
            if few[0] - many[0] < 1e-4:  # the number of clusters jumps over the target here
                break
            share = (many[1] - math.log(target)) / (many[1] - few[1])
            share = 0.5 if len(trials) % 4 == 0 else min(max(share, 0.1), 0.9)  # now and then a bisection: curves may bend
            point = many[0] + share * (few[0] - many[0])
    return best, chosen, trials


def nearest(x, centres):
    """Index of the nearest row of `centres` for each row of x, by squared Euclidean distance: int64 (len(x),)."""
    norm, block = np.square(centres).sum(axis=1), max(1, 2**24 // len(centres))
    return np.concatenate([np.argmin(norm - 2 * x[i:i + block] @ centres.T, axis=1) for i in range(0, len(x), block)]
                          or [np.zeros(0, np.int64)])


def draw_typical(users, args):
    """The control without affinity propagation: (drawn users, a Clustering of these in which each is its own exemplar, row)."""
    chosen = np.sort(np.random.default_rng(args.seed).choice(users, max(1, round(args.typical_fraction * len(users))), replace=False))
    itself = np.arange(len(chosen))
    return chosen, types.SimpleNamespace(exemplars=itself, labels=itself, peak_bytes=0), {
        "preference": None, "clusters": len(chosen), "fraction": len(chosen) / len(users), "iterations": 0, "converged": True,
        "net_similarity": None, "seconds": 0.0}


def find_typical(users, user_text, args, log):
    """Affinity propagation on the users' text vectors: (clustered users, neighbors, Clustering, its row, rows of all trials)."""
    chosen = users
    if args.sample_users is not None and args.sample_users < len(users):
        chosen = np.sort(np.random.default_rng(args.seed).choice(users, args.sample_users, replace=False))
    x = np.ascontiguousarray(user_text[chosen], dtype=np.float32)
    neighbors = args.neighbors if args.neighbors is not None else SPARSE_NEIGHBORS if len(x) > SPARSE_ABOVE else 0
    memory_limit = check_memory(*x.shape, neighbors)
    log.info("clustering %d of %d users with text, %d dimensions, %s", len(x), len(users), x.shape[1],
             f"{neighbors} neighbors each" if neighbors else "all pairs")

    started = time.perf_counter()
    if neighbors:
        kernel = functools.partial(eimf_core.affinity_propagation_sparse, *neighbor_graph(x, neighbors, args.threads))
        log.info("graph of %d neighbors each in %.1f s", neighbors, time.perf_counter() - started)
    else:
        try:
            kernel = eimf_core.Points(x, memory_limit=memory_limit).affinity_propagation  # keeps the neighbours from trial to trial
        except ValueError as error:
            raise UserError(f"user_text.npy cannot be clustered: {error}") from None
    cluster_at = functools.partial(cluster, kernel, len(x), args=args, memory_limit=memory_limit)
    if args.typical_fraction is None:
        result, row = cluster_at(args.preference)
        trials = [row]
    else:
        target = max(1, round(args.typical_fraction * len(x)))
        result, row, trials = search(cluster_at, starting_preference(x), target, args.tolerance * target, log)
        if abs(row["clusters"] - args.typical_fraction * len(x)) > max(1, args.tolerance * args.typical_fraction * len(x)):
            log.warning("no preference gives %.4f typical users; the nearest is %.4f", args.typical_fraction, row["fraction"])
    if not row["converged"] and not args.allow_unconverged:
        raise UserError(f"affinity propagation with preference {row['preference']:.6g} has not converged after {row['iterations']} iterations "
                        f"(damping {args.damping}). Try --damping {(1 + args.damping) / 2:.3g}, a larger --max-iter, another --preference, or "
                        "--allow-unconverged to take its best recent state")
    return chosen, neighbors, result, row, trials


def main(argv=None):
    args = parse_arguments(argv)
    stage = Stage("03_cluster_users", args)
    preprocessed, encoded = stage.input("01_preprocess"), stage.input("02_encode_text")
    if stage.is_done():
        return 0
    interactions = load_interactions(preprocessed)
    user_text = load_array(encoded / "user_text.npy", mmap_mode="r")
    users = clustered_users(interactions, user_text)
    folder = stage.begin()

    started = time.perf_counter()
    if args.typical == "random":
        (chosen, result, row), neighbors = draw_typical(users, args), 0
        trials = [row]
    else:
        chosen, neighbors, result, row, trials = find_typical(users, user_text, args, stage.log)

    typical = chosen[result.exemplars]
    cluster_of_user = np.full(interactions.n_users, -1, np.int32)
    cluster_of_user[chosen] = result.labels
    others = users[cluster_of_user[users] < 0]  # not sampled, or without an edge to a typical user
    cluster_of_user[others] = nearest(np.asarray(user_text[others]), np.asarray(user_text[typical]))
    unconnected = chosen[result.labels < 0]
    if len(unconnected):
        row["net_similarity"] -= float(np.square(user_text[unconnected] - user_text[typical[cluster_of_user[unconnected]]], dtype=np.float64).sum())
    # The kernel's exemplars label themselves, so every typical user is a training user and a member of its own cluster.
    assert np.array_equal(cluster_of_user[typical], np.arange(len(typical))) and (cluster_of_user[users] >= 0).all()

    sizes = np.bincount(cluster_of_user[users], minlength=len(typical))
    report = row | {
        "seconds": round(time.perf_counter() - started, 3), "clustered_users": len(users), "sampled_users": len(chosen),
        "neighbors": neighbors or None, "assigned_afterwards": len(unconnected),
        "training_users_without_text": len(interactions.training_ranges()[0]) - len(users),
        "cluster_size": {f"q{q}": float(np.quantile(sizes, q / 100)) for q in (0, 25, 50, 75, 100)} | {"mean": float(sizes.mean())},
        "singletons": int((sizes == 1).sum()), "peak_bytes": result.peak_bytes, "target_fraction": args.typical_fraction, "trials": trials,
    }
    save_array(folder / "cluster_of_user.npy", cluster_of_user)
    save_array(folder / "typical_users.npy", typical.astype(np.int64))
    save_json(folder / "report.json", report)
    stage.finish({k: report[k] for k in ("clusters", "fraction", "preference", "iterations", "converged", "net_similarity")})
    if args.typical == "random":
        print(f"{row['clusters']} random typical users ({100 * row['fraction']:.2f} % of {len(users)} users), {report['seconds']:.1f} s")
        return 0
    print(f"{row['clusters']} clusters ({100 * row['fraction']:.2f} % of {len(chosen)} users), preference {row['preference']:.6g}, "
          f"{row['iterations']} iterations, {'converged' if row['converged'] else 'not converged'}, {report['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    run(main)
