"""The naive loop: the same update as the package's, written the way one writes it first. A comparator, kept correct.

It re-encodes the whole context at every step, embeds all keys at every step, scores every value in a forward of its
own, and recomputes every query's log-probabilities in a forward of its own. It uses the package's model, template and
embedder, so its outputs must be the same: picks equal, rewards and gradients to 1e-3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attention_guided_rl.records import PROMPT, PairPool
from attention_guided_rl.rl_agent import compute_returns, full_kl, leave_one_out
from attention_guided_rl.selection import head_scores, sample, selection_logprobs
from attention_guided_rl.session import Session


@dataclass
class NaiveResult:
    picks: Tensor
    """(B, S)"""
    rewards: Tensor
    """(B, S) nats per value token"""


def naive_update(session: Session, pool: PairPool, uniforms: Tensor, batch_rows: int) -> NaiveResult:
    """Roll out, score and accumulate the gradient for all rows, `batch_rows` at a time (default scoring and loss)."""
    group = uniforms.shape[0] // pool.num_articles
    parts = []
    for start in range(0, uniforms.shape[0], batch_rows):
        rows = torch.arange(start, min(start + batch_rows, uniforms.shape[0]))
        parts.append(_rollout(session, pool, uniforms[rows].float(), rows // group))
    contexts = [p[0] for p in parts]
    picks, rewards = torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    returns = compute_returns(rewards, "to_go")
    deviation = returns - leave_one_out(returns, group)
    advantages = deviation / deviation.square().mean().sqrt()
    length = session.config.rollout.query_tokens
    denominator = rewards.numel() * length
    for number, steps in enumerate(contexts):
        chunk = slice(number * batch_rows, (number + 1) * batch_rows)
        for t, (context, query) in enumerate(steps):
            logprobs, divergence = _query_terms(session, context, query)
            loss = -(advantages[chunk, t, None] * logprobs).sum()
            loss = loss + session.config.objective.kl.coefficient * divergence.sum()
            (loss / denominator).backward()
    return NaiveResult(picks, rewards)


def _rollout(
    session: Session, pool: PairPool, uniforms: Tensor, article: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    template, config = session.template, session.config
    rows, num_steps = uniforms.shape[:2]

    def constant(piece: tuple[int, ...]) -> Tensor:
        return torch.tensor(piece).expand(rows, -1)

    context = constant(template.prompt)
    unread = torch.ones(rows, pool.num_pairs, dtype=torch.bool)
    contexts, picks, rewards = [], [], []
    for t in range(num_steps):
        context = torch.cat([context, constant(template.before_query)], 1)
        before_query = context
        query = _generate(session, context, uniforms[:, t, :-1])
        keys = session.embedder.embed_keys(pool.key_ids[article].flatten(0, 1), pool.key_mask[article].flatten(0, 1))
        vectors = session.embedder.embed_queries(query, torch.ones_like(query, dtype=torch.bool))
        scores = head_scores(vectors, keys.unflatten(0, (rows, -1)))
        pick = sample(
            selection_logprobs(scores, unread, session.temperature, config.selection.heads), uniforms[:, t, -1]
        )
        unread[torch.arange(rows), pick] = False
        value = pool.value_ids[article, pick]
        context = torch.cat([context, query, constant(template.before_value)], 1)
        raw = _value_score(session, context, value)
        prior = constant(template.prompt + template.before_query + template.before_value)
        rewards.append((raw - _value_score(session, prior, value)) / value.shape[1])
        context = torch.cat([context, value], 1)
        contexts.append((before_query, query))
        picks.append(pick)
    return contexts, torch.stack(picks, 1), torch.stack(rewards, 1)


@torch.no_grad()
def _generate(session: Session, context: Tensor, uniforms: Tensor) -> Tensor:
    """Encode the whole context again, then decode token by token with a cache."""
    model, cache = session.model, session.model.new_cache()
    role = torch.full_like(context, PROMPT)
    states = model.extend(cache, context, role)
    tokens = []
    for i in range(uniforms.shape[1]):
        distribution = model.policy_logprobs(states[:, -1], session.config.rollout.temperature)
        tokens.append(sample(distribution, uniforms[:, i]))
        if i + 1 < uniforms.shape[1]:
            role = torch.cat([role, role[:, :1]], 1)
            states = model.extend(cache, tokens[-1][:, None], role)
    return torch.stack(tokens, 1)


@torch.no_grad()
def _value_score(session: Session, context: Tensor, value: Tensor) -> Tensor:
    """Sum of the value's log-probabilities under the reference, in a forward of its own."""
    ids = torch.cat([context, value], 1)
    with session.model.reference():
        logits = session.model._logits(session.model._body(ids, torch.zeros_like(ids), cache=None))
    logprobs = logits[:, context.shape[1] - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, value[:, :, None])[:, :, 0].sum(1)


def _query_terms(session: Session, context: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and KL of one step's query tokens, policy and reference each in a forward of its own."""
    ids = torch.cat([context, query], 1)
    role, model, temperature = torch.zeros_like(ids), session.model, session.config.rollout.temperature
    where = slice(context.shape[1] - 1, -1)
    with torch.no_grad(), model.reference():
        reference = model.policy_logprobs(model._body(ids, role, cache=None)[:, where], temperature)
    distribution = model.policy_logprobs(model._body(ids, role, cache=None)[:, where], temperature)
    logprobs = distribution.gather(-1, query[:, :, None])[:, :, 0]
    return logprobs, full_kl(distribution, reference)
