"""The explicit side of EIMF: frozen text, a learned map, and the two tasks that teach a behavioural model (paper, 3.3-3.4).

Shapes: B batch, M explicit interests, D dimension, N items, d_t text dimension.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import losses, parallel
from .artifacts import UserError, load_array, load_json, load_lines, save_array, save_json, save_lines


class Teacher(nn.Module):
    """The explicit side: frozen text vectors, one learned map to D, self-attention over explicit interests (Eq. 4, 7)."""

    def __init__(self, text, args, precision=torch.float32, projection=None):
        super().__init__()
        self.args, self.precision = args, precision
        for name, tensor in text.items():  # rebuilt from the stage folders, not checkpointed
            self.register_buffer(name, tensor.to(precision) if tensor.is_floating_point() else tensor, persistent=False)
        self.projection = nn.Linear(self.item_text.shape[1], args.dim, bias=False)  # shared by titles and interests
        self.attention = nn.Linear(args.dim, 3 * args.dim, bias=False)  # queries, keys and values in one map
        for weight in self.parameters():
            nn.init.kaiming_normal_(weight)
        if projection is not None:  # of --item-text add: explicit interests then lie among the items
            self.projection = projection
        self.register_buffer("no_title", torch.nonzero(~self.item_has_text).squeeze(1), persistent=False)

    def project(self, text):
        """Frozen text vectors (n, d_t) in the common space, (n, D) float32 (Eq. 4)."""
        return F.linear(text, self.projection.weight.to(self.precision)).float()

    def explicit(self, cluster):
        """Explicit interests of each user's typical user, cluster (B,) -> (B, M, D) and mask (B, M)."""
        index = self.interest_index[cluster]  # (B, M), -1 where there is none
        mask = (index >= 0) & (cluster >= 0)[:, None]
        e = self.project(self.interest_vectors[index.clamp(min=0)])  # (B, M, D), Eq. 4
        query, key, value = self.attention.weight.chunk(3)  # (D, D) each
        # Q K^T = E (W_q^T W_k) E^T and A V = (A E) W_v^T: two products with E instead of three, and nothing wider than E.
        scores = e @ (query.T @ key / math.sqrt(e.shape[2])) @ e.transpose(1, 2)  # (B, M, M), Eq. 7
        scores = scores.masked_fill(~mask[:, None], torch.finfo(e.dtype).min)
        # The attention adds to each interest what the others say. Without the sum, the value map first has to learn to give
        # back what the projection already knows: on Beauty the semantic loss stays higher (.68 against .65).
        return e + F.linear(scores.softmax(2) @ e, value), mask

    def forward(self, implicit, target, target_id_vector, cluster):
        """Loss terms of both tasks, dict of scalars.

        implicit (B, D): the read-out of the implicit interests; target (B,) item numbers; target_id_vector (B, D): their
        ID embeddings; cluster (B,): the users' clusters, -1 for none.
        """
        args = self.args
        target_text_vector = self.project(self.item_text[target])  # e^T_t, (B, D); target_id_vector is e^T_i
        distinct, row = cluster.unique(return_inverse=True)  # users of one cluster share a set
        explicit, mask = (x.index_select(0, row) for x in self.explicit(distinct))
        has_title = self.item_has_text[target]
        keep = has_title & mask.any(1)  # (B,), targets without a title have no text term
        taught = losses.read_out(explicit, target_text_vector, mask, args.soft_read_out)  # (B, D), Eq. 8
        terms = {}
        if not args.no_semantic_prediction:
            # The product with all projected titles, with the map on its other side: then no title is projected.
            query = taught @ self.projection.weight  # (B, d_t)
            terms["semantic"] = losses.softmax_loss(query, self.item_text, target, self.no_title, keep, self.precision)  # Eq. 9
        # A pair with the same target, or taught by the same typical user, is no negative of each other.
        same_target = target[:, None] == parallel.gather(target)  # (B, W), W rows of all ranks
        same_teacher = cluster[:, None] == parallel.gather(cluster)
        if not (args.no_alignment or args.no_align_user):
            # Eq. 10 and 12, explicit against implicit read-out
            info_nce, distance = losses.alignment(taught, implicit, same_target | same_teacher, args.temperature, keep)
            terms["align_user"] = args.alpha * info_nce + args.beta * distance
        if not (args.no_alignment or args.no_align_item):
            # Eq. 11 and 12, title against ID embedding; only the target matters here
            info_nce, distance = losses.alignment(target_text_vector, target_id_vector, same_target, args.temperature, has_title)
            terms["align_item"] = args.alpha * info_nce + args.beta * distance
        return terms


