"""What every backbone is: a torch module from a history's item vectors to K interests (paper, Eq. 5).

Shapes: B batch, L history length, K interests, D dimension, R real events of a batch.
"""
from torch import nn


class Backbone(nn.Module):
    """Base of all backbones, built-in or a user's own. `forward` is all that a subclass has to write.

        forward(vectors, mask) -> interests (B, K, D), routing (B, K, L)
            vectors (B, L, D) float: the history's item vectors, oldest first, right-padded;
            mask (B, L) bool: true at real events. Items are scored by their largest dot product with an interest.
            routing: the share of each event in each interest, at least 0, rows sum to 1 (shown by stage 08 as the reason for an
            item). A model that has no such weights gives each real event the same share, see `even_share`.

    `forward` is written with torch.export, so its Python must not depend on the tensors' values, nor on B.
    What stands at padded positions must not matter, and a history of padding alone must give finite output. A model with
    a single interest gives K = 1 whatever `interests` says. `tests/test_backbones.py --backbone FILE.py:Class` checks this.
    """

    # Values of stage 06's flags that this model wants unless the flag is given, such as {"learning_rate": 0.005}.
    defaults = {}

    def __init__(self, dim, interests, max_len, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)  # every backbone applies it to the history's vectors, some within as well

    def forward(self, vectors, mask):
        raise NotImplementedError

    def regulariser(self, routing):
        """Scalar that is added to the loss as it is. routing (B, K, L) is what `forward` returned.

        Ranks that share a batch add up their values. So it must be a sum over the rows of the batch, not a mean; a term of the
        weights alone is to be divided by `eimf.parallel.world()`.
        """
        return routing.new_zeros(())

    def examples(self, implicit, target, history, items):
        """What the recommendation loss is taken over: vectors (Q, D) and the items (Q,) that they should find.

        implicit (B, D): the interests that the targets read out; target (B,) and history (B, L) item numbers; items: the
        item table as a function from numbers to vectors. By default (implicit, target), Eq. 13-14; a model with a training
        task of its own returns that task's examples. EIMF's terms keep to (implicit, target).
        """
        return implicit, target


def even_share(mask):
    """Routing of a model that does not weigh events: each real event the same, (B, L) bool -> (B, 1, L)."""
    share = mask[:, None].float()
    return share / share.sum(2, keepdim=True).clamp(min=1)


def newest(mask):
    """Position of the newest real event, (B, L) bool -> (B,) int64; 0 for a history without any."""
    return mask.sum(1).clamp(min=1) - 1


class Events:
    """Rows of a batch that hold real events, for layers that work on each position alone.

    Three quarters of a training batch are padding, so these layers then run four times faster on the real rows. For the
    export, whose shapes must not depend on the data, `fixed` keeps every position.
    """

    def __init__(self, mask, fixed):
        self.shape = mask.shape
        self.rows = None if fixed else mask.flatten().nonzero().squeeze(1)

    def pack(self, x):
        """(B, L, D) -> (R, D)"""
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)

    def unpack(self, x):
        """(R, D) -> (B, L, D), zero at padding"""
        if self.rows is not None:
            x = x.new_zeros(self.shape.numel(), x.shape[1]).index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)
