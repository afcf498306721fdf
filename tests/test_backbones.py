"""Every backbone: one conformance test for all, built-in or a user's own, and oracles for the formulas.

A backbone of your own is tested by `pytest tests/test_backbones.py --backbone FILE.py:ClassName`.
"""
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from eimf import backbones, losses
from eimf.artifacts import UserError, load_json
from eimf.backbones.capsule import squash
from eimf.export import load_export, save_export
from eimf.model import table_from_text

DIM, INTERESTS, MAX_LEN, N_ITEMS = 16, 3, 7, 50
SINGLE = {"dnn", "gru4rec", "sasrec", "bert4rec", "bert4rec-cloze", "llm2bert4rec", "sine"}

USERS_OWN = '''
import torch
from torch import nn
from eimf.backbones import Backbone, newest


class Echo(Backbone):
    """Each interest is a map of the newest event."""
    defaults = {"learning_rate": 0.003}

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.maps = nn.Parameter(torch.randn(interests, dim, dim) / dim)

    def forward(self, vectors, mask):
        at = torch.nn.functional.one_hot(newest(mask), mask.shape[1]).bool() & mask  # (B, L)
        last = torch.where(at[:, :, None], self.dropout(vectors), 0).sum(1)  # (B, D)
        interests = torch.einsum("bd,kde->bke", last, self.maps)
        return interests, at.float()[:, None].expand(-1, interests.shape[1], -1)
'''


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for several threads, which on a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(USERS_OWN)
    return f"{path}:Echo"


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [*backbones.BACKBONES, "own", *metafunc.config.getoption("--backbone")], indirect=True)


@pytest.fixture
def name(request):
    return request.getfixturevalue("own") if request.param == "own" else request.param


def build(name, seed=0, interests=INTERESTS, dropout=0.0):
    torch.manual_seed(seed)
    return backbones.build(name, DIM, interests, MAX_LEN, dropout)


def histories(users=11, seed=0):
    """vectors (B, L, D) and mask (B, L): all lengths from 1 to L, the last user without any event; zeros at padding."""
    torch.manual_seed(seed)
    length = torch.tensor([1 + i % MAX_LEN for i in range(users - 1)] + [0])
    mask = torch.arange(MAX_LEN) < length[:, None]
    return torch.randn(users, MAX_LEN, DIM) * mask[:, :, None], mask


def both(model, vectors, mask):
    """The output in training and in evaluation mode, without dropout."""
    with torch.no_grad():
        return model.train()(vectors, mask), model.eval()(vectors, mask)


