"""Loss terms of EIMF (paper, Eq. 7-15) and the recommendation losses it can be combined with.

Shapes: B batch, D dimension, N items, M explicit interests, S sampled negatives. Row 0 of every item table is padding.
"""
import math

import torch
import torch.nn.functional as F

LOG2_E = math.log2(math.e)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `query @ table.T`, with the gradient computed in the forward pass.

    The (B, N) scores are exponentiated in place and used up at once, where autograd would keep two more copies of
    them: about 2x faster on a CPU, where these passes over memory cost more than the products. The products take their
    factors in `precision`; sums, exponentials and the target's own part of the gradient stay in float32.
    """

    @staticmethod
    def forward(ctx, query, table, target, weight, excluded, precision):
        low_table = table.to(precision)
        # In bits, not nats: on a CPU torch's exp2 takes a third of the time of its exp.
        scores = ((query * LOG2_E).to(precision) @ low_table.T).to(query.dtype)  # (B, N + 1)
        scores.index_fill_(1, excluded, -torch.inf)
        top = scores.amax(1, keepdim=True)  # (B, 1)
        at_target = scores.gather(1, target[:, None])
        total = scores.sub_(top).exp2_().sum(1, keepdim=True)
        # A target that is itself excluded has an infinite loss; its weight is 0, and infinity times 0 would be NaN.
        loss = torch.where(weight > 0, (total.log2() + top - at_target).squeeze(1) * weight, 0).sum() / LOG2_E
        scale = weight[:, None] / total  # softmax = scores / total; the division is done on the small factors
        low_scores = scores.to(precision)
        if ctx.needs_input_grad[0]:
            ctx.grad_query = (low_scores @ low_table) * scale - table[target] * weight[:, None]
        if ctx.needs_input_grad[1]:
            ctx.grad_table = (low_scores.T @ (query * scale).to(precision)).to(table.dtype)
            ctx.grad_table.index_add_(0, target, query * -weight[:, None])
        return loss

    @staticmethod
    def backward(ctx, grad):
        return (ctx.grad_query * grad if ctx.needs_input_grad[0] else None,
                ctx.grad_table * grad if ctx.needs_input_grad[1] else None, None, None, None, None)


def softmax_loss(query, table, target, excluded, keep=None, precision=None):
    """Mean cross entropy of the target under a softmax over the rows of `table` that are not excluded (Eq. 9, 14).

    query (B, D), table (N + 1, D), target (B,) int64, excluded int64: row numbers that are no class (padding, items
    without a title), keep (B,) bool: rows that count.
    The paper's Eq. 9 and 14 lack the minus sign. Returns a scalar, 0 if no row counts.
    """
    weight = torch.ones_like(target, dtype=query.dtype) if keep is None else keep.to(query.dtype)
    return _LinearCrossEntropy.apply(query, table, target, weight / weight.sum().clamp(min=1), excluded, precision or query.dtype)


def sampled_softmax_loss(query, table, target, negatives, hardness=0.0):
    """Softmax over the target and uniformly sampled negatives (S,) int64 shared by the batch.

    With `hardness` b > 0 each negative's term exp(x) gets the weight exp(b x), normalised to mean 1 over the
    negatives: REMI's interest-aware hard negatives (REMI, arXiv 2302.14532, Eq. 8). Sampling is uniform, so the
    log-Q correction is the same constant for all and cancels. Negatives equal to the target are dropped.
    """
    positive = (query * table[target]).sum(1)  # (B,)
    scores = query @ table[negatives].T  # (B, S)
    scores = scores.masked_fill(negatives == target[:, None], -torch.inf)
    if hardness:
        count = (negatives != target[:, None]).sum(1, keepdim=True).clamp(min=1)
        scores = scores + torch.log_softmax(hardness * scores, 1) + count.log()
    return (torch.logsumexp(torch.cat([positive[:, None], scores], 1), 1) - positive).mean()


def info_nce(a, b, not_negative, temperature, keep):
    """InfoNCE on cosine similarity (Eq. 10-11): row i of `a` (B, D) should find row i of `b` among the batch.

    not_negative (B, B) bool: pairs that are no negatives of each other, left out of the denominator (the diagonal is
    always in). keep (B,) bool: rows that count, as anchors and as negatives.
    """
    similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature  # (B, B)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    similarity = similarity.masked_fill((not_negative | ~keep) & ~own, -torch.inf)
    return mean_over(torch.logsumexp(similarity, 1) - similarity.diagonal(), keep)


def cosine_distance(a, b, keep):
    """Mean of 1 - cos(a_i, b_i) over the rows that count (Eq. 12)."""
    return mean_over(1 - F.cosine_similarity(a, b, dim=1), keep)


def mean_over(values, keep):
    """Mean of values (B,) where keep (B,) is true; 0 if nowhere."""
    return torch.where(keep, values, 0).sum() / keep.sum().clamp(min=1)


def read_out(interests, target, mask=None, soft=False):
    """The interest a target selects: (B, M, D), (B, D) -> (B, D).

    Hard (default): the interest with the largest dot product, which is how serving scores items (paper, 3.4). Soft:
    attention by those dot products. mask (B, M) bool marks real rows; a padded row can never win.
    """
    scores = (interests @ target[:, :, None]).squeeze(2)  # (B, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if soft:
        return (scores.softmax(1)[:, None] @ interests).squeeze(1)
    return interests[torch.arange(len(interests), device=interests.device), scores.argmax(1)]
