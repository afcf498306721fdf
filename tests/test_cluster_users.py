"""Stage 03 as a user runs it, on small folders of the contract's shape."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "stages" / "03_cluster_users.py"
sys.path.insert(0, str(ROOT / "stages"))


def manifest(folder, name):
    files = {p.name: {"bytes": p.stat().st_size, "sha256": f"{name}-{p.stat().st_size}"} for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"stage": name, "outputs": files, "inputs": {}, "arguments": {}}))


def make_data(root, users=400, dim=12, groups=8, split_kind="random", seed=0):
    """Folders 01 and 02. Users of group g lie around one centre; a tenth each is valid and test, users 5 and 7 have no text.

    Returns (group of each user, split).
    """
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, users)
    text = (10 * rng.standard_normal((groups, dim))[group] + rng.standard_normal((users, dim))).astype(np.float32)
    text[[5, 7]] = 0
    split = np.zeros(users, np.uint8)
    if split_kind != "leave-one-out":
        split[users // 10 * 8:users // 10 * 9] = 1
        split[users // 10 * 9:] = 2
    lengths = rng.integers(5, 9, users)
    first, second = root / "toy" / "01_preprocess", root / "toy" / "02_encode_text"
    first.mkdir(parents=True)
    second.mkdir()
    np.save(first / "sequence_items.npy", rng.integers(1, 20, lengths.sum()).astype(np.int32))
    np.save(first / "sequence_offsets.npy", np.r_[0, np.cumsum(lengths)].astype(np.int64))
    np.save(first / "split.npy", split)
    (first / "stats.json").write_text(json.dumps({"items": 20, "users": users, "split": split_kind}))
    np.save(second / "user_text.npy", text)
    manifest(first, "01_preprocess")
    manifest(second, "02_encode_text")
    return group, split


def run_stage(root, *options):
    return subprocess.run([sys.executable, SCRIPT, "--dataset", "toy", "--data-dir", root, *map(str, options)], capture_output=True, text=True)


def results(root):
    folder = root / "toy" / "03_cluster_users"
    return (np.load(folder / "cluster_of_user.npy"), np.load(folder / "typical_users.npy"), json.loads((folder / "report.json").read_text()))


def check_contract(cluster_of_user, typical, report, clustered):
    assert cluster_of_user.dtype == np.int32 and typical.dtype == np.int64 and (np.diff(typical) > 0).all()
    np.testing.assert_array_equal(np.flatnonzero(cluster_of_user >= 0), clustered)
    assert np.isin(typical, clustered).all()
    np.testing.assert_array_equal(cluster_of_user[typical], np.arange(len(typical)))
    assert report["clusters"] == len(typical) and set(cluster_of_user[clustered]) == set(range(len(typical)))


def training_with_text(split):
    return np.setdiff1d(np.flatnonzero(split == 0), [5, 7])


def test_preference_finds_the_groups_of_training_users_only(tmp_path):
    group, split = make_data(tmp_path)
    run = run_stage(tmp_path, "--preference", -200)
    assert run.returncode == 0, run.stderr
    cluster_of_user, typical, report = results(tmp_path)
    clustered = training_with_text(split)
    check_contract(cluster_of_user, typical, report, clustered)
    assert len(typical) == 8 and report["converged"] and report["preference"] == -200
    for cluster in range(8):  # clusters are the groups
        assert len(set(group[np.flatnonzero(cluster_of_user == cluster)])) == 1
    assert "8 clusters (2.52 % of 318 users), preference -200" in run.stdout
    assert report["training_users_without_text"] == 2 and report["cluster_size"]["mean"] == pytest.approx(318 / 8)
    text = np.load(tmp_path / "toy" / "02_encode_text" / "user_text.npy").astype(np.float64)
    members = [u for u in clustered if u not in typical]
    expected = -np.square(text[members] - text[typical[cluster_of_user[members]]]).sum() - 200 * 8
    assert report["net_similarity"] == pytest.approx(expected, rel=1e-5)


def test_typical_fraction_is_searched_and_every_trial_reported(tmp_path):
    _, split = make_data(tmp_path, users=1000)
    run = run_stage(tmp_path, "--typical-fraction", 0.1)
    assert run.returncode == 0, run.stderr
    cluster_of_user, typical, report = results(tmp_path)
    check_contract(cluster_of_user, typical, report, training_with_text(split))
    assert abs(len(typical) - 79.8) <= 2 and report["target_fraction"] == 0.1
    chosen = [t for t in report["trials"] if t["preference"] == report["preference"]]
    assert len(report["trials"]) > 1 and chosen[0]["clusters"] == len(typical)
    assert all(t["seconds"] >= 0 and t["iterations"] > 0 for t in report["trials"])
    by_preference = sorted((t["preference"], t["clusters"]) for t in report["trials"])
    assert by_preference[0][1] < len(typical) < by_preference[-1][1]


def test_leave_one_out_clusters_every_user(tmp_path):
    _, _ = make_data(tmp_path, split_kind="leave-one-out")
    assert run_stage(tmp_path, "--preference", -200).returncode == 0
    check_contract(*results(tmp_path), np.setdiff1d(np.arange(400), [5, 7]))


def test_threads_do_not_change_the_files(tmp_path):
    make_data(tmp_path, users=900)
    found = []
    for threads in (1, 2, 7):
        assert run_stage(tmp_path, "--threads", threads).returncode == 0
        found.append([a.tobytes() for a in results(tmp_path)[:2]])
    assert found[0] == found[1] == found[2]


def test_sample_of_users(tmp_path):
    group, split = make_data(tmp_path, users=1000)
    assert run_stage(tmp_path, "--sample-users", 200, "--preference", -200).returncode == 0
    cluster_of_user, typical, report = results(tmp_path)
    check_contract(cluster_of_user, typical, report, training_with_text(split))
    assert report["sampled_users"] == 200 and report["fraction"] == len(typical) / 200
    for cluster in range(len(typical)):  # the others went to the nearest typical user
        assert len(set(group[np.flatnonzero(cluster_of_user == cluster)])) == 1


def load_stage():
    spec = importlib.util.spec_from_file_location("cluster_users", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_searched_preference_gives_the_same_files_alone(tmp_path):
    """Trials share neighbour lists; the chosen one must be what a new run at its preference finds."""
    make_data(tmp_path, users=1000, groups=60)
    assert run_stage(tmp_path, "--typical-fraction", 0.05).returncode == 0
    searched = results(tmp_path)
    assert len(searched[2]["trials"]) > 1
    assert run_stage(tmp_path, f"--preference={searched[2]['preference']!r}").returncode == 0
    alone = results(tmp_path)
    np.testing.assert_array_equal(searched[0], alone[0])
    np.testing.assert_array_equal(searched[1], alone[1])
    assert searched[2]["net_similarity"] == alone[2]["net_similarity"] and searched[2]["iterations"] == alone[2]["iterations"]


def net_similarity(root):
    """By the definition, from the files."""
    cluster_of_user, typical, report = results(root)
    text = np.load(root / "toy" / "02_encode_text" / "user_text.npy").astype(np.float64)
    clustered = np.flatnonzero(cluster_of_user >= 0)
    return -np.square(text[clustered] - text[typical[cluster_of_user[clustered]]]).sum() + report["preference"] * len(typical)


def test_neighbor_graph_is_nearly_as_good_as_all_pairs(tmp_path):
    _, split = make_data(tmp_path, users=1500, groups=40)
    assert run_stage(tmp_path, "--preference", -60).returncode == 0
    exact = net_similarity(tmp_path)
    assert results(tmp_path)[2]["neighbors"] is None
    found = []
    for threads in (1, 2):
        run = run_stage(tmp_path, "--preference", -60, "--neighbors", 40, "--threads", threads)
        assert run.returncode == 0, run.stderr
        check_contract(*results(tmp_path), training_with_text(split))
        found.append([a.tobytes() for a in results(tmp_path)[:2]])
    report = results(tmp_path)[2]
    assert report["neighbors"] == 40 and report["assigned_afterwards"] == 0
    assert report["net_similarity"] == pytest.approx(net_similarity(tmp_path), rel=1e-5)
    assert abs(report["net_similarity"] / exact - 1) < 0.01
    assert found[0] == found[1]


def test_users_without_an_edge_to_a_typical_user_go_to_the_nearest(tmp_path):
    """Three neighbours of each user, and a preference for clusters of fifty: some users are connected to no exemplar."""
    group, split = make_data(tmp_path, users=1500, groups=30)
    assert run_stage(tmp_path, "--preference", -400, "--neighbors", 3, "--allow-unconverged").returncode == 0
    cluster_of_user, typical, report = results(tmp_path)
    clustered = training_with_text(split)
    check_contract(cluster_of_user, typical, report, clustered)
    assert report["assigned_afterwards"] >= 5
    assert report["net_similarity"] == pytest.approx(net_similarity(tmp_path), rel=1e-5)
    text = np.load(tmp_path / "toy" / "02_encode_text" / "user_text.npy")
    best = np.square(text[clustered, None] - text[typical]).sum(2).argmin(1)
    assert (best == cluster_of_user[clustered]).sum() >= report["assigned_afterwards"]
    assert all(len(set(group[clustered[cluster_of_user[clustered] == c]])) == 1 for c in range(len(typical)))


def test_graph_of_equal_and_of_few_users(tmp_path):
    module = load_stage()
    indptr, indices, similarity = module.neighbor_graph(np.ones((300, 4), np.float32), 5, 1)
    assert indptr.tolist() == list(range(0, 1501, 5)) and (similarity == 0).all()
    assert (indices.reshape(300, 5) != np.arange(300)[:, None]).all() and (np.diff(np.sort(indices.reshape(300, 5))) > 0).all()
    for n in (1, 2, 3):
        indptr, indices, similarity = module.neighbor_graph(np.arange(n, dtype=np.float32)[:, None], 5, 1)
        expected = [[k for k in sorted(range(n), key=lambda k: abs(i - k)) if k != i] for i in range(n)]
        assert [sorted(indices[indptr[i]:indptr[i + 1]]) for i in range(n)] == [sorted(row) for row in expected]
        assert [-((indices[e] - i) ** 2) for i in range(n) for e in range(indptr[i], indptr[i + 1])] == similarity.tolist()


def test_graph_above_a_number_of_users(tmp_path, monkeypatch):
    make_data(tmp_path)
    module = load_stage()
    monkeypatch.setattr(module, "SPARSE_ABOVE", 317)
    assert module.main(["--dataset", "toy", "--data-dir", str(tmp_path), "--preference", "-200"]) == 0
    assert results(tmp_path)[2]["neighbors"] == 64 and results(tmp_path)[2]["clusters"] == 8
    assert module.main(["--dataset", "toy", "--data-dir", str(tmp_path), "--preference", "-200", "--neighbors", "0"]) == 0
    assert results(tmp_path)[2]["neighbors"] is None


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["Office_Products"])
def test_neighbor_graph_on_real_users(tmp_path, shared, dataset):
    """The goal: a net similarity within 1 % of the exact form's, at the share of typical users that is the default."""
    for stage, options in (("01_preprocess", ["--raw-dir", shared / "data" / "raw"]), ("02_encode_text", [])):
        done = subprocess.run([sys.executable, ROOT / "stages" / f"{stage}.py", "--dataset", dataset, "--data-dir", tmp_path, *options],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    reports = []
    for options in ([], ["--neighbors", 64]):
        preference = [f"--preference={reports[0]['preference']!r}"] if reports else []
        done = subprocess.run([sys.executable, SCRIPT, "--dataset", dataset, "--data-dir", tmp_path, *map(str, options), *preference], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / dataset / "03_cluster_users" / "report.json").read_text()))
    assert reports[1]["neighbors"] == 64 and abs(reports[1]["net_similarity"] / reports[0]["net_similarity"] - 1) < 0.01


