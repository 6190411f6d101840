"""The agent's mathematics: returns, advantages, filters, the policy loss and KL. Pure functions, no model, no device.

In: rewards (B, S) of all rows of an update, from all processes, rows of a group side by side. Out: advantages and
which rows to keep; and, given log-probabilities, the loss. What an update must remember is in AgentState.

    Ĝ_t = (1/S) Σ_{t'≥t} r_{t'}          A_t = (Ĝ_t − b_t) / s
    L = (1/M) Σ_{kept rows} Σ_t Σ_i [ −A_t log π(q_{t,i}) + β KL_{t,i} ],   M = kept rows × S × Q
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attention_guided_rl.config import FilterConfig, ObjectiveConfig
from attention_guided_rl.records import Advantages

SCALE_DECAY = 0.95
SCALE_FLOOR = 1e-3  # nats


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of a stream of numbers."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: Float[Tensor, " n"]) -> "RunningMoments":
        """Return the moments after these values too (Chan et al.'s pairwise update)."""
        values = values.double()
        added = len(values)
        if added == 0:
            return self
        mean, squares = float(values.mean()), float(((values - values.mean()) ** 2).sum())
        count, delta = self.count + added, mean - self.mean
        return RunningMoments(
            count,
            self.mean + delta * added / count,
            self.squares + squares + delta**2 * self.count * added / count,
        )

    @property
    def deviation(self) -> float:
        """Standard deviation with n − 1."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


@dataclass(frozen=True, slots=True)
class AgentState:
    """What advantages remember from earlier updates; part of the checkpoint."""

    scale: float | None = None
    """s: moving average of the RMS of Ĝ − b; None before the first update that had any spread."""
    rewards: RunningMoments = field(default_factory=RunningMoments)
    """Of the trajectory rewards (1/S) Σ r_t of all earlier trajectories, kept or not."""
    returns: tuple[RunningMoments, ...] = ()
    """Of Ĝ_t, for each step index, of all earlier trajectories, kept or not."""


def compute_returns(rewards: Float[Tensor, "B S"], kind: Literal["to_go", "trajectory"]) -> Float[Tensor, "B S"]:
    """Ĝ_t = (1/S) Σ_{t'≥t} r_{t'} (`to_go`) or (1/S) Σ_{t'} r_{t'}; never divided by the number of steps left."""
    num_steps = rewards.shape[1]
    if kind == "trajectory":
        return rewards.sum(1, keepdim=True).expand_as(rewards) / num_steps
    return rewards.flip(1).cumsum(1).flip(1) / num_steps


def level_returns(rewards: Float[Tensor, "B S"], kind: Literal["to_go", "trajectory"]) -> Float[Tensor, "B S"]:
    """Ĝ_t of rewards that are levels: `to_go` is (1/S) Σ_{t'≥t} (r_{t'} − r_{t−1}), r before the first step being 0."""
    returns = compute_returns(rewards, kind)
    if kind == "trajectory":
        return returns
    num_steps = rewards.shape[1]
    before = torch.cat([torch.zeros_like(rewards[:, :1]), rewards[:, :-1]], 1)
    left = torch.arange(num_steps, 0, -1, device=rewards.device) / num_steps
    return returns - left * before


def leave_one_out(returns: Float[Tensor, "B S"], group_size: int) -> Float[Tensor, "B S"]:
    """b_t: the mean of Ĝ_t over the other rows of the group."""
    if group_size < 2:
        raise ValueError(f"leave_one_out needs groups of at least 2 rows, got {group_size}")
    groups = returns.unflatten(0, (-1, group_size))
    first = groups[:, :1]
    shifted = groups - first  # so that equal returns have a baseline equal to the bit, and advantages of exactly 0
    others = first + (shifted.sum(1, keepdim=True) - shifted) / (group_size - 1)
    return others.flatten(0, 1)


def advantage_baseline(
    returns: Float[Tensor, "B S"], config: ObjectiveConfig, state: AgentState, group_size: int
) -> Float[Tensor, "B S"]:
    """Return b_t. `running_mean` is over earlier updates only; before there are any, over this one."""
    if config.advantage_baseline == "leave_one_out":
        return leave_one_out(returns, group_size)
    if config.advantage_baseline == "none":
        return torch.zeros_like(returns)
    if not state.returns:
        first = returns[:1]
        return (first + (returns - first).mean(0, keepdim=True)).expand_as(returns)
    return returns.new_tensor([moments.mean for moments in state.returns]).expand_as(returns)


def keep_rows(
    rewards: Float[Tensor, "B S"], config: FilterConfig, state: AgentState, group_size: int
) -> Bool[Tensor, " B"]:
    """Return which trajectories the filter keeps, judged within their group or by earlier updates only."""
    trajectory_rewards = rewards.mean(1)
    if config.kind == "none":
        return torch.ones_like(trajectory_rewards, dtype=torch.bool)
    if config.kind in ("group_zscore", "extremes"):
        groups = trajectory_rewards.double().unflatten(0, (-1, group_size))
        keep = _above_group(groups, config.min_zscore) if config.kind == "group_zscore" else _extremes(groups, config)
        return keep.flatten()
    if state.rewards.count < config.warmup:
        return torch.zeros_like(trajectory_rewards, dtype=torch.bool)
    threshold = state.rewards.mean + config.min_zscore * state.rewards.deviation
    return trajectory_rewards.double() > threshold


def _above_group(groups: Float[Tensor, "A G"], min_zscore: float) -> Bool[Tensor, "A G"]:
    """Return which rows exceed their group's mean by so many of its standard deviations (n − 1)."""
    return groups > groups.mean(1, keepdim=True) + min_zscore * groups.std(1, keepdim=True)


