"""Recall, NDCG and hit rate of ranked lists, per user (paper, 4.1; the definitions of the protocol).

Shapes: U users, n ranks. Targets come as flat pairs: `target_user` (T,) row numbers 0..U-1 and `target_item` (T,).
"""
import numpy as np


def hit_matrix(ranked, target_user, target_item):
    """Which ranked items (U, n) are targets of their row: bool (U, n), and distinct targets per row: int64 (U,).

    Negative ids mark empty ranks and never hit.
    """
    base = max(ranked.max(initial=0), target_item.max(initial=0)) + 1
    targets = np.unique(target_user.astype(np.int64) * base + target_item)
    keys = np.arange(len(ranked))[:, None] * base + ranked
    hits = np.isin(keys, targets) & (ranked >= 0)
    return hits, np.bincount(targets // base, minlength=len(ranked))


def per_user(hits, n_targets, cutoffs=(5, 10, 20, 50)):
    """Metrics of every user from the hit matrix: dict of float64 (U,), keys like "recall@20".

    recall@k: hits in the top k over the user's targets. hr@k: 1 if there is any. ndcg@k: rank-aware, with the ideal
    over min(k, targets) ranks.
    """
    hits = hits.astype(np.float64)
    discount = 1 / np.log2(np.arange(hits.shape[1]) + 2)
    ideal = np.concatenate([[0], np.cumsum(discount)])
    result = {}
    for k in cutoffs:
        found = hits[:, :k].sum(1)
        result[f"recall@{k}"] = found / n_targets
        result[f"ndcg@{k}"] = (hits[:, :k] * discount[:k]).sum(1) / ideal[np.minimum(min(k, hits.shape[1]), n_targets)]
        result[f"hr@{k}"] = (found > 0).astype(np.float64)
    return result


def ndcg_published(ranked, target_user, target_item, k):
    """The published NDCG columns' computation, float64 (U,): not NDCG, kept only to compare with them.

    The authors' evaluation iterates a Python set of the top k, so a hit's position is its place in the set's order,
    and the ideal counts only the hits found. The order of a set is an implementation detail of CPython, so the only
    faithful way is to build the sets; hence the loop over users.
    """
    targets = [set() for _ in ranked]
    for user, item in zip(target_user.tolist(), target_item.tolist()):
        targets[user].add(item)
    discount = (1 / np.log2(np.arange(k) + 2)).tolist()
    values = np.zeros(len(ranked))
    for user, row in enumerate(ranked[:, :k].tolist()):
        found = [discount[place] for place, item in enumerate(set(row)) if item in targets[user]]
        values[user] = sum(found) / sum(discount[:len(found)]) if found else 0.0
    return values
