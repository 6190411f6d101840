"""The agent's mathematics against numbers worked out by hand."""

import math
import statistics

import pytest
import torch
from torch import tensor

from attention_guided_rl.config import FilterConfig, KLConfig, ObjectiveConfig
from attention_guided_rl.rl_agent import (
    AgentState,
    RunningMoments,
    advantage_baseline,
    compute_advantages,
    compute_returns,
    effective_sample_size,
    full_kl,
    keep_rows,
    leave_one_out,
    level_returns,
    policy_loss,
    sampled_kl,
)

PLAIN = ObjectiveConfig(advantage_baseline="none")
ZSCORE = ObjectiveConfig(advantage_baseline="none", filter=FilterConfig(kind="running_zscore"))


def of_one_step(*rewards: float) -> torch.Tensor:
    """Rewards of rows with a single step."""
    return tensor(rewards)[:, None]


# -- returns and baselines ---------------------------------------------------------------------------------------------


def test_returns_to_go_sum_own_and_later_rewards_over_all_steps():
    rewards = tensor([[1.0, 2.0, 6.0], [-3.0, 0.0, 0.3]])
    # (1+2+6)/3, (2+6)/3, 6/3: always divided by S = 3, never by the number of steps left
    expected = tensor([[3.0, 8 / 3, 2.0], [-0.9, 0.1, 0.1]])
    torch.testing.assert_close(compute_returns(rewards, "to_go"), expected)


def test_trajectory_returns_credit_every_step_with_the_mean_reward():
    assert compute_returns(tensor([[1.0, 2.0, 6.0]]), "trajectory").tolist() == [[3.0, 3.0, 3.0]]


def test_leave_one_out_is_the_mean_of_the_other_rows_of_the_group():
    returns = tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0], [10.0, -1.0], [10.0, 1.0], [10.0, 0.0]])
    # first group, step 0: (2+6)/2, (1+6)/2, (1+2)/2; step 1: (0+3)/2, (0+3)/2, (0+0)/2; groups stay apart
    expected = [[4.0, 1.5], [3.5, 1.5], [1.5, 0.0], [10.0, 0.5], [10.0, -0.5], [10.0, 0.0]]
    assert leave_one_out(returns, 3).tolist() == expected


def test_leave_one_out_refuses_a_group_of_one():
    with pytest.raises(ValueError, match=r"at least 2 rows, got 1"):
        leave_one_out(tensor([[1.0]]), 1)


def test_running_mean_is_this_updates_mean_only_before_there_is_an_earlier_one():
    config = ObjectiveConfig(advantage_baseline="running_mean")
    _, state = compute_advantages(tensor([[2.0, 0.0], [0.0, 4.0]]), config, AgentState(), 2)  # Ĝ = [1 0], [2 2]
    first = advantage_baseline(tensor([[1.0, 0.0], [2.0, 2.0]]), config, AgentState(), 2)
    later = advantage_baseline(tensor([[90.0, 90.0]]), config, state, 1)

    assert first.tolist() == [[1.5, 1.0], [1.5, 1.0]]  # (1+2)/2, (0+2)/2
    assert later.tolist() == [[1.5, 1.0]]  # the rows of the update itself have no say


def test_running_mean_covers_all_rows_of_all_earlier_updates():
    config = ObjectiveConfig(advantage_baseline="running_mean")
    _, state = compute_advantages(tensor([[2.0, 0.0], [0.0, 4.0]]), config, AgentState(), 2)  # Ĝ = [1 0], [2 2]
    _, state = compute_advantages(tensor([[0.0, 6.0]]), config, state, 1)  # Ĝ = [3 3]
    # (1+2+3)/3, (0+2+3)/3
    torch.testing.assert_close(advantage_baseline(tensor([[0.0, 0.0]]), config, state, 1), tensor([[2.0, 5 / 3]]))


# -- advantages and their scale ----------------------------------------------------------------------------------------


def test_advantages_of_two_rows_and_two_steps():
    rewards = tensor([[2.0, 0.0], [0.0, 4.0]])
    result, _ = compute_advantages(rewards, ObjectiveConfig(), AgentState(), 2)
    # Ĝ = [1 0], [2 2]; b = [2 2], [1 0]; Ĝ − b = [−1 −2], [1 2]; RMS = √((1+4+1+4)/4) = √2.5
    assert result.returns.tolist() == [[1.0, 0.0], [2.0, 2.0]]
    torch.testing.assert_close(result.advantages, tensor([[-1.0, -2.0], [1.0, 2.0]]) / math.sqrt(2.5))
    assert result.keep.tolist() == [True, True]