class Whole(nn.Module):
    """A backbone and its item table, as stage 06 exports them."""

    def __init__(self, backbone, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.items = nn.Embedding(N_ITEMS + 1, DIM, padding_idx=0)
        self.backbone = backbone

    def forward(self, history):
        return self.backbone(self.items(history), history > 0)


def item_histories(users=11):
    _, mask = histories(users)
    return torch.randint(1, N_ITEMS + 1, mask.shape, generator=torch.Generator().manual_seed(0)) * mask


def test_shapes_and_routing(name):
    vectors, mask = histories()
    for interests, routing in both(build(name), vectors, mask):
        count = interests.shape[1]
        assert count == (1 if name in SINGLE else INTERESTS) or name not in backbones.BACKBONES
        assert interests.shape == (11, count, DIM) and routing.shape == (11, count, MAX_LEN)
        assert interests.dtype == routing.dtype == torch.float32
        assert (routing >= 0).all() and not routing[:-1].masked_select(~mask[:-1, None].expand_as(routing[:-1])).any()
        torch.testing.assert_close(routing[:-1].sum(2), torch.ones(10, count))


def test_what_stands_at_padding_does_not_matter(name):
    """Nor do, therefore, events after the history: the target and what comes later cannot reach the interests."""
    vectors, mask = histories()
    later = torch.where(mask[:, :, None], vectors, 100 * torch.randn(vectors.shape))
    model = build(name)
    for before, after in zip(both(model, vectors, mask), both(model, later, mask)):
        torch.testing.assert_close(before[0], after[0])
        torch.testing.assert_close(before[1], after[1])


def test_an_empty_history_is_finite_in_value_and_gradient(name):
    vectors, mask = histories()
    for users in (slice(None), slice(-1, None)):  # among others, and alone
        model = build(name).train()
        x = vectors[users].clone().requires_grad_()
        interests, routing = model(x, mask[users])
        (interests.square().sum() + routing.square().sum() + model.regulariser(routing)).backward()
        assert torch.isfinite(interests).all() and torch.isfinite(routing).all() and torch.isfinite(x.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_training_and_evaluation_compute_the_same(name):
    """Training leaves out the padding's arithmetic, evaluation has fixed shapes."""
    trained, evaluated = both(build(name), *histories())
    torch.testing.assert_close(trained[0][:-1], evaluated[0][:-1])
    torch.testing.assert_close(trained[1][:-1], evaluated[1][:-1])


def test_training_and_evaluation_have_the_same_gradient(name):
    vectors, mask = histories()
    found = []
    for training in (True, False):
        model, x = build(name).train(training), vectors[:-1].clone().requires_grad_()
        interests, _ = model(x, mask[:-1])
        (interests * torch.linspace(-1, 1, interests.numel()).view_as(interests)).sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)


def test_a_batch_equals_its_users_alone(name):
    vectors, mask = histories()
    model = build(name)
    for mode, (interests, routing) in zip((True, False), both(model, vectors, mask)):
        model.train(mode)
        for user in range(len(vectors)):
            alone = model(vectors[user:user + 1], mask[user:user + 1])
            torch.testing.assert_close(alone, (interests[user:user + 1], routing[user:user + 1]))


def test_the_gradient_reaches_every_parameter(name):
    model = Whole(build(name)).train()
    history, target = item_histories()[:-1], torch.arange(1, 11)
    interests, routing = model(history)
    implicit = losses.read_out(interests, model.items(target))
    query, label = model.backbone.examples(implicit, target, history, model.items)
    loss = losses.softmax_loss(query, model.items.weight, label, torch.tensor([0])) + model.backbone.regulariser(routing)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    assert query.shape == (len(label), DIM) and label.min() > 0
    assert model.backbone.regulariser(routing).shape == ()


def test_the_export_equals_the_model(name, tmp_path):
    model = Whole(build(name)).eval()
    save_export(model, MAX_LEN, tmp_path / "model.pt2")
    exported = load_export(tmp_path / "model.pt2")
    for users in (1, 2, 29):
        history = item_histories(users)
        torch.testing.assert_close(exported(history), model(history))


def test_same_seed_same_model_and_evaluation_has_no_chance(name):
    vectors, mask = histories()
    first, second, other = (build(name, seed).eval() for seed in (0, 0, 1))
    torch.testing.assert_close(first(vectors, mask), second(vectors, mask), rtol=0, atol=0)
    torch.testing.assert_close(first(vectors, mask), first(vectors, mask), rtol=0, atol=0)
    assert not torch.allclose(first(vectors, mask)[0], other(vectors, mask)[0])
    other.load_state_dict(first.state_dict())  # everything that decides the output is in the saved state
    torch.testing.assert_close(first(vectors, mask), other(vectors, mask), rtol=0, atol=0)


def test_dropout_is_for_training_only(name):
    vectors, mask = histories()
    plain, dropping = build(name), build(name, dropout=0.5)
    torch.testing.assert_close(plain.eval()(vectors, mask), dropping.eval()(vectors, mask), rtol=0, atol=0)
    assert not torch.allclose(dropping.train()(vectors, mask)[0], dropping(vectors, mask)[0])


def test_it_learns(name):
    """Users click within one of five groups of items; after a short training the target's group ranks first."""
    torch.manual_seed(0)
    model = Whole(build(name, interests=2)).train()
    nn.init.normal_(model.items.weight[1:], std=0.05)
    # A Transformer with the norm after the sum is unsteady at a high rate without a warm-up; stage 06's default is 0.001.
    rate = 0.003 if isinstance(model.backbone, backbones.BERT4Rec) else 0.01
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(150):
        group = torch.randint(0, 5, (64, 1))
        events = 1 + group * 10 + torch.randint(0, 10, (64, MAX_LEN + 1))
        history = events[:, 1:] * (torch.arange(MAX_LEN) < torch.randint(1, MAX_LEN + 1, (64, 1)))
        interests, routing = model(history)
        query, label = model.backbone.examples(losses.read_out(interests, model.items(events[:, 0])), events[:, 0], history, model.items)
        loss = losses.softmax_loss(query, model.items.weight, label, torch.tensor([0])) + model.backbone.regulariser(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = (model.eval()(history)[0] @ model.items.weight[1:].T).amax(1)  # (64, N)
    found = scores.topk(5, 1).indices // 10 == group
    assert found.float().mean() > 0.9


# Oracles: the formulas again, user by user, in plain loops or with torch's own layers.

@pytest.fixture
def one_by_one():
    """Real events of each user (n, D) without padding, in float32."""
    vectors, mask = histories()
    return [v[m].numpy() for v, m in zip(vectors[:-1], mask[:-1])], vectors[:-1], mask[:-1]


def weights(model):
    return {key: value.detach().numpy() for key, value in model.state_dict().items()}


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def layer_norm(x, w, key):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{key}.weight"] + w[f"{key}.bias"]


def linear(x, w, key):
    return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0)


def assert_interests(model, vectors, mask, expected, routing=None):
    for interests, found in both(model, vectors, mask):
        np.testing.assert_allclose(interests.numpy(), np.array(expected), rtol=2e-4, atol=1e-5)
        for row, share in zip(found.numpy(), routing if routing is not None else []):
            np.testing.assert_allclose(row[:, :share.shape[1]], share, rtol=2e-4, atol=1e-6)


def test_dnn_is_a_masked_mean_and_a_tower(one_by_one):
    events, vectors, mask = one_by_one
    model = build("dnn")
    w = weights(model)
    expected = []
    for x in events:
        h = x.mean(0)
        for layer in (0, 2):
            h = np.maximum(linear(h, w, f"tower.{layer}"), 0)
        expected.append([linear(h, w, "tower.4")])
    assert_interests(model, vectors, mask, expected, [np.full((1, len(x)), 1 / len(x)) for x in events])


def test_gru4rec_step_by_step(one_by_one):
    events, vectors, mask = one_by_one
    model = build("gru4rec")
    w = weights(model)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    expected = []
    for x in events:
        state = np.zeros(2 * DIM)
        for event in x:
            from_event = np.split(w["cell.weight_ih"] @ event + w["cell.bias_ih"], 3)
            from_state = np.split(w["cell.weight_hh"] @ state + w["cell.bias_hh"], 3)
            reset, update = sigmoid(from_event[0] + from_state[0]), sigmoid(from_event[1] + from_state[1])
            state = update * state + (1 - update) * np.tanh(from_event[2] + reset * from_state[2])
        expected.append([linear(state, w, "output")])
    assert_interests(model, vectors, mask, expected)


def torch_layer(block, dim, hidden, activation, norm_first, heads):
    """torch's own Transformer layer with a block's weights."""
    layer = nn.TransformerEncoderLayer(dim, heads, hidden, 0.0, activation, batch_first=True, norm_first=norm_first)
    w = block.state_dict()
    layer.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([w["query.weight"], w["key_value.weight"]]),
        "self_attn.in_proj_bias": torch.cat([w["query.bias"], w["key_value.bias"]]),
        "self_attn.out_proj.weight": w["mix.weight"], "self_attn.out_proj.bias": w["mix.bias"],
        "linear1.weight": w["feed.0.weight"], "linear1.bias": w["feed.0.bias"],
        "linear2.weight": w["feed.3.weight"], "linear2.bias": w["feed.3.bias"],
        "norm1.weight": w["norm_attention.weight"], "norm1.bias": w["norm_attention.bias"],
        "norm2.weight": w["norm_feed.weight"], "norm2.bias": w["norm_feed.bias"]})
    return layer.train()  # its evaluation mode takes another path; there is no dropout


