"""Reward: what a trajectory is paid, from how well its values were predicted.

In: trajectories, their scores, the pool. Out: Rewards (B, S), nats per value token: every sum of log-probabilities is
divided by L̄, the pool's mean value length, so that with unequal lengths no order is paid for reading long values first.
`REWARDS` is the table; `package.module:name` in the configuration works too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_guided_rl.records import PairPool, Rewards, slot


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """What a reward may use. The oracle pays S unread candidates of one step as if they were S steps."""

    picks: Int[Tensor, "B S"]
    value_logprobs: Float[Tensor, "B S L"]
    pool: PairPool
    prior: Float[Tensor, "A N"]
    """u_j · L̄: Σ log p(value | prompt, empty query) under the same scorer."""

    @property
    def raw(self) -> Float[Tensor, "B S"]:
        """ℓ(v_t | c_t, q_t)."""
        return per_value_token(self.value_logprobs.sum(-1), self.pool)


def per_value_token(sums: Float[Tensor, "B ..."], pool: PairPool) -> Float[Tensor, "B ..."]:
    """Divide sums of log-probabilities by L̄ of each row's pool."""
    mean_len = pool.mean_value_len.to(sums.device)
    mean_len = mean_len.repeat_interleave(sums.shape[0] // len(mean_len))
    return sums / mean_len.view(-1, *(1,) * (sums.dim() - 1))


def plain(inputs: RewardInputs) -> Rewards:
    """The average conditional log-probability: r_t = ℓ(v_t | c_t, q_t)."""
    return Rewards(raw=inputs.raw, baseline=torch.zeros_like(inputs.raw))


def value_prior(inputs: RewardInputs) -> Rewards:
    """r_t = ℓ(v_t | c_t, q_t) − u of the value read: easy values stop paying."""
    prior = per_value_token(inputs.prior, inputs.pool)
    return Rewards(raw=inputs.raw, baseline=slot(prior, inputs.picks))


REWARDS: dict[str, Callable[[RewardInputs], Rewards]] = {"plain": plain, "value_prior": value_prior}
