"""Reward: what a trajectory is paid, from how well its values were predicted.

In: trajectories, their scores, the pool. Out: Rewards (B, S), nats per value token: every sum of log-probabilities is
divided by L̄, the pool's mean value length, so that with unequal lengths no order is paid for reading long values first.
`REWARDS` is the table; `package.module:name` in the configuration works too, and may name a plain function.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_guided_rl.records import BranchRequest, PairPool, Rewards, Scores, TrajectoryBatch, slot


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """What a reward may use. The oracle pays S unread candidates of one step as if they were S steps."""

    picks: Int[Tensor, "B S"]
    value_logprobs: Float[Tensor, "B S L"]
    pool: PairPool
    prior: Float[Tensor, "A N"]
    """u_j · L̄: Σ log p(value | prompt, empty query) under the same scorer."""
    counterfactual_logprobs: Float[Tensor, "B S L"] | None = None
    """log p(value token | c_t, q⁰_t), for a reward that needs `counterfactual`."""
    probe_logprobs: Float[Tensor, "B S1 P"] | None = None
    """Σ log p(probe | c after t steps, empty query), for a reward that needs `probes`."""

    @property
    def raw(self) -> Float[Tensor, "B S"]:
        """ℓ(v_t | c_t, q_t)."""
        return per_value_token(self.value_logprobs.sum(-1), self.pool)


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward: what it pays, and what it needs besides the log-probabilities of the values read."""

    pay: Callable[[RewardInputs], Rewards]
    needs: Literal["counterfactual", "probes"] | None = None
    is_level: bool = False
    """True: r_t says how much is known after step t, not what step t added; returns then credit its increments."""

    def __call__(self, inputs: RewardInputs) -> Rewards:
        """Return the rewards."""
        return self.pay(inputs)


def per_value_token(sums: Float[Tensor, "B ..."], pool: PairPool) -> Float[Tensor, "B ..."]:
    """Divide sums of log-probabilities by L̄ of each row's pool."""
    return _divide(sums, pool.mean_value_len)


def probe_curve(probe_logprobs: Float[Tensor, "B S1 P"], pool: PairPool) -> Float[Tensor, "B S1"]:
    """Return ℓ of the probes after t = 0 … S pairs, nats per probe token: Σ over probes / (P · their mean length)."""
    lengths = pool.probe_value_mask.sum(-1).float()
    return _divide(probe_logprobs.mean(-1), lengths.mean(-1))


def plain(inputs: RewardInputs) -> Rewards:
    """The average conditional log-probability: r_t = ℓ(v_t | c_t, q_t)."""
    return Rewards(raw=inputs.raw, baseline=torch.zeros_like(inputs.raw))


def value_prior(inputs: RewardInputs) -> Rewards:
    """r_t = ℓ(v_t | c_t, q_t) − u of the value read: easy values stop paying."""
    prior = per_value_token(inputs.prior, inputs.pool)
    return Rewards(raw=inputs.raw, baseline=slot(prior, inputs.picks))


def counterfactual(inputs: RewardInputs) -> Rewards:
    """r_t = ℓ(v_t | c_t, q_t) − ℓ(v_t | c_t, q⁰_t), q⁰ by the untrained model: what this query did for this value.

    A good order earns nothing by it, for the context is the same on both sides.
    """
    assert inputs.counterfactual_logprobs is not None
    return Rewards(raw=inputs.raw, baseline=per_value_token(inputs.counterfactual_logprobs.sum(-1), inputs.pool))


def held_out(inputs: RewardInputs) -> Rewards:
    """r_t = ℓ(probes | c_{t+1}) − ℓ(probes | c_1): its mean over steps is the area under the learning curve."""
    assert inputs.probe_logprobs is not None
    curve = probe_curve(inputs.probe_logprobs, inputs.pool)
    return Rewards(raw=curve[:, 1:], baseline=curve[:, :1].expand_as(curve[:, 1:]))