def test_equal_rewards_in_a_group_give_advantages_of_exactly_zero():
    result, state = compute_advantages(tensor([[0.5, -0.25]] * 3), ObjectiveConfig(), AgentState(), 3)
    assert result.advantages.tolist() == [[0.0, 0.0]] * 3
    assert state.scale is None


def test_scale_is_the_moving_average_of_earlier_updates_only():
    first, state = compute_advantages(of_one_step(1.0, 7.0), PLAIN, AgentState(), 2)
    second, state = compute_advantages(of_one_step(7.0, 17.0), PLAIN, state, 2)
    third, state = compute_advantages(of_one_step(5.4, -10.8), PLAIN, state, 2)

    torch.testing.assert_close(first.advantages, of_one_step(0.2, 1.4))  # its own RMS: √((1+49)/2) = 5
    torch.testing.assert_close(second.advantages, of_one_step(1.4, 3.4))  # still 5, not its own √((49+289)/2) = 13
    torch.testing.assert_close(third.advantages, of_one_step(1.0, -2.0))  # 0.95·5 + 0.05·13 = 5.4


def test_an_update_without_spread_leaves_the_scale():
    _, state = compute_advantages(of_one_step(1.0, 7.0), PLAIN, AgentState(), 2)
    result, after = compute_advantages(of_one_step(0.0, 0.0), PLAIN, state, 2)
    assert result.advantages.tolist() == [[0.0], [0.0]]
    assert after.scale == state.scale == 5.0


def test_scale_stays_open_until_an_update_has_spread():
    _, state = compute_advantages(of_one_step(0.0, 0.0), PLAIN, AgentState(), 2)
    result, _ = compute_advantages(of_one_step(1.0, 7.0), PLAIN, state, 2)
    torch.testing.assert_close(result.advantages, of_one_step(0.2, 1.4))


def test_scale_has_a_floor_of_a_thousandth_of_a_nat():
    result, _ = compute_advantages(of_one_step(1e-5, -1e-5), PLAIN, AgentState(), 2)
    torch.testing.assert_close(result.advantages, of_one_step(0.01, -0.01))  # 1e-5 / 1e-3, not 1e-5 / 1e-5


def test_rows_that_the_filter_drops_still_count_for_scale_and_baseline():
    config = ObjectiveConfig(advantage_baseline="running_mean", filter=FilterConfig(kind="running_zscore"))
    result, state = compute_advantages(of_one_step(1.0, 7.0), config, AgentState(), 1)
    assert result.keep.tolist() == [False, False]
    assert state.scale == pytest.approx(3.0)  # deviations −3, 3 from the mean 4
    assert [m.mean for m in state.returns] == [4.0]


# -- the filter --------------------------------------------------------------------------------------------------------

WARM_UP = [0.0, 2.0] * 7  # 14 trajectories: mean 1, squares 14


def after_warm_up() -> AgentState:
    """15 trajectories: n = 15, mean = 1, SD = √(14/14) = 1."""
    _, state = compute_advantages(of_one_step(*WARM_UP), ZSCORE, AgentState(), 1)
    _, state = compute_advantages(of_one_step(1.0), ZSCORE, state, 1)
    return state


def test_filter_keeps_nothing_until_fifteen_trajectories_have_been_seen():
    _, state = compute_advantages(of_one_step(*WARM_UP), ZSCORE, AgentState(), 1)
    fifteenth, state = compute_advantages(of_one_step(1.0), ZSCORE, state, 1)
    sixteenth, _ = compute_advantages(of_one_step(100.0), ZSCORE, state, 1)
    assert fifteenth.keep.tolist() == [False]  # 14 were seen before it
    assert sixteenth.keep.tolist() == [True]


def test_a_first_update_of_twenty_rows_is_all_warm_up():
    result, _ = compute_advantages(of_one_step(*[float(x) for x in range(20)]), ZSCORE, AgentState(), 1)
    assert not result.keep.any()


def test_filter_keeps_rewards_strictly_above_mean_plus_one_deviation():
    result, _ = compute_advantages(of_one_step(2.0, 2.5, 1.9, -9.0), ZSCORE, after_warm_up(), 1)
    assert result.keep.tolist() == [False, True, False, False]  # 2.0 is 1 + 1·1 itself


