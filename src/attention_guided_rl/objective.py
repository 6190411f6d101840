"""Objective: the loss of a micro-batch of kept rows, with its gradients' path through the policy.

In: UpdateBatch. Out: LossOutput, the micro-batch's share of

    L = (1/M) Σ_{kept rows} Σ_t Σ_i [ −A_t log π_θ(q_{t,i} | c_t, q_{t,<i}) + β KL_{t,i} ]

Only query tokens appear in it, unless it is asked for more: −A_t log σ(pick) where the embedder is trained, and the
gradient through the reward where its scorer is the policy. Rollouts are used for a single step, so sampler and learner
are the same policy and no ratio corrects for a difference. `OBJECTIVES` is the table; `package.module:name` in the
configuration works too.
"""

from collections.abc import Callable

import torch

from attention_guided_rl.config import KLConfig
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.records import PADDING, LossOutput, UpdateBatch
from attention_guided_rl.rl_agent import full_kl, policy_loss, reward_loss, sampled_kl, selection_loss

Objective = Callable[[LanguageModel, UpdateBatch, KLConfig, float], LossOutput]


def policy_gradient(model: LanguageModel, batch: UpdateBatch, kl: KLConfig, temperature: float) -> LossOutput:
    """REINFORCE with a KL penalty towards the fixed reference, both under the distribution that was sampled from."""
    rows = batch.rows
    query_ids, real = rows.query_slots()
    shape = query_ids.shape
    chosen = query_ids.flatten(1)[:, :, None]
    with torch.no_grad(), model.reference():
        reference = model.policy_logprobs(batch.reference_hidden, temperature)
    query, value = rows.layout.query_positions, rows.layout.value_positions
    wanted = query if batch.reward_weights is None else torch.cat([query, value])
    states = model.hidden(rows.ids, rows.role, wanted)
    distribution = model.policy_logprobs(states[:, : len(query)], temperature)
    logprobs = torch.where(real, distribution.gather(-1, chosen).view(shape), 0.0)
    if kl.estimator in ("k2", "k3"):
        divergence = sampled_kl(logprobs, reference.gather(-1, chosen).view(shape), kl.estimator)
    else:  # with the penalty in the reward, the exact KL is for the log alone
        divergence = full_kl(distribution, reference).view(shape)
    divergence = torch.where(real, divergence, 0.0)

    policy = policy_loss(logprobs, batch.advantages, batch.num_query_tokens)
    loss = policy + (kl.coefficient if kl.place == "loss" else 0.0) * divergence.sum() / batch.num_query_tokens
    if batch.selection_logprobs is not None:
        loss = loss + selection_loss(batch.selection_logprobs, batch.advantages, batch.num_query_tokens)
    if batch.reward_weights is not None:
        value_logprobs = model.logprobs_of(states[:, len(query) :], rows.ids[:, value], rows.role[:, value] != PADDING)
        loss = loss + reward_loss(value_logprobs, batch.reward_weights, batch.num_query_tokens)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution.clamp_min(-1e9)).sum(-1).view(shape)
        mismatch = torch.where(real, (logprobs - rows.sampled_logprobs).abs(), 0.0)
    sums = {
        "loss/policy": policy * batch.num_query_tokens,
        "loss/kl": divergence.sum(),
        "policy/entropy": torch.where(real, entropy, 0.0).sum(),
        "policy/sampler_mismatch": mismatch.sum(),
    }
    metrics = {name: value.detach() / batch.num_query_tokens for name, value in sums.items()}
    return LossOutput(loss=loss, metrics=metrics)


OBJECTIVES: dict[str, Objective] = {"policy_gradient": policy_gradient}
