"""Backbones that group a history's events into interests by dynamic routing."""
import torch
from torch import nn

from .base import Backbone

ROUNDS = 3


def squash(x):
    """Shorten a vector to a length below 1, in its own direction (MIND, arXiv 1904.08030, Eq. 7)."""
    square = x.square().sum(-1, keepdim=True)
    return square / (1 + square) * x / (square + 1e-9).sqrt()


def route(votes, logits, mask):
    """Dynamic routing: votes (B, 1 or K, L, D), logits (1, K, L), mask (B, L) -> interests (B, K, D), weights (B, K, L).

    The events' shares are a softmax over the interests. The gradient goes through the last round's sum only.
    """
    fixed, present = votes.detach(), mask[:, None]  # (B, 1, L)
    for round in range(ROUNDS):
        weight = logits.softmax(1) * present  # (B, K, L)
        last = round == ROUNDS - 1
        interests = squash((weight[:, :, None] @ (votes if last else fixed)).squeeze(2))  # (B, K, D)
        if not last:
            logits = logits + (fixed @ interests.unsqueeze(3)).squeeze(3)
    return interests, weight


def shares(weight):
    """Weights (B, K, L) as shares of the events in each interest, rows summing to 1."""
    return weight / weight.sum(2, keepdim=True).clamp(min=1e-12)


class MIND(Backbone):
    """Behaviour-to-interest routing with one map for all (MIND, arXiv 1904.08030, Eq. 5-8).

    What tells the interests apart is their initial logits, so these are drawn once, with the weights, and kept with the model;
    drawn anew they would make evaluation random. All K interests are used, not log2 of the history's length (Eq. 9).
    """

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.map = nn.Linear(dim, dim, bias=False)
        self.register_buffer("logits", torch.randn(1, interests, max_len))
        self.output = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, vectors, mask):
        votes = self.map(self.dropout(vectors * mask[:, :, None]))  # (B, L, D)
        interests, weight = route(votes[:, None], self.logits, mask)
        return self.output(interests), shares(weight)


class ComiRecDR(Backbone):
    """Dynamic routing with one map for each position and interest, from zero logits (ComiRec, arXiv 2005.09347, Eq. 2-6)."""
    defaults = {"learning_rate": 0.005}

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.interests = interests
        self.maps = nn.Parameter(torch.empty(max_len, dim, interests * dim))
        nn.init.normal_(self.maps, std=dim ** -0.5)

    def forward(self, vectors, mask):
        vectors = self.dropout(vectors * mask[:, :, None])
        votes = (vectors.transpose(0, 1) @ self.maps).unflatten(2, (self.interests, -1))  # (L, B, K, D)
        interests, weight = route(votes.permute(1, 2, 0, 3), vectors.new_zeros(1, self.interests, len(self.maps)), mask)
        return interests, shares(weight)
