"""Bootstrap, paired test and Holm's correction against values worked out by hand."""
import math

import numpy as np
import pytest

from eimf.statistics import bootstrap, holm, paired_p


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; the last is raised to the one before it
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert holm([.5, .9]) == [1.0, 1.0]
    assert holm([None, .02, None]) == [None, .02, None]
    assert holm([.03, .03]) == pytest.approx([.06, .06])
    assert holm([]) == []


def test_paired_p_by_the_closed_form():
    """With 3 degrees of freedom Student's distribution has an elementary integral."""
    differences = [1.0, 2.0, 3.0, 4.0]
    t = np.mean(differences) / (np.std(differences, ddof=1) / 2)
    x = t / math.sqrt(3)
    expected = 2 * (.5 - (x / (1 + x * x) + math.atan(x)) / math.pi)
    assert expected == pytest.approx(.030466, abs=1e-6)
    assert paired_p(differences) == pytest.approx(expected)
    assert paired_p([-d for d in differences]) == pytest.approx(expected)


def test_paired_p_at_its_edges():
    assert paired_p([.3]) is None
    assert paired_p([0, 0, 0]) == 1
    assert paired_p([.25, .25]) == 0


def test_bootstrap_interval():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    mean, low, high = bootstrap(values)
    error = 2 / math.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=.25 * error)
    columns = bootstrap(np.stack([values, -values, np.ones(2000)], 1))
    np.testing.assert_allclose([c[0] for c in columns], [mean, low, high])
    np.testing.assert_allclose([c[1] for c in columns], [-mean, -high, -low])
    np.testing.assert_allclose([c[2] for c in columns], 1)
    assert bootstrap(values) == (mean, low, high)  # the same every time