def test_not_converged_is_an_error_that_says_what_to_try(tmp_path):
    _, split = make_data(tmp_path)
    run = run_stage(tmp_path, "--preference", -200, "--max-iter", 5)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "not converged after 5 iterations" in run.stderr and "--damping 0.95" in run.stderr and "--allow-unconverged" in run.stderr
    assert not (tmp_path / "toy" / "03_cluster_users" / "manifest.json").exists()
    assert run_stage(tmp_path, "--preference", -200, "--max-iter", 5, "--allow-unconverged").returncode == 0
    check_contract(*results(tmp_path), training_with_text(split))
    assert results(tmp_path)[2]["converged"] is False


def test_skip_done(tmp_path):
    make_data(tmp_path)
    options = ("--preference", -200, "--skip-done")
    assert "running, no finished result yet" in run_stage(tmp_path, *options).stdout
    assert "skipped" in run_stage(tmp_path, *options).stdout
    assert "--preference was -200.0 and is -300.0" in run_stage(tmp_path, "--preference", -300, "--skip-done").stdout


def rewrite_text(root, change):
    folder = root / "toy" / "02_encode_text"
    np.save(folder / "user_text.npy", change(np.load(folder / "user_text.npy")))
    manifest(folder, "02_encode_text")


@pytest.mark.parametrize("change, words", [
    (lambda text: 0 * text, "none of the 320 training users has a text vector"),
    (lambda text: np.where(np.arange(len(text))[:, None] == 3, np.nan, text), "NaN"),
    (lambda text: text[:-1], "399 rows and 01_preprocess 400 users"),
    (lambda text: text * np.float32(1e25), "overflow"),
])
def test_bad_vectors(tmp_path, change, words):
    make_data(tmp_path)
    rewrite_text(tmp_path, change)
    run = run_stage(tmp_path, "--preference", -200)
    assert run.returncode == 1 and words in run.stderr and "Traceback" not in run.stderr


