"""Headroom: what there is to win on this corpus and model before any training, with own-key text in every arm.

A reader who updates its beliefs coherently is indifferent to the order in which it hears the same things, so whether a
model gains from order is a question for measurement. The planted rule has a control: itself, on shuffled labels.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from attention_guided_rl.arms import run_arms
from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.evaluation import evaluation_records
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.session import Session
from attention_guided_rl.summary import unit_contrast
from attention_guided_rl.tracking import make_console

PICKERS = ("untrained", "random", "article_order", "easy_to_hard", "nearest_key", "planted", "planted_shuffled")
NOTHING_TO_LEARN = 0.01  # nats per value token


def measure_headroom(session: Session) -> dict[str, dict[str, Any]]:
    """Run every simple reader with own-key text, and the greedy search, on the evaluation articles; print and return.

    Values are paired differences to `random/key` in nats per value token.
    """
    config = session.config
    if config.evaluation.articles < 1:
        raise ConfigError("evaluation.articles must be at least 1 to measure headroom")
    corpus: CorpusConfig = config.evaluation.corpus or config.corpus
    records: list[dict[str, Any]] = []
    pickers = [*PICKERS, *(["oracle"] if config.evaluation.oracle else [])]
    for batch in run_arms(session, pickers, corpus=corpus):
        records += evaluation_records(session, batch, update=0)
    arms = [arm for arm in dict.fromkeys(r["arm"] for r in records) if arm.endswith("/key") or arm == "oracle"]
    contrasts = {arm: unit_contrast(records, arm, "random/key") for arm in arms if arm != "random/key"}
    pool = session.stream(corpus, num_probes=config.evaluation.num_probes, purpose=Purpose.EVALUATION_POOL).next_pool(8)
    _print(make_console(), contrasts, float(session.steerability(pool.to(session.model.device)).mean()), corpus)
    return contrasts


def _print(console: Console, contrasts: dict[str, dict[str, Any]], steerability: float, corpus: CorpusConfig) -> None:
    variant = f" ({corpus.variant})" if corpus.kind == "encyclopedia" else ""
    table = Table(
        title=f"Headroom on {corpus.kind}{variant}: reward minus that of random picks, nats per value token",
        title_justify="left",
    )
    for column in ("reader", "mean", "95 % interval", "p"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for arm, c in sorted(contrasts.items(), key=lambda item: -item[1]["mean"]):
        table.add_row(arm, f"{c['mean']:+.4f}", f"{c['low']:+.4f} … {c['high']:+.4f}", f"{c['p']:.4f}")
    console.print(table)
    console.print(f"steerability of the selection: {steerability:.2f} nats", highlight=False)
    best = max(c["low"] for arm, c in contrasts.items() if arm not in ("oracle", "planted_shuffled/key"))
    if best < NOTHING_TO_LEARN:
        console.print(
            "No simple order beats random picks here: expect nothing from learning the order. (A greedy search "
            "maximises noise too, so its lead alone is no headroom.)",
            highlight=False,
        )
