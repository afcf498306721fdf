"""What stage 06 trains and exports: an item table in front of a backbone (paper, Eq. 5), and the popularity baseline.

Shapes: B batch, L history length, K interests, D dimension, N items, d_t text dimension.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import backbones


class BehaviouralModel(nn.Module):
    """history (B, L) int64 -> interests (B, K, D), routing (B, K, L). Items are scored by dot products with `tables()[1]`.

    item_text (N + 1, d_t), zero where there is no title, is needed for args.item_text "add" (a learned map of it is added to each
    item's own vector) and "init" (its principal components are the table's first values).
    """

    def __init__(self, n_items, args, item_text=None, precision=torch.float32):
        super().__init__()
        self.temperature, self.precision, self.dynamic = args.score_temperature, precision, args.dynamic_interests
        self.items = nn.Embedding(n_items + 1, args.dim, padding_idx=0)
        nn.init.normal_(self.items.weight[1:], std=args.init_std)
        self.text_map = None
        if args.item_text == "init":
            with torch.no_grad():
                self.items.weight.copy_(torch.from_numpy(table_from_text(self.items.weight.numpy(), item_text)))
        if args.item_text == "add":
            self.register_buffer("text", torch.from_numpy(item_text).to(precision), persistent=False)
            self.text_map = nn.Linear(item_text.shape[1], args.dim, bias=False)
            nn.init.normal_(self.text_map.weight, std=args.init_std)  # unit text vectors, so the sum starts in the table's own scale
        self.backbone = backbones.build(args.backbone, args.dim, args.interests, args.max_len, args.dropout)

    def tables(self):
        """Item vectors that histories are read with, and those that are scored: (N + 1, D) each."""
        read = self.items.weight
        if self.text_map is not None:
            read = read + F.linear(self.text, self.text_map.weight.to(self.precision))
        return read, self.scored(read)

    def scored(self, read):
        """Vectors that are scored, from those that histories are read with: (..., D)."""
        return F.normalize(read, dim=-1) / self.temperature if self.temperature else read

    def forward(self, history, vectors=None):
        """vectors (B, L, D): the history's item vectors, if they are not the table's own."""
        vectors = self.items(history) if vectors is None else vectors
        interests, routing = self.backbone(vectors, history > 0)
        if self.dynamic:
            interests, routing = by_length(interests, history), by_length(routing, history)
        return F.normalize(interests, dim=2) if self.temperature else interests, routing

    @torch.no_grad()
    def folded(self):
        """A copy that no longer needs text: its item table holds the sum."""
        model = copy.deepcopy(self)
        model.items.weight.copy_(self.tables()[0])
        model.text_map = None
        return model


def by_length(x, history):
    """Let a user have max(1, min(K, log2 L)) interests, L events in its history (MIND, arXiv 1904.08030, Eq. 9).

    x (B, K, ...): the rows beyond become copies of the first, which change no maximum over interests. The backbone has routed to all K
    before, where MIND's own routing has no others.
    """
    count = (history > 0).sum(1).clamp(min=1).log2().floor().clamp(min=1)  # (B,)
    keep = torch.arange(x.shape[1], device=x.device) < count[:, None]
    return torch.where(keep[:, :, None], x, x[:, :1])


def table_from_text(table, item_text):
    """Replace the rows of titled items by their text vectors' principal components, in the table's own scale.

    table (N + 1, D) float32, random; item_text (N + 1, d_t), zero where there is no title -> float32 (N + 1, D). Variances keep
    their proportions; items without a title, and columns beyond d_t, keep their random values (Harte et al., arXiv 2309.09261).
    """
    has_text = item_text.any(1)
    text = item_text[has_text].astype(np.float64)
    text -= text.mean(0)
    values, axes = np.linalg.eigh(text.T @ text)
    axes = axes[:, np.argsort(-values)[:table.shape[1]]]  # (d_t, <= D)
    axes *= np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1, 1)  # eigenvectors have no sign of their own
    reduced = text @ axes
    out = table.copy()
    out[has_text, :reduced.shape[1]] = reduced * (table[1:].std() / max(reduced.std(), 1e-12))
    return out


class Popularity(nn.Module):
    """The popularity baseline in the shape of a backbone: one interest (1,), an item's vector is its training count.

    Less than a half is added to break ties at random: item numbers, which would break them otherwise, go by the counts of all users, and so
    tell which of two items the test users have more often.
    """

    def __init__(self, counts):
        super().__init__()
        tie = np.random.default_rng(0).permutation(len(counts)) / (2 * len(counts))
        self.items = nn.Embedding.from_pretrained(torch.tensor(counts + tie, dtype=torch.float32)[:, None])

    def tables(self):
        return self.items.weight, self.items.weight

    def forward(self, history, vectors=None):
        share = (history > 0).float()[:, None]  # (B, 1, L)
        return torch.ones_like(history[:, :1, None], dtype=torch.float32), share / share.sum(2, keepdim=True).clamp(min=1)

    def folded(self):
        return self


def map_projection(vectors):
    """A flat map of the items by PCA of their directions: float32 (D + 1, 2), the last row is the shift.

    The place of any vector v, item or interest, is (v / |v|) @ map[:-1] + map[-1]; items lie within [-1, 1].
    """
    unit = vectors[1:] / np.linalg.norm(vectors[1:], axis=1, keepdims=True).clip(1e-12)
    mean = unit.mean(0)
    values, axes = np.linalg.eigh((unit - mean).T.astype(np.float64) @ (unit - mean))
    axes = axes[:, np.argsort(-values)[:2]]
    if axes.shape[1] < 2:  # vectors of one number have one direction
        axes = np.concatenate([axes, np.zeros_like(axes)], 1)
    axes /= np.abs((unit - mean) @ axes).max(0).clip(1e-12)
    return np.concatenate([axes, -mean[None] @ axes]).astype(np.float32)
