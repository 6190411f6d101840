"""Branching: many continuations of the same rows at once, off one cache that is left as it was.

In: a cache of B rows with their roles, and C continuations of each row, each after a prefix of its own. Out: hidden
states or log-probabilities. A branch attends to its prefix and to itself, so C branches cost one forward over their own
tokens. The counterfactual queries, the probes, the candidates of an expected pick and the oracle are all branches.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from attention_guided_rl.model import LanguageModel
from attention_guided_rl.records import PADDING, Continuations
from attention_guided_rl.selection import draw_tokens

_MASK_ELEMENTS = 2**25
"""Largest attention mask of one forward, (rows, branch tokens, all tokens): 128 MiB in float32."""

_FEW_TOKENS = 128  # of the branches of a row


class Branches:
    """C texts per row, growing off a cache side by side. Close it, and the cache is as before."""

    def __init__(
        self, model: LanguageModel, cache: DynamicCache, role: Int[Tensor, "B T"], prefix_len: Int[Tensor, " C"]
    ) -> None:
        """Begin C empty branches, each after the first `prefix_len` tokens of every cached row."""
        self._model, self._cache = model, cache
        prefix = torch.arange(role.shape[1], device=role.device) < prefix_len.to(role.device)[:, None]  # (C, T)
        self._visible = prefix & (role != PADDING)[:, None, :]  # (B, C, T): grows with every extension
        self._place = self._visible.sum(-1)  # (B, C): position id of the next token
        self._same = torch.eye(len(prefix_len), dtype=torch.bool, device=role.device)
        self._num_appended = 0

    def extend(self, ids: Int[Tensor, "B C M"], mask: Bool[Tensor, "B C M"]) -> Float[Tensor, "B C M D"]:
        """Append M tokens to every branch, padding at the end, and return their final hidden states."""
        length = ids.shape[2]
        place = self._place[:, :, None] + (mask.long().cumsum(-1) - 1).clamp_min(0)
        own = mask[:, :, None, :] & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        among = (own[:, :, :, None, :] & self._same[:, None, :, None]).flatten(3).flatten(1, 2)  # (B, C·M, C·M)
        before = self._visible.repeat_interleave(length, 1)
        states = self._model.extend_where(self._cache, ids.flatten(1), torch.cat([before, among], -1), place.flatten(1))
        added = (mask[:, None] & self._same[:, :, None]).flatten(2)  # (B, C, C·M)
        self._visible = torch.cat([self._visible, added], -1)
        self._place = self._place + mask.sum(-1)
        self._num_appended += ids.shape[1] * length
        return states.view(*ids.shape, -1)

    def fork(self, times: int) -> None:
        """Make `times` branches of each, side by side, that go on from what it has so far."""
        self._visible = self._visible.repeat_interleave(times, 1)
        self._place = self._place.repeat_interleave(times, 1)
        self._same = torch.eye(self._place.shape[1], dtype=torch.bool, device=self._same.device)

    def close(self) -> None:
        """Take the branches off the cache."""
        if self._num_appended:
            self._cache.crop(-self._num_appended)
            self._num_appended = 0


def branch_logprobs(
    model: LanguageModel, cache: DynamicCache, role: Int[Tensor, "B T"], branches: Continuations
) -> Float[Tensor, "B C num_scored"]:
    """Score the last `num_scored` tokens of continuations that branch off a cache; 0 at padding."""
    rows, num_branches, length = branches.ids.shape
    parts = []
    for chosen in torch.arange(num_branches).split(branches_at_once(rows, role.shape[1], length)):
        growing = Branches(model, cache, role, branches.prefix_len.to(chosen.device)[chosen])
        ids, mask = branches.ids[:, chosen], branches.mask[:, chosen]
        states = growing.extend(ids, mask)
        growing.close()
        parts.append(last_logprobs(model, states, ids, mask, branches.num_scored))
    return torch.cat(parts, 1)


def last_logprobs(
    model: LanguageModel,
    states: Float[Tensor, "B C M D"],
    ids: Int[Tensor, "B C M"],
    mask: Bool[Tensor, "B C M"],
    num_scored: int,
) -> Float[Tensor, "B C num_scored"]:
    """Return the log-probabilities of the last tokens, each under the state one place to its left; 0 at padding."""
    predicting = states[:, :, -num_scored - 1 : -1].flatten(0, 1)
    scored, real = ids[:, :, -num_scored:], mask[:, :, -num_scored:]
    return model.logprobs_of(predicting, scored.flatten(0, 1), real.flatten(0, 1)).view(scored.shape)


def write_queries(
    model: LanguageModel,
    branches: Branches,
    first: Float[Tensor, "B C D"],
    uniforms: Float[Tensor, "B C Q"],
    temperature: float,
) -> tuple[Int[Tensor, "B C Q"], Float[Tensor, "B C"]]:
    """Sample a query on every branch, all at once in Q steps; the last token is not yet appended.

    Returns the ids and Σ log π of each query, which is not finite where it was not drawn from numbers. `first` are the
    hidden states that predict the first token, which the pass over the rows has given already.
    """
    uniforms = uniforms.to(first.device, torch.float32)
    states = first
    tokens: list[Tensor] = []
    logprobs = torch.zeros(first.shape[:2], device=first.device)
    for i in range(uniforms.shape[2]):
        if i:
            last = tokens[-1][:, :, None]
            states = branches.extend(last, torch.ones_like(last, dtype=torch.bool))[:, :, 0]
        distribution = model.policy_logprobs(states.flatten(0, 1), temperature)
        token, logprob = draw_tokens(distribution, uniforms[:, :, i].flatten(), model.query_vocabulary)
        tokens.append(token.view(first.shape[:2]))
        logprobs = logprobs + logprob.view(first.shape[:2])
    return torch.stack(tokens, -1), logprobs


def branches_at_once(rows: int, cached: int, length: int) -> int:
    """Return how many branches of so many tokens one forward may have.

    Branches meet one another in the attention's matrix only to be masked; so they are to be fewer tokens than what is
    cached, or few. And the mask itself stays bounded.
    """
    count = 1
    while (
        2 * count * length <= max(cached, _FEW_TOKENS)
        and rows * 2 * count * length * (cached + 2 * count * length) <= _MASK_ELEMENTS
    ):
        count *= 2
    return count
