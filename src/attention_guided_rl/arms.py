"""Arms: `picker/text`, a way to choose pairs with a text in the query slots, run on equal terms.

In: a session with a trained policy, and held-out articles. Out: what every arm made of them, on the same articles,
pools, probes and random numbers. The scorer is the frozen reference, whatever training used; only the arms
`trained@live` and `untrained@live` are scored by training's own scorer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.encyclopedia import STAY_VARIANTS
from attention_guided_rl.oracle import oracle_rows
from attention_guided_rl.pickers import replay, simple_pickers
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import PairPool, TrajectoryBatch
from attention_guided_rl.session import PaidRows, Session
from attention_guided_rl.texts import with_fixed_text, with_key_text, with_possible_text, with_text

BATTERY = (
    "trained/untrained", "untrained/trained", "trained/none", "trained/shuffled", "trained/fixed", "planted/possible",
)  # fmt: skip
"""Arms that take the gain apart: the picks of one with the text of another."""
OWN_TEXT = {"trained": "trained", "oracle": "key"}
"""Text of a picker's own; that of every other is untrained."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm on one pool of articles, one trajectory each."""

    arm: str
    paid: PaidRows
    scorer: str = "reference"


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Some held-out articles and what every arm made of them."""

    pool: PairPool
    prior: Float[Tensor, "A N"]
    first_index: int
    results: tuple[ArmResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What all arms on a batch of articles share, and the rows that they have written so far."""

    session: Session
    pool: PairPool
    prior: Float[Tensor, "A N"]
    numbers: Float[Tensor, "A S U"]
    q0: Float[Tensor, "A S Q"] | None
    variant: str
    all_curves: bool
    key_text_only: bool
    rows: dict[str, TrajectoryBatch] = field(default_factory=dict)

    def pay(self, arm: str, rows: TrajectoryBatch) -> ArmResult:
        """Score an arm's rows; probes cost more than all else, so own-key text has its curve only with the battery."""
        self.rows[arm] = rows
        probes = self.all_curves or not arm.endswith("/key")
        paid = self.session.pay_for_evaluation(rows, self.pool, self.q0, prior=self.prior, probes=probes)
        return ArmResult(arm, paid)

    def pay_live(self, arm: str) -> ArmResult:
        """Score an arm's rows by the scorer of training, with priors of its own."""
        session = self.session
        paid = session.pay_for_evaluation(self.rows[arm], self.pool, self.q0, scorer=session.scorer)
        return ArmResult(f"{arm}@live", paid, session.config.reward.scorer)


def run_arms(
    session: Session,
    pickers: Sequence[str],
    *,
    battery: Sequence[str] = (),
    orders: Mapping[str, Sequence[Int[Tensor, " S"]]] | None = None,
    corpus: CorpusConfig | None = None,
    key_text_only: bool = False,
) -> Iterator[EvaluationBatch]:
    """Run arms on `evaluation.articles` articles, a batch at a time: each picker's own text, and own-key text.

    `planted` is left out where the corpus has no subjects, and an arm of the battery where its picker did not run.
    `orders`: further pickers by name, each with the picks of every article. `key_text_only`: without their own text.
    """
    evaluation = session.config.evaluation
    corpus = corpus or evaluation.corpus or session.config.corpus
    stream = session.stream(corpus, num_probes=evaluation.num_probes, purpose=Purpose.EVALUATION_POOL)
    queries = _QueriesOfOthers(session, corpus) if {"trained/shuffled", "trained/fixed"} & set(battery) else None
    for start in range(0, evaluation.articles, evaluation.batch_articles):
        indices = range(start, min(start + evaluation.batch_articles, evaluation.articles))
        pool = stream.next_pool(len(indices)).to(session.model.device)
        bench = _Bench(
            session=session,
            pool=pool,
            prior=session.prior(pool),
            numbers=session.uniforms(Purpose.EVALUATION, 0, indices, 1),
            q0=session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 0, indices, 1),
            variant=corpus.variant,
            all_curves=bool(battery),
            key_text_only=key_text_only,
        )
        results = [result for name in pickers for result in _run_picker(bench, name)]
        for name, picks in (orders or {}).items():
            chosen = torch.stack(list(picks[start : indices.stop])).to(session.model.device)
            results += _with_key(bench, name, _rewritten(bench, chosen, trained=False))
        results += _run_battery(bench, battery, queries)
        yield EvaluationBatch(pool, bench.prior, start, tuple(results))


