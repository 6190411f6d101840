"""Texts: what may stand in the query slots while the picks stay as they are.

In: finished rows. Out: the same rows with other queries, ready to be scored. With the picks held, a difference in
reward is due to the text; with the text held, to the picks.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.oracle import key_queries
from attention_guided_rl.records import BranchRequest, PairPool, TrajectoryBatch, slot
from attention_guided_rl.session import Session
from attention_guided_rl.template import assemble


def with_text(
    session: Session, rows: TrajectoryBatch, ids: Int[Tensor, "B S Q"], mask: Bool[Tensor, "B S Q"]
) -> TrajectoryBatch:
    """Return the rows with their queries replaced; picks, values and selection stand, and nothing counts as sampled."""
    value_ids, value_mask = rows.value_slots()
    return assemble(
        session.template, ids, mask, value_ids, value_mask, rows.picks,
        torch.zeros_like(rows.sampled_logprobs), rows.selection_logprobs,
    )  # fmt: skip


def with_key_text(session: Session, rows: TrajectoryBatch, pool: PairPool) -> TrajectoryBatch:
    """Return the rows with each query replaced by the last Q tokens of the picked key."""
    ids, mask = key_queries(session, pool)
    return with_text(session, rows, slot(ids, rows.picks), slot(mask, rows.picks))


def with_fixed_text(session: Session, rows: TrajectoryBatch, query_ids: Int[Tensor, " Q"]) -> TrajectoryBatch:
    """Return the rows with the same query in every slot."""
    ids, _ = rows.query_slots()
    return with_text(session, rows, query_ids.expand_as(ids), torch.ones_like(ids, dtype=torch.bool))


def with_possible_text(
    session: Session, rows: TrajectoryBatch, pool: PairPool, numbers: Float[Tensor, "B S Q"]
) -> TrajectoryBatch:
    """Return the rows with own-key text, but untrained text, written in that context, at each subject's first pair.

    Before a subject has been read nobody can name it. It is no strict bound: a first query that names no subject at all
    misleads less than an untrained one. A rewritten query depends on the slots before it alone, so after pass n the
    first n of a row are final.
    """
    ids, mask = key_queries(session, pool)
    ids, mask = slot(ids, rows.picks), slot(mask, rows.picks)
    first = first_of_subject(slot(pool.subject, rows.picks).tolist()).to(ids.device)
    request = BranchRequest(counterfactual_uniforms=numbers, query_temperature=session.config.rollout.temperature)
    mask = mask | first[:, :, None]
    for _ in range(int(first.sum(1).max())):
        scores = session.score(with_text(session, rows, ids, mask), request)
        assert scores.counterfactual_ids is not None
        ids = torch.where(first[:, :, None], scores.counterfactual_ids, ids)
    return with_text(session, rows, ids, mask)


def first_of_subject(subjects: Sequence[Sequence[int]]) -> Bool[Tensor, "B S"]:
    """Mark the steps that read a subject for the first time: [2, 2, 0, 2] → [T, F, T, F]."""
    return torch.tensor([[label not in row[:t] for t, label in enumerate(row)] for row in subjects])
