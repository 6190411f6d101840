"""Evaluation: does the learned reading beat simple ones? Every arm on the same articles, pools and random numbers.

An arm `picker/text` combines a way to choose pairs with the text that stands in the query slots. In: a session with a
trained policy, and held-out articles. Out: one record per arm and article, and a summary with paired intervals over
articles. The scorer is the frozen reference, whatever training used.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.encyclopedia import planted_pick
from attention_guided_rl.environment import Picker, ReadingEnvironment, sampled_pick
from attention_guided_rl.oracle import key_queries, oracle_rows
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import PairPool, TrajectoryBatch, slot
from attention_guided_rl.selection import sample
from attention_guided_rl.session import PaidRows, Session
from attention_guided_rl.statistics import bootstrap_mean, holm, sign_flip_p, smallest_detectable
from attention_guided_rl.template import assemble

PICKERS = ("trained", "untrained", "random", "article_order", "easy_to_hard", "nearest_key", "planted")
CONTRASTS = (
    ("trained", "untrained"), ("trained", "random"), ("trained", "article_order"), ("trained", "easy_to_hard"),
    ("trained", "nearest_key"), ("trained/key", "untrained/key"), ("planted/key", "random/key"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm on one pool of articles, one trajectory each."""

    arm: str
    paid: PaidRows


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Some held-out articles and what every arm made of them."""

    pool: PairPool
    prior: Float[Tensor, "A N"]
    first_index: int
    results: tuple[ArmResult, ...]


def run_arms(
    session: Session, pickers: Sequence[str], *, corpus: CorpusConfig | None = None
) -> Iterator[EvaluationBatch]:
    """Run arms on `evaluation.articles` articles, a batch at a time: each picker's own text, and own-key text.

    `planted` is left out where the corpus has no subjects. Arms with picks of their own policy come first.
    """
    evaluation = session.config.evaluation
    corpus = corpus or evaluation.corpus or session.config.corpus
    stream = session.stream(corpus, num_probes=evaluation.num_probes, purpose=Purpose.EVALUATION_POOL)
    for start in range(0, evaluation.articles, evaluation.batch_articles):
        indices = range(start, min(start + evaluation.batch_articles, evaluation.articles))
        pool = stream.next_pool(len(indices)).to(session.model.device)
        prior = session.reference_scorer.prior(pool, session.template)
        numbers = session.uniforms(Purpose.EVALUATION, 0, indices, 1)
        q0 = session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 0, indices, 1)
        results = []
        for name in pickers:
            if name == "oracle":
                results.append(
                    ArmResult(
                        "oracle",
                        session.pay_for_evaluation(oracle_rows(session, pool, prior, q0), pool, q0, prior=prior),
                    )
                )
                continue
            if name.startswith("planted") and not bool((pool.subject >= 0).all()):
                continue
            rows = _rollout_arm(session, name, pool, prior, numbers, corpus.variant)
            results.append(ArmResult(name, session.pay_for_evaluation(rows, pool, q0, prior=prior)))
            key_rows = with_key_text(session, rows, pool)
            results.append(ArmResult(f"{name}/key", session.pay_for_evaluation(key_rows, pool, q0, prior=prior)))
        yield EvaluationBatch(pool, prior, start, tuple(results))


def _rollout_arm(
    session: Session, name: str, pool: PairPool, prior: Tensor, numbers: Tensor, variant: str
) -> TrajectoryBatch:
    """Write one trajectory per article: the policy's for `trained`, else the reference's with the arm's picks."""
    if name == "trained":
        return session.rollout(pool, numbers)
    pickers: Mapping[str, Picker] = {
        "untrained": sampled_pick,
        "random": _random_pick,
        "article_order": _article_order_pick,
        "easy_to_hard": _easy_to_hard(prior),
        "nearest_key": _nearest_key_pick,
        "planted": _planted(pool.subject, variant),
        "planted_shuffled": _planted(_shuffle_labels(pool), variant),
    }
    with session.model.reference():
        return session.rollout(pool, numbers, pickers[name])


def _random_pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
    return sample(env.unread.float().log().log_softmax(-1), uniform)


