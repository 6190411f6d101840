"""Dry run: what training would send to an embedding service, and its price, before anything is sent.

Counts are upper bounds: a text that was embedded before, or that comes up twice, costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from rich.console import Console
from rich.table import Table

from attention_guided_rl.config import Config
from attention_guided_rl.data import open_corpus
from attention_guided_rl.embedders import EMBEDDERS
from attention_guided_rl.embedders.text import CANARIES
from attention_guided_rl.loading import load_tokenizer
from attention_guided_rl.model import encode_text
from attention_guided_rl.network import Network
from attention_guided_rl.pickers import PICKERS
from attention_guided_rl.session import PREPARED_ARTICLES
from attention_guided_rl.sizes import context_tokens, only_article, resolve_sizes
from attention_guided_rl.tables import resolve
from attention_guided_rl.template import build_template


@dataclass(frozen=True, slots=True)
class Planned:
    """Texts of one kind; `tokens` as the language model counts them."""

    what: str
    texts: int
    tokens: int
    how: str
    """The multiplication behind `tokens`."""


def planned_embeddings(
    config: Config, num_pairs: int, num_steps: int, num_distinct_keys: int | None, count: Callable[[str], int]
) -> list[Planned]:
    """Return what a whole run embeds at most, if no request has to be repeated.

    `num_distinct_keys` bounds the keys where the corpus is one article; `count` gives the tokens of a text.
    """
    rollout, pairs, evaluation, embedder = config.rollout, config.pairs, config.evaluation, config.embedder
    before_query, before_key = count(embedder.query_prompt or ""), count(embedder.key_prompt or "")
    q, v = rollout.query_tokens + before_query, pairs.value_tokens + before_query
    updates, rows = config.training.updates, rollout.articles * rollout.trajectories
    calibrated = -(-config.selection.calibration_queries // rollout.trajectories)
    calibrated = 0 if config.selection.temperature is not None else calibrated
    steered = (PREPARED_ARTICLES + updates * rollout.articles) * num_pairs  # keys that are tried as queries too
    keys, held_out = calibrated * num_pairs + steered, evaluation.articles * num_pairs
    if num_distinct_keys is not None:
        keys, steered = min(keys, num_distinct_keys), min(steered, num_distinct_keys)
        if evaluation.corpus in (None, config.corpus):
            held_out = min(held_out, num_distinct_keys - keys)
    plan = [
        Planned("canaries", len(CANARIES), sum(map(count, CANARIES)), "fixed texts, sent at every start and resume"),
        _each("calibration", calibrated * rollout.trajectories, "queries", q),
        Planned(
            "queries of the training", updates * rows * num_steps, updates * rows * num_steps * q,
            f"{updates:,} updates × {rows:,} rows × {num_steps} steps × {q} tokens",
        ),
        _each("keys", keys + held_out, "keys", pairs.key_tokens + before_key),
    ]  # fmt: skip
    if (embedder.query_prompt or "") != (embedder.key_prompt or ""):
        plan.append(_each("keys as queries", steered, "keys", pairs.key_tokens + before_query))
    rewritten = 2 if evaluation.arms == "all" else 0  # trained/untrained and untrained/trained
    others = 3 if evaluation.arms == "all" and evaluation.articles else 0  # rows from which other texts are taken
    arms = len(PICKERS) + rewritten  # every picker but the search writes queries of its own
    written = (arms * evaluation.articles + others) * num_steps
    return [
        *plan,
        _each("queries of the evaluation", written, "queries", q),
        _each("values as queries", evaluation.articles * num_steps, "values", v),
    ]


def _each(what: str, texts: int, noun: str, tokens: int) -> Planned:
    """Plan texts of at most so many tokens each."""
    return Planned(what, texts, texts * tokens, f"{texts:,} {noun} × {tokens} tokens")


def dry_run(config: Config, console: Console) -> None:
    """Print the plan and its price; nothing is embedded, and no weights are loaded."""
    factory = resolve(EMBEDDERS, config.embedder.kind, "embedder.kind")
    price = getattr(factory, "price", None)
    if price is None:
        console.print(f"embedder {config.embedder.kind}: computed on this machine; no text is sent anywhere")
        return
    host, usd_per_million = price(config.embedder)
    opened = cache(partial(open_corpus, network=Network(config.network)))
    tokenizer = load_tokenizer(config.model, offline=config.network.offline)
    encode = partial(encode_text, tokenizer)
    template = build_template(tokenizer, config.template)
    num_pairs, num_steps = resolve_sizes(config, template, encode, opened, context_tokens(config))
    distinct = None if config.corpus.title is None else len(only_article(config, encode, opened).pairs)
    plan = planned_embeddings(config, num_pairs, num_steps, distinct, lambda text: len(encode(text)))
    table = Table("at most", "texts", "tokens", "that is", box=None, pad_edge=False, header_style="bold")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for line in plan:
        table.add_row(line.what, f"{line.texts:,}", f"{line.tokens:,}", line.how)
    tokens = sum(line.tokens for line in plan)
    table.add_row("together", f"{sum(line.texts for line in plan):,}", f"{tokens:,}", "")
    console.print(table)
    cap = config.embedder.max_usd
    limit = "set --embedder.max-usd to stop at a sum" if cap is None else f"the run stops before {cap:g} USD"
    console.print(
        f"sent to {host}, {tokens * usd_per_million / 1e6:,.4f} USD at {usd_per_million:g} USD per million tokens, if "
        f"it counts tokens as the model does; texts embedded before cost nothing; {limit}",
        highlight=False,
    )
