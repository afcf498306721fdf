"""Stage 06: batches, the teacher's terms, leaks, determinism, resume after a kill."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eimf.artifacts import Stage, UserError, load_json, save_json, sha256
from eimf.data import Interactions
from eimf.export import load_export
from conftest import N_ITEMS, TRAIN_FLAGS
from test_losses import info_nce_oracle
from tiny import write_interests

@pytest.fixture(scope="module")
def stage06(load_script):
    return load_script("stages/06_train.py")


@pytest.fixture
def args(stage06, tiny):
    return stage06.parse(["--data-dir", str(tiny), "--dataset", "tiny", "--eimf", "--dim", "16"])


def loaded(stage06, args):
    stage = Stage("06_train", args, run=args.run)
    interactions = stage06.load_interactions(stage.input("01_preprocess"))
    text, cluster_of_user = stage06.load_text(stage, args, interactions.n_items)
    return interactions, text, cluster_of_user


def one_event_per_item(kind):
    """Every event is its own item, so that any item seen tells which event it came from."""
    lengths = np.random.default_rng(1).integers(5, 30, 300)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    split = np.random.default_rng(2).choice([0, 1, 2], 300, p=[.8, .1, .1]).astype(np.uint8)
    if kind == "leave-one-out":
        split[:] = 0
    return Interactions(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, split, offsets[-1], kind)


@pytest.mark.parametrize("kind", ["random", "file-order", "leave-one-out"])
def test_training_sees_no_held_out_event(stage06, args, kind):
    interactions = one_event_per_item(kind)
    batches = stage06.Batches(interactions, args)
    seen = set()
    for t in range(1, 80):
        history, target, users = batches[t]
        seen |= set(history.ravel().tolist()) | set(target.tolist())
        assert len(set(users)) == args.batch_size
    held_out = set()
    for user in range(300):
        events = interactions.items[interactions.offsets[user]:interactions.offsets[user + 1]].tolist()
        if kind == "leave-one-out":
            held_out |= set(events[-2:])
        elif interactions.split[user] != 0:
            held_out |= set(events)
    assert len(seen) > 2000 and not seen & held_out


def test_a_batch_is_a_target_and_the_events_before_it(stage06, args):
    interactions = one_event_per_item("random")
    batches = stage06.Batches(interactions, args)
    places = []
    for t in range(1, 60):
        for row, target, user in zip(*batches[t]):
            k = target - 1 - interactions.offsets[user]  # position of the target in its user's sequence
            length = interactions.offsets[user + 1] - interactions.offsets[user]
            assert 4 <= k < length
            before = np.arange(target - min(k, 20), target)
            assert row[:len(before)].tolist() == before.tolist() and not row[len(before):].any()
            if length > 9:
                places.append((k - 4) / (length - 5))
    assert abs(np.mean(places) - .5) < .02 and min(places) == 0 and max(places) == 1  # drawn evenly, both ends too


def test_a_horizon_draws_the_target_from_the_next_events(stage06, args):
    """Evenly from the next three, or from what the user has left; histories are those without a horizon."""
    interactions = one_event_per_item("random")
    plain = stage06.Batches(interactions, args)
    ahead = stage06.Batches(interactions, type(args)(**vars(args) | {"horizon": 3}))
    steps = []
    for t in range(1, 80):
        (history, target, users), (further_history, further, _) = plain[t], ahead[t]
        np.testing.assert_array_equal(history, further_history)
        left = interactions.offsets[users + 1] - (target - 1) - 1  # events after the next one
        assert ((further - target >= 0) & (further - target <= np.minimum(2, left))).all()
        steps += (further - target)[left >= 2].tolist()
    np.testing.assert_allclose(np.bincount(steps) / len(steps), 1 / 3, atol=.04)


def test_event_dropout_leaves_out_events_of_the_history(stage06, args):
    """A share of each history's events goes, the others keep their order and lie at the front; targets are those without it."""
    interactions = one_event_per_item("random")
    plain = stage06.Batches(interactions, args)
    thinned = stage06.Batches(interactions, type(args)(**vars(args) | {"event_dropout": .4}))
    left = total = 0
    for t in range(1, 40):
        (whole, target, users), (some, same_target, same_users) = plain[t], thinned[t]
        np.testing.assert_array_equal(target, same_target)
        np.testing.assert_array_equal(users, same_users)
        for before, after in zip(whole, some):
            events = after[after > 0]
            assert len(events) and not after[len(events):].any() and (np.diff(events) > 0).all() and np.isin(events, before).all()
            left, total = left + len(events), total + (before > 0).sum()
    assert abs(left / total - .6) < .02
    nothing = stage06.without_some(np.array([[3, 4, 5, 0], [6, 0, 0, 0]]), 1.0, np.random.default_rng(0))
    np.testing.assert_array_equal(nothing, [[5, 0, 0, 0], [6, 0, 0, 0]])