def test_sasrec_is_torchs_causal_transformer(one_by_one):
    events, vectors, mask = one_by_one
    model = build("sasrec")
    layers = [torch_layer(block, DIM, DIM, "relu", True, 1) for block in model.stack]
    expected = []
    with torch.no_grad():
        for x in events:
            n = len(x)
            h = torch.tensor(x)[None] + model.position[:n].flip(0)  # position 0 is the newest event's
            for layer in layers:
                h = layer(h, src_mask=torch.ones(n, n).triu(1).bool())
            expected.append([model.norm(h[0, -1]).numpy()])
    assert_interests(model, vectors, mask, expected)


def test_sasrec_attention_in_plain_numpy(one_by_one):
    """One block, so that routing is the attention over the events themselves."""
    events, vectors, mask = one_by_one
    model = build("sasrec")
    model.stack = model.stack[:1]
    w = {key.removeprefix("stack.0."): value for key, value in weights(model).items()}
    expected, routing = [], []
    for x in events:
        h = x + w["position"][:len(x)][::-1]
        z = layer_norm(h, w, "norm_attention")
        key, value = np.split(linear(z, w, "key_value"), 2, axis=1)
        attention = softmax(key @ linear(z[-1], w, "query") / np.sqrt(DIM))
        h = h[-1] + linear(attention @ value, w, "mix")
        h = h + linear(np.maximum(linear(layer_norm(h, w, "norm_feed"), w, "feed.0"), 0), w, "feed.3")
        expected.append([layer_norm(h, w, "norm")])
        routing.append(attention[None])
    assert_interests(model, vectors, mask, expected, routing)


