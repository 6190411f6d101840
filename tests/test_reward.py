"""Rewards by hand, and what they must be in the mean."""

import math
from dataclasses import replace

import pytest
import torch
from torch import tensor

from attention_guided_rl.errors import ConfigError
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Scores
from attention_guided_rl.reward import REWARDS, Candidates, RewardInputs, expected_rewards
from attention_guided_rl.update import reward_weights


def first_pool(session, probes=0, articles=2):
    return session.stream(session.config.corpus, num_probes=probes, purpose=Purpose.POOL).next_pool(articles)


def test_held_out_pays_the_level_of_the_probes_above_their_start(make_session):
    session = make_session()
    pool = first_pool(session, probes=2)
    lengths = pool.probe_value_mask.sum(-1).float()
    logprobs = tensor([[[-8.0, -6.0], [-6.0, -5.0], [-7.0, -1.0]], [[-3.0, -3.0], [-3.0, -3.0], [-1.0, -2.0]]])
    inputs = RewardInputs(
        picks=tensor([[0, 1], [2, 3]]),
        value_logprobs=torch.zeros(2, 2, 4),
        pool=pool,
        prior=torch.zeros(2, 5),
        probe_logprobs=logprobs,
    )
    found = REWARDS["held_out"](inputs).rewards
    for a, gains in enumerate([[3.0, 6.0], [0.0, 3.0]]):  # sums over both probes, minus those before the first step
        total = float(lengths[a].sum())  # P · mean length
        assert found[a].tolist() == pytest.approx([g / total for g in gains], abs=1e-6)


def test_an_untrained_policy_scores_nothing_against_its_own_kind(make_session):
    """Where the choice does not follow the query. Where it does, q_t fits what was picked better than q⁰ can."""
    session = make_session({"reward.kind": "counterfactual", "selection.temperature": 1e9})
    pool, rows = first_pool(session), 400
    numbers = session.uniforms(Purpose.TRAINING, 0, range(2), rows)
    q0 = session.counterfactual_uniforms(Purpose.COUNTERFACTUAL, 0, range(2), rows)
    means = session.pay(session.rollout(pool, numbers), pool, q0).rewards.rewards.mean(1)
    assert float(means.std()) > 0.1  # each query differs from its counterpart
    assert abs(float(means.mean())) < 3 * float(means.std()) / math.sqrt(2 * rows)


def test_the_expectation_over_the_pick_is_a_weighted_mean_over_the_unread(make_session):
    session = make_session()
    pool = first_pool(session, articles=1)
    rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, 0, range(1), 1))
    mean_len = float(pool.mean_value_len[0])
    # step 0: pairs 0 to 2 with σ = ½, ¼, ¼; step 1: pairs 1 and 2 with σ = 0.9, 0.1
    half = tensor([[[0.5, 0.25, 0.25, 0.0, 0.0], [0.0, 0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]])
    rows = type(rows)(**{name: getattr(rows, name) for name in rows.__slots__} | {"selection_logprobs": half.log()})
    candidates = Candidates(tensor([[0, 1, 2, 1, 2, 2]]), tensor([0, 0, 0, 1, 1, 2]))
    values = torch.zeros(1, 6, 4)
    values[0, :, 0] = tensor([-1.0, -2.0, -4.0, -3.0, -13.0, -5.0])
    scores = Scores(value_logprobs=torch.zeros(1, 3, 4), query_hidden=torch.zeros(1, 6, 1), candidate_logprobs=values)
    prior = tensor([[-10.0, -20.0, -30.0, 0.0, 0.0]])
    inputs = RewardInputs(picks=rows.picks, value_logprobs=scores.value_logprobs, pool=pool, prior=prior)
    found = expected_rewards(REWARDS["value_prior"], inputs, scores, candidates, rows)
    assert (found.raw[0] * mean_len).tolist() == pytest.approx([-2.0, -4.0, -5.0])  # −½−½−1, −2.7−1.3, −5
    assert (found.baseline[0] * mean_len).tolist() == pytest.approx([-17.5, -21.0, -30.0])  # −5−5−7.5, −18−3, −30


def test_what_a_reward_needs_is_demanded(make_session):
    counterfactual = make_session({"reward.kind": "counterfactual"})
    pool = first_pool(counterfactual)
    rows = counterfactual.rollout(pool, counterfactual.uniforms(Purpose.TRAINING, 0, range(2), 3))
    with pytest.raises(ValueError, match="uniform numbers"):
        counterfactual.pay(rows, pool)
    held_out = make_session({"reward.kind": "held_out"})
    assert held_out.num_training_probes == 4
    with pytest.raises(ValueError, match="probes"):
        held_out.pay(rows, pool)


def test_the_gradient_through_the_reward_is_weighted_by_the_rows_own_article(make_session):
    session = make_session({"reward.kind": "plain", "reward.scorer": "policy", "reward.gradient_weight": 0.5})
    pool = first_pool(session)
    mask = torch.ones_like(pool.value_mask)
    mask[0, :, 3:] = False  # L̄ is 3 and 4 tokens
    pool = replace(pool, value_mask=mask)
    rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, 0, range(2), 3))
    found = reward_weights(session, rows, pool, tensor([0, 2, 3]), 2.0)  # w/(s·S·L̄) with S = 3
    assert found is not None
    assert found.tolist() == pytest.approx([0.5 / 18, 0.5 / 18, 0.5 / 24])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"reward.kind": "counterfactual", "reward.query_in_context": False}, "query_in_context"),
        ({"reward.kind": "held_out", "reward.pick": "expected"}, "reward.pick"),
        ({"reward.gradient_weight": 0.5}, "reward.scorer: policy"),
        ({"reward.num_probes": 0}, "reward.num_probes"),
        ({"reward.ema_decay": 1.0}, "reward.ema_decay"),
        ({"objective.kl.estimator": "k1"}, "gradient of mean zero"),
        ({"objective.kl.place": "reward"}, "k1"),
        ({"objective.filter.kind": "group_zscore", "objective.filter.min_zscore": 1.2}, "1.155"),  # 2/√3
        ({"objective.filter.kind": "extremes"}, "objective.filter.extremes"),  # 2 + 2 of 3
        ({"embedder.kind": "hashing", "embedder.trained": True}, "embedder.trained"),
        ({"reward.kind": "held_out", "evaluation.articles": 3, "evaluation.num_probes": 0}, "evaluation.num_probes"),
    ],
)
def test_nonsense_is_refused_before_anything_loads(make_config, overrides, words):
    with pytest.raises(ConfigError, match=words):
        make_config(overrides)
