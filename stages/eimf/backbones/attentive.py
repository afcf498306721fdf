"""Backbones that weigh a history's events by attention, once for each interest."""
import torch
import torch.nn.functional as F
from torch import nn

from .. import parallel
from .base import Backbone, Events


class ComiRecSA(Backbone):
    """Self-attentive extraction (ComiRec, arXiv 2005.09347, Eq. 7): A = softmax(W2 tanh(W1 (H + P))), interests = A H."""

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.position = nn.Parameter(torch.empty(1, max_len, dim))
        self.hidden = nn.Linear(dim, 4 * dim, bias=False)
        self.heads = nn.Linear(4 * dim, interests, bias=False)
        for weight in self.parameters():
            nn.init.kaiming_normal_(weight)

    def forward(self, vectors, mask):
        vectors = self.dropout(vectors)
        events = Events(mask, fixed=not self.training)
        hidden = 2 * torch.sigmoid(2 * self.hidden(events.pack(vectors + self.position))) - 1  # tanh, in a third of its time on a CPU
        scores = events.unpack(self.heads(hidden))  # (B, L, K)
        # A finite minimum, not -inf: an all-padding history then has interests of zero instead of NaN.
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
        routing = scores.transpose(1, 2).softmax(2)  # (B, K, L)
        return routing * mask[:, None] @ vectors, routing


class REMI(ComiRecSA):
    """ComiRec-SA with a routing regulariser (REMI, arXiv 2302.14532): lambda * sum over B of ||diag(Cov(A))||^2.

    The diagonal of the covariance is divided by the dimension D and the sum runs over the batch, as in the authors'
    code, so the strength that lambda = 100 means depends on both.
    """
    strength = 100.0

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.dim = dim

    def regulariser(self, routing):
        variance = (routing - routing.mean(2, keepdim=True)).square().sum(2) / self.dim  # (B, K)
        return self.strength * variance.square().sum()


class SINE(Backbone):
    """Sparse interests: a few prototypes of a large pool, joined by the predicted intention (SINE, arXiv 2102.09267, section 3).

    The user's summary activates the nearest prototypes; each event belongs to them in shares, each prototype weighs the events,
    and the resulting interests are averaged by their likeness to the intention that should come next. So K = 1.
    """
    pool, active, temperature, strength = 500, 2, 0.1, 1.0

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.prototypes = nn.Parameter(torch.empty(self.pool, dim))
        self.position = nn.Parameter(torch.empty(max_len, dim))
        for weight in (self.prototypes, self.position):
            nn.init.normal_(weight, std=0.05)
        self.summary, self.weighing, self.next = (Scores(dim, heads) for heads in (1, self.active, 1))
        self.assign = nn.Linear(dim, dim, bias=False)
        self.norm_event, self.norm_prototype, self.norm_interest, self.norm_next = (nn.LayerNorm(dim) for _ in range(4))

    def forward(self, vectors, mask):
        vectors = self.dropout(vectors * mask[:, :, None])
        summary = (self.summary(vectors, mask) @ vectors).squeeze(1)  # (B, D)
        likeness, index = (summary @ self.prototypes.T).topk(self.active, 1)  # (B, A)
        activated = self.prototypes[index] * likeness.sigmoid()[:, :, None]  # (B, A, D)
        belongs = (self.norm_prototype(activated) @ self.norm_event(self.assign(vectors)).transpose(1, 2)).softmax(1)  # (B, A, L)
        weight = belongs * self.weighing(vectors + self.position, mask)  # (B, A, L)
        interests = self.norm_interest(weight @ vectors)  # (B, A, D)
        intention = belongs.transpose(1, 2) @ activated  # (B, L, D)
        following = self.norm_next((self.next(intention, mask) @ intention).squeeze(1))  # (B, D)
        share = ((interests @ following[:, :, None]) / self.temperature).softmax(1).transpose(1, 2)  # (B, 1, A)
        routing = share @ weight  # (B, 1, L)
        return share @ interests, routing / routing.sum(2, keepdim=True).clamp(min=1e-12)

    def regulariser(self, routing):
        """Half the squared covariances of different prototypes, which keeps them apart."""
        centred = self.prototypes - self.prototypes.mean(1, keepdim=True)
        covariance = centred @ centred.T / self.prototypes.shape[1]  # (pool, pool)
        return self.strength * 0.5 * (covariance.square().sum() - covariance.diagonal().square().sum()) / parallel.world()


class Scores(nn.Module):
    """Attention over events, softmax(W2 tanh(W1 X)): (B, L, D), mask (B, L) -> (B, heads, L)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.hidden, self.heads = nn.Linear(dim, dim, bias=False), nn.Linear(dim, heads, bias=False)

    def forward(self, x, mask):
        scores = self.heads(torch.tanh(self.hidden(x))).transpose(1, 2)
        return F.softmax(scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min), 2)
