"""Train a multi-interest model, alone or taught by explicit interests (EIMF; paper, 3.3-3.5 and Eq. 5-15).

Reads   01_preprocess/  sequences, split
        02_encode_text/ item_text.npy float32 (items + 1, d_t), item_has_text.npy bool           with --eimf or --item-text
        03_cluster_users/ cluster_of_user.npy int32 (users,)                                      with --eimf only
        04_infer_interests/ interests.jsonl, for the labels                                       with --eimf only
        05_encode_interests/ interest_vectors.npy float32 (all, d_t), interest_offsets.npy int64  with --eimf only
Writes  06_train/<run>/
        model.pt2         torch.export archive: history int64 (B, max_len) -> interests float32 (B, K, D), routing
                          float32 (B, K, max_len); any batch size; needs neither this code nor any text
        item_vectors.npy  float32 (items + 1, D), row 0 zero; item_ids.txt: line i is row i's item id, line 0 empty
        map_projection.npy  float32 (D + 1, 2), places items and interests on a plane
        label_vectors.npy float32 (labels, D), labels.jsonl, labels.json: explicit interests in the aligned space, their
                          texts and who wrote them                                                 with --eimf only
        config.json       settings, best iteration, validation metrics
        log.jsonl         one line per validation: iteration, loss terms, metrics, seconds so far,
                          and seconds of the validation itself
        checkpoint/       last.safetensors, from which a killed run goes on with the same result

    python stages/06_train.py --dataset sample --backbone remi --eimf
    torchrun --standalone --nproc-per-node 2 -- stages/06_train.py --dataset sample --backbone remi --eimf

Several processes share each batch and learn what one would, but for rounding and for the random masks of dropout and of the cloze.
A run is named <backbone>[-<recipe>][-eimf][-<control>]-s<seed>. On the sample it prints the best iteration and its validation
Recall@50. Shapes: B batch, L history length, K interests, M explicit interests, D dimension, N items, d_t text dimension.
"""
import copy
import ctypes
import json
import math
import os
import platform
import time

# Read by OpenMP when torch loads it. By default its threads spin between two small operations, thousands of times a second: on two idle cores a
# step took up to a quarter longer, and where another program held one of them more than five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from eimf import backbones, losses, parallel
from eimf.artifacts import Stage, UserError, argument_parser, check_ranges, run, save_array, save_json, save_lines
from eimf.checkpoint import load_checkpoint, save_checkpoint
from eimf.data import load_interactions, load_items, padded
from eimf.encoder import pick_device
from eimf.export import save_export
from eimf.metrics import hit_matrix, per_user
from eimf.model import BehaviouralModel, Popularity, map_projection
from eimf.ranking import interests_of, rank, targets_of
from eimf.teacher import Teacher, load_item_text, load_text, save_labels

# What a recipe sets, unless a flag says otherwise; the paper's is every flag's default. Chosen on validation users, file order, one seed,
# at most 6,000 steps (the first pair: 7,200), REMI's Recall@50 on Office and Beauty: .199 and .210 alone, .256 and .242 with text in the
# item vectors, .269 and .254 with targets from all later events as well, .270 and .258 with dropout on top, .280 and .257 with all of the
# text vectors' dimensions instead of the 128 that the runs before had. Without dropout, nothing was gained by averaged weights (.268,
# .252), EIMF (.257, .256) or weight decay of 1 (.257, .198). Cosine scores were far worse (Office: .18), brand and categories beside the
# title no better (Office: .248), nor were, with dropout and all dimensions, three times the learning rate (Office: .266), whitened text
# vectors (.251), dropping 30 % of the items' own vectors (.271), or SASRec with text (.261).
# Later, on a processor that rounds otherwise and with up to 8,000 steps: .270 (two seeds) and .255 as above, .266 (two) and .263 with 30 % of
# the events left out, .267 (two) and .267 with averaged weights as well, which the recipe is now: a gain on Beauty, none on Office. On Beauty,
# with the events left out, half of them did as well (.263), REMI's regulariser three times as strong did too (.262) and without it was
# far worse (.232), as was a second item table for the scores (without event dropout, .222). Two runs there were not let end: a learning rate
# that falls over 8,000 steps had .259 after 6,600 (constant: .263), weight decay of 0.2 .246 after 4,800 (none: .255). Averaged weights
# with a dropout of 0.5 in place of left-out events: .278 (one seed) and .252. On Office wider vectors lost (128 numbers: .256).
# Tried on Beauty with the recipe as it is, without a gain: eight interests (.261); and, not let end, 50 events (as the recipe up to step 5,200),
# targets from before the history as well, for half of the users (.244 at step 4,400, the recipe .260), a learned map of the interests (.232
# then), and a loss that puts the history's own items below the target (.147 at step 2,800, the recipe .241). GRU4Rec with the recipe had
# .246 on Office, where data/tune.py gets it to .255 without text. On Beauty again, one seed: the recipe .266, best at step 6,600 also where
# 20,000 are allowed; with brand and categories beside the title .269; with 256 users in a batch, not let end, .261 up to step 8,000;
# with vectors of 128 numbers, not let end, .263 at step 3,200 and less up to 4,600.
# Fewer interests for short histories (--dynamic-interests) cost the plain models a little on Office: REMI .201 for .207, MIND .147 for
# .153, ComiRec-SA .151 for .160.
RECIPES = {
    "paper": {},
    "best": {"item_text": "add", "horizon": 100, "dropout": 0.3, "event_dropout": 0.3, "average": 0.998},
}