def test_filter_judges_the_mean_reward_of_all_steps():
    rewards = tensor([[9.0, -4.8], [2.0, 2.0], [0.0, 4.2]])  # means 2.1, 2.0, 2.1
    result, _ = compute_advantages(rewards, ZSCORE, fresh_returns(after_warm_up()), 1)
    assert result.keep.tolist() == [True, False, True]


def fresh_returns(state: AgentState) -> AgentState:
    """The state without per-step statistics, for rows with another number of steps."""
    return AgentState(scale=state.scale, rewards=state.rewards)


def test_filter_threshold_follows_min_zscore():
    config = FilterConfig(kind="running_zscore", min_zscore=0.5)
    assert keep_rows(of_one_step(1.5, 1.6), config, after_warm_up(), 1).tolist() == [False, True]  # 1 + 0.5·1


def test_filter_statistics_cover_all_earlier_trajectories_kept_or_not():
    _, state = compute_advantages(of_one_step(2.0, 2.5, 1.9, -9.0), ZSCORE, after_warm_up(), 1)
    # n = 19, sum = 15 − 2.6 = 12.4, squares = 29 + 94.86; SD = √((123.86 − 12.4²/19)/18) = 2.536; threshold 3.1887.
    # Counting the kept 2.5 alone it would be 2.13.
    result, _ = compute_advantages(of_one_step(3.18, 3.20), ZSCORE, state, 1)
    assert result.keep.tolist() == [False, True]


def test_no_filter_keeps_every_row():
    assert keep_rows(of_one_step(-5.0, 0.0), FilterConfig(), AgentState(), 1).tolist() == [True, True]


def test_running_moments_equal_those_of_the_whole_list():
    numbers = [1e6 + x for x in (0.5, -2.0, 3.25, 8.0, -1.5, 0.0, 7.75)]
    moments = RunningMoments()
    for chunk in (numbers[:1], [], numbers[1:4], numbers[4:]):
        moments = moments.including(tensor(chunk, dtype=torch.float64))
    assert moments.count == 7
    assert moments.mean == pytest.approx(statistics.mean(numbers), rel=1e-14)
    assert moments.deviation == pytest.approx(statistics.stdev(numbers), rel=1e-9)


def test_deviation_of_a_single_number_is_zero():
    assert RunningMoments().including(tensor([3.0])).deviation == 0.0


# -- loss --------------------------------------------------------------------------------------------------------------


def test_policy_loss_is_a_sum_over_the_whole_updates_tokens():
    logprobs = tensor([[[-1.0, -3.0], [-0.5, -0.5]]])
    advantages = tensor([[2.0, -1.0]])
    # −(2·(−4) − 1·(−1)) = 7, over M
    assert float(policy_loss(logprobs, advantages, 4)) == 1.75
    assert float(policy_loss(logprobs, advantages, 8)) == 0.875  # another micro-batch holds the other half


def test_policy_loss_has_no_gradient_through_advantages():
    logprobs = torch.zeros(1, 2, 2, requires_grad=True)
    advantages = tensor([[2.0, -1.0]], requires_grad=True)
    policy_loss(logprobs, advantages, 4).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[[-0.5, -0.5], [0.25, 0.25]]]  # −A/M
    assert advantages.grad is None


def test_full_kl_is_the_reverse_one():
    policy, reference = tensor([0.9, 0.1]).log(), tensor([0.5, 0.5]).log()
    # 0.9 ln 1.8 + 0.1 ln 0.2 = 0.36806; the other way round it would be 0.51083
    assert float(full_kl(policy, reference)) == pytest.approx(0.368064, abs=1e-6)


def test_full_kl_of_every_position():
    policy = tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    reference = tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log()
    # 0.5 ln 2 + 0.25 ln ½ = 0.25 ln 2
    torch.testing.assert_close(full_kl(policy, reference), tensor([0.25 * 0.6931472, 0.0]))


def test_masked_ids_add_nothing_to_full_kl_or_its_gradient():
    mask = tensor([False, False, True])
    logits = tensor([math.log(9.0), 0.0, 5.0], requires_grad=True)
    reference = tensor([0.0, 0.0, 5.0]).masked_fill(mask, -torch.inf).log_softmax(-1)
    divergence = full_kl(logits.masked_fill(mask, -torch.inf).log_softmax(-1), reference)
    divergence.backward()

    assert float(divergence.detach()) == pytest.approx(0.368064, abs=1e-6)  # (0.9, 0.1) against (0.5, 0.5), as above
    assert logits.grad is not None
    # p_v (ln π/π_0 − KL): 0.9·(0.587787 − 0.368064), and its negative
    torch.testing.assert_close(logits.grad, tensor([0.197750, -0.197750, 0.0]), atol=1e-6, rtol=0)


