"""Interests of many histories and exact top-N lists, as training's validation and the evaluation compute them."""
import numpy as np
import torch

import eimf_core

from .data import range_positions


def interests_of(model, history, device="cpu", batch=4096):
    """Run a model or an export over histories (U, L) int64: interests (U, K, D) and routing (U, K, L), float32."""
    parts = []
    with torch.inference_mode():
        for at in range(0, len(history), batch):
            interests, routing = model(torch.from_numpy(history[at:at + batch]).to(device))
            parts.append((interests.cpu().numpy(), routing.cpu().numpy()))
    return tuple(np.concatenate(part) for part in zip(*parts))


def rank(interests, item_vectors, n, exclude=None, n_threads=0):
    """Top-n item numbers by the maximum over interests (paper, 3.4), exact: ids, scores, winning interest, each (U, n).

    item_vectors (N + 1, D) with the padding row, which is no candidate; or, for many calls with few users,
    eimf_core.Items(item_vectors[1:]). `exclude` is (indptr, item numbers) per user.
    Ids are item numbers, -1 where fewer than n candidates remain.
    """
    lists = {}
    if exclude is not None:
        lists = {"exclude_indptr": exclude[0], "exclude_indices": exclude[1] - 1}
    items = item_vectors if isinstance(item_vectors, eimf_core.Items) else item_vectors[1:]
    ids, scores, interest = eimf_core.top_n(np.ascontiguousarray(interests), items, n, n_threads=n_threads, **lists)
    return np.where(ids >= 0, ids + 1, -1), scores, interest


def targets_of(items, middle, end):
    """Targets [middle, end) of each user as flat pairs: row numbers and item numbers, each (T,)."""
    return np.repeat(np.arange(len(middle)), end - middle), items[range_positions(middle, end)]
