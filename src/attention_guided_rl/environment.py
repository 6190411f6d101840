"""Environment: a reader's desk. It owns the pool, what is unread, and the selection; it knows no language model.

In: query ids and uniform numbers. Out: picks, the values read, and the selection's log-probabilities. Rows are
independent: each embeds its own query, makes its own pick and keeps its own unread set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.config import SelectionConfig
from attention_guided_rl.records import PairPool, TrajectoryBatch, slot
from attention_guided_rl.selection import head_scores, sample, selection_logprobs

Picker = Callable[["ReadingEnvironment", Float[Tensor, "B N"], Float[Tensor, " B"]], Int[Tensor, " B"]]
"""Chooses pool positions given the environment, log σ and one uniform number per row."""


@runtime_checkable
class Embedder(Protocol):
    """Standalone text to vectors. The score of a query and a key is the inner product of their vectors, per head."""

    identity: str
    """Endpoint, name, revision, dimensions, normalisation: what vectors may be mixed and what a resume must match."""
    depends_on_policy: bool
    """True: log σ would have to join the objective."""

    def embed_queries(self, ids: Int[Tensor, "B Q"], mask: Bool[Tensor, "B Q"]) -> Float[Tensor, "B H D"]:
        """Embed queries; one that decodes to whitespace gets the zero vector, hence a uniform choice."""
        ...

    def embed_keys(self, ids: Int[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> Float[Tensor, "M Hk D"]:
        """Embed keys; H is a multiple of Hk, and query head h goes with key head h // (H / Hk)."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What one step brought."""

    picks: Int[Tensor, " B"]
    selection_logprobs: Float[Tensor, "B N"]
    value_ids: Int[Tensor, "B L"]
    value_mask: Bool[Tensor, "B L"]


def sampled_pick(
    env: "ReadingEnvironment", logprobs: Float[Tensor, "B N"], uniform: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """Pick as the method does: a draw from σ. Where σ is NaN, any unread pair: the guard finds it afterwards."""
    return sample(logprobs.nan_to_num(nan=0.0, neginf=-torch.inf), uniform)


class ReadingEnvironment:
    """Pools of A articles read by G rows each; call `reset`, then `step` until done."""

    def __init__(self, embedder: Embedder, selection: SelectionConfig, temperature: float) -> None:
        self._embedder, self._selection, self.temperature = embedder, selection, temperature

    def reset(self, pool: PairPool, key_vectors: Float[Tensor, "A N Hk D"], trajectories: int) -> None:
        """Open the pools to `trajectories` rows per article, nothing read yet."""
        self._whole, self._trajectories = (pool, key_vectors), trajectories
        self.begin()

    def begin(self, rows: Int[Tensor, " B"] | None = None) -> None:
        """Begin anew, with these of the rows only if they are given."""
        pool, key_vectors = self._whole
        article = torch.arange(pool.num_articles, device=key_vectors.device).repeat_interleave(self._trajectories)
        self.rows: Int[Tensor, " B"] = torch.arange(len(article), device=article.device) if rows is None else rows
        """Places of this environment's rows among all rows of the pools."""
        self.articles: Int[Tensor, " B"] = article[self.rows]
        """Places of their articles among the pools."""
        if rows is not None:  # as if each had a pool of its own
            pool, key_vectors = pool.take(self.articles), key_vectors[self.articles]
        self.pool, self._key_vectors = pool, key_vectors
        self.unread = torch.ones(len(self.rows), pool.num_pairs, dtype=torch.bool, device=key_vectors.device)
        self.last_pick: Int[Tensor, " B"] | None = None

    def step(
        self,
        query_ids: Int[Tensor, "B Q"],
        query_mask: Bool[Tensor, "B Q"],
        uniform: Float[Tensor, " B"],
        picker: Picker = sampled_pick,
    ) -> Reading:
        """Embed each row's query, let the picker choose an unread pair, and read its value."""
        logprobs = self.selection(self._embedder.embed_queries(query_ids, query_mask))
        picks = picker(self, logprobs, uniform)
        rows = torch.arange(len(picks), device=picks.device)
        if not bool(self.unread[rows, picks].all()):
            raise ValueError(f"a pair was picked twice: {picks.tolist()}")
        self.unread = self.unread.clone()
        self.unread[rows, picks] = False
        self.last_pick = picks
        value_ids = slot(self.pool.value_ids, picks[:, None])[:, 0]
        value_mask = slot(self.pool.value_mask, picks[:, None])[:, 0]
        return Reading(picks, logprobs, value_ids, value_mask)

    def selection(self, query_vectors: Float[Tensor, "B H D"]) -> Float[Tensor, "B N"]:
        """Return log σ over each row's unread pairs."""
        scores = head_scores(query_vectors, self._key_vectors)
        return selection_logprobs(scores, self.unread, self.temperature, self._selection.heads)

    def value_scores(self) -> Float[Tensor, "B N"]:
        """Return log σ with the last value standing in for the query (nearest_key)."""
        assert self.last_pick is not None
        ids = slot(self.pool.value_ids, self.last_pick[:, None])[:, 0]
        mask = slot(self.pool.value_mask, self.last_pick[:, None])[:, 0]
        return self.selection(self._embedder.embed_queries(ids, mask))


def embed_pool_keys(embedder: Embedder, pool: PairPool) -> Float[Tensor, "A N Hk D"]:
    """Embed every key of the pools, once."""
    vectors = embedder.embed_keys(pool.key_ids.flatten(0, 1), pool.key_mask.flatten(0, 1))
    return vectors.unflatten(0, (pool.num_articles, pool.num_pairs))


def picked_logprobs(
    embedder: Embedder,
    selection: SelectionConfig,
    temperature: float,
    rows: TrajectoryBatch,
    pool: PairPool,
    articles: Int[Tensor, " B"],
) -> Float[Tensor, "B S"]:
    """Recompute log σ(a_t | q_t, unread) of finished rows, with gradients where the embedder has them.

    Row b reads article `articles[b]` of the pool; every article is embedded once.
    """
    ids, mask = rows.query_slots()
    keys = embed_pool_keys(embedder, pool)[articles].repeat_interleave(rows.num_steps, 0)
    queries = embedder.embed_queries(ids.flatten(0, 1), mask.flatten(0, 1))
    unread = (rows.selection_logprobs > -torch.inf).flatten(0, 1)
    logprobs = selection_logprobs(head_scores(queries, keys), unread, temperature, selection.heads)
    return logprobs.gather(-1, rows.picks.flatten()[:, None]).view(rows.picks.shape)