def _extremes(groups: Float[Tensor, "A G"], config: FilterConfig) -> Bool[Tensor, "A G"]:
    """Return the best and the worst rows of each group; of equal ones the earlier counts as the better."""
    rank = groups.sort(dim=1, descending=True, stable=True).indices
    chosen = torch.cat([rank[:, : config.extremes], rank[:, -config.extremes :]], 1)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, chosen, True)


def compute_advantages(
    rewards: Float[Tensor, "B S"],
    config: ObjectiveConfig,
    state: AgentState,
    group_size: int,
    *,
    is_level: bool = False,
    kl: Float[Tensor, "B S"] | None = None,
) -> tuple[Advantages, AgentState]:
    """Turn rewards into advantages and kept rows, and return the state for the next update.

    `kl` is the mean k1 of each step's query, where the penalty is taken from the reward: it lowers the returns and
    leaves the filter alone.
    """
    returns = (level_returns if is_level else compute_returns)(rewards, config.returns)
    if kl is not None:
        returns = returns - config.kl.coefficient * compute_returns(kl, config.returns)
    deviation = returns - advantage_baseline(returns, config, state, group_size)
    rms = float(deviation.double().square().mean().sqrt())
    scale = state.scale if state.scale is not None else rms
    divisor = max(scale, SCALE_FLOOR)
    advantages = deviation / divisor
    keep = keep_rows(rewards, config.filter, state, group_size)

    next_scale = state.scale
    if rms > 0:
        next_scale = rms if state.scale is None else SCALE_DECAY * state.scale + (1 - SCALE_DECAY) * rms
    earlier = state.returns or (RunningMoments(),) * returns.shape[1]
    next_state = AgentState(
        scale=next_scale,
        rewards=state.rewards.including(rewards.mean(1)),
        returns=tuple(m.including(returns[:, t]) for t, m in enumerate(earlier)),
    )
    return Advantages(returns=returns, advantages=advantages, keep=keep, scale=divisor), next_state


def effective_sample_size(advantages: Float[Tensor, "B S"]) -> float:
    """(Σ|A|)² / Σ A²: how many equal advantages would weigh as much; 0 if all are 0."""
    squares = float(advantages.square().sum())
    return float(advantages.abs().sum()) ** 2 / squares if squares > 0 else 0.0


def policy_loss(
    logprobs: Float[Tensor, "B S Q"], advantages: Float[Tensor, "B S"], num_query_tokens: int
) -> Float[Tensor, ""]:
    """−(1/M) Σ sg(A_t) log π(q_{t,i} | c_t, q_{t,<i}): a micro-batch's share, a sum over M and not a mean."""
    return -(advantages.detach()[:, :, None] * logprobs).sum() / num_query_tokens


def selection_loss(
    logprobs: Float[Tensor, "B S"], advantages: Float[Tensor, "B S"], num_query_tokens: int
) -> Float[Tensor, ""]:
    """−(1/M) Σ sg(A_t) log σ(a_t | q_t, unread): the pick as an action of its own, where the embedder is trained."""
    return -(advantages.detach() * logprobs).sum() / num_query_tokens


def reward_loss(
    value_logprobs: Float[Tensor, "B SL"], weights: Float[Tensor, " B"], num_query_tokens: int
) -> Float[Tensor, ""]:
    """−(1/M) Σ_b w_b Σ log p(value tokens): the gradient through the reward itself, where its scorer is the policy."""
    return -(weights[:, None] * value_logprobs).sum() / num_query_tokens


def full_kl(logprobs: Float[Tensor, "... V"], reference: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """Σ_v π(v) (log π(v) − log π_0(v)); ids masked out of both distributions contribute 0, never 0·∞."""
    difference = (logprobs - reference).masked_fill(logprobs == -torch.inf, 0.0)
    return (logprobs.exp() * difference).sum(-1)


def sampled_kl(
    logprobs: Float[Tensor, "..."], reference: Float[Tensor, "..."], estimator: Literal["k2", "k3"]
) -> Float[Tensor, "..."]:
    """KL from the sampled token's log-probabilities: k2 = ½ k1², k3 = e^{−k1} − 1 + k1, with k1 = log π − log π_0.

    Schulman, "Approximating KL divergence" (2020). k1 itself has a gradient of mean zero and is not offered as a loss.
    """
    k1 = logprobs - reference
    return 0.5 * k1.square() if estimator == "k2" else torch.exp(-k1) - 1 + k1