def test_full_kl_to_itself_is_exactly_zero_without_gradient():
    logits = tensor([0.3, -1.2, 2.0], requires_grad=True)
    divergence = full_kl(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    divergence.backward()
    assert float(divergence.detach()) == 0.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.0, 0.0, 0.0]


def test_sampled_kl_estimators():
    logprobs, reference = tensor([math.log(0.5), math.log(0.25)]), tensor([math.log(0.25), math.log(0.5)])
    # k1 = ±ln 2; k2 = (ln 2)²/2 both times; k3 = ½ − 1 + ln 2 and 2 − 1 − ln 2
    torch.testing.assert_close(sampled_kl(logprobs, reference, "k2"), tensor([0.2402265, 0.2402265]))
    torch.testing.assert_close(sampled_kl(logprobs, reference, "k3"), tensor([0.1931472, 0.3068528]))


@pytest.mark.parametrize(
    ("advantages", "expected"),
    [
        ([[3.0, 1.0], [-2.0, 0.0]], 36 / 14),  # (3+1+2)² / (9+1+4)
        ([[0.5, -0.5], [0.5, 0.5]], 4.0),  # equal weights count in full
        ([[0.0, 0.0]], 0.0),
    ],
)
def test_effective_sample_size(advantages, expected):
    assert effective_sample_size(tensor(advantages)) == pytest.approx(expected)


def test_levels_credit_what_each_step_and_the_later_ones_add():
    # r = 1, 4, 3: to go from step 1: (1 + 4 + 3)/3; from 2: ((4−1) + (3−1))/3; from 3: (3−4)/3
    found = level_returns(tensor([[1.0, 4.0, 3.0]]), "to_go")[0].tolist()
    assert found == pytest.approx([8 / 3, 5 / 3, -1 / 3])
    assert level_returns(tensor([[1.0, 4.0, 3.0]]), "trajectory")[0].tolist() == pytest.approx([8 / 3] * 3)


def test_a_group_filter_judges_rows_by_their_own_group():
    # groups (0, 0, 0, 4): mean 1, SD 2, the last is 1.5 SD above; (5, 6, 7, 8): mean 6.5, SD 1.291: 8 is 1.162 above
    rewards = of_one_step(0.0, 0.0, 0.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    for z, expected in ((1.0, [3, 7]), (1.2, [3]), (0.3, [3, 6, 7])):
        keep = keep_rows(rewards, FilterConfig(kind="group_zscore", min_zscore=z), AgentState(), 4)
        assert keep.nonzero()[:, 0].tolist() == expected
    assert not keep_rows(
        of_one_step(2.0, 2.0), FilterConfig(kind="group_zscore", min_zscore=0.0), AgentState(), 2
    ).any()


def test_extremes_are_the_best_and_the_worst_with_ties_by_place():
    rewards = of_one_step(3.0, 1.0, 2.0, 5.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    keep = keep_rows(rewards, FilterConfig(kind="extremes", extremes=1), AgentState(), 5)
    assert keep.nonzero()[:, 0].tolist() == [1, 3, 5, 9]  # equal ones: the first is the best, the last the worst


def test_a_penalty_in_the_reward_lowers_returns_and_leaves_the_filter_alone():
    config = ObjectiveConfig(
        advantage_baseline="none",
        kl=KLConfig(coefficient=0.5, place="reward", estimator="k1"),
        filter=FilterConfig(kind="group_zscore", min_zscore=0.0),
    )
    rewards, kl = tensor([[1.0, 3.0], [0.0, 2.0]]), tensor([[4.0, 2.0], [0.0, 0.0]])
    found, _ = compute_advantages(rewards, config, AgentState(scale=1.0), 2, kl=kl)
    # row 0: (1−2) + (3−1) = 1, over S = 2; then (3−1)/2. Row 1: (0 + 2)/2, 2/2
    assert found.returns.tolist() == [[0.5, 1.0], [1.0, 1.0]]
    assert found.keep.tolist() == [True, False]  # means 2 and 1, without the penalty
