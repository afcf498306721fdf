"""Backbones without order: the mean of the history."""
from torch import nn

from .base import Backbone, even_share


class YouTubeDNN(Backbone):
    """Mean of the history's vectors, then a ReLU tower (Covington et al., RecSys 2016, section 3.2).

    The last layer is linear: interests are scored by dot products with item vectors, which may point anywhere.
    """

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__(dim, interests, max_len, dropout)
        self.tower = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, vectors, mask):
        routing = even_share(mask)  # (B, 1, L); the mean is over real events only
        return self.tower(routing @ self.dropout(vectors * mask[:, :, None])), routing