REWARDS: dict[str, Reward] = {
    "plain": Reward(plain),
    "value_prior": Reward(value_prior),
    "counterfactual": Reward(counterfactual, needs="counterfactual"),
    "held_out": Reward(held_out, needs="probes", is_level=True),
}


def reward_inputs(rows: TrajectoryBatch, scores: Scores, pool: PairPool, prior: Float[Tensor, "A N"]) -> RewardInputs:
    """Gather what a reward may use from finished and scored rows."""
    return RewardInputs(
        picks=rows.picks,
        value_logprobs=scores.value_logprobs,
        pool=pool,
        prior=prior,
        counterfactual_logprobs=scores.counterfactual_logprobs,
        probe_logprobs=scores.probe_logprobs,
    )


def with_probes(request: BranchRequest, rows: TrajectoryBatch, pool: PairPool) -> BranchRequest:
    """Ask for the pool's probes as well.

    Raises:
        ValueError: it has none.
    """
    if not pool.probe_value_ids.shape[1]:
        raise ValueError("this reward needs probes, and the pool has none")
    group = rows.num_rows // pool.num_articles
    return replace(
        request,
        probe_ids=pool.probe_value_ids.repeat_interleave(group, 0),
        probe_mask=pool.probe_value_mask.repeat_interleave(group, 0),
    )


@dataclass(frozen=True, slots=True)
class Candidates:
    """What each row might have read: all pairs unread at step 0, then those at step 1, …"""

    pairs: Int[Tensor, "B C"]
    """Pool positions."""
    steps: Int[Tensor, " C"]
    """Step of each, the same for all rows."""


def unread_candidates(rows: TrajectoryBatch, pool: PairPool) -> Candidates:
    """Return the unread pairs of every step of every row; C = N + (N − 1) + … over S steps."""
    unread = torch.ones(rows.num_rows, pool.num_pairs, dtype=torch.bool, device=rows.picks.device)
    pairs = []
    for step in range(rows.num_steps):
        pairs.append(unread.nonzero()[:, 1].view(rows.num_rows, -1))
        picks_of_step = rows.picks[:, step : step + 1]
        unread.scatter_(1, picks_of_step, False)
    steps = torch.arange(rows.num_steps, device=rows.picks.device)
    counts = torch.tensor([p.shape[1] for p in pairs], device=rows.picks.device)
    return Candidates(torch.cat(pairs, 1), steps.repeat_interleave(counts))


def with_candidates(request: BranchRequest, candidates: Candidates, pool: PairPool) -> BranchRequest:
    """Ask for the candidates' values as well."""
    return replace(
        request,
        candidate_ids=slot(pool.value_ids, candidates.pairs),
        candidate_mask=slot(pool.value_mask, candidates.pairs),
        candidate_steps=candidates.steps,
    )


def expected_rewards(
    reward: Reward, inputs: RewardInputs, scores: Scores, candidates: Candidates, rows: TrajectoryBatch
) -> Rewards:
    """Return E_{a ~ σ(· | q_t, unread)} of the reward at every step, for rewards of the pick alone.

    The pick's own luck is averaged out of r_t; later steps still follow from what was read.
    """
    assert scores.candidate_logprobs is not None
    paid = reward(replace(inputs, picks=candidates.pairs, value_logprobs=scores.candidate_logprobs))
    row = torch.arange(rows.num_rows, device=candidates.pairs.device)[:, None]
    weights = rows.selection_logprobs[row, candidates.steps, candidates.pairs].exp()

    def expectation(values: Float[Tensor, "B C"]) -> Float[Tensor, "B S"]:
        sums = values.new_zeros(rows.picks.shape)
        return sums.index_add(1, candidates.steps, weights * values)

    return Rewards(raw=expectation(paid.raw), baseline=expectation(paid.baseline))


def _divide(sums: Float[Tensor, "B ..."], lengths: Float[Tensor, " A"]) -> Float[Tensor, "B ..."]:
    lengths = lengths.to(sums.device).repeat_interleave(sums.shape[0] // len(lengths))
    return sums / lengths.view(-1, *(1,) * (sums.dim() - 1))
