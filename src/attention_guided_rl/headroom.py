"""Headroom: what there is to win on this corpus and model before any training, with own-key text in every arm.

A reader who updates its beliefs coherently is indifferent to the order in which it hears the same things, so whether a
model gains from order is a question for measurement. A search maximises noise too; its noise floor is its lead on the
same articles with values exchanged between them, where no value tells anything about another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attention_guided_rl.arms import run_arms
from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.diagnostics import STEERABILITY_WARNING
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.evaluation import evaluation_records
from attention_guided_rl.oracle import oracle_rows
from attention_guided_rl.pickers import simple_pickers
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import PairPool
from attention_guided_rl.report.verdict import verdict as verdict_of
from attention_guided_rl.screen import make_console
from attention_guided_rl.session import Session
from attention_guided_rl.summary import contrast, unit_contrast, with_holm
from attention_guided_rl.texts import with_key_text

PICKERS = ("untrained", "random", "article_order", "easy_to_hard", "nearest_key", "planted", "planted_shuffled")
NO_ORDERS = ("oracle", "beam", "permuted/oracle", "permuted/beam", "planted_shuffled/key")
"""What says nothing of an order that could be learned: searches, floors, and the planted rule's control."""
TOO_LITTLE = 0.01  # nats per value token: less is not worth learning
RANDOM_ORDERS = 8
BEAM_WIDTH = 4
SEARCHED_ARTICLES = 24  # a beam costs its width times the greedy search
FLOOR_ARTICLES = 4
"""Different articles that a noise floor needs: fewer give each other so many values that an article's plan survives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What was measured, in nats per value token; contrasts are paired differences to random orders.

    `p_holm` is adjusted among the orders that could be learned, and apart from them among the searches.
    """

    contrasts: dict[str, dict[str, Any]]
    """By reader; those of `NO_ORDERS` have no `p_holm`."""
    random_order_sd: float
    """Standard deviation over random orders of the same article, averaged (root mean square) over articles."""
    above_floor: dict[str, dict[str, Any]]
    """Each search's lead minus its lead on permuted values; empty without searches or without a floor."""
    no_floor: str | None
    """Why searches have no noise floor, if there are searches without one."""
    steerability: float
    """Mean over articles, nats."""

    @property
    def verdict(self) -> str:
        """Say in a sentence whether there is something to learn about order."""
        if self.steerability < STEERABILITY_WARNING:
            return (
                f"The selection cannot be steered ({self.steerability:.3f} nats, below {STEERABILITY_WARNING}): "
                "whatever the query, the choice is nearly the same, so nothing can be learned about order here. Lower "
                "selection.target_entropy or change the embedder."
            )
        if _best(c for c in self.contrasts.values() if "p_holm" in c) >= TOO_LITTLE:
            return "A simple order beats random picks here: there is something to learn about order."
        if _best(self.above_floor.values()) >= TOO_LITTLE:
            return (
                f"No simple order is shown to beat random picks by {TOO_LITTLE} nats, but a search beats them by more "
                "than its noise floor: there may be something to learn, and no simple rule finds it."
            )
        searches = "."
        if self.above_floor:
            searches = ", and no search by that much more than its noise floor."
        elif self.no_floor is not None:
            searches = "; the searches have no noise floor here and say nothing."
        return (
            "Nothing to learn about order is shown here: no simple order is shown to beat random picks by "
            f"{TOO_LITTLE} nats{searches}"
        )


def _best(contrasts: Iterable[Mapping[str, Any]]) -> float:
    """Return the largest lower bound among the leads that are shown; 0 if none is."""
    return max((c["low"] for c in contrasts if verdict_of(c) == "better"), default=0.0)


def measure_headroom(session: Session) -> Headroom:
    """Run every simple reader with own-key text, and the searches, on the evaluation articles; print and return."""
    config = session.config
    if config.evaluation.articles < 1:
        raise ConfigError("evaluation.articles must be at least 1 to measure headroom")
    corpus: CorpusConfig = config.evaluation.corpus or config.corpus
    records: list[dict[str, Any]] = []
    for batch in run_arms(session, PICKERS, corpus=corpus, key_text_only=True):
        records += evaluation_records(session, batch, update=0)
    arms = dict.fromkeys(r["arm"] for r in records)
    contrasts = {arm: unit_contrast(records, arm, "random/key") for arm in arms if arm != "random/key"}
    family = with_holm({arm: c for arm, c in contrasts.items() if arm not in NO_ORDERS})
    stream = session.stream(corpus, num_probes=config.evaluation.num_probes, purpose=Purpose.EVALUATION_POOL)
    pool = stream.next_pool(min(config.evaluation.articles, SEARCHED_ARTICLES)).to(session.model.device)
    no_floor = no_floor_of(pool) if config.evaluation.oracle else None
    if config.evaluation.oracle and no_floor is None:
        pool = different_articles(pool)
    orders = random_order_rewards(session, pool)
    leads = search_leads(session, pool, orders.mean(1)) if config.evaluation.oracle else {}
    floors = {}
    if leads and no_floor is None:
        permuted = permute_values(pool)
        floors = search_leads(session, permuted, random_order_rewards(session, permuted).mean(1))
    searched = leads | {f"permuted/{name}": floor for name, floor in floors.items()}
    result = Headroom(
        contrasts=contrasts | family | {name: contrast(lead.tolist()) for name, lead in searched.items()},
        random_order_sd=float(orders.var(1).mean().sqrt()),
        above_floor=with_holm({name: contrast((leads[name] - floor).tolist()) for name, floor in floors.items()}),
        no_floor=no_floor,
        steerability=float(session.steerability(pool.take(torch.arange(min(8, pool.num_articles)))).mean()),
    )
    _print(make_console(), result, corpus, pool.num_articles)
    return result


