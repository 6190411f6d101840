"""Our step, as the trainer takes it, and what is measured of it."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, shortened
from machine import timed
from phases import Clock, clocked

from attention_guided_rl.diagnostics import row_metrics
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import PairPool
from attention_guided_rl.rl_agent import AgentState, compute_advantages
from attention_guided_rl.session import PaidRows
from attention_guided_rl.update import apply_update, make_optimizer


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gave, and how long it took."""

    paid: PaidRows
    seconds: float
    phases: dict[str, float]
    peak: dict[str, int]


def update_step(case: Case, optimizer: Any, pool: PairPool, uniforms: torch.Tensor, clock: Clock | None) -> PaidRows:
    """Roll out, pay, find advantages, update, and compute the metrics, like one turn of the trainer's loop."""
    session = case.session
    config = session.config
    rows = session.rollout(pool, uniforms)
    session.steerability(pool)
    rollout = config.rollout
    q0 = session.counterfactual_uniforms(Purpose.COUNTERFACTUAL, 0, range(rollout.articles), rollout.trajectories)
    with _memory(clock, "frozen pass"):
        paid = session.pay(rows, pool, q0)
    rewards = paid.rewards.rewards
    advantages, _ = compute_advantages(rewards, config.objective, AgentState(), rollout.trajectories)
    with _memory(clock, "update"), clock.phase("update") if clock else contextlib.nullcontext():
        apply_update(session, optimizer, paid, pool, advantages, 0)
    row_metrics(session, paid, advantages, rewards)
    return paid


def our_step(case: Case, pool: PairPool, uniforms: torch.Tensor, *, phases: bool = True) -> Step:
    """Take a step and time it, by phase or as a whole only."""
    optimizer = make_optimizer(case.session, case.session.config.optimizer)
    device = case.session.model.device
    paid: list[PaidRows] = []
    if not phases:
        seconds = timed(lambda: paid.append(update_step(case, optimizer, pool, uniforms, None)), device)
        return Step(paid[0], seconds, {}, {})
    with clocked(case.session) as clock:
        seconds = timed(lambda: paid.append(update_step(case, optimizer, pool, uniforms, clock)), device)
    rest = seconds - sum(clock.seconds.values())
    return Step(paid[0], seconds, {**clock.seconds, "everything else": rest}, clock.peak)


def our_gradient(case: Case, pool: PairPool, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a step, clipped, as one vector."""
    optimizer = make_optimizer(case.session, case.session.config.optimizer)
    found: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: found.append(flat_gradient(case)))
    update_step(case, optimizer, pool, uniforms, None)
    return found[0]


def flat_gradient(case: Case) -> torch.Tensor:
    """Return what has been accumulated, as one vector."""
    return torch.cat([p.grad.flatten() for p in case.session.model.named_trainable().values()])


def next_pool(case: Case) -> PairPool:
    """Draw pools for the next step."""
    return case.stream.next_pool(case.session.config.rollout.articles).to(case.session.model.device)


def warm_up(case: Case, num_steps: int = 2) -> None:
    """Take a short step, so that libraries have loaded what they load at first use."""
    with shortened(case, num_steps) as short:
        our_step(short, next_pool(short), short.uniforms(10**6))


def weight_bytes(case: Case) -> int:
    """Bytes of all weights, each counted once."""
    seen = {p.data_ptr(): p.numel() * p.element_size() for p in case.session.model.peft_model.parameters()}
    return sum(seen.values())


def _memory(clock: Clock | None, name: str) -> contextlib.AbstractContextManager[None]:
    return clock.memory(name) if clock else contextlib.nullcontext()
