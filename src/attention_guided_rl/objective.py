"""Objective: the loss of a micro-batch of kept rows, with its gradients' path through the policy.

In: UpdateBatch. Out: LossOutput, the micro-batch's share of

    L = (1/M) Σ_{kept rows} Σ_t Σ_i [ −A_t log π_θ(q_{t,i} | c_t, q_{t,<i}) + β KL_{t,i} ]

Only query tokens appear in it, unless it is asked for more: −A_t log σ(pick) where the embedder is trained, and the
gradient through the reward where its scorer is the policy. Rollouts are used for a single step, so sampler and learner
are the same policy and no ratio corrects for a difference. `OBJECTIVES` is the table; `package.module:name` in the
configuration works too.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_guided_rl.config import KLConfig
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.records import PADDING, LossOutput, UpdateBatch
from attention_guided_rl.rl_agent import full_kl, policy_loss, reward_loss, sampled_kl, selection_loss
from attention_guided_rl.selection import entropy as entropy_of

Objective = Callable[[LanguageModel, UpdateBatch, KLConfig, float], LossOutput]


def policy_gradient(model: LanguageModel, batch: UpdateBatch, kl: KLConfig, temperature: float) -> LossOutput:
    """REINFORCE with a KL penalty towards the fixed reference, both under the distribution that was sampled from."""
    rows = batch.rows
    query_ids, real = rows.query_slots()
    shape = query_ids.shape
    query, value = rows.layout.query_positions, rows.layout.value_positions
    wanted = query if batch.reward_weights is None else torch.cat([query, value])
    states = model.hidden(rows.ids, rows.role, wanted)
    terms = model.in_chunks(
        partial(_query_terms, model, kl, temperature),
        states[:, : len(query)].flatten(0, 1), batch.reference_hidden.flatten(0, 1), query_ids.flatten(),
    )  # fmt: skip
    logprobs, divergence, entropy = (torch.where(real, term.view(shape), 0.0) for term in terms)

    policy = policy_loss(logprobs, batch.advantages, batch.num_query_tokens)
    loss = policy + (kl.coefficient if kl.place == "loss" else 0.0) * divergence.sum() / batch.num_query_tokens
    if batch.selection_logprobs is not None:
        loss = loss + selection_loss(batch.selection_logprobs, batch.advantages, batch.num_query_tokens)
    if batch.reward_weights is not None:
        value_logprobs = model.logprobs_of(states[:, len(query) :], rows.ids[:, value], rows.role[:, value] != PADDING)
        loss = loss + reward_loss(value_logprobs, batch.reward_weights, batch.num_query_tokens)
    with torch.no_grad():
        mismatch = torch.where(real, (logprobs - rows.sampled_logprobs).abs(), 0.0)
    sums = {
        "loss/policy": policy * batch.num_query_tokens,
        "loss/kl": divergence.sum(),
        "policy/entropy": entropy.sum(),
        "policy/sampler_mismatch": mismatch.sum(),
    }
    metrics = {name: value.detach() / batch.num_query_tokens for name, value in sums.items()}
    return LossOutput(loss=loss, metrics=metrics)


def _query_terms(
    model: LanguageModel,
    kl: KLConfig,
    temperature: float,
    states: Float[Tensor, "M D"],
    reference_states: Float[Tensor, "M D"],
    ids: Int[Tensor, " M"],
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Return log π(id), its divergence from the reference, and the entropy (without gradient) at query tokens."""
    distribution = model.policy_logprobs(states, temperature)
    reference = model.reference_logprobs(reference_states, temperature)
    logprobs = distribution.gather(-1, ids[:, None])[:, 0]
    if kl.estimator in ("k2", "k3"):
        divergence = sampled_kl(logprobs, reference.gather(-1, ids[:, None])[:, 0], kl.estimator)
    else:  # with the penalty in the reward, the exact KL is for the log alone
        divergence = full_kl(distribution, reference)
    return logprobs, divergence, entropy_of(distribution.detach())


OBJECTIVES: dict[str, Objective] = {"policy_gradient": policy_gradient}
