"""The naive loop: the same update as the package's, written the way one writes it first. A comparator, kept correct.

It re-encodes the whole context at every step, embeds all keys at every step, scores every value in a forward of its
own, and recomputes every query's log-probabilities in a forward of its own. It uses the package's weights, template and
embedder and the model's own forward, so its outputs must be the same: queries and picks equal, rewards and gradients
to 1e-3.
"""

from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, library_layers
from machine import timed
from torch import Tensor
from transformers import DynamicCache

from attention_guided_rl.records import PairPool, TrajectoryBatch
from attention_guided_rl.rl_agent import compute_returns, full_kl, leave_one_out
from attention_guided_rl.selection import head_scores, sample, selection_logprobs
from attention_guided_rl.session import Session


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that have read some pairs."""

    context: Tensor
    """(B, T so far)"""
    unread: Tensor
    """(B, N)"""
    article: Tensor
    """(B,)"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one step wrote, picked and earned."""

    before_query: Tensor
    query: Tensor
    pick: Tensor
    reward: Tensor


def naive_update(session: Session, pool: PairPool, uniforms: Tensor, batch_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Roll out, score and accumulate the gradient for all rows, `batch_rows` at a time (default scoring and loss).

    Returns queries (B, S, Q), picks (B, S) and rewards (B, S), nats per value token.
    """
    group = uniforms.shape[0] // pool.num_articles
    batches = torch.arange(uniforms.shape[0], device=session.model.device).split(batch_rows)
    written: list[list[Reading]] = []
    for index in batches:
        rows, readings = start_rows(session, pool, index // group), []
        for t in range(uniforms.shape[1]):
            rows, reading = read_step(session, pool, rows, uniforms[index.cpu(), t])
            readings.append(reading)
        written.append(readings)
    queries, picks, rewards = (
        torch.cat([torch.stack([getattr(r, name) for r in readings], 1) for readings in written])
        for name in ("query", "pick", "reward")
    )
    returns = compute_returns(rewards, "to_go")
    deviation = returns - leave_one_out(returns, group)
    advantages = deviation / deviation.square().mean().sqrt()
    for index, readings in zip(batches, written, strict=True):
        for t, reading in enumerate(readings):
            step_gradient(session, reading, advantages[index, t], rewards.numel())
    return queries, picks, rewards


def start_rows(session: Session, pool: PairPool, article: Tensor) -> Rows:
    """Begin rows that have read nothing."""
    unread = torch.ones(len(article), pool.num_pairs, dtype=torch.bool, device=article.device)
    return Rows(_constant(session, session.template.prompt, len(article)), unread, article)


@torch.no_grad()
def read_step(session: Session, pool: PairPool, rows: Rows, uniforms: Tensor) -> tuple[Rows, Reading]:
    """Write a query, pick a pair by it, score its value."""
    template, count = session.template, len(rows.context)
    uniforms = uniforms.to(rows.context.device, torch.float32)
    before_query = torch.cat([rows.context, _constant(session, template.before_query, count)], 1)
    query = _generate(session, before_query, uniforms[:, :-1])
    keys = session.embedder.embed_keys(
        pool.key_ids[rows.article].flatten(0, 1), pool.key_mask[rows.article].flatten(0, 1)
    )
    vectors = session.embedder.embed_queries(query, torch.ones_like(query, dtype=torch.bool))
    scores = head_scores(vectors, keys.unflatten(0, (count, -1)))
    logprobs = selection_logprobs(scores, rows.unread, session.temperature, session.config.selection.heads)
    pick = sample(logprobs, uniforms[:, -1])
    value = pool.value_ids[rows.article, pick]
    context = torch.cat([before_query, query, _constant(session, template.before_value, count)], 1)
    prior = _constant(session, template.prompt + template.before_query + template.before_value, count)
    reward = (_value_score(session, context, value) - _value_score(session, prior, value)) / value.shape[1]
    unread = rows.unread.clone()
    unread[torch.arange(count, device=pick.device), pick] = False
    return Rows(torch.cat([context, value], 1), unread, rows.article), Reading(before_query, query, pick, reward)


def step_gradient(session: Session, reading: Reading, advantages: Tensor, num_readings: int) -> None:
    """Accumulate the gradient of one step's loss; `num_readings` are all rows' steps of the update."""
    logprobs, divergence = _query_terms(session, reading.before_query, reading.query)
    loss = -(advantages[:, None] * logprobs).sum() + session.config.objective.kl.coefficient * divergence.sum()
    (loss / (num_readings * reading.query.shape[1])).backward()


def resume_rows(session: Session, rows: TrajectoryBatch, pool: PairPool, step: int, index: Tensor) -> Rows:
    """Return finished rows as they were before a step, so that it can be timed without those before it."""
    layout = rows.layout
    end = layout.prompt_len + step * layout.step_len
    unread = torch.ones(len(index), pool.num_pairs, dtype=torch.bool, device=rows.ids.device)
    unread.scatter_(1, rows.picks[index, :step], False)
    return Rows(rows.ids[index, :end], unread, index // (rows.num_rows // pool.num_articles))


def time_step(
    case: Case, pool: PairPool, uniforms: Tensor, finished: TrajectoryBatch, step: int, batch_rows: int
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """Time one step of all rows, its loss included; return seconds, and queries (B, 1, Q), picks and rewards (B, 1)."""
    session = case.session
    readings: list[Reading] = []

    def work() -> None:
        for index in torch.arange(finished.num_rows, device=finished.ids.device).split(batch_rows):
            rows = resume_rows(session, finished, pool, step, index)
            _, reading = read_step(session, pool, rows, uniforms[index.cpu(), step])
            step_gradient(session, reading, torch.ones_like(reading.reward), finished.picks.numel())
            readings.append(reading)

    with library_layers(session):
        seconds = timed(work, session.model.device)
    for parameter in session.model.named_trainable().values():
        parameter.grad = None
    queries, picks, rewards = (
        torch.cat([getattr(r, name) for r in readings])[:, None] for name in ("query", "pick", "reward")
    )
    return seconds, (queries, picks, rewards)


def best_batch(case: Case, pool: PairPool, uniforms: Tensor, finished: TrajectoryBatch) -> int:
    """Try batches of 2, 4, 8, … rows on the middle step; return the fastest."""
    candidates = [2**i for i in range(1, 20) if 2**i < case.task.rows] + [case.task.rows]
    middle = finished.num_steps // 2
    return min(candidates, key=lambda size: time_step(case, pool, uniforms, finished, middle, size)[0])


def summed(seconds: list[float], num_steps: int) -> float:
    """Add up all steps from steps 0, ⌊S/2⌋ and S − 1, by the parabola through them; up to three steps as they are."""
    if num_steps <= 3:
        return sum(seconds)
    first, middle, last = seconds
    m, e = num_steps // 2, num_steps - 1
    total = 0.0
    for t in range(num_steps):
        total += first * (t - m) * (t - e) / (m * e)
        total += middle * t * (t - e) / (m * (m - e)) + last * t * (t - m) / (e * (e - m))
    return total


def _constant(session: Session, piece: tuple[int, ...], rows: int) -> Tensor:
    return torch.tensor(piece, device=session.model.device).expand(rows, -1)


def _causal_lm(session: Session) -> Any:
    return session.model.peft_model.get_base_model()


@torch.no_grad()
def _generate(session: Session, context: Tensor, uniforms: Tensor) -> Tensor:
    """Encode the whole context again, then decode token by token with a cache."""
    cache = DynamicCache(config=session.model.config)
    ids, tokens = context, []
    for i in range(uniforms.shape[1]):
        states = _causal_lm(session).base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        distribution = session.model.policy_logprobs(states[:, -1], session.config.rollout.temperature)
        tokens.append(sample(distribution, uniforms[:, i]))
        ids = tokens[-1][:, None]
    return torch.stack(tokens, 1)


@torch.no_grad()
def _value_score(session: Session, context: Tensor, value: Tensor) -> Tensor:
    """Sum of the value's log-probabilities under the reference, in a forward of its own."""
    ids = torch.cat([context, value], 1)
    with session.model.reference():
        logits = _causal_lm(session)(input_ids=ids, use_cache=False).logits.float()
    logprobs = logits[:, context.shape[1] - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, value[:, :, None])[:, :, 0].sum(1)


def _query_terms(session: Session, context: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and KL of one step's query tokens, policy and reference each in a forward of its own."""
    ids = torch.cat([context, query], 1)

    def distribution() -> Tensor:
        states = _causal_lm(session).base_model(input_ids=ids, use_cache=False).last_hidden_state
        return session.model.policy_logprobs(states[:, context.shape[1] - 1 : -1], session.config.rollout.temperature)

    with torch.no_grad(), session.model.reference():
        reference = distribution()
    policy = distribution()
    return policy.gather(-1, query[:, :, None])[:, :, 0], full_kl(policy, reference)
