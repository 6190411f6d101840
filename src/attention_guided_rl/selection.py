"""Selection: from scores to a choice among the unread pairs, and how far queries can steer it. Pure functions.

σ(a | q, unread) ∝ exp(score(q, k_a) / τ). Scores are per head, (B, H, N); log-probabilities are (B, N).
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HeadReduction = Literal["mean_score", "mean_softmax"]


def head_scores(queries: Float[Tensor, "B H D"], keys: Float[Tensor, "A N Hk D"]) -> Float[Tensor, "B H N"]:
    """Inner products of each query head with its key head; B = A·G rows share the keys of their article.

    Query heads come in groups of H / Hk per key head: head h meets key head h // (H / Hk).
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[2], dim=2)
    grouped = queries.unflatten(0, (keys.shape[0], -1))
    return torch.einsum("aghd,anhd->aghn", grouped, keys).flatten(0, 1)


def selection_logprobs(
    scores: Float[Tensor, "B H N"],
    unread: Bool[Tensor, "B N"],
    temperature: float,
    heads: HeadReduction = "mean_score",
) -> Float[Tensor, "B N"]:
    """Return log σ over the unread pairs; −inf where read. One softmax over mean scores, or the mean of softmaxes.

    A score that is not finite makes the whole row NaN where unread: −∞ would pass for a pair that is never picked.
    """
    if heads == "mean_score":
        scores = scores.mean(1, keepdim=True)
    logprobs = (scores / temperature).masked_fill(~unread[:, None], -torch.inf).log_softmax(-1)
    finite = logprobs.masked_fill(~unread[:, None], 0.0)  # the gradient of logsumexp over nothing but −inf is NaN
    mean = finite.logsumexp(1) - math.log(logprobs.shape[1])
    broken = ~(mean.isfinite() | ~unread).all(-1, keepdim=True)
    return mean.masked_fill(broken, torch.nan).masked_fill(~unread, -torch.inf)


def sample(logprobs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Draw by inverse CDF: the first index at which the float32 cumulative probability exceeds u.

    An index of probability 0 is never drawn, whatever u in [0, 1) and rounding.
    """
    probs = logprobs.float().exp()
    cumulative = probs.cumsum(-1)
    target = uniform.to(cumulative.device, torch.float32)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)


def draw_tokens(
    logprobs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], allowed: Bool[Tensor, " V"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Draw a token for each row; return the ids and their log-probabilities.

    Where the distribution is not finite, the log-probability says so and the id is the first that is allowed.
    """
    ids = sample(logprobs, uniform)
    drawn = logprobs.gather(1, ids[:, None])[:, 0]
    return torch.where(drawn.isfinite(), ids, allowed.int().argmax()), drawn


def entropy(logprobs: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
    """Return the entropy in nats, 0·log 0 = 0."""
    return -(logprobs.exp() * logprobs.clamp_min(-1e9)).sum(-1)


def query_information(logprobs: Float[Tensor, "G N"]) -> Float[Tensor, ""]:
    """Return mean_q KL(σ(·|q) ‖ mean_q σ(·|q)) in nats: how much the query decides. At most ln G."""
    mean = logprobs.logsumexp(0) - math.log(logprobs.shape[0])
    difference = (logprobs - mean).masked_fill(logprobs == -torch.inf, 0.0)
    return (logprobs.exp() * difference).sum(-1).mean()


def normalised_entropy(scores: Float[Tensor, "M H N"], temperature: float, heads: HeadReduction) -> float:
    """Return the mean of H(σ)/ln N over queries that see the whole pool."""
    everything = torch.ones(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
    logprobs = selection_logprobs(scores, everything, temperature, heads)
    return float((entropy(logprobs) / math.log(scores.shape[2])).mean())


def calibrate_temperature(scores: Float[Tensor, "M H N"], target: float, heads: HeadReduction) -> tuple[float, bool]:
    """Find τ with mean H(σ)/ln N = target by bisection in log τ; return it and whether the target was reached.

    Unreachable (say, because no score differs): τ = standard deviation of the scores / 1.5, and False.
    """
    low, high = math.log(1e-6), math.log(1e6)
    if (
        not normalised_entropy(scores, math.exp(low), heads)
        < target
        < normalised_entropy(scores, math.exp(high), heads)
    ):
        return max(float(scores.mean(1).std()) / 1.5, 1e-6), False
    for _ in range(60):
        middle = (low + high) / 2
        if normalised_entropy(scores, math.exp(middle), heads) < target:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2), True