def test_short_histories_have_fewer_interests(stage06, args):
    """Histories of 1, 2, 3, 4, 8 and 16 events: log2 of it, at least one, at most K; the others repeat the first."""
    model = stage06.BehaviouralModel(N_ITEMS, type(args)(**vars(args) | {"dynamic_interests": True})).eval()
    history = torch.tensor([[5 + j if j < n else 0 for j in range(20)] for n in (1, 2, 3, 4, 8, 16)])
    interests, routing = model(history)
    everything, all_routing = model.backbone(model.items(history), history > 0)
    for row, k in enumerate([1, 1, 1, 2, 3, 4]):
        for found, whole in ((interests, everything), (routing, all_routing)):
            torch.testing.assert_close(found[row, :k], whole[row, :k], rtol=0, atol=0)
            torch.testing.assert_close(found[row, k:], whole[row, :1].expand(4 - k, -1), rtol=0, atol=0)


def test_batches_depend_on_seed_and_step_only(stage06, args):
    a, b = (stage06.Batches(one_event_per_item("random"), args) for _ in range(2))
    for _ in range(3):
        a[5]
    np.testing.assert_array_equal(a[9][0], b[9][0])
    assert not np.array_equal(a[9][0], a[10][0])


def test_teacher_terms_by_hand(stage06, args):
    """Every EIMF term recomputed with NumPy from the weights (Eq. 4, 7-12)."""
    interactions, text, cluster_of_user = loaded(stage06, args)
    torch.manual_seed(0)
    model, teacher = stage06.BehaviouralModel(interactions.n_items, args), stage06.Teacher(text, args)
    with torch.no_grad():
        model.items.weight *= 10
    history, target, users = stage06.Batches(interactions, args)[1]
    target[:3] = [7, 8, target[5]]  # two targets without a title, one repeated target
    cluster = cluster_of_user[users]
    interests, _ = model(torch.tensor(history))
    implicit = stage06.losses.read_out(interests, model.items(torch.tensor(target)))
    target_ids = model.items(torch.tensor(target))
    terms = teacher(implicit, torch.tensor(target), target_ids, torch.tensor(cluster))

    weight = {name: p.detach().numpy() for name, p in teacher.named_parameters()}
    titles = text["item_text"].numpy() @ weight["projection.weight"].T
    has_title = text["item_has_text"].numpy()
    taught = np.zeros((len(users), args.dim), np.float32)
    for row, c in enumerate(cluster):
        index = text["interest_index"].numpy()[c]
        index = index[index >= 0]
        if c < 0 or not len(index):
            continue
        e = text["interest_vectors"].numpy()[index] @ weight["projection.weight"].T
        query, key, value = np.split(e @ weight["attention.weight"].T, 3, axis=1)
        scores = query @ key.T / np.sqrt(args.dim)
        attention = np.exp(scores - scores.max(1, keepdims=True))
        h = e + attention / attention.sum(1, keepdims=True) @ value
        taught[row] = h[(h @ titles[target[row]]).argmax()]
    keep = has_title[target] & (cluster >= 0)
    assert 0 < keep.sum() < len(keep)
    logits = (taught @ titles.T)[:, has_title]
    logsumexp = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    semantic = (logsumexp - (taught * titles[target]).sum(1))[keep].mean()
    assert terms["semantic"].item() == pytest.approx(semantic, rel=1e-4)

    def cosine(a, b, rows):
        return np.mean([1 - a[i] @ b[i] / np.linalg.norm(a[i]) / np.linalg.norm(b[i]) for i in np.flatnonzero(rows)])

    same_target, same_teacher = target[:, None] == target, cluster[:, None] == cluster
    implicit, ids = implicit.detach().numpy(), model.items.weight.detach().numpy()[target]
    user = .4 * info_nce_oracle(np.where(keep[:, None], taught, 1), implicit, same_target | same_teacher, .1, keep) + .1 * cosine(taught, implicit, keep)
    item = .4 * info_nce_oracle(np.where(has_title[target][:, None], titles[target], 1), ids, same_target, .1, has_title[target]) \
        + .1 * cosine(titles[target], ids, has_title[target])
    assert terms["align_user"].item() == pytest.approx(user, rel=1e-4)
    assert terms["align_item"].item() == pytest.approx(item, rel=1e-4)


