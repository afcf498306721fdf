"""Loss terms of EIMF (paper, Eq. 7-15) and the recommendation losses it can be combined with.

Where several ranks share a batch, each term is this rank's part of the mean over the whole batch: the parts add up to it.

Shapes: B batch (of one rank), W batch of all ranks, D dimension, N items, M explicit interests, S sampled negatives. Row 0 of every item table is padding.
"""
import math

import eimf_core
import torch
import torch.nn.functional as F

from . import parallel

LOG2_E = math.log2(math.e)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `query @ table.T`, in fewer passes over the (N, B) scores than autograd would take.

    On a CPU these passes over memory cost more than the products. The scores are exponentiated in place, without the usual
    subtraction of each query's largest, unless its sum then leaves the range in which nothing of weight over- or underflows. What
    autograd keeps are the exponentials; the softmax's denominator and the incoming gradient scale the small factors instead. The (N, B)
    values are held in `precision`; sums over them and the target's own part of the gradient are not.
    """

    @staticmethod
    def forward(ctx, query, table, target, weight, excluded, precision):
        low_table = table.to(precision)
        low_query = (query * LOG2_E).to(precision)  # in bits, not nats: on a CPU torch's exp2 takes a third of the time of its exp
        for shift in (False, True):
            scores = low_table @ low_query.T  # (N + 1, B); each item's scores are contiguous, which is faster than each query's
            scores.index_fill_(0, excluded, -torch.inf)
            if shift:
                scores.sub_(scores.amax(0))
            at_target = scores[target, torch.arange(len(target), device=target.device)].to(query.dtype)  # (B,)
            scores.exp2_()
            # Blocks of items first: each thread then sums what it wrote itself, and two threads take a third of the time.
            rows, rest = scores[:len(table) // 16 * 16], scores[len(table) // 16 * 16:]
            total = rows.unflatten(0, (16, len(table) // 16)).sum(1, dtype=query.dtype).sum(0) + rest.sum(0, dtype=query.dtype)  # (B,)
            if total.min() > 2.0 ** -60 and total.max() < 2.0 ** 100:  # float32 and bfloat16 end at 2 ** -126 and 2 ** 127
                break
        ctx.save_for_backward(query, table, low_table, target, scores, weight, weight / total)
        # A target that is itself excluded has an infinite loss; its weight is 0, and infinity times 0 would be NaN.
        return torch.where(weight > 0, (total.log2() - at_target) * weight, 0).sum() / LOG2_E

    @staticmethod
    def backward(ctx, grad):
        query, table, low_table, target, scores, weight, scale = ctx.saved_tensors
        weight, scale = (weight * grad)[:, None], (scale * grad)[:, None]  # softmax * weight = scores * scale
        grad_query = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_query = (scores.T @ low_table) * scale - table[target] * weight
        if ctx.needs_input_grad[1]:
            grad_table = (scores @ (query * scale).to(scores.dtype)).to(table.dtype)
            grad_table.index_add_(0, target, query * -weight)
        return grad_query, grad_table, None, None, None, None


class _NativeCrossEntropy(torch.autograd.Function):
    """The same by the C++ core, for float32 on a CPU: loss and gradients at once, chunk by chunk of the items, within the cache."""

    @staticmethod
    def forward(ctx, query, table, target, weight, excluded):
        arrays = [x.detach().contiguous().numpy() for x in (query, table, target, weight, excluded)]
        losses, *gradients = eimf_core.softmax_loss(*arrays, item_gradient=ctx.needs_input_grad[1], n_threads=torch.get_num_threads())
        ctx.gradients = [None if g is None else torch.from_numpy(g) for g in gradients]
        return torch.from_numpy(losses) @ weight

    @staticmethod
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None  # let go of, so that autograd may add to the arrays instead of copying them
        return *(None if g is None else g if grad == 1 else g * grad for g in gradients), None, None, None


def softmax_loss(query, table, target, excluded, keep=None, precision=None):
    """Mean cross entropy of the target under a softmax over the rows of `table` that are not excluded (Eq. 9, 14).

    query (B, D), table (N + 1, D), target (B,) int64, excluded int64: row numbers that are no class (padding, items
    without a title), keep (B,) bool: rows that count. The products are computed in `precision`.
    The paper's Eq. 9 and 14 lack the minus sign. Returns a scalar, 0 if no row counts.
    """
    weight = torch.ones_like(target, dtype=query.dtype) if keep is None else keep.to(query.dtype)
    weight = weight / parallel.total(weight.sum()).clamp(min=1)
    if query.device.type == "cpu" and query.dtype == table.dtype == (precision or query.dtype) == torch.float32:
        return _NativeCrossEntropy.apply(query, table, target, weight, excluded)
    return _LinearCrossEntropy.apply(query, table, target, weight, excluded, precision or query.dtype)


def lookup(table, *numbers):
    """Rows of table (N + 1, D) for several int64 tensors of item numbers, each of shape (...): a list of (..., D).

    Together they have one gradient (N + 1, D); apart, each would fill one of its own. The padding's row 0 has none.
    """
    rows = F.embedding(torch.cat([n.flatten() for n in numbers]), table, padding_idx=0)
    return [part.view(*n.shape, table.shape[1]) for part, n in zip(rows.split([n.numel() for n in numbers]), numbers)]


def sampled_scores(query, positive, negative, is_target):
    """Scores of the targets' vectors (B, D) and of the negatives' (S, D), shared by the batch: (B,) and (B, S).

    is_target (B, S) bool: negatives that are a row's target. They score so low that they have no share in any sum; infinity would
    become NaN where it is multiplied.
    """
    return (query * positive).sum(1), (query @ negative.T).masked_fill(is_target, -1e9)


def sampled_softmax_loss(query, positive, negative, is_target, log_expected):
    """Softmax loss whose sum over all items is estimated from sampled negatives, with the log-Q correction.

    query and positive (B, D), negative (S, D), is_target (B, S): as for `sampled_scores`. log_expected (S,): log of how often each of
    the negatives is expected among them, S q_i. A negative's score is lowered by it
    (Bengio and Senecal, 2008), so that exp(score) sums up to the full sum on average. The target is always there: it is
    not sampled, and not corrected. Loss and gradient come near those of `softmax_loss` as S grows.
    """
    positive, scores = sampled_scores(query, positive, negative, is_target)
    scores = torch.cat([positive[:, None], scores - log_expected], 1)  # (B, 1 + S)
    return mean_over(torch.logsumexp(scores, 1) - positive)


class _HardNegatives(torch.autograd.Function):
    """log sum_j exp((1 + h) x_j) - log sum_j exp(h x_j), x = query @ negative.T without is_target: (B, D), (S, D) -> (B,).

    Its gradient by x is (1 + h) softmax((1 + h) x) - h softmax(h x). The (B, S) scores become it in place: half of autograd's passes.
    """

    @staticmethod
    def forward(ctx, query, negative, is_target, hardness):
        scores = (query @ negative.T).masked_fill_(is_target, -1e30)  # (B, S); -inf times a hardness of 0 would be NaN
        top = scores.amax(1, keepdim=True)
        scores.sub_(top)
        soft = (scores * hardness).exp_()
        if hardness == 0:
            soft.masked_fill_(is_target, 0)
        hard = scores.exp_().mul_(soft)
        tiny = torch.finfo(scores.dtype).tiny  # where all negatives are the target
        soft_total, hard_total = (x.sum(1, keepdim=True).clamp(min=tiny) for x in (soft, hard))  # (B, 1)
        ctx.save_for_backward(query, negative, hard.mul_((1 + hardness) / hard_total).sub_(soft.mul_(hardness / soft_total)))
        return (hard_total.log() - soft_total.log() + top).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        query, negative, grad_scores = ctx.saved_tensors
        return grad_scores @ negative * grad[:, None], grad_scores.T @ (query * grad[:, None]), None, None


def hard_negative_loss(query, positive, negative, is_target, hardness):
    """REMI's interest-aware hard negatives (REMI, arXiv 2302.14532, Eq. 8) among uniformly sampled ones.

    Shapes as for `sampled_scores`. Each negative's term exp(x) gets the weight exp(hardness x), normalised to mean 1 over the
    negatives; 0 weighs all the same.
    """
    count = (len(negative) - is_target.sum(1)).clamp(min=1)
    negatives = _HardNegatives.apply(query, negative, is_target, hardness) + count.log()  # log of their weighted sum, (B,)
    return mean_over(F.softplus(negatives - (query * positive).sum(1)))


def gbce_loss(query, positive, negative, is_target, n_items, calibration):
    """Generalised binary cross-entropy (gSASRec, arXiv 2308.07192), uniformly sampled negatives.

    Shapes as for `sampled_scores`. The target's probability is raised to beta = alpha (t (1 - 1 / alpha) + 1 / alpha), with alpha =
    S / (N - 1) the share of items that is sampled and t = calibration: t = 0 is the plain binary cross-entropy, t = 1 undoes the
    overconfidence that sampling causes.
    The terms are summed, where the paper divides by S + 1: its weight beside the other terms grows with S.
    """
    positive, scores = sampled_scores(query, positive, negative, is_target)
    alpha = min(1.0, len(negative) / (n_items - 1))
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
        """Negatives (S,) int64, with replacement; row i is drawn with probability cumulative[i] - cumulative[i - 1].

        None, (0,), for the full softmax.
        """
        if self.args.loss == "softmax":
            return self.padding[:0]
        u = torch.rand(self.args.negatives, dtype=torch.float64, device=self.cumulative.device, generator=self.generator)
        return torch.searchsorted(self.cumulative, u, right=True)

    def __call__(self, query, table, target, positive, negatives, negative):
        """positive (Q, D) and negative (S, D): the table's rows of the targets and of negatives (S,) int64, from `draw`."""
        args = self.args
        if args.loss == "softmax":
            return softmax_loss(query, table, target, self.padding, precision=self.precision)
        sample = query, positive, negative, negatives == target[:, None]
        if args.loss == "sampled":
            return sampled_softmax_loss(*sample, self.log_expected[negatives])
        if args.loss == "hard-negatives":
            return hard_negative_loss(*sample, args.hardness)
        return gbce_loss(*sample, len(table) - 1, args.calibration)


def alignment(a, b, not_negative, temperature, keep):
    """InfoNCE (Eq. 10-11) and cosine distance (Eq. 12) of the pairs (a_i, b_i), rows of `a` and `b` (B, D): two scalars.

    InfoNCE: by cosine similarity, row i of `a` should find row i of `b` among all ranks' rows of `b`. The distance is the mean of
    1 - cos(a_i, b_i). not_negative (B, W) bool: pairs that are no negatives of each other, left out of the denominator (a row's own
    pair is always in). keep (B,) bool: rows that count, as anchors and as negatives.
    """
    cosine = F.normalize(a, dim=1) @ parallel.gather(F.normalize(b, dim=1)).T  # (B, W)
    first = len(a) * parallel.rank()  # the column of row 0's own pair
    own = cosine.diagonal(first)
    left_out = not_negative | ~parallel.gather(keep)
    left_out.diagonal(first).fill_(False)
    found = torch.logsumexp((cosine / temperature).masked_fill(left_out, -torch.inf), 1) - own / temperature
    return mean_over(found, keep), mean_over(1 - own, keep)


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
