"""Records: what flows from one stage to the next. Frozen; a stage adds information by returning a new record.

Dimensions: A articles, G trajectories per article, B = A·G rows (row b = a·G + g), N pairs in the pool, P probes,
S steps, T tokens in a row, Q/K/L query/key/value slot lengths in tokens, H heads, D embedding size, V vocabulary;
SQ = S·Q, SL = S·L, S1 = S + 1, C branches off a row, U = Q + 1 uniform numbers a step.
Log-probabilities and rewards are in nats. Masks are True where there is a real token.

    Article → PairPool → TrajectoryBatch → Rewards → Advantages → UpdateBatch → LossOutput
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PROMPT, TEMPLATE, QUERY, VALUE, PADDING = range(5)
"""Values of `TrajectoryBatch.role`, the one source of every mask."""


@dataclass(frozen=True, slots=True)
class PairText:
    """A key/value pair that a corpus provides ready-made."""

    key: str
    value: str
    subject: int | None = None
    """What the pair is about, where the corpus knows; otherwise None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Article:
    """One article of a corpus. Either `text` is cut into pairs, or the corpus gives `pairs`."""

    id: str
    title: str
    text: str
    source: str
    revision: str
    url: str
    licence: str
    pairs: tuple[PairText, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPool:
    """The pairs of A articles, cut and tokenised: what may be read, and the probes that are never read."""

    articles: tuple[Article, ...]
    pair_ids: tuple[tuple[str, ...], ...]
    """A × N stable names, `<hash of the cut text>-<position>`."""
    probe_pair_ids: tuple[tuple[str, ...], ...]
    key_ids: Int[Tensor, "A N K"]
    key_mask: Bool[Tensor, "A N K"]
    value_ids: Int[Tensor, "A N L"]
    value_mask: Bool[Tensor, "A N L"]
    probe_key_ids: Int[Tensor, "A P K"]
    probe_key_mask: Bool[Tensor, "A P K"]
    probe_value_ids: Int[Tensor, "A P L"]
    probe_value_mask: Bool[Tensor, "A P L"]
    position: Int[Tensor, "A N"]
    """Place of the pair in its article; the pool is in article order."""
    probe_position: Int[Tensor, "A P"]
    subject: Int[Tensor, "A N"]
    """Label of what the pair is about; −1 where the corpus has none."""
    probe_subject: Int[Tensor, "A P"]

    def to(self, device: torch.device) -> "PairPool":
        """Return the pool with its tensors on a device."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device)
        return replace(self, **moved)

    def take(self, index: Int[Tensor, " M"]) -> "PairPool":
        """Return the pools of these articles, which may repeat."""
        taken: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            taken[f.name] = value[index] if isinstance(value, Tensor) else tuple(value[i] for i in index.tolist())
        return replace(self, **taken)

    @property
    def num_articles(self) -> int:
        """A."""
        return self.key_ids.shape[0]

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.key_ids.shape[1]

    @property
    def mean_value_len(self) -> Float[Tensor, " A"]:
        """L̄: mean real value length of the pool, the unit "per value token" of every reward."""
        return self.value_mask.sum(-1).float().mean(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """Where things lie in a row: the same for every row of a batch. Lengths in tokens."""

    prompt_len: int
    before_query_len: int
    query_len: int
    before_value_len: int
    value_len: int
    num_steps: int

    @property
    def step_len(self) -> int:
        """Tokens of one step."""
        return self.before_query_len + self.query_len + self.before_value_len + self.value_len

    @property
    def row_len(self) -> int:
        """T: tokens of a whole row."""
        return self.prompt_len + self.num_steps * self.step_len

    @property
    def query_positions(self) -> Int[Tensor, " SQ"]:
        """Places of the query slots."""
        return self._slots(self.before_query_len, self.query_len)

    @property
    def value_positions(self) -> Int[Tensor, " SL"]:
        """Places of the value slots."""
        return self._slots(self.step_len - self.value_len, self.value_len)

    def _slots(self, offset: int, length: int) -> Tensor:
        starts = self.prompt_len + offset + self.step_len * torch.arange(self.num_steps)
        return (starts[:, None] + torch.arange(length)).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """B finished trajectories, rectangular: every row has its slots at the same positions.

    A row is prompt, then S times [template, query slot (Q), template, value slot (L)]. A query or value shorter
    than its slot leaves PADDING, which attention ignores and which takes no position id. Example, S = 1, Q = L = 2,
    a one-token value:  role = [0 0 1 2 2 1 3 4],  step = [−1 −1 0 0 0 0 0 0].
    """

    ids: Int[Tensor, "B T"]
    role: Int[Tensor, "B T"]
    step: Int[Tensor, "B T"]
    """Step of each token, −1 in the prompt."""
    picks: Int[Tensor, "B S"]
    """Pool position read at each step."""
    sampled_logprobs: Float[Tensor, "B S Q"]
    """log π(q_{t,i}) under the model that wrote the query, at query temperature; 0 where nothing was sampled."""
    selection_logprobs: Float[Tensor, "B S N"]
    """log σ(· | q_t, unread); −inf where read."""
    layout: RowLayout

    @property
    def num_rows(self) -> int:
        """B."""
        return self.ids.shape[0]

    @property
    def num_steps(self) -> int:
        """S."""
        return self.picks.shape[1]

    def select(self, rows: Tensor) -> "TrajectoryBatch":
        """Return the rows chosen by an index or boolean tensor."""
        return TrajectoryBatch(
            ids=self.ids[rows],
            role=self.role[rows],
            step=self.step[rows],
            picks=self.picks[rows],
            sampled_logprobs=self.sampled_logprobs[rows],
            selection_logprobs=self.selection_logprobs[rows],
            layout=self.layout,
        )

    def query_slots(self) -> tuple[Int[Tensor, "B S Q"], Bool[Tensor, "B S Q"]]:
        """Return the query ids and which of them are real."""
        return self._slots(self.layout.query_positions, QUERY)

    def value_slots(self) -> tuple[Int[Tensor, "B S L"], Bool[Tensor, "B S L"]]:
        """Return the value ids and which of them are real."""
        return self._slots(self.layout.value_positions, VALUE)

    def _slots(self, positions: Tensor, role: int) -> tuple[Tensor, Tensor]:
        shape = (self.num_rows, self.num_steps, -1)
        positions = positions.to(self.ids.device)
        return self.ids[:, positions].view(shape), (self.role[:, positions] == role).view(shape)

    def before_query(self) -> Int[Tensor, "B M"]:
        """Return the template tokens before a query, the same at every step."""
        start = self.layout.prompt_len
        return self.ids[:, start : start + self.layout.before_query_len]

    def before_value(self) -> Int[Tensor, "B M"]:
        """Return the template tokens before a value, the same at every step."""
        end = self.layout.prompt_len + self.layout.step_len - self.layout.value_len
        return self.ids[:, end - self.layout.before_value_len : end]

    def without_queries(self) -> "TrajectoryBatch":
        """Return the same rows with every query deleted: its tokens become padding."""
        return replace(self, role=torch.where(self.role == QUERY, PADDING, self.role))


def join_rows(parts: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
    """Put batches of the same layout together."""
    first, *others = parts
    if not others:
        return first
    names = [f.name for f in fields(first) if f.name != "layout"]
    columns: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one pass of a scorer over finished trajectories gives."""

    value_logprobs: Float[Tensor, "B S L"]
    """log p(value token | everything before it); 0 at padding."""
    query_hidden: Float[Tensor, "B SQ D"]
    """Final hidden states that predict the query tokens: the reference's side of the KL without a second pass."""
    counterfactual_ids: Int[Tensor, "B S Q"] | None = None
    """q⁰_t, written by the untrained model in the context of step t, where it was asked for."""
    counterfactual_logprobs: Float[Tensor, "B S L"] | None = None
    """log p(value token | context, q⁰_t), where it was asked for."""
    probe_logprobs: Float[Tensor, "B S1 P"] | None = None
    """Σ log p(probe's tokens | the context after t steps, empty query), t = 0 … S, where it was asked for."""
    candidate_logprobs: Float[Tensor, "B C L"] | None = None
    """log p(value token | context and query of its step) of unread candidates, where it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchRequest:
    """What a scorer is asked about finished rows besides the values that were read; every part is optional."""

    counterfactual_uniforms: Float[Tensor, "B S Q"] | None = None
    """Write q⁰_t with these numbers, and score the value of step t after it."""
    query_temperature: float = 1.0
    probe_ids: Int[Tensor, "B P L"] | None = None
    """Score these after every step."""
    probe_mask: Bool[Tensor, "B P L"] | None = None
    candidate_ids: Int[Tensor, "B C L"] | None = None
    """Score these values in place of the one that was read, candidate c at step `candidate_steps[c]`."""
    candidate_mask: Bool[Tensor, "B C L"] | None = None
    candidate_steps: Int[Tensor, " C"] | None = None

    def select(self, rows: Tensor) -> "BranchRequest":
        """Return the request for the rows chosen by an index tensor."""
        chosen = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if f.name not in ("query_temperature", "candidate_steps") and getattr(self, f.name) is not None
        }
        return replace(self, **chosen)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return self.counterfactual_uniforms is None and self.probe_ids is None and self.candidate_ids is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """C pieces of text a row might go on with, each after the first `prefix_len` tokens of what is cached."""

    ids: Int[Tensor, "B C M"]
    mask: Bool[Tensor, "B C M"]
    prefix_len: Int[Tensor, " C"]
    num_scored: int
    """How many tokens at the end are scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Nats per value token. `rewards = raw − baseline`; `baseline` is part of the reward, not of the advantage."""

    raw: Float[Tensor, "B S"]
    baseline: Float[Tensor, "B S"]

    @property
    def rewards(self) -> Float[Tensor, "B S"]:
        """r_t."""
        return self.raw - self.baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages of every row and step, and which rows the update keeps."""

    returns: Float[Tensor, "B S"]
    advantages: Float[Tensor, "B S"]
    keep: Bool[Tensor, " B"]
    scale: float
    """s: what the advantages were divided by, nats per value token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateBatch:
    """The kept rows of one process with all the objective needs."""

    rows: TrajectoryBatch
    advantages: Float[Tensor, "B S"]
    reference_hidden: Float[Tensor, "B SQ D"]
    num_query_tokens: int
    """M: kept rows of the whole update (all micro-batches, all processes) × S × Q, the loss's denominator."""
    selection_logprobs: Float[Tensor, "B S"] | None = None
    """log σ(pick), with its gradient, where the embedder is trained."""
    reward_weights: Float[Tensor, " B"] | None = None
    """Weight of each row's Σ log p(value tokens) in the objective, where the gradient runs through the reward too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the loss, and sums over its query tokens for the log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    """Sums over query tokens, divided by `num_query_tokens`, so that micro-batches and processes add up."""


def has_padding(role: Int[Tensor, "B T"]) -> bool:
    """Return whether any slot of any row is not full."""
    return bool((role == PADDING).any())


def position_ids(role: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count real tokens from 0; padding repeats the position before it and is never attended to."""
    return ((role != PADDING).long().cumsum(-1) - 1).clamp_min(0)


def slot(values: Tensor, row_index: Tensor) -> Tensor:
    """Gather `values[a(b), index[b, s]]`: (A, N, …), (B, S) with B = A·G → (B, S, …)."""
    group = row_index.shape[0] // values.shape[0]
    article = torch.arange(values.shape[0], device=values.device).repeat_interleave(group)
    return values[article[:, None], row_index]