def test_equal_users_are_one_cluster(tmp_path):
    _, split = make_data(tmp_path)
    rewrite_text(tmp_path, np.ones_like)
    run = run_stage(tmp_path)
    assert run.returncode == 0, run.stderr
    cluster_of_user, typical, report = results(tmp_path)
    assert len(typical) == 1 and report["clusters"] == 1 and "no preference gives 0.0300" in run.stderr


@pytest.mark.parametrize("options", [("--typical-fraction", 0), ("--typical-fraction", 1.5), ("--preference", -1, "--typical-fraction", 0.1),
                                     ("--tolerance", -1), ("--sample-users", 0), ("--neighbors", -1), ("--no-such-option",)])
def test_bad_options_exit_2(tmp_path, options):
    assert run_stage(tmp_path, *options).returncode == 2


def test_missing_stage_names_the_command(tmp_path):
    run = run_stage(tmp_path)
    assert run.returncode == 1 and "python stages/01_preprocess.py" in run.stderr


def test_memory_is_checked_before_it_is_taken(tmp_path, monkeypatch):
    from eimf.artifacts import UserError
    module = load_stage()
    assert module.free_memory() is None or module.free_memory() > 2**20
    monkeypatch.setattr(module, "free_memory", lambda: 50 * 2**20)
    assert module.check_memory(1000, 64, 0) == int(0.8 * 50 * 2**20)
    with pytest.raises(UserError, match="needs about .* MiB and 50 MiB are free; give --sample-users N with N below"):
        module.check_memory(200_000, 384, 0)
    with pytest.raises(UserError, match="needs about .* MiB"):
        module.check_memory(200_000, 384, 64)


def test_random_typical_users_are_a_control_without_affinity_propagation(tmp_path):
    """As many users as the fraction says, drawn with the seed; everyone with text goes to the nearest of them."""
    _, split = make_data(tmp_path)
    done = run_stage(tmp_path, "--typical", "random", "--typical-fraction", "0.1", "--seed", 3)
    assert done.returncode == 0, done.stderr
    cluster_of_user, typical, report = results(tmp_path)
    clustered = training_with_text(split)
    check_contract(cluster_of_user, typical, report, clustered)
    assert len(typical) == report["clusters"] == round(0.1 * len(clustered)) and report["preference"] is None
    text = np.load(tmp_path / "toy" / "02_encode_text" / "user_text.npy")
    distance = np.square(text[clustered][:, None] - text[typical]).sum(2)
    np.testing.assert_array_equal(cluster_of_user[clustered], distance.argmin(1))
    run_stage(tmp_path, "--typical", "random", "--typical-fraction", "0.1", "--seed", 4)
    assert not np.array_equal(results(tmp_path)[1], typical)
    done = run_stage(tmp_path, "--typical", "random", "--preference", "-3")
    assert done.returncode == 2 and "leave out --preference" in done.stderr