def test_the_teacher_reaches_the_model_and_the_model_needs_no_teacher(stage06, args):
    """Gradients of the alignment reach the item table and the backbone; the export takes only a history."""
    interactions, text, cluster_of_user = loaded(stage06, args)
    model, teacher = stage06.BehaviouralModel(interactions.n_items, args), stage06.Teacher(text, args)
    history, target, users = stage06.Batches(interactions, args)[1]
    interests, _ = model(torch.tensor(history))
    target = torch.tensor(target)
    ids = model.items(target)
    terms = teacher(stage06.losses.read_out(interests, ids), target, ids, torch.tensor(cluster_of_user[users]))
    terms["align_user"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*model.parameters(), *teacher.parameters()])


def test_controls_change_what_they_say_and_no_more(stage06, args):
    _, text, cluster = loaded(stage06, args)
    args.control = "random-text"
    _, random_text, same_cluster = loaded(stage06, args)
    assert {k: v.shape for k, v in text.items()} == {k: v.shape for k, v in random_text.items()}
    assert np.array_equal(cluster, same_cluster) and torch.equal(text["item_has_text"], random_text["item_has_text"])
    assert abs(F.cosine_similarity(text["item_text"][1:], random_text["item_text"][1:]).mean()) < .2
    args.control = "shuffled-clusters"
    _, same_text, shuffled = loaded(stage06, args)
    assert all(torch.equal(text[k], same_text[k]) for k in text)
    assert np.array_equal(np.sort(cluster), np.sort(shuffled)) and np.array_equal(cluster < 0, shuffled < 0)
    changed = (cluster != shuffled)[cluster >= 0].mean()
    assert changed > .7  # 9 clusters: about 1 in 9 keeps its own by chance


def test_text_dim_keeps_the_leading_directions(stage06, args):
    _, full, _ = loaded(stage06, args)
    args.text_dim = 5
    _, reduced, _ = loaded(stage06, args)
    x, y = full["item_text"].double().numpy(), reduced["item_text"].numpy()
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(y @ y.T, (u[:, :5] * s[:5] ** 2) @ u[:, :5].T, atol=1e-4)  # the best rank-5 Gram matrix
    assert reduced["interest_vectors"].shape == (len(full["interest_vectors"]), 5)


def test_padding_does_not_matter_and_an_empty_history_is_finite(stage06, args):
    model = stage06.BehaviouralModel(N_ITEMS, args)
    history = torch.zeros(3, 20, dtype=torch.int64)
    history[0, :4] = torch.tensor([3, 9, 9, 1])
    history[1, :1] = 5
    before, routing = model(history)
    with torch.no_grad():
        model.items.weight[0] = 99  # what the padding row holds must not reach an interest
    after, _ = model(history)
    torch.testing.assert_close(before[:2], after[:2])
    assert torch.isfinite(before).all() and torch.isfinite(routing).all()
    assert not routing[0, :, 4:].any()
    torch.testing.assert_close(model.eval()(history), (after, routing))  # the exported form equals the training form


def test_regulariser_is_remis(stage06):
    remi = stage06.backbones.BACKBONES["remi"](8, 3, 5)
    routing = torch.rand(4, 3, 5, dtype=torch.float64)
    expected = 0
    for a in routing.numpy():
        centred = a - a.mean(1, keepdims=True)
        expected += 100 * (np.diag(centred @ centred.T / 8) ** 2).sum()
    assert remi.regulariser(routing).item() == pytest.approx(expected)


RESULT = ("model.pt2", "item_vectors.npy", "item_ids.txt", "config.json")


