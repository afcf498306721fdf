"""Is one model better than another? Bootstrap intervals, paired tests and Holm's correction.

Two questions are kept apart. Over users: would other test users say the same (the models as trained)? Over seeds: would another
training say the same (these test users)? Shapes: U users, S seeds.
"""
import numpy as np

LEVEL = .95  # of intervals; tests use 1 - LEVEL


def bootstrap(values, resamples=2000, block=200):
    """Mean of `values` (U,) or (U, columns) and its percentile interval over resampled users: mean, low, high.

    The same number of users always gets the same resamples, so that results can be repeated.
    """
    rng, n, means = np.random.default_rng(0), len(values), []
    for at in range(0, resamples, block):
        size = min(block, resamples - at)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)  # how often each user was drawn
        means.append(times @ values / n)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return values.mean(0), low, high


def paired_p(differences):
    """Two-sided p-value of Student's paired t-test that `differences` (n,) have mean 0; None if n is below 2.

    1 if all are 0, 0 if all are equal and not 0: a spread of 0 leaves no doubt, however small n is.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    from scipy.stats import ttest_1samp  # here, as it takes 1.5 s and stage 07 needs none

    return float(ttest_1samp(differences, 0).pvalue)


def holm(p_values):
    """Holm's step-down adjustment of a family of p-values: list in the same order. None (not tested) stays None.

    The i-th smallest of m is multiplied by m - i + 1, then raised to the largest before it, and cut at 1.
    """
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, (p, at) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[at] = largest
    return adjusted