def _first_unread(preference: Float[Tensor, "B N"], unread: Bool[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """Return the unread position of largest preference; ties go to the first in the article."""
    return preference.masked_fill(~unread, -math.inf).argmax(-1)


def _article_order_pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
    return _first_unread(
        -torch.arange(env.unread.shape[1], device=uniform.device).float().expand_as(env.unread), env.unread
    )


def _easy_to_hard(prior: Float[Tensor, "A N"]) -> Picker:
    """Prefer the largest u_j; dividing by L̄ would not change the order."""

    def pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
        return _first_unread(prior.repeat_interleave(len(uniform) // len(prior), 0), env.unread)

    return pick


def _nearest_key_pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
    if env.last_pick is None:
        return _article_order_pick(env, logprobs, uniform)
    return _first_unread(env.value_scores(), env.unread)


def _planted(subject: Int[Tensor, "A N"], variant: str) -> Picker:
    def pick(env: ReadingEnvironment, logprobs: Tensor, uniform: Tensor) -> Tensor:
        group = len(uniform) // len(subject)
        picks = []
        for b in range(len(uniform)):
            last = None if env.last_pick is None else int(env.last_pick[b])
            unread = env.unread[b].nonzero()[:, 0].tolist()
            picks.append(planted_pick(variant, subject[b // group].tolist(), unread, last))
        return torch.tensor(picks, device=uniform.device)

    return pick


def _shuffle_labels(pool: PairPool) -> Int[Tensor, "A N"]:
    """Permute the subject labels within each article, by its own seed: the control."""
    rows = [
        labels[torch.from_numpy(generator(0, Purpose.CONTROL, int(ids[0][:8], 16)).permutation(len(labels)))]
        for labels, ids in zip(pool.subject, pool.pair_ids, strict=True)
    ]
    return torch.stack(rows)


def with_key_text(session: Session, rows: TrajectoryBatch, pool: PairPool) -> TrajectoryBatch:
    """Return the rows with each query replaced by the last Q tokens of the picked key; the picks stand."""
    ids, mask = key_queries(session, pool)
    value_ids, value_mask = rows.value_slots()
    query_ids, query_mask = slot(ids, rows.picks), slot(mask, rows.picks)
    return assemble(
        session.template, query_ids, query_mask, value_ids, value_mask, rows.picks,
        torch.zeros_like(rows.sampled_logprobs), rows.selection_logprobs,
    )  # fmt: skip


def evaluation_records(session: Session, batch: EvaluationBatch, update: int) -> list[dict[str, Any]]:
    """Return one JSON-ready record per arm and article."""
    records = []
    for result in batch.results:
        picker, _, text = result.arm.partition("/")
        default_text = {"trained": "trained", "oracle": "key"}.get(picker, "untrained")
        rewards = result.paid.rewards.rewards.mean(1).tolist()
        for a, reward in enumerate(rewards):
            picks = result.paid.rows.picks[a]
            subjects = batch.pool.subject[a][picks].tolist()
            records.append(
                {
                    "arm": result.arm,
                    "picker": picker,
                    "text": text or default_text,
                    "article": batch.pool.articles[a].id,
                    "index": batch.first_index + a,
                    "seed": session.config.training.seed,
                    "update": update,
                    "reward_kind": session.config.evaluation.reward or session.config.reward.kind,
                    "scorer": "reference",
                    "reward": reward,
                    "picks": picks.tolist(),
                    "subjects": len(set(subjects)) if min(subjects) >= 0 else None,
                    "probe_curve": None,
                }
            )
    return records


def summarise(records: Sequence[Mapping[str, Any]], *, held_out: bool) -> dict[str, Any]:
    """Compute the contents of evaluation.json from the records of evaluation.jsonl alone."""
    unit = "article" if len({r["article"] for r in records}) > 1 else "trajectory"
    values = _unit_means(records, "reward", "article" if unit == "article" else "index")
    subjects = _unit_means([r for r in records if r["subjects"] is not None], "subjects", "article")
    arms = {
        arm: asdict(bootstrap_mean(list(by_unit.values())))
        | ({"subjects": sum(subjects[arm].values()) / len(subjects[arm])} if arm in subjects else {})
        for arm, by_unit in values.items()
    }
    contrasts = {f"{a}-{b}": _contrast(values[a], values[b]) for a, b in CONTRASTS if a in values and b in values}
    for name, p in holm({name: c["p"] for name, c in contrasts.items()}).items():
        contrasts[name]["p_holm"] = p
    choice = contrasts.get("trained/key-untrained/key")
    return {
        "unit": "nats per value token",
        "resampled": unit,
        "held_out": held_out,
        "articles": len({r["article"] for r in records}),
        "trajectories": len({r["index"] for r in records}),
        "seeds": sorted({r["seed"] for r in records}),
        "arms": arms,
        "contrasts": contrasts,
        "choice_gain": None if choice is None else {k: choice[k] for k in ("mean", "low", "high", "p")},
        "oracle_gap_closed": _gap_closed(values),
    }


def unit_contrast(records: Sequence[Mapping[str, Any]], a: str, b: str) -> dict[str, Any]:
    """Return the paired difference of two arms over articles (over trajectories if there is one article)."""
    unit = "article" if len({r["article"] for r in records}) > 1 else "index"
    values = _unit_means([r for r in records if r["arm"] in (a, b)], "reward", unit)
    return _contrast(values[a], values[b])


def _unit_means(records: Sequence[Mapping[str, Any]], field: str, unit: str) -> dict[str, dict[Any, float]]:
    """Average a field by arm and unit, in the order of first appearance."""
    sums: dict[str, dict[Any, list[float]]] = {}
    for record in records:
        sums.setdefault(record["arm"], {}).setdefault(record[unit], []).append(record[field])
    return {arm: {u: sum(v) / len(v) for u, v in by_unit.items()} for arm, by_unit in sums.items()}


def _differences(a: Mapping[Any, float], b: Mapping[Any, float]) -> list[float]:
    return [a[unit] - b[unit] for unit in a if unit in b]


def _contrast(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, Any]:
    differences = _differences(a, b)
    detectable = smallest_detectable(differences)
    return {
        **asdict(bootstrap_mean(differences)),
        "p": sign_flip_p(differences),
        "smallest_detectable": detectable if math.isfinite(detectable) else None,
    }


def _gap_closed(values: Mapping[str, Mapping[Any, float]]) -> float | None:
    """(trained − untrained) / (oracle − untrained), only where the gap's interval is positive."""
    if not {"trained", "untrained", "oracle"} <= set(values):
        return None
    gap = bootstrap_mean(_differences(values["oracle"], values["untrained"]))
    if gap.low <= 0:
        return None
    return bootstrap_mean(_differences(values["trained"], values["untrained"])).mean / gap.mean
