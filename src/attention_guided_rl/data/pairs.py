"""Pairs: cut articles into key/value pairs, draw probes and pool, and stream pools from a corpus.

In: a Corpus and a tokenizer's `encode`. Out: PairPools of A articles, and a position from which to go on.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from syntok import segmenter

from attention_guided_rl.config import PairsConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.errors import CheckpointError, CorpusError
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Article, PairPool

logger = logging.getLogger(__name__)
MAX_SKIPPED_IN_A_ROW = 10_000
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class CutPair:
    """One pair of an article in token ids, cut to its slots but not yet padded."""

    key_ids: Sequence[int]
    value_ids: Sequence[int]
    position: int
    subject: int = -1


@dataclass(frozen=True, slots=True)
class CutArticle:
    """An article and its pairs; `digest` names the exact cut text."""

    article: Article
    pairs: tuple[CutPair, ...]
    digest: str

    def pair_id(self, pair: CutPair) -> str:
        """Return the pair's stable name."""
        return f"{self.digest}-{pair.position}"


def cut_article(article: Article, encode: Encode, config: PairsConfig) -> CutArticle:
    """Cut an article into pairs: ready ones as they are, otherwise by token counts or by sentences.

    Every piece is tokenised as running text, that is, after a space.
    """
    k, v = config.key_tokens, config.value_tokens
    if article.pairs is not None:
        texts = [(p.key, p.value, -1 if p.subject is None else p.subject) for p in article.pairs]
    elif config.cut == "sentences":
        sentences = split_sentences(article.text)
        texts = [(key, value, -1) for key, value in zip(sentences[0::2], sentences[1::2], strict=False)]
    else:
        texts = []
        ids = encode(" " + article.text.strip())
        ready = [
            CutPair(ids[start : start + k], ids[start + k : start + k + v], place)
            for place, start in enumerate(range(0, len(ids) - (k + v) + 1, k + v))
        ]
    if article.pairs is not None or config.cut == "sentences":
        pieces = [(encode(f" {key.strip()}"), encode(f" {value.strip()}"), label) for key, value, label in texts]
        ready = [
            CutPair(key_ids[:k], value_ids[:v], place, label)
            for place, (key_ids, value_ids, label) in enumerate(pieces)
            if key_ids and value_ids
        ]
    digest = hashlib.sha256(repr([(p.key_ids, p.value_ids) for p in ready]).encode()).hexdigest()[:16]
    return CutArticle(article, tuple(ready), digest)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text in order, each exactly as it stands there; a line break ends a paragraph."""
    sentences = []
    for paragraph in text.splitlines():
        for part in segmenter.analyze(paragraph):
            for tokens in part:
                start, end = tokens[0].offset, tokens[-1].offset + len(tokens[-1].value)
                sentences.append(paragraph[start:end])
    return [s for s in sentences if s.strip()]


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which pairs of an article are probes and which the pool, both in article order."""

    cut: CutArticle
    pool: list[CutPair]
    probes: list[CutPair]


def _draw(cut: CutArticle, num_pairs: int, num_probes: int, rng: np.random.Generator) -> _Draw:
    """Take a random run of N + P neighbouring pairs, draw the probes from it, then keep the rest as pool."""
    start = int(rng.integers(len(cut.pairs) - (num_pairs + num_probes) + 1))
    window = cut.pairs[start : start + num_pairs + num_probes]
    probe = set(rng.permutation(len(window))[:num_probes].tolist())
    return _Draw(
        cut,
        [p for i, p in enumerate(window) if i not in probe],
        [p for i, p in enumerate(window) if i in probe],
    )