def parse(argv):
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--run", help="name of the run's folder; by default made from backbone, control and seed")
    add("--backbone", default="remi", metavar="NAME", help=f"behavioural model: {', '.join(backbones.BACKBONES)}; pop ranks by "
        "training popularity; FILE.py:ClassName is one of your own")
    add("--eimf", action="store_true", help="teach the backbone with explicit interests (needs stages 02-05)")
    add("--control", choices=["random-text", "shuffled-clusters", "random-typical-users"],
        help="with --eimf: replace text vectors by random ones, give users another user's cluster, or require that stage 03 was run "
        "with --typical random")
    add("--seed", type=int, default=0)
    add("--dim", type=int, default=64, help="D, size of item and interest vectors (paper: 64)")
    add("--interests", type=int, default=4, help="K, interests per user (paper: 4); single-interest models have 1 whatever is given")
    add("--dynamic-interests", action="store_true", help="fewer interests for short histories, log2 of the events (MIND; paper: off)")
    add("--max-len", type=int, default=20, help="n, newest events of a history that are read (paper: 20)")
    add("--horizon", type=int, default=1, help="events after the history from which the target is drawn (paper: 1, the next)")
    add("--batch-size", type=int, default=128, help="training users per step, of all processes together (paper: 128)")
    add("--learning-rate", type=float, default=1e-3, help="Adam's step size (paper: 0.001); comirec-dr: 0.005")
    add("--dropout", type=float, default=0.0, help="of the history's vectors, and within Transformers; gru4rec and Transformers: 0.2")
    add("--event-dropout", type=float, default=0.0, help="of whole events: the share of a training history that is left out at random (paper: 0)")
    add("--loss", choices=["softmax", "sampled", "hard-negatives", "gbce"], default="softmax", help="Eq. 14 over all items; over sampled "
        "negatives, with log-Q correction; over REMI's interest-aware hard negatives; gSASRec's binary cross-entropy")
    add("--negatives", type=int, default=1280, help="sampled negatives per step, shared by the batch (REMI: 10 per user)")
    add("--sampling", choices=["uniform", "popularity"], default="uniform", help="how --loss sampled draws negatives")
    add("--calibration", type=float, default=0.75, help="t of gbce, from 0 (no correction for sampling) to 1 (full; gSASRec: 0.75)")
    add("--hardness", type=float, default=10.0, help="importance exponent of hard-negatives (REMI: 10)")
    add("--text-dim", type=int, default=0,
        help="keep this many principal directions of the frozen text vectors, 0 for all (paper: all); fewer train faster")
    add("--soft-read-out", action="store_true", help="attention read-out instead of the best-matching interest")
    add("--gamma", type=float, default=0.1, help="weight of the two EIMF tasks, Eq. 15 (paper: 0.1)")
    add("--alpha", type=float, default=0.4, help="weight of InfoNCE in the alignment, Eq. 12 (paper: 0.4)")
    add("--beta", type=float, default=0.1, help="weight of the cosine distance in the alignment, Eq. 12 (paper: 0.1)")
    add("--temperature", type=float, default=0.1, help="InfoNCE temperature (paper: 0.1)")
    add("--no-semantic-prediction", action="store_true", help="ablation: without Eq. 7-9")
    add("--no-alignment", action="store_true", help="ablation: without Eq. 10-12, through which alone the teaching reaches the backbone: "
        "but for --item-text add it is then trained as without --eimf. The next two leave out one half")
    add("--no-align-user", action="store_true", help="ablation: no alignment of explicit and implicit interest (Eq. 10)")
    add("--no-align-item", action="store_true", help="ablation: no alignment of title and item vector (Eq. 11)")
    # Validation Recall@50, one seed, file order, REMI and EIMF: Office .199 and .227 with 0.05, .205 and .227 with 0.02; Beauty .210 and
    # .240, .205 and .233. On Office's test users 0.02 gave .236 and .258, 0.05 three-seed means of .231 and .252.
    add("--init-std", type=float, default=0.05, help="spread of the initial item vectors (REMI's code: 0.18)")
    add("--item-text", choices=["none", "init", "add"], default="none", help="text in the item vectors: as their first values, or "
        "added through a learned map, so that an item without clicks has a useful vector too (paper: none); llm2bert4rec: init")
    add("--score-temperature", type=float, default=0.0,
        help="score items by the cosine with an interest, divided by this; 0 is the dot product (paper: 0)")
    add("--weight-decay", type=float, default=0.0, help="AdamW's (paper: 0)")
    add("--schedule", choices=["constant", "cosine"], default="constant",
        help="of the learning rate: cosine falls to 0 at --max-iterations (paper: constant)")
    add("--average", type=float, default=0.0, help="validate and export a moving average of the weights with this decay (paper: 0)")
    add("--recipe", choices=list(RECIPES), default="paper", help="settings that are flags' defaults: the paper's, or the ones that won on validation")
    add("--max-iterations", type=int, default=20000, help="training steps at most")
    add("--validate-every", type=int, default=200, help="steps between validations (paper: 200)")
    add("--patience", type=int, default=10, help="validations without a better Recall@50 before stopping")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the large matrix products; auto is bfloat16 where the hardware multiplies it natively")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=int, default=0, help="CPU threads; 0 means all cores")
    args = parser.parse_args(argv)
    if args.backbone != "pop":  # what the model wants, unless a flag says otherwise
        if args.backbone not in backbones.BACKBONES and not backbones.source_file(args.backbone):
            parser.error(f"argument --backbone: invalid choice: {args.backbone!r} (choose from {', '.join(backbones.BACKBONES)}, pop, "
                         "FILE.py:ClassName)")
        backbone = backbones.backbone_class(args.backbone)
        if unknown := backbone.defaults.keys() - vars(args).keys():
            raise UserError(f"--backbone {args.backbone}: defaults of {', '.join(sorted(unknown))}, which are no flags of this stage")
        for action in parser._actions:  # argparse looks at what is given, not at defaults
            if action.choices and action.dest in backbone.defaults and backbone.defaults[action.dest] not in action.choices:
                raise UserError(f"--backbone {args.backbone}: its default {action.dest} is {backbone.defaults[action.dest]!r}; choose from "
                                f"{', '.join(action.choices)}")
        # How text enters is what makes LLM2BERT4Rec one, so there a recipe has no say.
        parser.set_defaults(**backbone.defaults | RECIPES[args.recipe] | {k: v for k, v in backbone.defaults.items() if k == "item_text"})
        args = parser.parse_args(argv)
    check_ranges(parser, args, seed=(0, 2**32 - 1), threads=0, text_dim=0)
    for name in ("dim", "interests", "max_len", "horizon", "batch_size", "negatives", "max_iterations", "validate_every", "patience"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.sampling != "uniform" and args.loss != "sampled":
        parser.error(f"--sampling {args.sampling} is for --loss sampled; {args.loss} has no correction for it")
    if not 0 <= args.calibration <= 1:
        parser.error(f"--calibration must be from 0 to 1, got {args.calibration}")
    for name in ("dropout", "event_dropout", "average"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 0 and below 1, got {getattr(args, name)}")
    for name in ("score_temperature", "weight_decay", "init_std", "gamma", "alpha", "beta", "hardness"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(args, name)}")
    for name in ("learning_rate", "temperature"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if args.control and not args.eimf:
        parser.error("--control needs --eimf")
    if args.backbone == "pop" and args.eimf:
        parser.error("--backbone pop has nothing to teach; leave out --eimf")
    args.run = args.run or default_name(args)
    return args


def default_name(args):
    parts = [args.backbone.rpartition(":")[2], args.recipe if args.recipe != "paper" else None, "eimf" if args.eimf else None,
             args.control, f"s{args.seed}"]
    return "-".join(filter(None, parts))


class Batches:
    """One random target per sampled user: position k in [4, len) and the up to max_len events before it (paper, 4.1).

    With a horizon h the target is a random one of the events k to k + h - 1, as evaluation asks for more than the next event.
    Event dropout then leaves out events of the history.
    Batch t depends on (seed, t) alone, so a resumed run sees the same batches. Under leave-one-out a training
    prefix can be shorter than 5 events; its only target is then the last one.
    """

    def __init__(self, interactions, args):
        self.items, self.args = interactions.items, args
        users, start, end = interactions.training_ranges()
        keep = end - start >= 2
        self.users, self.start, self.length = users[keep], start[keep], (end - start)[keep]
        if not len(self.users):
            raise UserError("no training user has two events or more; lower --min-interactions in stage 01 or give more data")
        self.low = np.minimum(4, self.length - 1)
        self.size = min(args.batch_size, len(self.users))
        if self.size % parallel.world():
            raise UserError(f"a batch of {self.size} users cannot be shared evenly by {parallel.world()} processes; give a --batch-size "
                            f"that is a multiple of {parallel.world()}, at most {len(self.users)} (the training users)")

    def __getitem__(self, t):
        rng = np.random.default_rng([self.args.seed, t])
        row = rng.choice(len(self.users), self.size, replace=False)
        k = self.low[row] + (rng.random(self.size) * (self.length[row] - self.low[row])).astype(np.int64)
        at = self.start[row] + k
        history = padded(self.items, self.start[row], at, self.args.max_len)  # (B, L)
        if self.args.horizon > 1:
            at += (rng.random(self.size) * np.minimum(self.args.horizon, self.length[row] - k)).astype(np.int64)
        if self.args.event_dropout:
            history = without_some(history, self.args.event_dropout, rng)
        return history, self.items[at].astype(np.int64), self.users[row]


def without_some(history, share, rng):
    """Histories (B, L), right-padded, without a random share of their events; the newest stays if all would go."""
    real = history > 0
    keep = real & (rng.random(history.shape) >= share)
    empty = np.flatnonzero(~keep.any(axis=1))
    keep[empty, real[empty].sum(axis=1) - 1] = True  # a training history has an event
    order = np.argsort(~keep, axis=1, kind="stable")
    return np.take_along_axis(np.where(keep, history, 0), order, axis=1)


def train(stage, args, interactions, model, teacher, cluster_of_user, device, precision):
    """Optimise until early stop. Goes on from checkpoint/last.safetensors.

    Returns the best state dicts, the model's and the teacher's with "teacher." before its names, and a summary.
    """
    modules = nn.ModuleDict({"model": model} | ({"teacher": teacher} if teacher else {}))
    parameters = dict(modules.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    validated = copy.deepcopy(model) if args.average else model
    teaching = {name: p for name, p in parameters.items() if name.startswith("teacher.")}  # of the same step as the model that is exported
    kept = {name: p.detach().clone() for name, p in teaching.items()} if args.average else teaching
    buffers = {name: b for name, b in model.state_dict().items() if f"model.{name}" not in parameters}  # of a backbone of one's own
    recommendation = losses.RecommendationLoss(args, interactions.training_counts(), device, precision)
    batches = Batches(interactions, args)
    state = {"iteration": 0, "best_iteration": 0, "best": None, "seconds": 0.0, "log": []}
    best = {}
    groups = {"parameter": parameters, "best": best, "average": dict(validated.named_parameters()) | kept if args.average else {}, "buffer": buffers}
    path = stage.folder / "checkpoint" / "last.safetensors"
    identity = json.dumps({"arguments": stage.settings(), "inputs": stage.inputs}, sort_keys=True)
    if path.is_file():
        restored = load_checkpoint(path, identity, groups, optimizer)
        if restored:
            state = restored
            stage.log.info("going on from iteration %d", state["iteration"])
        else:
            stage.log.info("the checkpoint is of other settings or inputs; starting anew")
    # torch.manual_seed takes 0.4 ms, as it looks at every kind of device
    noise = torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else torch.default_generator
    sums, ahead, started = {}, {}, time.perf_counter() - state["seconds"]
    progress = tqdm(total=args.max_iterations, initial=state["iteration"], desc=args.run, unit="step", mininterval=1,
                    disable=None if parallel.rank() == 0 else True)
    model.train()
    while state["iteration"] < args.max_iterations and not _stopped(state, args):
        t = state["iteration"] = state["iteration"] + 1
        step_seed = args.seed * 1_000_003 + t  # negatives depend on (seed, t) alone, dropout on the rank too; a CPU uses 32 bits
        noise.manual_seed(step_seed + (parallel.rank() << 24))
        recommendation.generator.manual_seed(step_seed + (1 << 31))
        if t not in ahead:  # several at once, while their code and data are in the cache: 0.07 ms each instead of 0.4
            ahead = {i: batches[i] for i in range(t, t + 16)}
        history, target, users = map(parallel.share, ahead[t])
        history, target = torch.from_numpy(history).to(device), torch.from_numpy(target).to(device)
        negatives = recommendation.draw()  # (S,)
        read, scored = model.tables()  # (N + 1, D) each
        vectors, target_vector, negative_vectors = losses.lookup(read, history, target, negatives)
        interests, routing = model(history, vectors)  # (B, K, D), (B, K, L)
        target_vector, negative_vectors = model.scored(target_vector), model.scored(negative_vectors)  # e^T_i (B, D), (S, D)
        implicit = losses.read_out(interests, target_vector, soft=args.soft_read_out)  # (B, D), Eq. 6
        query, wanted = model.backbone.examples(implicit, target, history, lambda number: F.embedding(number, read))
        if args.score_temperature:  # as the interests are; a model's own examples are not yet
            query = F.normalize(query, dim=1)
        positive = target_vector if wanted is target else F.embedding(wanted, scored)
        terms = {"recommendation": recommendation(query, scored, wanted, positive, negatives, negative_vectors),
                 "regulariser": model.backbone.regulariser(routing)}
        if teacher:
            cluster = torch.from_numpy(cluster_of_user[users]).to(device)
            taught = teacher(implicit, target, target_vector, cluster)
            terms |= {name: args.gamma * term for name, term in taught.items()}  # Eq. 15
        loss = sum(terms.values())
        for p in parameters.values():
            p.grad = None
        loss.backward()
        parallel.sum_gradients(parameters.values())
        if args.schedule == "cosine":
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 + math.cos(math.pi * (t - 1) / args.max_iterations)) / 2
        optimizer.step()
        if args.average:  # the first steps count less, so that the average does not stay near the random start
            with torch.no_grad():
                torch._foreach_lerp_([*validated.parameters(), *kept.values()], [*model.parameters(), *teaching.values()],
                                     1 - min(args.average, t / (10 + t)))
                for mine, theirs in zip(validated.buffers(), model.buffers()):
                    mine.copy_(theirs)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
        progress.update()
        if t % args.validate_every == 0 or t == args.max_iterations:
            means = parallel.total(torch.stack(list(sums.values()))) / ((t - 1) % args.validate_every + 1)
            means = dict(zip(sums, means.tolist()))
            if not math.isfinite(sum(means.values())):
                raise UserError(f"the loss became {sum(means.values())} before iteration {t} (terms {means}). "
                                "Lower --learning-rate, or look for extreme values in the text vectors.")
            before = time.perf_counter()
            metrics = validate(validated, interactions, args, device)
            model.train()
            now = time.perf_counter()
            state["seconds"] = round(now - started, 2)
            if state["best"] is None or metrics["recall@50"] > state["best"]["recall@50"]:
                state |= {"best": metrics, "best_iteration": t}
                best.update((name, p.detach().clone()) for name, p in (validated.state_dict() | kept).items())
            entry = {"iteration": t, "loss": {k: round(v, 6) for k, v in means.items()},
                     "valid": {k: round(v, 6) for k, v in metrics.items()}, "seconds": state["seconds"],
                     "validation_seconds": round(now - before, 2)}
            state["log"].append(entry)
            if parallel.rank() == 0:
                save_checkpoint(path, identity, state, groups, optimizer)
            sums = {}
            progress.set_postfix_str(" ".join(f"{k[:9]} {v:.3f}" for k, v in means.items())
                                     + f" R@50 {metrics['recall@50']:.4f} best {state['best']['recall@50']:.4f}")
    progress.close()
    return best, state


def _stopped(state, args):
    return bool(state["log"]) and state["iteration"] - state["best_iteration"] >= args.patience * args.validate_every


def validate(model, interactions, args, device):
    """Mean metrics over validation users, exact ranking by the scoring kernel. Dict of floats."""
    model.eval()
    with torch.no_grad():
        read, scored = model.tables()
    users, start, middle, end = map(parallel.share, interactions.evaluation_ranges("valid"))
    history = padded(interactions.items, start, middle, args.max_len)
    interests, _ = interests_of(lambda batch: model(batch, F.embedding(batch, read)), history, device)
    ranked, _, _ = rank(interests, scored.detach().cpu().numpy(), 50, n_threads=args.threads)
    hits, n_targets = hit_matrix(ranked, *targets_of(interactions.items, middle, end))
    metrics = per_user(hits, n_targets, (20, 50))
    *sums, count = parallel.total(torch.tensor([*(values.sum() for values in metrics.values()), len(users)], dtype=torch.float64)).tolist()
    return {name: value / count for name, value in zip(metrics, sums)}


def keep_freed_memory():
    """Let glibc reuse memory that was freed; it would give large arrays back, and a step's first touch of new pages took up to 4 ms."""
    if platform.libc_ver()[0] == "glibc":
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-4, 0)  # M_MMAP_MAX: no array is a mapping of its own
        c_library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def pick_precision(name, device):
    if name == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                  else torch.cpu.get_capabilities().get("avx512_bf16", False))
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


def main(argv=None):
    args = parse(argv)
    device = parallel.start(args, pick_device(args.device))
    stage = Stage("06_train", args, run=args.run)
    source = stage.input("01_preprocess")
    interactions, items = load_interactions(source), load_items(source)
    if own := backbones.source_file(args.backbone):
        stage.input_file(own)
    text, cluster_of_user = load_text(stage, args, interactions.n_items) if args.eimf else (None, None)
    item_text = load_item_text(stage, args, interactions.n_items)[0] if args.item_text != "none" else None
    if stage.is_done():
        return
    if parallel.rank() == 0:
        if args.run == default_name(args) and not args.skip_done and (changed := stage.replaces()):
            raise UserError(f"{stage.folder} holds a finished run with other settings ({changed}); give this one a name of its own with --run, "
                            "or delete that folder, or replace it with --skip-done")
        stage.begin()
    keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products may differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that took a fifth of each step
    precision = pick_precision(args.precision, device)
    torch.manual_seed(args.seed)
    if args.backbone == "pop":
        model, state = Popularity(interactions.training_counts()), {"best_iteration": 0, "iteration": 0, "log": []}
        state["best"] = validate(model, interactions, args, torch.device("cpu"))
    else:
        model = BehaviouralModel(interactions.n_items, args, item_text, precision).to(device)
        teacher = Teacher(text, args, precision, model.text_map).to(device) if args.eimf else None
        best, state = train(stage, args, interactions, model, teacher, cluster_of_user, device, precision)
        model.load_state_dict({name: p for name, p in best.items() if not name.startswith("teacher.")})
        if teacher:
            teacher.load_state_dict({name.removeprefix("teacher."): p for name, p in best.items() if name.startswith("teacher.")}, strict=False)
    if not parallel.stop():
        return
    model = model.cpu().folded()
    item_vectors = model.tables()[1].detach().numpy()
    save_export(model, args.max_len, stage.folder / "model.pt2")
    save_array(stage.folder / "item_vectors.npy", item_vectors)
    save_lines(stage.folder / "log.jsonl", state["log"])
    save_lines(stage.folder / "item_ids.txt", ["", *(item["id"] for item in items[1:])])
    save_array(stage.folder / "map_projection.npy", map_projection(item_vectors))
    summary = {"best_iteration": state["best_iteration"], "iterations": state["iteration"], "valid": state["best"]}
    settings = {"run": args.run, "backbone": args.backbone, "eimf": args.eimf, "control": args.control, "seed": args.seed,
                "max_len": args.max_len, "dim": item_vectors.shape[1], "items": interactions.n_items,
                "precision": str(precision).removeprefix("torch.")}
    save_json(stage.folder / "config.json", settings | summary)
    outputs = ["model.pt2", "item_vectors.npy", "item_ids.txt", "map_projection.npy", "config.json", "log.jsonl"]
    if args.eimf and not args.control:
        outputs += save_labels(teacher.cpu(), stage, stage.folder)
    stage.finish(summary, outputs)
    print(f"{args.run}: best at iteration {summary['best_iteration']} of {summary['iterations']}, "
          f"validation Recall@50 {summary['valid']['recall@50']:.4f}, written to {stage.folder}")


if __name__ == "__main__":
    run(main)
