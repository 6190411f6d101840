"""Evaluation: run every arm on a run's policy, and leave records that others can read and compute with.

In: a session and its run folder. Out: evaluation.jsonl, evaluation.json (which `summary.py` computes from it alone),
the trajectories that a model wrote, the figure and the table.
"""

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from attention_guided_rl.arms import BATTERY, OWN_TEXT, ArmResult, EvaluationBatch, run_arms
from attention_guided_rl.checkpoint import latest_checkpoint, verify
from attention_guided_rl.pickers import PICKERS
from attention_guided_rl.records import PairPool
from attention_guided_rl.report.figures import plot_run
from attention_guided_rl.report.html import write_report
from attention_guided_rl.report.log_lines import objects
from attention_guided_rl.report.tables import print_summary
from attention_guided_rl.reward import probe_curve
from attention_guided_rl.session import Session
from attention_guided_rl.storage import write_text
from attention_guided_rl.summary import summarise
from attention_guided_rl.tracking import RunLogs, pair_records, trajectory_records

_log = logging.getLogger(__name__)


def evaluate_run(
    session: Session,
    folder: Path,
    update: int,
    console: Console,
    orders: Mapping[str, Sequence[Int[Tensor, " S"]]] | None = None,
) -> dict[str, Any]:
    """Run all arms, write evaluation.jsonl, evaluation.json and the figure, print the table, return the summary.

    `orders`: further pickers by name, each with the picks of every evaluation article.
    """
    config = session.config
    lengths = verify(latest_checkpoint(folder))["log_bytes"]
    pickers = [*PICKERS, *(["oracle"] if config.evaluation.oracle else [])]
    battery = BATTERY if config.evaluation.arms == "all" else ()
    records: list[dict[str, Any]] = []
    waiting = console.status("evaluating") if console.is_terminal else contextlib.nullcontext()
    with waiting, RunLogs(folder, config.log, lengths) as logs:  # drops the trajectories of an earlier evaluation
        for batch in run_arms(session, pickers, battery=battery, orders=orders):
            records += evaluation_records(session, batch, update)
            _log_trajectories(session, logs, batch, update)
    _warn_of_other_articles(folder / "evaluation.jsonl", records)
    summary = summarise(records, held_out=config.evaluation.corpus not in (None, config.corpus))
    write_text(folder / "evaluation.jsonl", "".join(json.dumps(r, allow_nan=False) + "\n" for r in records))
    write_text(folder / "evaluation.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    metrics = list(objects(folder / "metrics.jsonl", Counter()))
    plot_run(metrics, summary, folder / "figures" / "run.png")
    write_report(folder)
    print_summary(console, summary)
    return summary


def _warn_of_other_articles(earlier: Path, records: list[dict[str, Any]]) -> None:
    """Say so if the evaluation that these records replace read other articles, or other text of the same."""
    try:
        before = {r["index"]: r["pool"] for r in map(json.loads, earlier.read_text(encoding="utf-8").splitlines())}
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of a version that wrote less: it goes anyway
        return
    now = {r["index"]: r["pool"] for r in records}
    changed = [index for index in now.keys() & before.keys() if now[index] != before[index]]
    if changed:
        _log.warning(
            "%s: %d of %d articles or their texts are not those of the evaluation before, which this one replaces: the "
            "two do not compare; name the network.cache and the files that the run began with to read the same",
            earlier.parent, len(changed), len(now),
        )  # fmt: skip


def _log_trajectories(session: Session, logs: RunLogs, batch: EvaluationBatch, update: int) -> None:
    """Log the trajectories with text that a model wrote; the others follow from evaluation.jsonl and pairs.jsonl."""
    for result in batch.results:
        written = result.arm.partition("/")[2] in ("", "trained", "untrained")
        if result.arm == "oracle" or "@" in result.arm or not written:
            continue
        labels = {"phase": "evaluation", "arm": result.arm, "update": update, "scorer": result.scorer}
        logs.write(
            "trajectories.jsonl",
            trajectory_records(
                result.paid.rows, result.paid.rewards, result.paid.scores, batch.pool, session.model, labels,
                batch.first_index,
            ),
        )  # fmt: skip
    logs.pairs(pair_records(batch.pool, batch.prior, session.model))
    logs.attribute(batch.pool.articles)


def evaluation_records(session: Session, batch: EvaluationBatch, update: int) -> list[dict[str, Any]]:
    """Return one JSON-ready record per arm and article."""
    pools = [_pool_digest(batch.pool, a) for a in range(batch.pool.num_articles)]
    scoring = scoring_identity(session)
    records = []
    for result in batch.results:
        picker, _, text = result.arm.partition("@")[0].partition("/")
        rewards = result.paid.rewards.rewards.mean(1).tolist()
        curves = _curves(result, batch.pool)
        for a, reward in enumerate(rewards):
            picks = result.paid.rows.picks[a]
            subjects = batch.pool.subject[a][picks].tolist()
            records.append(
                {
                    "arm": result.arm,
                    "picker": picker,
                    "text": text or OWN_TEXT.get(picker, "untrained"),
                    "article": batch.pool.articles[a].id,
                    "pool": pools[a],
                    "index": batch.first_index + a,
                    "seed": session.config.training.seed,
                    "update": update,
                    "reward_kind": session.config.evaluation.reward or session.config.reward.kind,
                    "scorer": result.scorer,
                    "scoring": scoring,
                    "reward": reward,
                    "picks": picks.tolist(),
                    "subjects": len(set(subjects)) if min(subjects) >= 0 else None,
                    "probe_curve": curves[a],
                }
            )
    return records


def scoring_identity(session: Session) -> str:
    """Name what a number of this evaluation means, beside its reward's kind: runs that differ here are not subtracted.

    The settings are those of `run_settings.SCORING`, as they turned out: the template in tokens, sizes without `auto`.
    """
    config, template = session.config, session.template
    asked = config.rollout.temperature if session.evaluation_reward.needs == "counterfactual" else None
    parts = (
        *(config.model.name, config.model.revision, template.prompt, template.before_query, template.before_value),
        *(config.pairs.cut, config.pairs.key_tokens, config.pairs.value_tokens, session.num_pairs, session.num_steps),
        *(config.rollout.query_tokens, asked, config.reward.query_in_context, config.evaluation.num_probes),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _curves(result: ArmResult, pool: PairPool) -> list[list[float]] | list[None]:
    """Return ℓ of the probes after 0 … S pairs, nats per probe token, for every article; None without probes."""
    logprobs = result.paid.scores.probe_logprobs
    return [None] * pool.num_articles if logprobs is None else probe_curve(logprobs, pool).tolist()


def _pool_digest(pool: PairPool, article: int) -> str:
    """Name the exact pairs and probes of an article, so that two runs can tell whether they read the same."""
    return hashlib.sha256(repr((pool.pair_ids[article], pool.probe_pair_ids[article])).encode()).hexdigest()[:16]