def test_bert4rec_is_torchs_transformer_over_the_history_and_mask(one_by_one):
    events, vectors, mask = one_by_one
    model = build("bert4rec")
    layers = [torch_layer(block, DIM, 4 * DIM, "gelu", False, 2) for block in model.stack]
    expected = []
    with torch.no_grad():
        for x in events:
            h = torch.cat([torch.tensor(x), model.token[None]])[None] + model.position[:len(x) + 1].flip(0)
            for layer in layers:
                h = layer(h)
            expected.append([model.output(h[0, -1]).numpy()])
    assert_interests(model, vectors, mask, expected)


def test_a_state_of_a_causal_model_does_not_depend_on_later_events():
    """All states, not only the newest: changing event t leaves the states before t as they are, and changes state t."""
    vectors, mask = histories()
    full = mask.all(1)
    model = build("sasrec").eval()
    at = 4
    changed = vectors.clone()
    changed[:, at:] += mask[:, at:, None] * torch.randn(len(vectors), MAX_LEN - at, DIM)
    before, after = (model.encode(x, mask, newest_only=False).unflatten(0, mask.shape)[full] for x in (vectors, changed))
    torch.testing.assert_close(before[:, :at], after[:, :at], rtol=0, atol=0)
    assert (before[:, at:] - after[:, at:]).abs().amax(2).min() > 1e-3
    newest = model.encode(vectors, mask)[0][full]  # the shortcut to the newest position gives the same state
    torch.testing.assert_close(newest, before[:, -1])


def test_order_matters_where_it_should():
    vectors, mask = histories(8)
    turned = vectors[6:7].flip(1)  # the user with MAX_LEN events
    for name in backbones.BACKBONES:
        model = build(name).eval()
        same = torch.allclose(model(turned, mask[6:7])[0], model(vectors[6:7], mask[6:7])[0], atol=1e-5)
        assert same is (name == "dnn"), name


def cloze_examples(model, history, target):
    torch.manual_seed(3)
    return model.backbone.examples(None, target, history, model.items)


def test_cloze_predicts_masked_events_and_cannot_see_them():
    model = Whole(build("bert4rec-cloze")).train()
    model.backbone.share_masked = 0.4
    history = torch.arange(1, 1 + 6 * MAX_LEN).view(6, MAX_LEN) * (torch.arange(MAX_LEN) < torch.tensor([[1], [3], [7], [5], [7], [2]]))
    target = torch.arange(N_ITEMS - 5, N_ITEMS + 1)  # every item occurs once
    query, label = cloze_examples(model, history, target)
    sequence = [set(h[h > 0].tolist()) | {t} for h, t in zip(history, target.tolist())]
    assert len(set(label.tolist())) == len(label) and all(s & set(label.tolist()) for s in sequence)
    assert set(label.tolist()) < set().union(*sequence)
    with torch.no_grad():
        model.items.weight[label] += 10
    torch.testing.assert_close(cloze_examples(model, history, target), (query, label), rtol=0, atol=0)
    with torch.no_grad():
        visible = next(iter(sequence[4] - set(label.tolist())))
        model.items.weight[visible] += 10
    assert not torch.equal(cloze_examples(model, history, target)[0], query)
    torch.testing.assert_close(cloze_examples(model.eval(), history, target)[0], cloze_examples(model.train(), history, target)[0])
    model.backbone.share_masked = 0.0  # no event is masked by chance: the target is, and its state is the served interest
    query, label = cloze_examples(model, history, target)
    torch.testing.assert_close((query[:, None], label), (model(history)[0], target))