def _pad(pieces: list[list[Sequence[int]]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack A × M pieces into ids and mask (A, M, length), padded at the end of the slot."""
    num_pieces = len(pieces[0])
    ids = torch.zeros(len(pieces), num_pieces, length, dtype=torch.long)
    mask = torch.zeros(len(pieces), num_pieces, length, dtype=torch.bool)
    for a, row in enumerate(pieces):
        for m, piece in enumerate(row):
            ids[a, m, : len(piece)] = torch.as_tensor(piece)
            mask[a, m, : len(piece)] = True
    return ids, mask


def _build_pool(draws: Sequence[_Draw], config: PairsConfig) -> PairPool:
    pools, probes = [d.pool for d in draws], [d.probes for d in draws]
    keys = _pad([[p.key_ids for p in pool] for pool in pools], config.key_tokens)
    values = _pad([[p.value_ids for p in pool] for pool in pools], config.value_tokens)
    probe_keys = _pad([[p.key_ids for p in row] for row in probes], config.key_tokens)
    probe_values = _pad([[p.value_ids for p in row] for row in probes], config.value_tokens)
    return PairPool(
        articles=tuple(d.cut.article for d in draws),
        pair_ids=tuple(tuple(d.cut.pair_id(p) for p in d.pool) for d in draws),
        probe_pair_ids=tuple(tuple(d.cut.pair_id(p) for p in d.probes) for d in draws),
        key_ids=keys[0],
        key_mask=keys[1],
        value_ids=values[0],
        value_mask=values[1],
        probe_key_ids=probe_keys[0],
        probe_key_mask=probe_keys[1],
        probe_value_ids=probe_values[0],
        probe_value_mask=probe_values[1],
        position=torch.tensor([[p.position for p in pool] for pool in pools]),
        probe_position=torch.tensor([[p.position for p in row] for row in probes], dtype=torch.long).view(
            len(draws), -1
        ),
        subject=torch.tensor([[p.subject for p in pool] for pool in pools]),
        probe_subject=torch.tensor([[p.subject for p in row] for row in probes], dtype=torch.long).view(len(draws), -1),
    )


def whole_pool(cuts: Sequence[CutArticle], config: PairsConfig) -> PairPool:
    """Return pools of all pairs of the articles, without probes; the articles have equally many pairs.

    Raises:
        CorpusError: they do not.
    """
    if len({len(cut.pairs) for cut in cuts}) != 1:
        raise CorpusError(f"articles with unequal numbers of pairs: {[len(cut.pairs) for cut in cuts]}")
    return _build_pool([_Draw(cut, list(cut.pairs), []) for cut in cuts], config)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream stands: next is place `offset` of pass `epoch`; `drawn` articles have been used."""

    epoch: int = 0
    offset: int = 0
    drawn: int = 0
    skipped: int = 0
    """Articles skipped so far because they have too few pairs."""
    last_article: str = ""
    """Digest of the last article drawn: on resume it must be found there again."""
    history: str = ""
    """SHA-256 over all articles drawn, their ids and digests in order: two runs that agree in it have read the same."""
    pinned: str = ""
    """The corpus's own name for all of its text, where it has one: on resume it must be the same."""

    def after(self, cut: CutArticle) -> "Position":
        """Return the position once an article has been drawn."""
        history = hashlib.sha256(f"{self.history}\n{cut.article.id}\n{cut.digest}".encode()).hexdigest()
        return replace(self, drawn=self.drawn + 1, last_article=cut.digest, history=history)


class PoolStream:
    """Pools of consecutive articles, pass after pass; one with too few pairs is passed over and counted."""

    def __init__(
        self,
        corpus: Corpus,
        encode: Encode,
        config: PairsConfig,
        *,
        num_pairs: int,
        num_probes: int,
        seed: int,
        purpose: Purpose,
    ) -> None:
        self._corpus, self._config = corpus, config
        self._num_pairs, self._num_probes = num_pairs, num_probes
        self._seed, self._purpose = seed, purpose
        self._cut = functools.lru_cache(maxsize=256)(lambda article: cut_article(article, encode, config))
        self.position = Position(pinned=getattr(corpus, "pinned", ""))
        self._articles = corpus.articles(0, 0)
        self._drawn_before_pass: int | None = 0
        """Articles drawn before this pass began; None: it began before a resume."""
        self._skipped_in_a_row = 0

    @property
    def num_skipped(self) -> int:
        """Articles skipped so far, those before a resume included."""
        return self.position.skipped

    def resume(self, position: Position) -> None:
        """Go on from a saved position.

        Raises:
            CheckpointError: the article read last is no longer where it was, or what the corpus pins has changed.
        """
        pinned = self.position.pinned
        if position.drawn:
            if position.pinned != pinned:
                raise CheckpointError(
                    "the corpus has changed: its articles are not the ones, or not in the revisions, that this run "
                    "began with; resume with the network.cache it began with, or, if that was damaged or has changed, "
                    "start a new run"
                )
            self._articles = self._corpus.articles(position.epoch, position.offset - 1)
            before = next(self._articles, None)
            if before is None or self._cut(before).digest != position.last_article:
                raise CheckpointError(
                    f"the corpus has changed: article {position.offset - 1} of pass {position.epoch} is not the one "
                    "this run read last; resume with the same corpus and model"
                )
            self._drawn_before_pass = None
        self.position = replace(position, pinned=pinned)

    def next_pool(self, num_articles: int, keep: slice = slice(None)) -> PairPool:
        """Draw the pool of the next articles; `keep` selects those of this process.

        Raises:
            CorpusError: a whole pass had no article with enough pairs.
        """
        draws = [self._next_draw() for _ in range(num_articles)]
        return _build_pool(draws[keep], self._config)

    def _next_draw(self) -> _Draw:
        needed = self._num_pairs + self._num_probes
        while True:
            try:
                article = next(self._articles)
            except StopIteration:
                self._end_pass(needed)
                continue
            self.position = replace(self.position, offset=self.position.offset + 1)
            if article is None:
                continue
            cut = self._cut(article)
            if len(cut.pairs) >= needed:
                drawn = self.position.drawn
                self.position = self.position.after(cut)
                self._skipped_in_a_row = 0
                return _draw(cut, self._num_pairs, self._num_probes, self._rng(drawn))
            self.position = replace(self.position, skipped=self.position.skipped + 1)
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:  # an endless corpus has no pass to end
                raise self._nothing_usable(needed)
            logger.debug("skipped %r: %d pairs of %d needed", article.title, len(cut.pairs), needed)

    def _rng(self, drawn: int) -> np.random.Generator:
        return generator(self._seed, self._purpose, drawn)

    def _nothing_usable(self, needed: int) -> CorpusError:
        return CorpusError(
            f"no article has enough text: {self._skipped_in_a_row} in a row were cut into fewer than the {needed} "
            f"pairs needed (pairs.num_pairs {self._num_pairs} + {self._num_probes} probes, of "
            f"{self._config.key_tokens} + {self._config.value_tokens} tokens); lower pairs.num_pairs or the lengths"
        )

    def _end_pass(self, needed: int) -> None:
        if self.position.drawn == self._drawn_before_pass:
            raise self._nothing_usable(needed)
        self._drawn_before_pass = self.position.drawn
        self.position = replace(self.position, epoch=self.position.epoch + 1, offset=0)
        self._articles = self._corpus.articles(self.position.epoch, 0)
