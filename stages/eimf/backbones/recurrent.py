"""Backbones that read a history event by event."""
import torch
from torch import nn

from .base import Backbone, even_share


class GRU4Rec(Backbone):
    """A gated recurrent unit's state after the newest event, mapped to D (GRU4Rec, arXiv 1511.06939, section 3.1).

    Items share one table as input and as output. A state says nothing about single events, so routing is even. The unit is
    stepped here, because torch.export cannot export `nn.GRU` for any batch size.
    """
    defaults = {"dropout": 0.2}

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.cell = nn.GRUCell(dim, 2 * dim)
        self.output = nn.Linear(2 * dim, dim)

    def forward(self, vectors, mask):
        vectors, length = self.dropout(vectors * mask[:, :, None]), mask.sum(1)
        state = vectors.new_zeros(vectors.shape[0], self.cell.hidden_size)  # (B, 2 D)
        if self.training:  # longest histories first, so that the users with a t-th event are the first rows
            order = length.argsort(descending=True, stable=True)
            vectors = vectors[order]
            for t, rows in enumerate(mask.sum(0).tolist()):
                if t and not rows:  # no history is longer
                    break
                state = torch.cat([self.cell(vectors[:rows, t], state[:rows]), state[rows:]])
            state = state[order.argsort()]
        else:  # the same in fixed shapes, for the export
            for t in range(vectors.shape[1]):
                state = torch.where(mask[:, t:t + 1], self.cell(vectors[:, t], state), state)
        return self.output(state)[:, None], even_share(mask)
