"""Dry run: what training would send to an embedding service, and its price, before anything is sent.

Counts are upper bounds: a text that was embedded before, or that comes up twice, costs nothing.
"""

from dataclasses import dataclass
from functools import cache, partial

from rich.console import Console
from rich.table import Table

from attention_guided_rl.config import Config
from attention_guided_rl.data import open_corpus
from attention_guided_rl.embedders import EMBEDDERS
from attention_guided_rl.loading import load_tokenizer
from attention_guided_rl.model import encode_text
from attention_guided_rl.network import Network
from attention_guided_rl.pickers import PICKERS
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


def planned_embeddings(config: Config, num_pairs: int, num_steps: int, num_distinct_keys: int | None) -> list[Planned]:
    """Return what a whole run embeds at most; `num_distinct_keys` bounds the keys where the corpus is one article."""
    rollout, pairs, evaluation = config.rollout, config.pairs, config.evaluation
    rows = rollout.articles * rollout.trajectories
    queries = config.training.updates * rows * num_steps
    num_articles = config.training.updates * rollout.articles + evaluation.articles
    keys = num_articles * num_pairs
    if num_distinct_keys is not None and evaluation.corpus in (None, config.corpus):
        keys = min(keys, num_distinct_keys)
    rewritten = 2 if evaluation.arms == "all" else 0  # trained/untrained and untrained/trained
    steps = (len(PICKERS) + rewritten) * evaluation.articles * num_steps  # the search alone writes no queries
    values = evaluation.articles * num_steps
    q, k, v = rollout.query_tokens, pairs.key_tokens, pairs.value_tokens
    plan = [
        Planned(
            "queries of the training", queries, queries * q,
            f"{config.training.updates:,} updates × {rows:,} rows × {num_steps} steps × {q} tokens",
        ),
        Planned("keys", keys, keys * k, f"{keys:,} keys × {k} tokens"),
        Planned("queries of the evaluation", steps, steps * q, f"{steps:,} queries × {q} tokens"),
        Planned("values as queries", values, values * v, f"{values:,} values × {v} tokens"),
    ]  # fmt: skip
    if config.selection.temperature is None:
        calibration = -(-config.selection.calibration_queries // rollout.trajectories) * rollout.trajectories
        plan.append(Planned("calibration", calibration, calibration * q, f"{calibration} queries × {q} tokens"))
    return plan


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
    plan = planned_embeddings(config, num_pairs, num_steps, distinct)
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
