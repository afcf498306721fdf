"""Loss terms of EIMF (paper, Eq. 7-15) and the recommendation losses it can be combined with.

Where several ranks share a batch, each term is this rank's part of the mean over the whole batch: the parts add up to it.

Shapes: B batch (of one rank), W batch of all ranks, D dimension, N items, M explicit interests, S sampled negatives. Row 0 of every item table is padding.
"""
import math

import torch
import torch.nn.functional as F

from . import parallel

LOG2_E = math.log2(math.e)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `query @ table.T`, with the gradient computed in the forward pass.

    The (B, N) scores are exponentiated in place and used up at once, where autograd would keep two more copies of
    them: about 2x faster on a CPU, where these passes over memory cost more than the products. The (B, N) values are held in
    `precision`; sums over them and the target's own part of the gradient are not.
    """

    @staticmethod
    def forward(ctx, query, table, target, weight, excluded, precision):
        low_table = table.to(precision)
        # In bits, not nats: on a CPU torch's exp2 takes a third of the time of its exp.
        scores = (query * LOG2_E).to(precision) @ low_table.T  # (B, N + 1)
        scores.index_fill_(1, excluded, -torch.inf)
        top = scores.amax(1, keepdim=True)  # (B, 1)
        at_target = (scores.gather(1, target[:, None]) - top).to(query.dtype)
        total = scores.sub_(top).exp2_().sum(1, keepdim=True, dtype=query.dtype)
        # A target that is itself excluded has an infinite loss; its weight is 0, and infinity times 0 would be NaN.
        loss = torch.where(weight > 0, (total.log2() - at_target).squeeze(1) * weight, 0).sum() / LOG2_E
        scale = weight[:, None] / total  # softmax = scores / total; the division is done on the small factors
        if ctx.needs_input_grad[0]:
            ctx.grad_query = (scores @ low_table) * scale - table[target] * weight[:, None]
        if ctx.needs_input_grad[1]:
            ctx.grad_table = (scores.T @ (query * scale).to(precision)).to(table.dtype)
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
    return _LinearCrossEntropy.apply(query, table, target, weight / parallel.total(weight.sum()).clamp(min=1), excluded, precision or query.dtype)


def sampled_scores(query, table, target, negatives):
    """Scores of the targets (B,) and of the negatives (S,), shared by the batch, (B, S).

    A negative that is the target scores so low that it has no share in any sum; infinity would become NaN where it is multiplied.
    """
    positive = (query * table[target]).sum(1)
    return positive, (query @ table[negatives].T).masked_fill(negatives == target[:, None], -1e9)


def sampled_softmax_loss(query, table, target, negatives, log_expected):
    """Softmax loss whose sum over all items is estimated from sampled negatives (S,) int64, with the log-Q correction.

    log_expected (N + 1,): log of how often each item is expected among the negatives, S q_i. A negative's score is lowered by it
    (Bengio and Senecal, 2008), so that exp(score) sums up to the full sum on average. The target is always there: it is
    not sampled, and not corrected. Loss and gradient come near those of `softmax_loss` as S grows.
    """
    positive, scores = sampled_scores(query, table, target, negatives)
    scores = torch.cat([positive[:, None], scores - log_expected[negatives]], 1)  # (B, 1 + S)
    return mean_over(torch.logsumexp(scores, 1) - positive)


def hard_negative_loss(query, table, target, negatives, hardness):
    """REMI's interest-aware hard negatives (REMI, arXiv 2302.14532, Eq. 8) among uniformly sampled ones (S,) int64.

    Each negative's term exp(x) gets the weight exp(hardness x), normalised to mean 1 over the negatives; 0 weighs all the same.
    """
    positive, scores = sampled_scores(query, table, target, negatives)
    is_target = negatives == target[:, None]
    importance = torch.log_softmax((hardness * scores).masked_fill(is_target, -1e9), 1)
    scores = scores + importance + (~is_target).sum(1, keepdim=True).clamp(min=1).log()
    return mean_over(torch.logsumexp(torch.cat([positive[:, None], scores], 1), 1) - positive)


def gbce_loss(query, table, target, negatives, calibration):
    """Generalised binary cross-entropy (gSASRec, arXiv 2308.07192), uniformly sampled negatives (S,) int64.

    The target's probability is raised to beta = alpha (t (1 - 1 / alpha) + 1 / alpha), with alpha = S / (N - 1) the share of items that is
    sampled and t = calibration: t = 0 is the plain binary cross-entropy, t = 1 undoes the overconfidence that sampling causes.
    The terms are summed, where the paper divides by S + 1: its weight beside the other terms then does not depend on S.
    """
    positive, scores = sampled_scores(query, table, target, negatives)
    alpha = min(1.0, len(negatives) / (len(table) - 2))
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    return mean_over(F.softplus(scores).sum(1) - beta * F.logsigmoid(positive))


class RecommendationLoss:
    """The loss that --loss names, over queries (Q, D), the item table (N + 1, D) and targets (Q,) int64 (Eq. 13-14).

    counts int64 (N + 1,): how often training has each item, for --sampling popularity. Every item can be drawn: one more is added.
    """

    def __init__(self, args, counts, device, precision=None):
        self.args, self.precision = args, precision
        self.generator = torch.Generator(device)  # of the negatives alone: all ranks draw the same, whatever else they draw
        self.padding = torch.zeros(1, dtype=torch.int64, device=device)
        weight = torch.as_tensor(counts, dtype=torch.float64) + 1 if args.sampling == "popularity" else torch.ones(len(counts), dtype=torch.float64)
        weight[0] = 0
        cumulative = weight.cumsum(0)
        self.cumulative = (cumulative / cumulative[-1]).to(device)  # (N + 1,)
        self.log_expected = (args.negatives * weight / weight.sum()).log().float().to(device)  # (N + 1,)

    def draw(self):
        """Negatives (S,) int64, with replacement; row i is drawn with probability cumulative[i] - cumulative[i - 1]."""
        u = torch.rand(self.args.negatives, dtype=torch.float64, device=self.cumulative.device, generator=self.generator)
        return torch.searchsorted(self.cumulative, u, right=True)

    def __call__(self, query, table, target):
        args = self.args
        if args.loss == "softmax":
            return softmax_loss(query, table, target, self.padding, precision=self.precision)
        if args.loss == "sampled":
            return sampled_softmax_loss(query, table, target, self.draw(), self.log_expected)
        if args.loss == "hard-negatives":
            return hard_negative_loss(query, table, target, self.draw(), args.hardness)
        return gbce_loss(query, table, target, self.draw(), args.calibration)


def info_nce(a, b, not_negative, temperature, keep):
    """InfoNCE on cosine similarity (Eq. 10-11): row i of `a` (B, D) should find row i of `b` (B, D) among all ranks' rows of `b`.

    not_negative (B, W) bool: pairs that are no negatives of each other, left out of the denominator (a row's own pair is
    always in). keep (B,) bool: rows that count, as anchors and as negatives.
    """
    similarity = F.normalize(a, dim=1) @ parallel.gather(F.normalize(b, dim=1)).T / temperature  # (B, W)
    first = len(a) * parallel.rank()  # the column of row 0's own pair
    own = torch.zeros_like(not_negative)
    own.diagonal(first).fill_(True)
    similarity = similarity.masked_fill((not_negative | ~parallel.gather(keep)) & ~own, -torch.inf)
    return mean_over(torch.logsumexp(similarity, 1) - similarity.diagonal(first), keep)


def cosine_distance(a, b, keep):
    """Mean of 1 - cos(a_i, b_i) over the rows that count (Eq. 12)."""
    return mean_over(1 - F.cosine_similarity(a, b, dim=1), keep)


def mean_over(values, keep=None):
    """Mean of values (B,) where keep (B,) is true, everywhere by default; 0 if nowhere."""
    keep = torch.ones_like(values, dtype=torch.bool) if keep is None else keep
    return torch.where(keep, values, 0).sum() / parallel.total(keep.sum()).clamp(min=1)


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