def _run_picker(bench: _Bench, name: str) -> list[ArmResult]:
    """Write one trajectory per article: the policy's for `trained`, else the reference's with the picker's picks."""
    session, pool = bench.session, bench.pool
    if name == "oracle":
        return [bench.pay(name, oracle_rows(session, pool, bench.prior, bench.q0))]
    if name.startswith("planted") and not bool((pool.subject >= 0).all()):
        return []
    if name == "trained":
        return _with_key(bench, name, session.rollout(pool, bench.numbers))
    with session.model.reference():
        rows = session.rollout(pool, bench.numbers, simple_pickers(pool, bench.prior, bench.variant)[name])
    return _with_key(bench, name, rows)


def _with_key(bench: _Bench, name: str, rows: TrajectoryBatch) -> list[ArmResult]:
    own = [] if bench.key_text_only else [bench.pay(name, rows)]
    return [*own, bench.pay(f"{name}/key", with_key_text(bench.session, rows, bench.pool))]


def _rewritten(bench: _Bench, picks: Int[Tensor, "A S"], *, trained: bool) -> TrajectoryBatch:
    """Replay picks while a writer writes in the context that they make, with the numbers that all arms share."""
    if trained:
        return bench.session.rollout(bench.pool, bench.numbers, replay(picks))
    with bench.session.model.reference():
        return bench.session.rollout(bench.pool, bench.numbers, replay(picks))


def _run_battery(bench: _Bench, battery: Sequence[str], queries: "_QueriesOfOthers | None") -> list[ArmResult]:
    results = []
    for arm in battery:
        picker, _, text = arm.partition("/")
        if picker in bench.rows and not (text == "possible" and bench.variant not in STAY_VARIANTS):
            results.append(bench.pay(arm, _other_text(bench, picker, text, queries)))
    if battery and bench.session.scorer.live:
        results += [bench.pay_live(arm) for arm in ("trained", "untrained") if arm in bench.rows]
    return results


def _other_text(bench: _Bench, picker: str, text: str, queries: "_QueriesOfOthers | None") -> TrajectoryBatch:
    """Return a picker's rows with a text that is not its own."""
    session, rows = bench.session, bench.rows[picker]
    if text == "none":
        return rows.without_queries()
    if text == "possible":
        return with_possible_text(session, rows, bench.pool, bench.numbers[:, :, :-1])
    if text in ("trained", "untrained"):
        return _rewritten(bench, rows.picks, trained=text == "trained")
    assert queries is not None
    return queries.fixed(rows) if text == "fixed" else queries.shuffled(rows)


class _QueriesOfOthers:
    """Queries that were written for another article, whatever the size of a batch."""

    def __init__(self, session: Session, corpus: CorpusConfig) -> None:
        """Write for the first two articles, ahead of everything."""
        self._session = session
        num_probes = session.config.evaluation.num_probes
        pool = session.stream(corpus, num_probes=num_probes, purpose=Purpose.EVALUATION_POOL).next_pool(2)
        pool = pool.to(session.model.device)
        numbers = session.uniforms(Purpose.EVALUATION, 0, range(2), 1)
        self._before = session.rollout(pool, numbers).query_slots()[0][1:]
        with session.model.reference():
            self._fixed = session.rollout(pool, numbers[:, :1]).query_slots()[0][0, 0]

    def fixed(self, rows: TrajectoryBatch) -> TrajectoryBatch:
        """Put the first untrained query of the first article into every slot."""
        return with_fixed_text(self._session, rows, self._fixed)

    def shuffled(self, rows: TrajectoryBatch) -> TrajectoryBatch:
        """Give each row the queries of the article before it, and the very first row those of the second article."""
        ids, mask = rows.query_slots()
        others = torch.cat([self._before, ids[:-1]])
        self._before = ids[-1:]
        return with_text(self._session, rows, others, mask)