def without_seconds(path):
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "validation_seconds")} for line in open(path)]


def test_the_export_equals_the_trained_model(finished):
    items = np.load(finished / "item_vectors.npy")
    model = load_export(finished / "model.pt2")
    for batch in (1, 7, 300):
        history = torch.randint(0, N_ITEMS + 1, (batch, 20), generator=torch.Generator().manual_seed(0)).sort(descending=True)[0]
        interests, routing = model(history)
        assert interests.shape == (batch, 4, 16) and routing.shape == (batch, 4, 20)
        rebuilt = routing.detach().numpy() @ np.where((history > 0).numpy()[:, :, None], items[history.numpy()], 0)
        np.testing.assert_allclose(interests.detach().numpy(), rebuilt, atol=1e-5)
    assert not items[0].any() and len(items) == N_ITEMS + 1
    assert (finished / "item_ids.txt").read_text().split("\n")[:3] == ["", "I1", "I2"]


def test_the_log_and_the_config_agree(finished):
    log, config = without_seconds(finished / "log.jsonl"), load_json(finished / "config.json")
    assert [entry["iteration"] for entry in log] == list(range(10, config["iterations"] + 1, 10))
    best = max(log, key=lambda entry: entry["valid"]["recall@50"])
    assert config["best_iteration"] == best["iteration"] and set(log[0]["loss"]) == {
        "recommendation", "regulariser", "semantic", "align_user", "align_item"}
    assert log[-1]["loss"]["semantic"] < log[0]["loss"]["semantic"]


def test_the_same_seed_gives_the_same_files_and_another_does_not(finished, train):
    for name, seed, same in (("again", "0", True), ("other", "1", False)):
        done, folder = train("--eimf", "--seed", seed, "--run", name)
        assert done.returncode == 0, done.stderr
        assert (sha256(folder / name / "item_vectors.npy") == sha256(finished / "item_vectors.npy")) is same
        assert (without_seconds(folder / name / "log.jsonl") == without_seconds(finished / "log.jsonl")) is same


BEYOND_THE_PAPER = ["--item-text", "add", "--text-dim", "6", "--dropout", "0.3", "--average", "0.9", "--schedule", "cosine",
                    "--weight-decay", "0.01", "--score-temperature", "0.1", "--precision", "bfloat16"]


