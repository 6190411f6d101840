"""Diagnostics: what is measured of an update's trajectories, and the alarms that say when training degenerates.

In: this process's paid rows, the advantages of all rows. Out: metrics by name, over all rows of all processes; every
name is explained in docs/metrics.md.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.records import Advantages, TrajectoryBatch
from attention_guided_rl.rl_agent import effective_sample_size
from attention_guided_rl.selection import entropy, query_information
from attention_guided_rl.session import PaidRows, Session

logger = logging.getLogger(__name__)

ALARMS = {
    "zero_variance": "in more than half of the groups all rewards are equal, so most trajectories teach nothing",
    "entropy_collapse": "query tokens are all but certain, so nothing new is tried",
    "constant_queries": "most queries of the update are the same text",
    "repeated_queries": "most queries of a trajectory repeat an earlier one of it",
    "copied_values": "most query tokens stand in the value then read: queries may predict it rather than ask for it",
    "kl_drift": "the policy is far from the untrained model; its queries may be no language any more",
    "unsteerable": "whatever the query, the choice is nearly the same",
}
"""What each alarm means."""

STEERABILITY_WARNING = 0.1  # nats: below this, no query changes much


def raise_alarms(metrics: Mapping[str, Any]) -> dict[str, bool]:
    """Return for every alarm whether these metrics of an update set it off, as `alarm/<name>`."""

    def beyond(name: str, low: float = -math.inf, high: float = math.inf) -> bool:
        value = metrics.get(name)
        return value is not None and not low <= value <= high

    found = {
        "zero_variance": beyond("reward/zero_variance_groups", high=0.5),
        "entropy_collapse": beyond("policy/entropy", low=0.05),
        "constant_queries": beyond("query/distinct", low=0.1),
        "repeated_queries": beyond("query/repeated", high=0.5),
        "copied_values": beyond("query/value_overlap", high=0.5),
        "kl_drift": beyond("loss/kl", high=3.0),
        "unsteerable": beyond("selection/steerability", low=STEERABILITY_WARNING),
    }
    return {f"alarm/{name}": found[name] for name in ALARMS}


class AlarmBell:
    """Says each alarm once, when it first rings, with the newest checkpoint that is known to be without one."""

    def __init__(self, *, audible: bool) -> None:
        self._audible = audible
        self._said: set[str] = set()

    def ring(self, metrics: Mapping[str, Any], last_good: int | None) -> bool:
        """Warn of new alarms among an update's metrics; return whether any is on."""
        on = [name for name in ALARMS if metrics[f"alarm/{name}"]]
        for name in on if self._audible else []:
            if name not in self._said:
                where = "no checkpoint is without one" if last_good is None else f"without one: checkpoint {last_good}"
                logger.warning("alarm at update %d: %s: %s (%s)", metrics["update"], name, ALARMS[name], where)
            self._said.add(name)
        return bool(on)


def row_metrics(
    session: Session, paid: PaidRows, advantages: Advantages, rewards: Float[Tensor, "R S"]
) -> dict[str, Any]:
    """Return an update's metrics that are not about the weights; `rewards` and `advantages` are of all rows."""
    rows, processes, group = paid.rows, session.processes, session.config.rollout.trajectories
    raw = processes.gather_rows(paid.rewards.raw)
    kept = advantages.advantages[advantages.keep]
    groups = rewards.unflatten(0, (-1, group))
    known = bool(rewards.isfinite().all()) and bool(advantages.advantages.isfinite().all())
    return {
        "reward/mean": finite(rewards.mean()),
        "reward/raw": finite(raw.mean()),
        "reward/std": finite(rewards.mean(1).std(correction=0)),
        "reward/zero_variance_groups": float((groups == groups[:, :1]).flatten(1).all(1).float().mean())
        if known
        else None,
        "advantage/effective_sample_size": effective_sample_size(kept) if known else None,
        "filter/kept_fraction": float(advantages.keep.float().mean()) if known else None,
        **_selection_metrics(session, rows, group),
        **_query_metrics(session, rows),
    }


def finite(value: Tensor) -> float | None:
    """Return a number, or None where it is not finite (JSON has no such number)."""
    return float(value) if math.isfinite(value) else None


def _selection_metrics(session: Session, rows: TrajectoryBatch, group: int) -> dict[str, Any]:
    selection = session.processes.gather_rows(rows.selection_logprobs)
    picks = session.processes.gather_rows(rows.picks)
    choices = (selection != -math.inf).sum(-1) >= 2  # NaN counts: no mean over the rest
    first = selection[:, 0].unflatten(0, (-1, group))
    picked = selection.gather(-1, picks[:, :, None]).squeeze(-1)
    return {
        "selection/entropy": finite(entropy(selection)[choices].mean()) if bool(choices.any()) else None,
        "selection/picked_logprob": finite(picked.mean()),
        "selection/query_information": finite(torch.stack([query_information(g) for g in first]).mean()),
    }


def _query_metrics(session: Session, rows: TrajectoryBatch) -> dict[str, Any]:
    """Measure the texts of the queries of all processes."""
    processes = session.processes
    ids, real = rows.query_slots()
    value_ids, value_real = rows.value_slots()
    texts = session.model.decode_rows(ids.flatten(0, 1), real.flatten(0, 1))
    blank = torch.tensor([not text.strip() for text in texts], device=ids.device)
    overlap = processes.gather_rows(value_overlap(ids, real, value_ids, value_real))
    everything = processes.gather_rows(ids)
    return {
        "query/distinct": len(everything.flatten(0, 1).unique(dim=0)) / everything[:, :, 0].numel(),
        "query/repeated": finite(repeated_queries(everything).mean()),
        "query/value_overlap": finite(overlap.mean()),
        "selection/blank_queries": int(processes.gather_rows(blank).sum()),
    }


def repeated_queries(ids: Int[Tensor, "B S Q"]) -> Float[Tensor, " B"]:
    """Return the share of each trajectory's queries that repeat an earlier one of it, token for token."""
    same = (ids[:, :, None] == ids[:, None]).all(-1)  # (B, S, S)
    earlier = torch.ones_like(same[0]).tril(-1)
    return (same & earlier).any(-1).float().mean(-1)


def value_overlap(
    query_ids: Int[Tensor, "B S Q"],
    query_real: Bool[Tensor, "B S Q"],
    value_ids: Int[Tensor, "B S L"],
    value_real: Bool[Tensor, "B S L"],
) -> Float[Tensor, "B S"]:
    """Return the share of each query's tokens that stand in the value read after it."""
    same = (query_ids[..., :, None] == value_ids[..., None, :]) & value_real[..., None, :]
    inside = same.any(-1) & query_real
    return inside.sum(-1) / query_real.sum(-1).clamp_min(1)