def load_item_text(stage, args, n_items):
    """Stage 02's titles with --text-dim and --control applied: vectors float32 (N + 1, d), has_text bool (N + 1,), axes (d_t, d).

    The axes are the d leading right singular vectors of the title vectors, or the identity. Raises UserError if no item has a title.
    """
    encoded = stage.input("02_encode_text")
    item_text, has_text = (load_array(encoded / f"{name}.npy") for name in ("item_text", "item_has_text"))
    if len(item_text) != n_items + 1:
        raise UserError(f"{encoded} has text vectors for {len(item_text) - 1} items, stage 01 has {n_items}. Run stage 02 again.")
    if not has_text.any():
        raise UserError(f"no item of {args.dataset} has a title, so there is nothing to learn from text; "
                        "train without --eimf and --item-text")
    axes = np.eye(item_text.shape[1], dtype=np.float32)
    if 0 < args.text_dim < item_text.shape[1]:
        values, axes = np.linalg.eigh(item_text.T.astype(np.float64) @ item_text)
        axes = axes[:, np.argsort(-values)[:args.text_dim]]
        axes *= np.where(axes[np.abs(axes).argmax(0), np.arange(args.text_dim)] < 0, -1, 1)  # eigenvectors have no sign of their own
        axes = axes.astype(np.float32)
        item_text = item_text @ axes
    if args.control == "random-text":
        item_text = _random_unit(np.random.default_rng([args.seed, 2]), item_text.shape) * has_text[:, None]
    return item_text, has_text, axes


def load_text(stage, args, n_items):
    """Tensors of the explicit side from stages 02, 03 and 05, with the control applied: (tensors, cluster_of_user).

    Raises UserError if the stages' outputs do not fit together or no item has a title.
    """
    item_text, has_text, axes = load_item_text(stage, args, n_items)
    clusters, interests = (stage.input(s) for s in ("03_cluster_users", "05_encode_interests"))
    stage.input("04_infer_interests", optional=True)  # the labels' texts, see save_labels
    check_typical_users(stage, args)
    vectors = load_array(interests / "interest_vectors.npy")
    offsets = load_array(interests / "interest_offsets.npy")
    cluster_of_user = load_array(clusters / "cluster_of_user.npy").astype(np.int64)
    if vectors.shape[1] != len(axes):
        raise UserError(f"titles have text vectors of {len(axes)} numbers, explicit interests of {vectors.shape[1]}. "
                        "Run stages 02 and 05 again, with one encoder.")
    if cluster_of_user.max(initial=-1) >= len(offsets) - 1:
        raise UserError(f"03 has {cluster_of_user.max() + 1} clusters, 05 has interests for {len(offsets) - 1}. "
                        "Run stages 04 and 05 again.")
    vectors = vectors @ axes
    rng = np.random.default_rng([args.seed, 1])
    if args.control == "random-text":
        vectors = _random_unit(rng, vectors.shape)
    if args.control == "shuffled-clusters":
        clustered = np.flatnonzero(cluster_of_user >= 0)
        cluster_of_user[clustered] = cluster_of_user[rng.permutation(clustered)]
    # Ragged sets as one padded index, (clusters, M); the last row, all -1, is where cluster -1 points.
    lengths = np.diff(offsets)
    column = np.arange(max(lengths.max(initial=0), 1))
    index = np.where(column < lengths[:, None], offsets[:-1, None] + column, -1)
    index = np.concatenate([index, np.full((1, len(column)), -1)])
    tensors = {"item_text": item_text, "item_has_text": has_text, "interest_vectors": vectors, "interest_index": index}
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, cluster_of_user


def check_typical_users(stage, args):
    """Raise UserError unless the typical users are those that --control names."""
    arguments = load_json(stage.root / "03_cluster_users" / "manifest.json")["arguments"]
    if (arguments.get("typical") == "random") != (args.control == "random-typical-users"):
        found, fix = ("random users", "add --control random-typical-users") if args.control != "random-typical-users" else (
            "exemplars", "run stage 03 with --typical random, then 04 and 05")
        raise UserError(f"the typical users of stage 03 are {found}, --control is {args.control}; {fix}")


def _random_unit(rng, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def save_labels(teacher, stage, folder):
    """Write what explains an interest in words: every explicit interest's vector in the aligned space, and its text.

    label_vectors.npy float32 (labels, D), labels.jsonl lines {"text", "cluster"}, labels.json {"source"}. An interest's
    label is the text whose vector is nearest by cosine. Nothing is written if stage 04 is not there.
    """
    source = stage.input("04_infer_interests", optional=True)
    if source is None:
        return []
    rows = load_lines(source / "interests.jsonl")
    with torch.inference_mode():
        explicit, mask = teacher.explicit(torch.arange(len(rows), device=teacher.no_title.device))  # (C, M, D), (C, M)
        vectors = explicit[mask].cpu().numpy()
    labels = [{"text": text, "cluster": cluster} for cluster, row in enumerate(rows) for text in row["interests"]]
    if len(labels) != len(vectors):
        raise UserError(f"stage 04 has {len(labels)} interests, stage 05 encoded {len(vectors)}. Run stage 05 again.")
    save_array(folder / "label_vectors.npy", vectors)
    save_lines(folder / "labels.jsonl", labels)
    save_json(folder / "labels.json", {"source": load_json(source / "usage.json")["llm"]})
    return ["label_vectors.npy", "labels.jsonl", "labels.json"]