@pytest.mark.parametrize("extra", [pytest.param([], id="paper"), pytest.param(BEYOND_THE_PAPER, id="beyond", marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_files(finished, train, tiny, root, extra):
    """kill -9 twice in the middle of training; the third start finishes with the files of an uninterrupted run."""
    if extra:
        done, folder = train("--eimf", "--run", "whole", *extra)
        assert done.returncode == 0, done.stderr
        finished = folder / "whole"
    folder = tiny / "tiny" / "06_train" / f"killed-{len(extra)}"
    command = [sys.executable, root / "stages/06_train.py", "--data-dir", tiny, "--dataset", "tiny", *TRAIN_FLAGS, "--eimf", *extra,
               "--run", folder.name]
    for kill in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        checkpoint, seen = folder / "checkpoint" / "last.safetensors", 0.0
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while (checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0) == before and seen < 60:
            time.sleep(.002)
            seen += .002
            assert process.poll() is None or kill == 1, "it finished before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from iteration" in done.stderr, done.stderr
    for name in RESULT:
        if name == "config.json":
            assert load_json(folder / name) | {"run": ""} == load_json(finished / name) | {"run": ""}
        else:
            assert sha256(folder / name) == sha256(finished / name), name
    assert without_seconds(folder / "log.jsonl") == without_seconds(finished / "log.jsonl")


def in_process(stage06, tiny, *arguments):
    """Stage 06 in this process, with few threads and steps: its folder."""
    stage06.main(["--data-dir", str(tiny), "--dataset", "tiny", "--dim", "16", "--threads", "1", "--validate-every", "10", *arguments])
    return tiny / "tiny" / "06_train" / arguments[arguments.index("--run") + 1]


@pytest.mark.parametrize("average", ["0", "0.8"])
def test_labels_are_of_the_step_that_is_exported(stage06, tiny, tmp_path, average):
    """Training on after the best step changes neither the model nor the explicit interests beside it."""
    tiny = shutil.copytree(tiny, tmp_path / "data", ignore=shutil.ignore_patterns("06_train", "07_evaluate"))
    write_interests(tiny)
    flags = ["--eimf", "--average", average, "--learning-rate", "0.03"]
    longer = in_process(stage06, tiny, *flags, "--run", f"longer-{average}", "--max-iterations", "150")
    best, last = (load_json(longer / "config.json")[k] for k in ("best_iteration", "iterations"))
    assert best < last
    exact = in_process(stage06, tiny, *flags, "--run", f"exact-{average}", "--max-iterations", str(best))
    for file in ("item_vectors.npy", "label_vectors.npy"):
        assert sha256(longer / file) == sha256(exact / file), file


NORMALISED = '''
import torch
from torch import nn
from eimf.backbones import Backbone, even_share


class Mean(Backbone):
    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, vectors, mask):
        share = even_share(mask)
        return self.norm((share @ self.dropout(vectors)).squeeze(1))[:, None], share
'''


def test_buffers_of_ones_own_backbone_are_resumed_and_averaged(stage06, tiny, tmp_path, monkeypatch):
    (tmp_path / "mean.py").write_text(NORMALISED)
    flags = ["--backbone", f"{tmp_path / 'mean.py'}:Mean", "--average", "0.5", "--max-iterations", "40", "--learning-rate", "0.01"]
    whole = in_process(stage06, tiny, *flags, "--run", "buffers-whole")
    validate, calls = stage06.validate, []

    def stop_in_the_third(model, *rest):
        calls.append(model.backbone.norm.running_var.clone())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(model, *rest)
    monkeypatch.setattr(stage06, "validate", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        in_process(stage06, tiny, *flags, "--run", "buffers-again")
    monkeypatch.undo()
    again = in_process(stage06, tiny, *flags, "--run", "buffers-again")
    assert not torch.equal(calls[0], torch.ones(16)) and not torch.equal(calls[0], calls[1])
    assert without_seconds(again / "log.jsonl") == without_seconds(whole / "log.jsonl")


def test_a_finished_run_of_a_default_name_is_not_replaced_by_other_settings(finished, train):
    before = sha256(finished / "manifest.json")
    done, _ = train("--eimf", "--no-alignment")
    assert done.returncode == 1 and "other settings (--no-alignment was False and is True)" in done.stderr and "--run" in done.stderr
    assert sha256(finished / "manifest.json") == before


def test_stages_of_other_data_are_refused(stage06, tiny, tmp_path):
    """Held-out users must not teach: what 02 to 05 were made from must be what stage 01 holds now."""
    copy = tmp_path / "data"
    shutil.copytree(tiny, copy, ignore=shutil.ignore_patterns("06_train", "07_evaluate"))
    for later, earlier in (("03_cluster_users", "01_preprocess/split.npy"), ("05_encode_interests", "03_cluster_users/cluster_of_user.npy")):
        path = copy / "tiny" / later / "manifest.json"
        manifest = load_json(path)
        path.write_text(json.dumps(manifest | {"inputs": {earlier: "0" * 64}}))
        with pytest.raises(UserError, match=f"{later} was made from another {earlier} than the present one; run stage {later} again"):
            in_process(stage06, copy, "--eimf", "--run", "never")
        path.write_text(json.dumps(manifest))
    assert not (copy / "tiny" / "06_train" / "never").exists()


def test_item_text_is_folded_into_the_export(train, tiny):
    """The exported table is the sum, so an item that no one clicked is scored by its title; the export reads no text."""
    done, folder = train("--item-text", "add", "--run", "folded", "--score-temperature", "0.5")
    assert done.returncode == 0, done.stderr
    scored = np.load(folder / "folded" / "item_vectors.npy")
    np.testing.assert_allclose(np.linalg.norm(scored[1:], axis=1), 2, rtol=1e-4)  # directions over the temperature
    assert not scored[0].any()
    export = load_export(folder / "folded" / "model.pt2")
    history = torch.tensor([[3, 9, 1] + [0] * 17])
    interests, routing = export(history)
    torch.testing.assert_close(interests.norm(dim=2), torch.ones(1, 4))
    table = dict(export.named_parameters())["items.weight"] if "items.weight" in dict(export.named_parameters()) else dict(export.named_buffers())["items.weight"]
    expected = F.normalize(routing @ table[history], dim=2)  # the export's own table is the sum too
    torch.testing.assert_close(interests, expected)
    torch.testing.assert_close(F.normalize(table[1:], dim=1) * 2, torch.tensor(scored[1:]), rtol=1e-4, atol=1e-5)


def test_item_text_starts_or_joins_the_table(stage06, tiny):
    options = ["--data-dir", str(tiny), "--dataset", "tiny", "--dim", "6"]
    args = stage06.parse([*options, "--item-text", "init"])
    item_text, has_text, _ = stage06.load_item_text(Stage("06_train", args, run=args.run), args, N_ITEMS)
    torch.manual_seed(0)
    table = stage06.BehaviouralModel(N_ITEMS, args, item_text).items.weight.detach().numpy()[has_text]
    text = item_text[has_text] - item_text[has_text].mean(0)
    u, s, _ = np.linalg.svd(text, full_matrices=False)
    best = (u[:, :6] * s[:6]) @ (u[:, :6] * s[:6]).T  # Gram matrix of the six leading components
    np.testing.assert_allclose(table @ table.T / (table @ table.T).trace(), best / best.trace(), atol=1e-5)
    args = stage06.parse([*options, "--item-text", "add"])
    model = stage06.BehaviouralModel(N_ITEMS, args, item_text)
    expected = model.items.weight.detach().numpy() + item_text @ model.text_map.weight.detach().numpy().T
    np.testing.assert_allclose(model.tables()[0].detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(model.folded().items.weight.detach().numpy(), expected, atol=1e-5)


def test_added_text_and_the_teacher_share_one_map(stage06, train, tiny):
    """Explicit interests are then projected as titles are; the export of such a training is whole."""
    done, folder = train("--item-text", "add", "--eimf", "--run", "shared-map")
    assert done.returncode == 0, done.stderr
    args = stage06.parse(["--data-dir", str(tiny), "--dataset", "tiny", "--eimf", "--item-text", "add"])
    text, _ = stage06.load_text(Stage("06_train", args, run=args.run), args, N_ITEMS)
    model = stage06.BehaviouralModel(N_ITEMS, args, text["item_text"].numpy())
    teacher = stage06.Teacher(text, args, projection=model.text_map)
    titles = model.tables()[0] - model.items.weight
    torch.testing.assert_close(teacher.project(text["item_text"]), titles, rtol=1e-4, atol=1e-6)
    assert np.isfinite(np.load(folder / "shared-map" / "item_vectors.npy")).all()


def test_a_recipe_is_a_set_of_defaults(stage06):
    best = stage06.RECIPES["best"]
    args = stage06.parse(["--recipe", "best"])
    assert {name: getattr(args, name) for name in best} == best
    assert stage06.parse(["--recipe", "best", "--item-text", "init"]).item_text == "init"  # a flag wins
    assert stage06.parse(["--recipe", "best", "--backbone", "llm2bert4rec"]).item_text == "init"  # which makes it what it is
    paper = vars(stage06.parse([]))
    assert paper["item_text"] == "none" and paper["horizon"] == 1 and not any(
        paper[k] for k in ("dropout", "event_dropout", "average", "weight_decay", "score_temperature"))


def test_a_checkpoint_of_other_settings_is_not_used(train):
    for rate in ("0.001", "0.002"):
        done, folder = train("--run", "rates", "--learning-rate", rate)
        assert done.returncode == 0, done.stderr
    assert "other settings" in done.stderr


def test_skip_done(finished, train):
    done, _ = train("--eimf", "--skip-done")
    assert done.returncode == 0 and "skipped" in done.stdout
    done, _ = train("--eimf", "--skip-done", "--gamma", "0.2", "--run", "remi-eimf-s0-gamma")
    assert done.returncode == 0 and "running, no finished result yet" in done.stdout


def test_popularity(train, tiny):
    done, folder = train("--backbone", "pop")
    assert done.returncode == 0, done.stderr
    counts = np.load(folder / "pop-s0" / "item_vectors.npy")[:, 0]
    stage01 = tiny / "tiny" / "01_preprocess"
    items, offsets, split = (np.load(stage01 / f"{n}.npy") for n in ("sequence_items", "sequence_offsets", "split"))
    expected = np.zeros(N_ITEMS + 1)
    for user in np.flatnonzero(split == 0):
        for item in items[offsets[user]:offsets[user + 1]]:
            expected[item] += 1
    np.testing.assert_array_equal(np.floor(counts), expected)
    assert len(np.unique(counts)) == len(counts)  # no ties, and equal counts are not in the order of item numbers
    for count in np.unique(expected[1:]):
        tied = counts[1:][expected[1:] == count]
        assert len(tied) < 5 or (np.diff(tied) > 0).any() and (np.diff(tied) < 0).any()


@pytest.mark.parametrize("arguments, code, message", [
    (["--dim", "0"], 2, "--dim must be at least 1"),
    (["--control", "random-text"], 2, "--control needs --eimf"),
    (["--backbone", "pop", "--eimf"], 2, "nothing to teach"),
    (["--backbone", "nonsense"], 2, "invalid choice"),
    (["--seed", "-1"], 2, "--seed must be 0 to 4294967295, got -1"),
    (["--threads", "-1"], 2, "--threads must be at least 0"),
    (["--text-dim", "-5"], 2, "--text-dim must be at least 0"),
    (["--learning-rate", "nan"], 2, "--learning-rate must be above 0, got nan"),
    (["--temperature", "0"], 2, "--temperature must be above 0"),
    (["--gamma", "nan"], 2, "--gamma must be at least 0"),
    (["--hardness", "-1"], 2, "--hardness must be at least 0"),
    (["--device", "cuda:99"], 1, "no CUDA device"),
    (["--device", "gpu"], 1, "expected auto, cpu, cuda"),
    (["--dataset", "nowhere"], 1, "python stages/01_preprocess.py --dataset nowhere"),
])
def test_mistakes_get_a_sentence(train, arguments, code, message):
    if message == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done, _ = train("--run", "mistake", *arguments)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_export_with_a_pickle_is_refused(tmp_path, finished):
    """torch falls back to unpickling an archive's sample inputs; a crafted one must be refused before that."""
    import pickle

    import zipfile

    from eimf.artifacts import UserError

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    crafted = tmp_path / "model.pt2"
    with zipfile.ZipFile(finished / "model.pt2") as source, zipfile.ZipFile(crafted, "w") as out:
        for name in source.namelist():
            out.writestr(name, pickle.dumps(Payload()) if "sample_inputs" in name else source.read(name))
    with pytest.raises(UserError, match="Run stage 06 again"):
        load_export(crafted)
    assert not marker.exists()
    crafted.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a readable exported model"):
        load_export(crafted)


def test_random_typical_users_must_come_from_stage_03(stage06, args, tmp_path, tiny):
    """The control changes stages 03 to 05; 06 refuses a name that is not what they did, and stages that do not belong together."""
    shutil.copytree(tiny / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("06_train"))
    args.data_dir = tmp_path
    loaded(stage06, args)
    args.control = "random-typical-users"
    with pytest.raises(UserError, match="are exemplars, --control is random-typical-users; run stage 03 with --typical random"):
        loaded(stage06, args)
    path = tmp_path / "tiny" / "03_cluster_users" / "manifest.json"
    manifest = load_json(path)
    save_json(path, manifest | {"arguments": manifest["arguments"] | {"typical": "random"}})
    loaded(stage06, args)
    args.control = None
    with pytest.raises(UserError, match="are random users, --control is None; add --control random-typical-users"):
        loaded(stage06, args)
    save_json(path, manifest)
    folder = tmp_path / "tiny" / "04_infer_interests"
    folder.mkdir()
    save_json(folder / "manifest.json", manifest | {"outputs": {}, "inputs": {"03_cluster_users/typical_users.npy": "another"}})
    save_json(path, manifest | {"outputs": manifest["outputs"] | {"typical_users.npy": {"bytes": 1, "sha256": "this"}}})
    (path.parent / "typical_users.npy").write_bytes(b"1")
    with pytest.raises(UserError, match="04_infer_interests was made from another 03_cluster_users/typical_users.npy .* run stage 04"):
        stage06.main(["--data-dir", str(tmp_path), "--dataset", "tiny", "--eimf"])
