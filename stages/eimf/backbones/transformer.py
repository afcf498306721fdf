"""Transformer backbones. Their one interest is the state at one position, after a last layer normalisation."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import Backbone, Events


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each with dropout and a residual (Vaswani et al., arXiv 1706.03762).

    `norm_first` normalises what goes into each of the two (SASRec), otherwise what comes out of the sum (BERT4Rec).
    """

    def __init__(self, dim, heads, hidden, activation, norm_first, dropout):
        super().__init__()
        self.heads, self.norm_first, self.dropout = heads, norm_first, nn.Dropout(dropout)
        self.query, self.key_value, self.mix = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, hidden), activation, nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout))
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def attend(self, x, events, allowed, rows):
        key, value = (self.split(z) for z in events.unpack(self.key_value(x)).chunk(2, 2))  # (B, heads, L, D / heads)
        query = self.split(events.unpack(self.query(x)) if rows is None else self.query(x[rows])[:, None])
        scores = query @ key.transpose(2, 3) / math.sqrt(key.shape[3])  # (B, heads, L or 1, L)
        weight = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(3)
        mixed = (self.dropout(weight) @ value).transpose(1, 2).flatten(2)  # (B, L or 1, D)
        return self.dropout(self.mix(events.pack(mixed) if rows is None else mixed[:, 0])), weight.mean(1)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, heads, L, D / heads)

    def forward(self, x, events, allowed, rows=None):
        """x (R, D), allowed (.., L or 1, L) bool -> x (R, D), attention (B, L, L); with rows (B,) only these: (B, D), (B, 1, L)."""
        into = self.norm_attention(x) if self.norm_first else x
        attended, weight = self.attend(into, events, allowed, rows)
        x = (x if rows is None else x[rows]) + attended
        if self.norm_first:
            return x + self.feed(self.norm_feed(x)), weight
        x = self.norm_attention(x)
        return self.norm_feed(x + self.feed(x)), weight


class Transformer(Backbone):
    """Learned positions and a stack of blocks. Position 0 is the newest event, whatever the history's length."""
    blocks, heads, hidden, norm_first, causal = 2, 2, 4, True, False
    activation = nn.GELU

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.position = nn.Parameter(torch.empty(max_len + 1, dim))  # one more than events, for [MASK]
        nn.init.normal_(self.position, std=0.05)
        heads = self.heads if dim % self.heads == 0 else 1
        self.stack = nn.ModuleList(Block(dim, heads, self.hidden * dim, self.activation(), self.norm_first, dropout)
                                   for _ in range(self.blocks))
        # torch's default weights are a third as large. With them, and the norm after the sum, what attention brings is lost beside the
        # [MASK] vector, and BERT4Rec stays at the loss of equal probabilities.
        for layer in self.stack.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def encode(self, vectors, mask, newest_only=True):
        """States (B, D) of the newest positions and their attention (B, 1, L) in the last block; or all states (R, D)."""
        length = mask.sum(1)
        column = torch.arange(mask.shape[1], device=mask.device)
        place = (length[:, None] - 1 - column).clamp(min=0)  # (B, L)
        mask = mask | (column == 0)  # a history without events is one zero vector
        events = Events(mask, fixed=not self.training)
        x = self.dropout(events.pack(vectors + self.position[place]))
        allowed = mask[:, None, None]  # (B, 1, 1, L): which events may be looked at
        if events.rows is None:
            last = torch.arange(mask.shape[0], device=mask.device) * mask.shape[1] + length.clamp(min=1) - 1
        else:
            last = length.clamp(min=1).cumsum(0) - 1
        earlier = allowed & (column <= column[:, None]) if self.causal else allowed
        for block in self.stack[:-1]:
            x, _ = block(x, events, earlier)
        # Of the last block only one position is needed, and it may look at all events: none is later.
        return self.stack[-1](x, events, allowed, last) if newest_only else self.stack[-1](x, events, earlier)[0]


class SASRec(Transformer):
    """Causal Transformer, the state at the newest event (SASRec, arXiv 1808.09781, section 3).

    Trained here as the other models are, on one target of a history at a step and with their losses; the paper predicts every event, with a
    binary cross-entropy of one negative. Routing is the attention of the newest event in the last block, mean over heads.
    """
    defaults = {"dropout": 0.2}
    heads, hidden, activation, causal = 1, 1, nn.ReLU, True

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, vectors, mask):
        state, attention = self.encode(vectors * mask[:, :, None], mask)
        return self.norm(state)[:, None], attention


class BERT4Rec(Transformer):
    """Bidirectional Transformer, the state at a [MASK] appended to the history (BERT4Rec, arXiv 1904.06690, section 3).

    As in EIMF's paper it is trained as the other models are: only the appended [MASK] is predicted. Routing is what [MASK] pays
    attention to in the last block, mean over heads, without the attention to itself.
    """
    defaults = {"dropout": 0.2}
    norm_first = False

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.token, std=0.05)
        self.output = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))  # then tied item vectors

    def forward(self, vectors, mask):
        vectors, present, at_end = extended(vectors * mask[:, :, None], mask)
        state, attention = self.encode(torch.where(at_end[:, :, None], self.token, vectors), present)
        routing = attention[:, :, :-1] * mask[:, None]  # (B, 1, L)
        return self.output(state)[:, None], routing / routing.sum(2, keepdim=True).clamp(min=1e-12)


def extended(x, mask):
    """One more position: x (B, L, ..) -> (B, L + 1, ..), mask with the position after the newest event, that position alone."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))
    at_end = torch.arange(x.shape[1], device=x.device) == mask.sum(1, keepdim=True)  # (B, L + 1)
    return x, F.pad(mask, (0, 1)) | at_end, at_end


class BERT4RecCloze(BERT4Rec):
    """BERT4Rec with its own training task, the cloze (arXiv 1904.06690, model learning): random events are masked and predicted.

    The sequence is the history with the target at its end. Where no event happens to be masked, the target is. It needs several
    times the training of the other models.
    """
    share_masked = 0.2

    def examples(self, implicit, target, history, items):
        sequence, present, at_end = extended(history, history > 0)  # (B, L + 1)
        sequence = torch.where(at_end, target[:, None], sequence)
        masked = (torch.rand(sequence.shape, device=sequence.device) < self.share_masked) & present
        masked = masked | (at_end & ~masked.any(1, keepdim=True))
        vectors = torch.where(masked[:, :, None], self.token, items(sequence))
        states = self.encode(vectors, present, newest_only=False)  # (R, D)
        chosen = masked.flatten() if not self.training else masked[present]
        return self.output(states[chosen]), sequence[masked]


class LLM2BERT4Rec(BERT4Rec):
    """BERT4Rec whose item table starts from text (Harte et al., arXiv 2309.09261): vectors reduced by PCA, then trained."""
    defaults = {"dropout": 0.2, "item_text": "init"}
