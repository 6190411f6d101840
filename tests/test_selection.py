"""Selection against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from attention_guided_rl.selection import (
    calibrate_temperature,
    entropy,
    head_scores,
    normalised_entropy,
    query_information,
    sample,
    selection_logprobs,
)

LN2, LN3, LN5, LN9 = 0.6931472, 1.0986123, 1.6094379, 2.1972246


def probabilities(scores, unread=None, temperature=1.0, heads="mean_score") -> list[list[float]]:
    scores = tensor(scores)
    everything = torch.ones(scores.shape[0], scores.shape[2], dtype=torch.bool)
    unread = everything if unread is None else tensor(unread)
    return selection_logprobs(scores, unread, temperature, heads).exp().tolist()


# -- scores ------------------------------------------------------------------------------------------------------------


def test_neighbouring_query_heads_share_a_key_head():
    queries = tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]])  # H = 4
    keys = tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])  # two pairs, Hk = 2
    # heads 0 and 1 meet [1 2] and [5 6]; heads 2 and 3 meet [3 4] and [7 8]
    assert head_scores(queries, keys).tolist() == [[[1.0, 5.0], [2.0, 6.0], [7.0, 15.0], [6.0, 14.0]]]


def test_rows_meet_the_keys_of_their_own_article():
    queries = tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None, None]  # G = 3 rows for each of A = 2 articles
    keys = tensor([[10.0, 20.0], [100.0, 200.0]])[:, :, None, None]
    expected = [[[10.0, 20.0]], [[20.0, 40.0]], [[30.0, 60.0]], [[400.0, 800.0]], [[500.0, 1000.0]], [[600.0, 1200.0]]]
    assert head_scores(queries, keys).tolist() == expected


# -- the softmax -------------------------------------------------------------------------------------------------------


def test_one_softmax_over_scores_divided_by_the_temperature():
    scores = [[[0.0, LN2, LN5]]]
    assert probabilities(scores)[0] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1e-6)
    assert probabilities(scores, temperature=0.5)[0] == pytest.approx([1 / 30, 4 / 30, 25 / 30], abs=1e-6)


def test_read_pairs_have_probability_zero_and_leave_the_rest_in_proportion():
    logprobs = selection_logprobs(tensor([[[0.0, LN2, LN5]]]), tensor([[True, False, True]]), 1.0)
    assert logprobs[0, 1] == -torch.inf
    assert logprobs.exp()[0].tolist() == pytest.approx([1 / 6, 0.0, 5 / 6], abs=1e-6)


def test_each_row_has_its_own_unread_pairs():
    chances = probabilities([[[0.0, 0.0, 0.0]]] * 2, unread=[[True, True, False], [False, False, True]])
    assert chances[0] == pytest.approx([0.5, 0.5, 0.0])
    assert chances[1] == [0.0, 0.0, 1.0]


def test_mean_score_averages_before_and_mean_softmax_after_the_softmax():
    scores = [[[0.0, LN9], [0.0, 0.0]]]
    # mean score (0, ln 3); softmaxes (1/10, 9/10) and (1/2, 1/2)
    assert probabilities(scores, heads="mean_score")[0] == pytest.approx([0.25, 0.75], abs=1e-6)
    assert probabilities(scores, heads="mean_softmax")[0] == pytest.approx([0.3, 0.7], abs=1e-6)


def test_mean_softmax_leaves_read_pairs_out_of_every_head():
    scores, unread = [[[0.0, LN9, 7.0], [0.0, 0.0, -7.0]]], [[True, True, False]]
    assert probabilities(scores, unread, heads="mean_softmax")[0] == pytest.approx([0.3, 0.7, 0.0], abs=1e-6)


def test_the_key_that_equals_the_query_is_certain_as_temperature_falls():
    keys = torch.eye(4)[None, :, None]  # four orthogonal keys
    scores = head_scores(keys[0, 2:3], keys)  # the query is the third
    chance = [
        float(selection_logprobs(scores, torch.ones(1, 4, dtype=torch.bool), tau).exp()[0, 2])
        for tau in (1.0, 0.1, 0.01)
    ]
    # e^{1/τ} / (e^{1/τ} + 3): a second softmax over probabilities could not exceed e/(e + 3)
    assert chance == pytest.approx([0.475367, 0.999864, 1.0], abs=1e-6)


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_draws_over_an_even_grid_are_as_frequent_as_probable():
    logprobs = tensor([0.1, 0.0, 0.2, 0.3, 0.4]).log().expand(1000, -1)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.bincount(sample(logprobs, grid), minlength=5).tolist() == [100, 0, 200, 300, 400]


def test_draws_follow_the_order_of_the_cumulative_sum():
    logprobs = tensor([0.25, 0.5, 0.25]).log().expand(5, -1)
    assert sample(logprobs, tensor([0.0, 0.2, 0.25, 0.74, 0.75])).tolist() == [0, 0, 1, 1, 2]


def test_each_row_draws_from_its_own_distribution():
    logprobs = tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert sample(logprobs, tensor([0.9, 0.1])).tolist() == [0, 1]


@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.5, 1 - 1e-7, 1 - 1e-12])
def test_what_has_probability_zero_is_never_drawn(uniform):
    logprobs = tensor([0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]).log()[None]
    drawn = int(sample(logprobs, tensor([uniform], dtype=torch.float64)))
    assert drawn == (2 if uniform < 0.5 else 4)


def test_the_largest_uniform_number_draws_the_last_id_of_a_large_vocabulary():
    logprobs = torch.full((1, 50_000), -math.log(49_990))
    logprobs[0, 49_990:] = -torch.inf
    for uniform in (1 - 2**-24, 1 - 2**-53):  # the second rounds to 1 in float32
        assert 49_985 <= int(sample(logprobs, tensor([uniform], dtype=torch.float64))) <= 49_989


# -- entropy and information -------------------------------------------------------------------------------------------


def test_entropy_counts_nothing_for_impossible_choices():
    values = entropy(tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]]).log())
    assert values.tolist() == pytest.approx([LN2, 0.0, 1.5 * LN2], abs=1e-6)


def test_normalised_entropy_is_a_share_of_that_of_the_uniform_choice():
    # (1/2, 1/2, 0, 0) has half of ln 4, the uniform choice all of it
    scores = tensor([[[0.0, 0.0, -1e4, -1e4]], [[3.0, 3.0, 3.0, 3.0]]])
    assert normalised_entropy(scores, 1.0, "mean_score") == pytest.approx(0.75)


def test_query_information_is_the_mean_divergence_from_the_mean_choice():
    # the mean is (1/2, 1/2); each: 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812
    assert float(query_information(tensor([[0.75, 0.25], [0.25, 0.75]]).log())) == pytest.approx(0.130812, abs=1e-6)


def test_query_information_of_queries_that_disagree_fully_is_log_of_their_number():
    assert float(query_information(torch.eye(3).log())) == pytest.approx(LN3, abs=1e-6)


def test_query_information_of_equal_choices_is_zero():
    assert float(query_information(tensor([[0.2, 0.8, 0.0]] * 4).log())) == pytest.approx(0.0, abs=1e-7)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_of_two_pairs_by_hand():
    # H(0.757) = 0.8 ln 2, so 1/τ = ln(0.757/0.243) = 1.13625
    temperature, reached = calibrate_temperature(tensor([[[0.0, 1.0]]]), 0.8, "mean_score")
    assert reached
    assert temperature == pytest.approx(1 / 1.13625, rel=1e-3)


@pytest.mark.parametrize("heads", ["mean_score", "mean_softmax"])
@pytest.mark.parametrize("target", [0.8, 0.5])
def test_calibration_hits_its_target(target, heads):
    numbers = torch.Generator().manual_seed(0)
    common, own = torch.randn(40, 1, 6, generator=numbers), torch.randn(40, 3, 6, generator=numbers)
    scores = 0.8 + 0.01 * common + 0.001 * own  # a narrow, high band, in which three heads nearly agree
    temperature, reached = calibrate_temperature(scores, target, heads)

    assert reached
    shares = [
        sum(-p * math.log(p) for p in row if p > 0) / math.log(6)
        for row in probabilities(scores.tolist(), None, temperature, heads)
    ]
    assert sum(shares) / len(shares) == pytest.approx(target, abs=1e-3)


def test_an_unreachable_target_gives_the_deviation_over_one_and_a_half():
    # the first query cannot tell the pairs apart, so the mean share cannot fall below 0.5;
    # scores 0, 0, 0, 3: mean 0.75, SD = √(6.75/3) = 1.5
    assert calibrate_temperature(tensor([[[0.0, 0.0]], [[0.0, 3.0]]]), 0.3, "mean_score") == (1.0, False)


def test_equal_scores_give_a_positive_temperature():
    temperature, reached = calibrate_temperature(torch.full((4, 2, 5), 0.7), 0.8, "mean_score")
    assert not reached
    assert 0 < temperature < math.inf
