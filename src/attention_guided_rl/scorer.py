"""Scorer: who predicts the values. `reference` and `policy` are two constructors of one small class.

In: finished rows. Out: log-probabilities of their values and, from the same pass, the hidden states at the query
positions (the reference's side of the KL).
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from attention_guided_rl.model import LanguageModel
from attention_guided_rl.records import (
    PADDING,
    PROMPT,
    TEMPLATE,
    VALUE,
    Continuations,
    PairPool,
    Scores,
    TrajectoryBatch,
)
from attention_guided_rl.template import Template


@runtime_checkable
class Scorer(Protocol):
    """Predicts values; never has gradients."""

    @property
    def live(self) -> bool:
        """Whether its weights change in training, so that nothing it computed may be kept."""
        ...

    def score(self, rows: TrajectoryBatch) -> Scores:
        """Score every value of finished rows, after everything before it."""
        ...

    def prior(self, pool: PairPool, template: Template) -> Float[Tensor, "A N"]:
        """Return Σ log p(value tokens | prompt, empty query) of every pair of the pool."""
        ...

    def branch(
        self, cache: DynamicCache, role_so_far: Int[Tensor, "B T"], branches: Continuations
    ) -> Float[Tensor, "B C num_scored"]:
        """Score the last tokens of continuations that branch off a cache of this scorer."""
        ...


@dataclass(frozen=True)
class ModelScorer:
    """A scorer that is one of the two sets of weights of a LanguageModel."""

    model: LanguageModel
    weights: Callable[[], AbstractContextManager[None]]
    live: bool
    micro_batch_rows: int | None = None

    @torch.no_grad()
    def score(self, rows: TrajectoryBatch) -> Scores:
        """Run one full forward per micro-batch; the output head only sees the value positions."""
        parts = [self._score(part) for part in micro_batches(rows, self.micro_batch_rows)]
        return Scores(
            value_logprobs=torch.cat([p.value_logprobs for p in parts]),
            query_hidden=torch.cat([p.query_hidden for p in parts]),
        )

    def _score(self, rows: TrajectoryBatch) -> Scores:
        query, value = rows.layout.query_positions, rows.layout.value_positions
        with self.weights():
            states = self.model.hidden(rows.ids, rows.role, torch.cat([query, value]))
            query_hidden, value_hidden = states.split([len(query), len(value)], dim=1)
            logprobs = self.model.logprobs_of(value_hidden, rows.ids[:, value], rows.role[:, value])
        return Scores(value_logprobs=logprobs.view(*rows.picks.shape, -1), query_hidden=query_hidden)

    @torch.no_grad()
    def prior(self, pool: PairPool, template: Template) -> Float[Tensor, "A N"]:
        """Score each value right after the prompt and an empty query slot."""
        device = self.model.device
        values, mask = pool.value_ids.flatten(0, 1).to(device), pool.value_mask.flatten(0, 1).to(device)
        before = template.prompt + template.before_query + template.before_value
        prefix = torch.tensor(before, device=device).expand(len(values), -1)
        ids = torch.cat([prefix, values], 1)
        role = torch.cat([torch.full_like(prefix, TEMPLATE), torch.where(mask, VALUE, PADDING)], 1)
        role[:, : len(template.prompt)] = PROMPT
        positions = torch.arange(len(before), ids.shape[1])
        size = self.micro_batch_rows or len(ids)
        with self.weights():
            logprobs = torch.cat(
                [
                    self.model.token_logprobs(i, r, positions)
                    for i, r in zip(ids.split(size), role.split(size), strict=True)
                ]
            )
        return logprobs.sum(-1).view(pool.num_articles, pool.num_pairs)

    @torch.no_grad()
    def branch(
        self, cache: DynamicCache, role_so_far: Int[Tensor, "B T"], branches: Continuations
    ) -> Float[Tensor, "B C num_scored"]:
        """Run all continuations of a row in one forward."""
        with self.weights():
            return self.model.branch_logprobs(cache, role_so_far, branches)


def reference_scorer(model: LanguageModel, micro_batch_rows: int | None = None) -> ModelScorer:
    """The frozen reference: the only scorer that supports a claim about queries."""
    return ModelScorer(model, model.reference, live=False, micro_batch_rows=micro_batch_rows)


def policy_scorer(model: LanguageModel, micro_batch_rows: int | None = None) -> ModelScorer:
    """The live policy, detached; its reward also rises by plain fine-tuning."""
    return ModelScorer(model, contextlib.nullcontext, live=True, micro_batch_rows=micro_batch_rows)


SCORERS = {"reference": reference_scorer, "policy": policy_scorer}


def micro_batches(rows: TrajectoryBatch, size: int | None) -> list[TrajectoryBatch]:
    """Split rows into runs of at most `size` (None: one run)."""
    everything = torch.arange(rows.num_rows, device=rows.ids.device)
    return [rows.select(index) for index in everything.split(size or max(1, rows.num_rows))]