def route_naively(votes, logits, rounds=3):
    """votes[k][l] (D,), logits (K, L) -> interests (K, D), weights: one user's dynamic routing, in loops."""
    logits = logits.copy()
    count, length = logits.shape
    for round in range(rounds):
        weight = np.stack([softmax(logits[:, t]) for t in range(length)], 1)
        interests = []
        for k in range(count):
            total = sum(weight[k, t] * votes[k][t] for t in range(length))
            norm = np.linalg.norm(total)
            interests.append(norm ** 2 / (1 + norm ** 2) * total / norm)
        if round < rounds - 1:
            for k in range(count):
                for t in range(length):
                    logits[k, t] += interests[k] @ votes[k][t]
    return np.array(interests), weight / weight.sum(1, keepdims=True)


def test_mind_routing_in_loops(one_by_one):
    events, vectors, mask = one_by_one
    model = build("mind")
    w = weights(model)
    expected, routing = [], []
    for x in events:
        votes = linear(x, w, "map")
        interests, shares = route_naively([votes] * INTERESTS, w["logits"][0, :, :len(x)])
        expected.append(linear(np.maximum(linear(interests, w, "output.0"), 0), w, "output.2"))
        routing.append(shares)
    assert_interests(model, vectors, mask, expected, routing)


def test_comirec_dr_routing_in_loops(one_by_one):
    events, vectors, mask = one_by_one
    model = build("comirec-dr")
    maps = weights(model)["maps"].reshape(MAX_LEN, DIM, INTERESTS, DIM)
    expected, routing = [], []
    for x in events:
        votes = [[x[t] @ maps[t, :, k] for t in range(len(x))] for k in range(INTERESTS)]
        interests, shares = route_naively(votes, np.zeros((INTERESTS, len(x))))
        expected.append(interests)
        routing.append(shares)
    assert_interests(model, vectors, mask, expected, routing)


