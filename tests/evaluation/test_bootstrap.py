"""Bootstrap intervals: do they cover, does pairing pay, and values that can be worked out."""

import numpy as np
import pytest

from chance import shifted
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import bootstrap, bootstrap_interval, paired_difference


def test_interval_covers_the_truth_as_often_as_it_says(holds):
    rng = np.random.default_rng(shifted(0))
    covered = 0
    for seed in range(500):
        weights = rng.uniform(50, 500, size=80)
        interval = bootstrap_interval(weights * rng.normal(1.5, 0.3, size=80), weights, resamples=300, seed=seed)
        covered += interval.low <= 1.5 <= interval.high
    holds(covered / 500, above=0.89, below=0.99)


def test_width_agrees_with_the_standard_error(holds):
    values = np.random.default_rng(shifted(0)).normal(size=1000)
    value, low, high = bootstrap_interval(values, resamples=4000)
    assert value == pytest.approx(values.mean())
    holds((high - low) / 2 / (1.96 * values.std() / np.sqrt(1000)), above=0.9, below=1.1)


def test_pairing_is_tighter_than_two_intervals(holds):
    rng = np.random.default_rng(shifted(0))
    bytes_ = rng.uniform(50, 500, size=200)
    hard = bytes_ * rng.normal(1.5, 0.4, size=200)
    easier = hard - bytes_ * rng.normal(0.1, 0.02, size=200)
    paired = paired_difference(hard, easier, bytes_)
    a, b = bootstrap_interval(hard, bytes_), bootstrap_interval(easier, bytes_, seed=1)
    assert paired.value == pytest.approx(a.value - b.value)
    assert 0 < paired.low < paired.value < paired.high
    unpaired = np.hypot(a.high - a.low, b.high - b.low)
    holds((paired.high - paired.low) / unpaired, below=1 / 5)


def test_by_hand():
    assert bootstrap_interval([3.0, 6.0], [1.0, 2.0]) == (3.0, 3.0, 3.0)  # the same ratio in every item
    assert bootstrap_interval([1, 2, 6]).value == 3.0
    value, low, high = bootstrap_interval([0.0, 1.0], confidence=0.99)  # resampled: 0, 1/2, 1/2 or 1
    assert (value, low, high) == (0.5, 0.0, 1.0)
    assert paired_difference([2.0, 4.0], [1.0, 3.0]) == (1.0, 1.0, 1.0)


def test_seed_decides_and_blocks_do_not(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    interval = bootstrap_interval(values)
    assert bootstrap_interval(values) == interval != bootstrap_interval(values, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK", 170)
    assert bootstrap_interval(values) == interval


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "shapes"),
        (([1.0, 2.0], [1.0]), {}, "shapes"),
        (([1.0], [0.0]), {}, "denominator of 0"),
        (([1.0],), {"confidence": 95}, "confidence 95"),
        (([1.0],), {"resamples": 0}, "0 resamples"),
    ],
)
def test_refuses(arguments, options, message):
    with pytest.raises(DataError, match=message):
        bootstrap_interval(*arguments, **options)
