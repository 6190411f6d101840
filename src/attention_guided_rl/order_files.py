"""Order files: reading orders made by anyone, as a picker of the evaluation.

In: orders.jsonl files, whose lines name an article, the hash of its cut text, and pairs by id (as `agrl rollout --out`
writes them). Out: for every evaluation article the pool positions to read. What does not fit its article is refused;
lines of articles that are not evaluated are ignored.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.pickers import PICKERS
from attention_guided_rl.plain_data import parse_json
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import PairPool
from attention_guided_rl.session import Session


class OrderLine(BaseModel):
    """What is needed of a line of orders.jsonl; further keys are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    article: str
    hash: str
    pairs: tuple[str, ...]
    picks: tuple[int, ...] | None = None
    """The same pairs by their places in the pool; what is read goes by `pairs`."""


def match_orders(session: Session, files: Sequence[Path]) -> dict[str, list[Int[Tensor, " S"]]]:
    """Return, under each file's name without its ending, the picks it gives for every evaluation article.

    Raises:
        ConfigError: a file's name is that of a picker, or no plain name.
        CorpusError: a file cannot be read, or does not fit the articles, pools or steps of the evaluation.
    """
    if not files:
        return {}
    evaluation = session.config.evaluation
    corpus = evaluation.corpus or session.config.corpus
    stream = session.stream(corpus, num_probes=evaluation.num_probes, purpose=Purpose.EVALUATION_POOL)
    pool = stream.next_pool(evaluation.articles)
    found: dict[str, list[Int[Tensor, " S"]]] = {}
    for file in files:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", file.stem) or file.stem in (*PICKERS, *found, "oracle"):
            raise ConfigError(f"--arms file:{file}: the file's name names its arm, so it must be a plain, new name")
        found[file.stem] = picks_of_orders(read_orders(file), pool, session.num_steps, str(file))
    return found


def read_orders(path: Path) -> list[OrderLine]:
    """Read an orders.jsonl file.

    Raises:
        CorpusError: it cannot be read, or a line is no order.
    """
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot read the orders: {error}") from None
    lines = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 too
        try:
            lines.append(OrderLine.model_validate(parse_json(line)))
        except ValueError:
            raise CorpusError(
                f"{path}: line {number} is no order; needed: article, hash and pairs (a list of pair ids; picks, if "
                "given, are a list of places in the pool)"
            ) from None
    return lines


def picks_of_orders(lines: Sequence[OrderLine], pool: PairPool, num_steps: int, source: str) -> list[Int[Tensor, " S"]]:
    """Return the pool positions that the lines name for every article; lines of one article are used in turn.

    Raises:
        CorpusError: there is none for an article, or it does not fit the article's pool.
    """
    waiting: dict[str, list[OrderLine]] = {}
    for line in lines:
        waiting.setdefault(line.article, []).append(line)
    picks: list[Int[Tensor, " S"]] = []
    for article, pair_ids in zip(pool.articles, pool.pair_ids, strict=True):
        if not waiting.get(article.id):
            raise CorpusError(
                f"{source}: no order for article {article.id!r} (number {len(picks) + 1} of {pool.num_articles} to "
                "evaluate); add it, or lower evaluation.articles"
            )
        line = waiting[article.id].pop(0)
        if (fault := _fault(line, pair_ids, num_steps)) is not None:
            raise CorpusError(f"{source}: article {article.id!r}: {fault}")
        picks.append(torch.tensor([pair_ids.index(name) for name in line.pairs]))
    return picks


def _fault(line: OrderLine, pair_ids: Sequence[str], num_steps: int) -> str | None:
    """Return why an order does not fit a pool, or None."""
    digest = pair_ids[0].rpartition("-")[0]
    if line.hash != digest:
        return f"hash {line.hash!r}, here {digest!r}: another text, or cut in another way"
    strangers = [name for name in line.pairs if name not in pair_ids]
    if strangers:
        return (
            f"pair {strangers[0]!r} is not in this evaluation's pool (with other numbers of pairs or probes, or at "
            "another place among the articles, other pairs are drawn; probes are never read)"
        )
    if len(line.pairs) != num_steps or len(set(line.pairs)) < num_steps:
        return f"{len(line.pairs)} pairs, {len(set(line.pairs))} of them different; the evaluation reads {num_steps}"
    places = tuple(pair_ids.index(name) for name in line.pairs)
    if line.picks is not None and line.picks != places:
        return f"picks {list(line.picks)} are not its pairs, which lie at {list(places)}; correct or leave out picks"
    return None
