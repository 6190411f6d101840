"""Update: from the advantages of a batch of rollouts to one optimiser step.

In: this process's paid rows and the advantages of all rows. Out: changed weights and an Outcome. A micro-batch
contributes its sum over the number of query tokens kept in the whole update, over all processes; so the gradient does
not depend on how rows are divided.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_guided_rl.config import OptimizerConfig
from attention_guided_rl.errors import MemoryLimitError
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Advantages, PairPool, TrajectoryBatch, UpdateBatch
from attention_guided_rl.session import PaidRows, Session

SUMMED_METRICS = ("loss/total", "loss/policy", "loss/kl", "policy/entropy", "policy/sampler_mismatch")
WEIGHT_METRICS = (*SUMMED_METRICS, "optimizer/gradient_norm")
"""Metrics of the optimiser step; null when there was none."""


PLACES = {
    "policy/entropy": "logits",
    "loss/kl": "KL",
    "loss/policy": "loss",
    "loss/total": "loss",
    "policy/sampler_mismatch": "loss",
    "optimizer/gradient_norm": "gradient",
}
"""Where a number was not finite if this metric is the first that is not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to the weights in an update."""

    metrics: dict[str, float | None]
    stepped: bool
    place: str | None = None
    """Where the first number was seen that is not finite; the weights are then as they were."""

    @property
    def finite(self) -> bool:
        """Whether all numbers were."""
        return self.place is None


def make_optimizer(session: Session, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over what is trained."""
    return torch.optim.AdamW(
        session.model.named_trainable().values(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def apply_update(
    session: Session,
    optimizer: torch.optim.Optimizer,
    paid: PaidRows,
    pool: PairPool,
    advantages: Advantages,
    update: int,
    place: str | None = None,
) -> Outcome:
    """Accumulate the gradient of the kept rows over micro-batches and processes, and take one optimiser step.

    No step, not even for the KL, when no row is kept or every kept advantage is exactly 0; none when a number was not
    finite: `place` if it was seen before, else in the loss or the gradient. `advantages` are of all rows, `paid` and
    `pool` of this process's.

    Raises:
        MemoryLimitError: memory ran out on some process; on all of them, and nothing has changed.
    """
    learning_rate = _learning_rate(session.config.optimizer, update)
    metrics: dict[str, float | None] = {"optimizer/learning_rate": learning_rate, **dict.fromkeys(WEIGHT_METRICS)}
    kept_advantages = advantages.advantages[advantages.keep]
    if place is not None:
        return Outcome(metrics, stepped=False, place=place)
    if not bool((kept_advantages != 0).any()):
        return Outcome(metrics, stepped=False)
    optimizer.zero_grad()
    try:
        with session.processes.meeting(), session.micro_batch.watch("learning", paid.rows.num_rows):
            sums = _accumulate(session, paid, pool, advantages, update)
    except MemoryLimitError:
        optimizer.zero_grad()  # what was accumulated takes room, and is not the gradient of smaller micro-batches
        raise
    return _step(session, optimizer, metrics, sums, learning_rate)


def _accumulate(
    session: Session, paid: PaidRows, pool: PairPool, advantages: Advantages, update: int
) -> dict[str, Tensor]:
    """Add up this process's gradients, and return the sums of its metrics."""
    config, processes, rows = session.config, session.processes, paid.rows
    start = processes.rank * rows.num_rows
    mine = slice(start, start + rows.num_rows)
    keep = advantages.keep[mine].nonzero()[:, 0].to(rows.ids.device)
    denominator = int(advantages.keep.sum()) * rows.num_steps * rows.layout.query_len
    own_advantages = advantages.advantages[mine].to(rows.ids.device)
    sums: dict[str, Tensor] = {}
    for number, index in enumerate(keep.split(session.micro_batch_rows)):
        if len(index) == 0:
            continue
        reference_hidden = session.reference_hidden(paid, index)
        torch.manual_seed(_dropout_seed(config.training.seed, update, processes.rank, number))
        with session.model.adapter_dropout():
            batch = UpdateBatch(
                rows=rows.select(index),
                advantages=own_advantages[index],
                reference_hidden=reference_hidden,
                num_query_tokens=denominator,
                selection_logprobs=picked_logprobs(session, rows, pool, index),
                reward_weights=reward_weights(session, rows, pool, index, advantages.scale),
            )
            output = session.objective(session.model, batch, config.objective.kl, config.rollout.temperature)
        output.loss.backward()
        for name, value in {"loss/total": output.loss.detach(), **output.metrics}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    return sums


def picked_logprobs(
    session: Session, rows: TrajectoryBatch, pool: PairPool, index: Tensor
) -> Float[Tensor, "B S"] | None:
    """Return log σ(pick) of the rows at `index` with its gradient, if the embedder is trained."""
    if not session.embedder.depends_on_policy:
        return None
    return session.picked_logprobs(rows.select(index), pool, index // (rows.num_rows // pool.num_articles))


def reward_weights(
    session: Session, rows: TrajectoryBatch, pool: PairPool, index: Tensor, scale: float
) -> Float[Tensor, " B"] | None:
    """Return the weight of a value token's log-probability, so that with weight 1 the loss has the whole gradient of

    E[(1/S) Σ r_t] up to the factor 1/(S·Q·s) that the policy term has too. The reward's baseline is held fixed.
    """
    weight = session.config.reward.gradient_weight
    if weight == 0:
        return None
    article = index // (rows.num_rows // pool.num_articles)
    return weight / (scale * rows.num_steps * pool.mean_value_len.to(index.device)[article])


def _step(
    session: Session,
    optimizer: torch.optim.Optimizer,
    metrics: dict[str, float | None],
    sums: dict[str, Tensor],
    learning_rate: float,
) -> Outcome:
    """Add up gradients and metrics over the processes, guard, clip, step."""
    parameters = list(session.model.named_trainable().values())
    for parameter in parameters:
        if parameter.grad is None:  # this process had no kept row
            parameter.grad = torch.zeros_like(parameter)
    zero = torch.zeros((), device=session.model.device)
    totals = torch.stack([sums.get(name, zero) for name in SUMMED_METRICS])
    session.processes.sum_([p.grad for p in parameters if p.grad is not None] + [totals])
    norm = nn.utils.clip_grad_norm_(parameters, session.config.optimizer.max_grad_norm)
    values = dict(zip(SUMMED_METRICS, totals.tolist(), strict=True)) | {"optimizer/gradient_norm": float(norm)}
    place = next((place for name, place in PLACES.items() if not math.isfinite(values[name])), None)
    if place is None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        if session.ema is not None:
            session.ema.update()
    optimizer.zero_grad()
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return Outcome(metrics | finite, stepped=place is None, place=place)


def _learning_rate(config: OptimizerConfig, update: int) -> float:
    """Linear warm-up, then constant; the schedule advances with every update, stepped or not."""
    return config.learning_rate * min(1.0, (update + 1) / max(1, config.warmup_updates))


def _dropout_seed(seed: int, update: int, rank: int, micro_batch: int) -> int:
    return int(generator(seed, Purpose.DROPOUT, update, rank, micro_batch).integers(2**62))
