"""Oracle: a reader that tries every unread pair at every step and keeps what is paid best, greedily or on a beam.

In: a session and pools. Out: rows, one per article, with the picked key's own text in the query slots. It sees the
reward before it picks, so it is a bound for comparison and no policy; and it maximises noise too.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from attention_guided_rl.branching import Branches, branches_at_once, last_logprobs, write_queries
from attention_guided_rl.records import (
    PADDING,
    PROMPT,
    QUERY,
    TEMPLATE,
    VALUE,
    Continuations,
    PairPool,
    TrajectoryBatch,
    slot,
)
from attention_guided_rl.reward import RewardInputs
from attention_guided_rl.session import Session
from attention_guided_rl.template import assemble


def key_queries(session: Session, pool: PairPool) -> tuple[Int[Tensor, "A N Q"], Bool[Tensor, "A N Q"]]:
    """Return the last Q tokens of every key, padded at the end of the slot."""
    length = session.config.rollout.query_tokens
    lens = pool.key_mask.sum(-1, keepdim=True)
    place = torch.arange(length, device=lens.device) + (lens - length).clamp_min(0)
    mask = place < lens
    return pool.key_ids.gather(-1, place.clamp_max(pool.key_ids.shape[-1] - 1)), mask


@torch.no_grad()
def oracle_rows(
    session: Session,
    pool: PairPool,
    prior: Float[Tensor, "A N"],
    q0: Float[Tensor, "A S Q"] | None = None,
    *,
    width: int = 1,
) -> TrajectoryBatch:
    """Read by the evaluation's reward, keeping the `width` best beginnings of every article; 1 is the greedy reader.

    `q0`: the numbers of the counterfactual queries, where the reward has them.
    """

    def search() -> Tensor:
        found, at_once = [], max(1, session.rollout_batch.rows // width)
        with session.rollout_batch.watch("searching", pool.num_articles * width), session.model.reference():
            for some in torch.arange(pool.num_articles).split(at_once):
                part, index = pool.take(some), some.to(prior.device)
                beam = _Beam(session, part, prior[index], None if q0 is None else q0[some], width)
                for step in range(session.num_steps):
                    beam.advance(step)
                found.append(beam.best())
        return torch.cat(found)

    chosen = session.rollout_batch.fit(pool.num_articles * width, search)
    query_ids, query_mask = key_queries(session, pool)
    nothing = torch.zeros(*chosen.shape, query_ids.shape[-1], device=chosen.device)
    nowhere = torch.zeros(*chosen.shape, pool.num_pairs, device=chosen.device)
    return assemble(
        session.template, slot(query_ids, chosen), slot(query_mask, chosen), slot(pool.value_ids, chosen),
        slot(pool.value_mask, chosen), chosen, nothing, nowhere,
    )  # fmt: skip


class _Beam:
    """W beginnings per article, by the sum of their rewards so far; at first all but one count as worthless."""

    def __init__(
        self, session: Session, pool: PairPool, prior: Float[Tensor, "A N"], q0: Tensor | None, width: int
    ) -> None:
        self._width, self._num_articles = width, pool.num_articles
        self._article = torch.arange(pool.num_articles, device=prior.device).repeat_interleave(width)
        self._desk = _Desk(session, pool.take(self._article), prior[self._article])
        self._q0 = None if q0 is None else q0[self._article]
        self._total = torch.full((pool.num_articles, width), -torch.inf, device=prior.device)
        self._total[:, 0] = 0.0
        self._picks = torch.zeros(len(self._article), 0, dtype=torch.long, device=prior.device)

    def advance(self, step: int) -> None:
        """Try every unread pair after every beginning, and keep the best W."""
        candidates = self._desk.unread.nonzero()[:, 1].view(len(self._article), -1)  # every row has equally many
        rewards = self._desk.rewards(candidates, None if self._q0 is None else self._q0[:, step])
        totals = (self._total.flatten()[:, None] + rewards).view(self._num_articles, -1)
        kept = totals.sort(dim=-1, descending=True, stable=True).indices[:, : self._width]
        self._total = totals.gather(1, kept)
        first = torch.arange(self._num_articles, device=kept.device)[:, None] * self._width
        parent = (first + kept // candidates.shape[1]).flatten()
        pick = candidates.flatten()[(parent * candidates.shape[1] + (kept % candidates.shape[1]).flatten())][:, None]
        if self._width > 1:
            self._desk.keep(parent)
        self._desk.read(pick)
        self._picks = torch.cat([self._picks[parent], pick], 1)

    def best(self) -> Int[Tensor, "A S"]:
        """Return the picks of the best of every article."""
        return self._picks.view(self._num_articles, self._width, -1)[:, 0]


class _Desk:
    """Rows of articles: what has been read is cached, and what might be read next is tried on branches."""

    def __init__(self, session: Session, pool: PairPool, prior: Float[Tensor, "A N"]) -> None:
        self._session, self._pool, self._prior = session, pool, prior
        self._step_ids, self._step_role = _possible_steps(session, pool)
        template, device = session.template, session.model.device
        empty = torch.tensor(template.before_query + template.before_value, device=device)
        self._empty_query = empty.expand(pool.num_articles, -1)
        prompt = torch.tensor(template.prompt, device=device).expand(pool.num_articles, -1)
        self._cache: DynamicCache = session.model.new_cache()
        self._role = torch.full_like(prompt, PROMPT)
        session.model.extend(self._cache, prompt, self._role)
        self.unread = torch.ones(pool.num_articles, pool.num_pairs, dtype=torch.bool, device=device)
        self._before: list[Tensor] = []
        if pool.probe_value_ids.shape[1]:
            beginning = Branches(session.model, self._cache, self._role, torch.tensor([self._role.shape[1]]))
            self._before = [self._ask(beginning, 1)]
            beginning.close()

    def rewards(self, candidates: Int[Tensor, "A C"], q0: Float[Tensor, "A Q"] | None) -> Float[Tensor, "A C"]:
        """Return what each candidate would be paid if it were read now."""
        reward = self._session.evaluation_reward
        value_logprobs, probe_logprobs = self._read_and_ask(candidates, asks=reward.needs == "probes")
        inputs = RewardInputs(
            picks=candidates,
            value_logprobs=value_logprobs,
            pool=self._pool,
            prior=self._prior,
            counterfactual_logprobs=self._counterfactual(candidates, q0) if reward.needs == "counterfactual" else None,
            probe_logprobs=probe_logprobs,
        )
        return reward(inputs).rewards

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Go on from other rows' readings; only those of the same article may be exchanged."""
        self._cache.batch_select_indices(rows)
        self._role, self.unread = self._role[rows], self.unread[rows]

    def read(self, pick: Int[Tensor, "A 1"]) -> None:
        """Read one pair of each article."""
        self.unread.scatter_(1, pick, False)
        self._role = torch.cat([self._role, slot(self._step_role, pick)[:, 0]], 1)
        self._session.model.extend(self._cache, slot(self._step_ids, pick)[:, 0], self._role)

    def _score(self, ids: Int[Tensor, "A C M"], mask: Bool[Tensor, "A C M"]) -> Float[Tensor, "A C L"]:
        """Score the values (or probes) at the end of branches off what has been read."""
        branches = Continuations(
            ids=ids,
            mask=mask,
            prefix_len=torch.full((ids.shape[1],), self._role.shape[1]),
            num_scored=self._pool.value_ids.shape[-1],
        )
        return self._session.reference_scorer.branch(self._cache, self._role, branches)

    def _read_and_ask(
        self, candidates: Int[Tensor, "A C"], *, asks: bool
    ) -> tuple[Float[Tensor, "A C L"], Float[Tensor, "A C1 P"] | None]:
        """Score each candidate's value; and if asked, the probes before anything was read and after each candidate.

        A candidate is read once, and its probes are branches off it.
        """
        model, num_probes = self._session.model, self._pool.probe_value_ids.shape[1]
        length = self._step_ids.shape[2] + (num_probes * self._question()[0].shape[2] if asks else 0)
        values, levels = [], list(self._before)
        for some in candidates.split(branches_at_once(len(candidates), self._role.shape[1], length), 1):
            branches = Branches(model, self._cache, self._role, torch.full((some.shape[1],), self._role.shape[1]))
            ids, mask = slot(self._step_ids, some), slot(self._step_role, some) != PADDING
            values.append(last_logprobs(model, branches.extend(ids, mask), ids, mask, self._pool.value_ids.shape[-1]))
            if asks:
                levels.append(self._ask(branches, some.shape[1]))
            branches.close()
        return torch.cat(values, 1), torch.cat(levels, 1) if asks else None

    def _ask(self, branches: Branches, count: int) -> Float[Tensor, "A C P"]:
        """Return Σ log p of every probe after an empty query, on each of `count` branches."""
        ids, mask = (tensor.repeat(1, count, 1) for tensor in self._question())
        branches.fork(ids.shape[1] // count)
        states = branches.extend(ids, mask)
        logprobs = last_logprobs(self._session.model, states, ids, mask, self._pool.value_ids.shape[-1])
        return logprobs.sum(-1).unflatten(1, (count, -1))

    def _question(self) -> tuple[Int[Tensor, "A P M"], Bool[Tensor, "A P M"]]:
        """Return an empty query and a probe, for every probe."""
        empty = self._empty_query[:, None].expand(-1, self._pool.probe_value_ids.shape[1], -1)
        mask = torch.cat([torch.ones_like(empty, dtype=torch.bool), self._pool.probe_value_mask], -1)
        return torch.cat([empty, self._pool.probe_value_ids], -1), mask

    def _counterfactual(
        self, candidates: Int[Tensor, "A C"], q0: Float[Tensor, "A Q"] | None
    ) -> Float[Tensor, "A C L"]:
        """Score every candidate's value after the query that the untrained model writes here."""
        assert q0 is not None
        session, template = self._session, self._session.template
        before = self._empty_query[:, None, : len(template.before_query)]
        writing = Branches(session.model, self._cache, self._role, torch.tensor([self._role.shape[1]]))
        first = writing.extend(before, torch.ones_like(before, dtype=torch.bool))[:, :, -1]
        temperature = session.config.rollout.temperature
        query, _ = write_queries(session.model, writing, first, q0[:, None], temperature)
        writing.close()
        step = torch.cat([before, query, self._empty_query[:, None, len(template.before_query) :]], -1)
        step = step.expand(-1, candidates.shape[1], -1)
        value_ids, value_mask = slot(self._pool.value_ids, candidates), slot(self._pool.value_mask, candidates)
        mask = torch.cat([torch.ones_like(step, dtype=torch.bool), value_mask], -1)
        return self._score(torch.cat([step, value_ids], -1), mask)


def _possible_steps(session: Session, pool: PairPool) -> tuple[Int[Tensor, "A N M"], Int[Tensor, "A N M"]]:
    """Return the tokens of a step for every pair, with its own key as query, and their roles."""
    query_ids, query_mask = key_queries(session, pool)
    query_role = torch.where(query_mask, QUERY, PADDING)
    if not session.config.reward.query_in_context:
        query_role = torch.full_like(query_role, PADDING)

    def constant(piece: tuple[int, ...]) -> Tensor:
        return torch.tensor(piece, device=pool.key_ids.device).expand(pool.num_articles, pool.num_pairs, -1)

    before_query, before_value = constant(session.template.before_query), constant(session.template.before_value)
    ids = torch.cat([before_query, query_ids, before_value, pool.value_ids], -1)
    role = [
        torch.full_like(before_query, TEMPLATE), query_role, torch.full_like(before_value, TEMPLATE),
        torch.where(pool.value_mask, VALUE, PADDING),
    ]  # fmt: skip
    return ids, torch.cat(role, -1)
