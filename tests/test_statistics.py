"""Statistics of paired comparisons on lists short enough to enumerate by hand."""

import math

import pytest

from attention_guided_rl.statistics import Interval, bootstrap_mean, holm, sign_flip_p, smallest_detectable


def test_bootstrap_of_two_values_spans_both():
    # resampled means: 0 (¼), ½ (½), 1 (¼); the 2.5 % and 97.5 % points are 0 and 1
    assert bootstrap_mean([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)


def test_bootstrap_of_four_values():
    # means are Binomial(4, ¼)/4: P(0) = 0.32, P(≤ ½) = 0.949, P(≤ ¾) = 0.996
    assert bootstrap_mean([0.0, 0.0, 1.0, 0.0]) == Interval(0.25, 0.0, 0.75)


def test_bootstrap_of_many_values_is_about_two_standard_errors_wide():
    interval = bootstrap_mean([0.0, 1.0] * 200)  # SE = 0.5/√400 = 0.025
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert interval.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7]])
def test_an_interval_without_spread_is_the_value(values):
    interval = bootstrap_mean(values)
    assert [interval.mean, interval.low, interval.high] == pytest.approx([0.7, 0.7, 0.7])


def test_bootstrap_gives_the_same_interval_every_time():
    values = [0.3, -0.1, 0.8, 0.2, 0.45]
    assert bootstrap_mean(values) == bootstrap_mean(values)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # of 8 sign patterns only + + + reaches the mean, and − − − its negative
        ([-1.0, -2.0, -3.0], 2 / 8),
        ([1.0] * 5, 2 / 32),
        ([1.0, 1.0, 1.0, 1.0, -1.0], 12 / 32),  # sums of at least 3: 1 + 5 patterns, twice
        ([3.0, -1.0], 1.0),  # sums 4, 2, −2, −4: two of four reach 2, twice
        ([0.0, 0.0, 0.0], 1.0),
        ([5.0], 1.0),  # one article shows nothing
    ],
)
def test_sign_flip_p_counts_the_patterns_at_least_as_extreme(differences, p):
    assert sign_flip_p(differences) == pytest.approx(p)


def test_sign_flip_p_of_many_equal_signs_is_small_but_never_zero():
    assert 0 < sign_flip_p([1.0] * 30) < 0.001


def test_holm_multiplies_by_the_number_of_contrasts_left_and_never_falls():
    # 0.01·3; 0.03·2 = 0.06; 0.04·1 = 0.04, raised to 0.06
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == {"a": pytest.approx(0.03), "c": pytest.approx(0.06), "b": pytest.approx(0.06)}


def test_holm_stops_at_one():
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({}) == {}


def test_smallest_detectable_effect_is_2_8_standard_errors():
    assert smallest_detectable([1.0, 3.0]) == pytest.approx(2.8)  # SD √2, SE √2/√2 = 1
    assert smallest_detectable([1.0]) == math.inf
