"""Scorer: who predicts the values. `reference`, `policy` and `ema` are three constructors of one small class.

In: finished rows, and what else a reward wants scored on branches off them. Out: log-probabilities of their values and,
from the same pass, the hidden states at the query positions (the reference's side of the KL).
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from attention_guided_rl.branching import Branches, branch_logprobs, last_logprobs, write_queries
from attention_guided_rl.ema import EmaWeights
from attention_guided_rl.memory import RowLimit
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.records import (
    PADDING,
    PROMPT,
    TEMPLATE,
    VALUE,
    BranchRequest,
    Continuations,
    PairPool,
    Scores,
    TrajectoryBatch,
)
from attention_guided_rl.template import Template

NOTHING_MORE = BranchRequest()


@runtime_checkable
class Scorer(Protocol):
    """Predicts values; never has gradients."""

    @property
    def live(self) -> bool:
        """Whether its weights change in training, so that nothing it computed may be kept."""
        ...

    def score(self, rows: TrajectoryBatch, request: BranchRequest = NOTHING_MORE) -> Scores:
        """Score every value of finished rows, after everything before it, and what else is requested."""
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
    """A scorer that is one of the sets of weights of a LanguageModel."""

    model: LanguageModel
    weights: Callable[[], AbstractContextManager[None]]
    live: bool
    micro_batch: RowLimit | None = None

    @torch.no_grad()
    def score(self, rows: TrajectoryBatch, request: BranchRequest = NOTHING_MORE) -> Scores:
        """Run one full forward per micro-batch; the output head only sees the value positions."""
        everything = torch.arange(rows.num_rows, device=rows.ids.device)
        parts = [
            self._score(rows.select(index), request.select(index))
            for index in everything.split(self.micro_batch.forward_rows if self.micro_batch else max(1, rows.num_rows))
        ]
        return _concatenate(parts)

    def _score(self, rows: TrajectoryBatch, request: BranchRequest) -> Scores:
        """Score the values on the way through the rows; answer the request on branches off the cache of that pass."""
        query, value = rows.layout.query_positions, rows.layout.value_positions
        cache = None if request.is_empty else self.model.new_cache()
        with self.weights():
            states = self.model.hidden(rows.ids, rows.role, torch.cat([query, value]), cache)
            query_hidden, value_hidden = states.split([len(query), len(value)], dim=1)
            logprobs = self.model.logprobs_of(value_hidden, rows.ids[:, value], rows.role[:, value] != PADDING)
        scores = Scores(value_logprobs=logprobs.view(*rows.picks.shape, -1), query_hidden=query_hidden)
        if cache is None:
            return scores
        if request.probe_ids is not None:
            scores = replace(scores, probe_logprobs=self._probes(cache, rows, request))
        if request.candidate_ids is not None:
            scores = replace(scores, candidate_logprobs=self._candidates(cache, rows, request))
        if request.counterfactual_uniforms is not None:
            ids, logprobs = self._counterfactual(cache, rows, request, query_hidden)
            scores = replace(scores, counterfactual_ids=ids, counterfactual_logprobs=logprobs)
        return scores

    def _probes(self, cache: DynamicCache, rows: TrajectoryBatch, request: BranchRequest) -> Float[Tensor, "B S1 P"]:
        """Score every probe after an empty query, before the first step and after each."""
        assert request.probe_ids is not None
        assert request.probe_mask is not None
        layout, times = rows.layout, rows.num_steps + 1
        num_probes = request.probe_ids.shape[1]
        empty = torch.cat([rows.before_query(), rows.before_value()], -1)[:, None]
        empty = empty.expand(-1, num_probes, -1)
        ids = torch.cat([empty, request.probe_ids], -1).repeat(1, times, 1)
        mask = torch.cat([torch.ones_like(empty, dtype=torch.bool), request.probe_mask], -1).repeat(1, times, 1)
        ends = layout.prompt_len + layout.step_len * torch.arange(times)
        branches = Continuations(
            ids=ids, mask=mask, prefix_len=ends.repeat_interleave(num_probes), num_scored=layout.value_len
        )
        return self.branch(cache, rows.role, branches).sum(-1).view(rows.num_rows, times, num_probes)

    def _candidates(self, cache: DynamicCache, rows: TrajectoryBatch, request: BranchRequest) -> Float[Tensor, "B C L"]:
        """Score every candidate in the value slot of its step."""
        assert request.candidate_ids is not None
        assert request.candidate_mask is not None
        assert request.candidate_steps is not None
        layout = rows.layout
        last = rows.before_value()[:, None, -1:].expand(-1, request.candidate_ids.shape[1], -1)
        starts = layout.value_positions.view(rows.num_steps, -1)[:, 0]
        branches = Continuations(
            ids=torch.cat([last, request.candidate_ids], -1),
            mask=torch.cat([torch.ones_like(last, dtype=torch.bool), request.candidate_mask], -1),
            prefix_len=starts[request.candidate_steps.to(starts.device)] - 1,
            num_scored=layout.value_len,
        )
        return self.branch(cache, rows.role, branches)

    def _counterfactual(
        self, cache: DynamicCache, rows: TrajectoryBatch, request: BranchRequest, query_hidden: Float[Tensor, "B SQ D"]
    ) -> tuple[Int[Tensor, "B S Q"], Float[Tensor, "B S L"]]:
        """Let the reference write q⁰ on a branch at every step, and score that step's value after it."""
        assert request.counterfactual_uniforms is not None
        layout, role = rows.layout, rows.role
        query = layout.query_positions
        starts = query.view(rows.num_steps, -1)[:, 0]
        reference_cache = cache
        with self.model.reference():
            if self.live:  # the reference's own view of the rows
                reference_cache = self.model.new_cache()
                query_hidden = self.model.hidden(rows.ids, role, query, reference_cache)
            writing = Branches(self.model, reference_cache, role, starts)
            first = query_hidden.unflatten(1, (rows.num_steps, -1))[:, :, 0]
            ids, written = write_queries(
                self.model, writing, first, request.counterfactual_uniforms, request.query_temperature
            )
        value_ids, value_mask = rows.value_slots()
        before_value = rows.before_value()[:, None].expand(-1, rows.num_steps, -1)
        with self.weights():
            branches, unread = (
                (Branches(self.model, cache, role, starts), ids) if self.live else (writing, ids[..., -1:])
            )
            rest = torch.cat([unread, before_value, value_ids], -1)
            mask = torch.ones_like(rest, dtype=torch.bool)
            mask[:, :, -layout.value_len :] = value_mask
            states = branches.extend(rest, mask)
            branches.close()
            writing.close()
            logprobs = last_logprobs(self.model, states, rest, mask, layout.value_len)
            return ids, logprobs + 0.0 * written[:, :, None]  # NaN after a query that no number led to

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
        size = self.micro_batch.forward_rows_of(ids.shape[1]) if self.micro_batch else len(ids)
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
        """Run all continuations of a row at once."""
        with self.weights():
            return branch_logprobs(self.model, cache, role_so_far, branches)


def reference_scorer(model: LanguageModel, micro_batch: RowLimit | None = None) -> ModelScorer:
    """The frozen reference: the only scorer that supports a claim about queries."""
    return ModelScorer(model, model.reference, live=False, micro_batch=micro_batch)


def policy_scorer(model: LanguageModel, micro_batch: RowLimit | None = None) -> ModelScorer:
    """The live policy, detached; its reward also rises by plain fine-tuning."""
    return ModelScorer(model, contextlib.nullcontext, live=True, micro_batch=micro_batch)


def ema_scorer(model: LanguageModel, weights: EmaWeights, micro_batch: RowLimit | None = None) -> ModelScorer:
    """A moving average of the policy: live, but slow."""
    return ModelScorer(model, weights.applied, live=True, micro_batch=micro_batch)


SCORERS = {"reference": reference_scorer, "policy": policy_scorer}
"""Those that are a property of the model alone; `ema` has weights of its own."""


def _concatenate(parts: list[Scores]) -> Scores:
    """Join the scores of micro-batches."""
    columns: dict[str, Any] = {}
    for f in fields(Scores):
        values = [getattr(part, f.name) for part in parts]
        columns[f.name] = None if values[0] is None else torch.cat(values)
    return Scores(**columns)