def no_floor_of(pool: PairPool) -> str | None:
    """Say why values of this pool cannot be exchanged for a noise floor; None if they can."""
    found = len({article.id for article in pool.articles})
    if found >= FLOOR_ARTICLES:
        return None
    read = "one article is" if found == 1 else f"{found} different articles are"
    return f"{read} read, and values exchanged among fewer than {FLOOR_ARTICLES} keep what belongs together"


def different_articles(pool: PairPool) -> PairPool:
    """Return the first pool of every article: one exchanged with itself would keep its values."""
    ids = [article.id for article in pool.articles]
    return pool.take(torch.tensor([ids.index(name) for name in dict.fromkeys(ids)]))


def random_order_rewards(session: Session, pool: PairPool) -> Float[Tensor, "A R"]:
    """Return the reward of several random orders of every article, with own-key text."""
    indices = range(pool.num_articles)
    numbers = session.uniforms(Purpose.EVALUATION, 1, indices, RANDOM_ORDERS)
    with session.model.reference():
        picker = simple_pickers(pool, torch.zeros(pool.key_ids.shape[:2]), "threads")["random"]
        rows = with_key_text(session, session.rollout(pool, numbers, picker), pool)
    q0 = session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 1, indices, RANDOM_ORDERS)
    paid = session.pay_for_evaluation(rows, pool, q0)
    return paid.rewards.rewards.mean(1).view(pool.num_articles, RANDOM_ORDERS)


def search_leads(session: Session, pool: PairPool, random: Float[Tensor, " A"]) -> dict[str, Float[Tensor, " A"]]:
    """Return what the greedy search and the beam are paid beyond random orders, for every article."""
    prior = session.prior(pool)
    q0 = session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 0, range(pool.num_articles), 1)
    leads = {}
    for name, width in (("oracle", 1), ("beam", BEAM_WIDTH)):
        rows = oracle_rows(session, pool, prior, q0, width=width)
        leads[name] = session.pay_for_evaluation(rows, pool, q0, prior=prior).rewards.rewards.mean(1) - random
    return leads


def permute_values(pool: PairPool) -> PairPool:
    """Exchange values between articles, keys and probes staying: pair n takes that of the (1 + n mod (A − 1))th next.

    So neighbouring pairs get the values of different articles, as far as there are enough.
    """
    num_articles, num_pairs = pool.num_articles, pool.num_pairs
    pair = torch.arange(num_pairs, device=pool.value_ids.device)
    article = torch.arange(num_articles, device=pair.device)[:, None]
    source = (article + 1 + pair % (num_articles - 1)) % num_articles
    return replace(pool, value_ids=pool.value_ids[source, pair], value_mask=pool.value_mask[source, pair])


def _print(console: Console, result: Headroom, corpus: CorpusConfig, num_searched: int) -> None:
    variant = f" ({corpus.variant})" if corpus.kind == "encyclopedia" else ""
    table = Table(
        title=f"Headroom on {corpus.kind}{variant}: reward minus that of random picks, nats per value token",
        title_justify="left",
    )
    for column in ("reader", "mean", "95 % interval", "p", "p (Holm)"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for arm, c in sorted(result.contrasts.items(), key=lambda item: -item[1]["mean"]):
        adjusted = f"{c['p_holm']:.4f}" if "p_holm" in c else "–"
        table.add_row(arm, f"{c['mean']:+.4f}", _interval(c), f"{c['p']:.4f}", adjusted)
    console.print(table)
    lines = [f"random orders of an article differ by {result.random_order_sd:.4f} (standard deviation)"]
    lines += [
        f"{name} beyond its noise floor ({num_searched} articles, values permuted): {c['mean']:+.4f} [{_interval(c)}], "
        f"p (Holm) {c['p_holm']:.4f}"
        for name, c in result.above_floor.items()
    ]
    lines += [] if result.no_floor is None else [f"no noise floor of the searches: {result.no_floor}"]
    lines += [f"steerability of the selection: {result.steerability:.2f} nats", result.verdict]
    console.print(Text("\n".join(lines)))


def _interval(contrast: dict[str, Any]) -> str:
    return f"{contrast['low']:+.4f} … {contrast['high']:+.4f}"
