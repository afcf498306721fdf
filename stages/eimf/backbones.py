"""Behavioural models: item vectors of a history in, K interests out (paper, Eq. 5).

A backbone is a torch module built as `Backbone(dim, interests, max_len)` with

    forward(vectors, mask) -> interests (B, K, D), routing (B, K, L)
        vectors (B, L, D) float, the history's item vectors, oldest first, right-padded with zeros;
        mask (B, L) bool, true at real events. routing: how much each event counts in each interest, rows sum to 1.
    regulariser(routing) -> scalar, added to the loss as it is.

An all-padding history must give finite output, and what stands at padded positions must not matter.
"""
import torch
from torch import nn


class ComiRecSA(nn.Module):
    """Self-attentive extraction (ComiRec, arXiv 2005.09347, Eq. 7): A = softmax(W2 tanh(W1 (H + P))), interests = A H."""

    def __init__(self, dim, interests, max_len):
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, max_len, dim))
        self.hidden = nn.Linear(dim, 4 * dim, bias=False)
        self.heads = nn.Linear(4 * dim, interests, bias=False)
        for weight in self.parameters():
            nn.init.kaiming_normal_(weight)

    def forward(self, vectors, mask):
        placed = vectors + self.position
        # A finite minimum, not -inf: an all-padding history then gives the mean of zero vectors instead of NaN.
        least = torch.finfo(placed.dtype).min
        if self.training:  # three quarters of a training batch are padding, so only real events are computed
            scores = placed.new_full((*mask.shape, self.heads.out_features), least)
            scores[mask] = self.heads(torch.tanh(self.hidden(placed[mask])))  # (B, L, K)
        else:  # the same in fixed shapes, for the export
            scores = self.heads(torch.tanh(self.hidden(placed))).masked_fill(~mask[:, :, None], least)
        routing = scores.transpose(1, 2).softmax(2)  # (B, K, L)
        return routing @ (vectors * mask[:, :, None]), routing

    def regulariser(self, routing):
        return routing.new_zeros(())


class REMI(ComiRecSA):
    """ComiRec-SA with a routing regulariser (REMI, arXiv 2302.14532): lambda * sum over B of ||diag(Cov(A))||^2.

    The diagonal of the covariance is divided by the dimension D and the sum runs over the batch, as in the authors'
    code, so the strength that lambda = 100 means depends on both.
    """
    strength = 100.0

    def __init__(self, dim, interests, max_len):
        super().__init__(dim, interests, max_len)
        self.dim = dim

    def regulariser(self, routing):
        variance = (routing - routing.mean(2, keepdim=True)).square().sum(2) / self.dim  # (B, K)
        return self.strength * variance.square().sum()


BACKBONES = {"remi": REMI, "comirec-sa": ComiRecSA}