def test_the_gradient_goes_through_the_last_round_only():
    """With the weights of the last round held fixed, the gradient is the same."""
    model, (vectors, mask) = build("mind").eval(), histories()
    x = vectors[:-1].clone().requires_grad_()
    interests, weight = backbones.capsule.route(model.map(x)[:, None], model.logits, mask[:-1])
    interests.sum().backward()
    y = vectors[:-1].clone().requires_grad_()
    squash(weight.detach() @ model.map(y)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not weight.requires_grad


@pytest.mark.parametrize("name_", ["comirec-sa", "remi"])
def test_comirec_sa_attends_with_positions_and_sums_without(one_by_one, name_):
    events, vectors, mask = one_by_one
    model = build(name_)
    w = weights(model)
    expected, routing = [], []
    for x in events:
        attention = softmax(linear(np.tanh(linear(x + w["position"][0, :len(x)], w, "hidden")), w, "heads").T)
        expected.append(attention @ x)
        routing.append(attention)
    assert_interests(model, vectors, mask, expected, routing)


def test_sine_in_plain_numpy(one_by_one):
    events, vectors, mask = one_by_one
    model = build("sine")
    w = weights(model)

    def attention(x, key):
        return softmax(linear(np.tanh(linear(x, w, f"{key}.hidden")), w, f"{key}.heads").T)

    expected = []
    for x in events:
        summary = (attention(x, "summary") @ x)[0]
        likeness = w["prototypes"] @ summary
        best = np.argsort(-likeness)[:2]
        activated = w["prototypes"][best] / (1 + np.exp(-likeness[best]))[:, None]
        belongs = softmax(layer_norm(activated, w, "norm_prototype") @ layer_norm(linear(x, w, "assign"), w, "norm_event").T, 0)
        interests = layer_norm((belongs * attention(x + w["position"][:len(x)], "weighing")) @ x, w, "norm_interest")
        intention = belongs.T @ activated
        following = layer_norm((attention(intention, "next") @ intention)[0], w, "norm_next")
        expected.append([softmax(interests @ following / 0.1) @ interests])
    assert_interests(model, vectors, mask, expected)
    covariance = np.cov(w["prototypes"], bias=True)
    expected = 0.5 * (np.square(covariance).sum() - np.square(np.diag(covariance)).sum())
    assert model.regulariser(None).item() == pytest.approx(expected, rel=1e-4)


def test_a_table_from_text_keeps_the_texts_geometry():
    rng = np.random.default_rng(0)
    text = rng.standard_normal((N_ITEMS + 1, 8)).astype(np.float32) * 10 + 3
    has_text = np.ones(N_ITEMS + 1, bool)
    has_text[[0, 5]] = False
    random = rng.standard_normal((N_ITEMS + 1, DIM)).astype(np.float32) * 0.05
    text[~has_text] = 0
    table = table_from_text(random, text)
    np.testing.assert_array_equal(table[~has_text], random[~has_text])
    np.testing.assert_array_equal(table[:, 8:], random[:, 8:])  # the text has only 8 dimensions
    centred = text[has_text] - text[has_text].mean(0)
    gram, expected = table[has_text, :8] @ table[has_text, :8].T, centred @ centred.T
    np.testing.assert_allclose(gram / gram.trace(), expected / expected.trace(), atol=1e-5)
    assert table[has_text, :8].std() == pytest.approx(random[1:].std(), rel=1e-3)
    fewer = table_from_text(random[:, :3], text)  # the leading components, in descending order
    assert (np.diff(fewer[has_text].var(0)) < 0).all()
    np.testing.assert_allclose(np.corrcoef(fewer[has_text].T), np.eye(3), atol=1e-4)


# A user's own file

@pytest.mark.parametrize("text, class_name, message", [
    (None, "Echo", "there is no file"),
    ("x = 1\n", "Echo", "no class Echo that is a subclass of eimf.backbones.Backbone; it has none"),
    (USERS_OWN, "Eko", "no class Eko .* it has Echo"),
    ("class Echo: pass\n", "Echo", "no class Echo that is a subclass"),
    ("def f(:\n", "Echo", "failed with SyntaxError"),
    ("import nothing_of_this_name\n", "Echo", "failed with ModuleNotFoundError"),
    (USERS_OWN.replace("interests, max_len, dropout=0.0):", "interests):"), "Echo", "failed with TypeError"),
    (USERS_OWN.replace("bd,kde->bke", "bd,kde->be"), "Echo", r"forward returned interests \(2, 16\) .* expected interests \(B, K, D\)"),
    (USERS_OWN.replace("return interests,", "return interests[:, :, :5],"), "Echo", r"forward returned interests \(2, 3, 5\) .* expected .*\(2, K, 16\)"),
    (USERS_OWN.replace("return interests,", "return interests[:1],"), "Echo", r"forward returned interests \(1, 3, 16\)"),
    (USERS_OWN.replace("return interests, at", "return interests, at[:, :5]"), "Echo", r"routing \(2, 3, 5\); expected .*\(2, K, 7\)"),
    (USERS_OWN.replace("return interests,", "return 1 #"), "Echo", "forward returned int; expected .* a tuple of two tensors"),
    (USERS_OWN.replace("return interests,", "if float(interests.sum()) > 1e9: interests = 2 * interests\n        return interests,"), "Echo",
     "torch.export cannot write Echo.forward"),
    *((USERS_OWN + f"\n    def regulariser(self, routing):\n        return {wrong}\n", "Echo", f"regulariser {message}") for wrong, message in (
        ("None", "returned NoneType; expected a tensor"), ("0.0", "returned float"), ("routing.sum(2)", r"returned shape \(2, 3\)"),
        ("1 / 0", "or examples of Echo failed with ZeroDivisionError"))),
    *((USERS_OWN + f"\n    def examples(self, implicit, target, history, items):\n        return {wrong}\n", "Echo", f"examples returned {message}")
      for wrong, message in (("implicit", r"Tensor; expected vectors \(Q, 16\)"), ("implicit, target.float()", r".*torch.float32 \(2,\); expected"),
                             ("implicit, target[:1]", r".*torch.int64 \(1,\); expected"))),
    (USERS_OWN.replace("return interests,", "return interests / mask.sum(1)[:, None, None],"), "Echo", "NaN or infinite values for .* an empty one"),
])
def test_a_wrong_file_gets_a_sentence(tmp_path, text, class_name, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        backbones.build(f"{path}:{class_name}", DIM, INTERESTS, MAX_LEN)


def test_the_check_of_a_users_file_leaves_the_random_numbers_alone(own):
    torch.manual_seed(5)
    backbones.backbone_class(own)(DIM, INTERESTS, MAX_LEN)
    expected = torch.rand(3)
    torch.manual_seed(5)
    backbones.build(own, DIM, INTERESTS, MAX_LEN)
    assert torch.equal(torch.rand(3), expected)


def test_every_backbone_says_where_its_formula_is_from():
    for cls in backbones.BACKBONES.values():
        assert "arXiv" in cls.__doc__ or "RecSys" in cls.__doc__, cls
        assert len(inspect.getsource(cls).splitlines()) < 50, cls


# Stage 06

@pytest.fixture(scope="module")
def stage06(load_script):
    return load_script("stages/06_train.py")


def test_a_models_own_defaults_hold_unless_a_flag_is_given(stage06, own):
    def parse(*arguments):
        return stage06.parse([*arguments])

    assert parse("--backbone", "remi").learning_rate == 0.001 and parse("--backbone", "remi").dropout == 0
    assert parse("--backbone", "comirec-dr").learning_rate == 0.005
    assert parse("--backbone", "comirec-dr", "--learning-rate", "0.001").learning_rate == 0.001
    assert all(parse("--backbone", b).dropout == 0.2 for b in ("gru4rec", "sasrec", "bert4rec", "bert4rec-cloze", "llm2bert4rec"))
    assert parse("--backbone", own).learning_rate == 0.003 and parse("--backbone", own, "--eimf").run == "Echo-eimf-s0"


def test_unknown_defaults_are_refused(stage06, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USERS_OWN.replace("learning_rate", "lerning_rate"))
    with pytest.raises(UserError, match="defaults of lerning_rate, which are no flags"):
        stage06.parse(["--backbone", f"{path}:Echo"])
    path.write_text(USERS_OWN.replace('"learning_rate": 0.003', '"loss": "nope"'))
    with pytest.raises(UserError, match="its default loss is 'nope'; choose from softmax, sampled"):
        stage06.parse(["--backbone", f"{path}:Echo"])


@pytest.mark.parametrize("arguments", [
    ["--backbone", "own", "--eimf"],
    *(pytest.param(rest, marks=pytest.mark.slow) for rest in (
        ["--backbone", "own"], ["--backbone", "llm2bert4rec"], ["--backbone", "comirec-dr", "--loss", "gbce"],
        ["--backbone", "bert4rec-cloze", "--eimf", "--loss", "sampled", "--sampling", "popularity", "--no-align-item"])),
])
def test_stage_06_trains_and_exports(train, own, tmp_path, arguments):
    name = "".join(arguments).replace("--", "-").strip("-")
    done, folder = train(*(own if a == "own" else a for a in arguments), "--run", name, "--max-iterations", "20")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    interests, routing = load_export(folder / name / "model.pt2")(torch.tensor([[3, 1, 4] + [0] * 17]))
    assert interests.shape == (1, 4 if "own" in arguments or "comirec-dr" in arguments else 1, 16) and torch.isfinite(interests).all()
    terms = set(load_json_line(folder / name / "log.jsonl")["loss"])
    assert ("align_item" in terms) is ("--eimf" in arguments and "--no-align-item" not in arguments)
    assert ("align_user" in terms) is ("--eimf" in arguments)
    inputs = load_json(folder / name / "manifest.json")["inputs"]
    assert ("mine.py" in inputs) is ("own" in arguments)
    assert ("02_encode_text/item_text.npy" in inputs) is ("--eimf" in arguments or "llm2bert4rec" in arguments)


def load_json_line(path):
    import json
    return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize("arguments, code, message", [
    (["--backbone", "mine.py:Echo"], 1, "error: --backbone mine.py:Echo: there is no file mine.py"),
    (["--backbone", "sasrek"], 2, "invalid choice: 'sasrek' (choose from dnn, gru4rec,"),
    (["--dropout", "1"], 2, "--dropout must be at least 0 and below 1"),
    (["--event-dropout", "1"], 2, "--event-dropout must be at least 0 and below 1"),
    (["--loss", "gbce", "--calibration", "2"], 2, "--calibration must be from 0 to 1"),
    (["--loss", "hard-negatives", "--sampling", "popularity"], 2, "--sampling popularity is for --loss sampled"),
])
def test_mistakes_get_a_sentence(train, arguments, code, message):
    done, _ = train("--run", "mistake", *arguments)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr
