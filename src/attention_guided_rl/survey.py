"""Survey: what a corpus holds, before anyone trains. It needs the model's tokenizer, not its weights.

In: Config. Out: a Survey, to be printed or written as JSON. Of an article read, only a few numbers are kept.
"""

import functools
import itertools
import math
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_guided_rl.config import Config, CorpusConfig
from attention_guided_rl.data import CORPORA, dump
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.data.hygiene import CleanCorpus, NearDuplicates, Place, signature, split_of
from attention_guided_rl.data.pairs import CutArticle, cut_article
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.loading import load_tokenizer, max_positions
from attention_guided_rl.model import decode_ids, encode_text
from attention_guided_rl.network import Network
from attention_guided_rl.records import Article
from attention_guided_rl.session import resolve
from attention_guided_rl.template import build_template
from attention_guided_rl.tracking import visible

RESIDUE = ("{{", "}}", "[[", "]]", "<ref", "|-", "&nbsp;")
"""What is left of wikitext where its conversion failed."""
ENDLESS = ("encyclopedia",)
"""Kinds of corpora whose first pass never ends."""
MAX_COMPARED = 20_000  # articles of the evaluation corpus whose id and signature (256 bytes) are remembered
NUM_TITLES = 3  # named of articles that are in both
ANNOUNCE_EVERY = 50  # places

Decode = Callable[[list[int]], str]
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What training and evaluation ask of the corpus."""

    num_pairs: int
    """N: pairs of an article to train on it; `auto` as it is resolved."""
    num_probes: int
    """P: further pairs of an article to evaluate on it."""
    cut: str
    key_tokens: int
    value_tokens: int
    articles: int
    """Articles read in all: updates × articles an update, or those of the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What stood at the places that were read."""

    read: int
    whole_pass: bool
    """Whether reading came to the end of the corpus."""
    empty: int
    """Places where the corpus has nothing, such as redirects."""
    near_duplicates: int
    """Articles passed over because they nearly repeat one before them."""
    near_duplicates_on_opening: int
    """`files`: the same, dropped before anything has a place."""
    by_split: dict[str, int]
    """The other articles of each split by title, whichever is read."""
    articles: int
    """What is left to read: articles of the split that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A number that every article has."""

    min: int
    median: float
    mean: float
    max: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What the articles left to read are cut into."""

    enough_to_train: int
    """Articles with at least N pairs."""
    enough_to_evaluate: int
    """Articles with at least N + P pairs."""
    tokens_per_article: Spread | None
    """Of the text that is cut: with `pairs.cut: sentences`, without a last sentence that has no partner."""
    pairs_per_article: Spread | None
    key_len: float | None
    """Mean tokens of a key."""
    value_len: float | None
    """Mean tokens of a value."""
    repeated_values: int
    """Pairs whose value an earlier pair of the same article has too."""
    repeated_pairs: int
    """Those of which an earlier pair has both key and value."""
    with_residue: int
    """Pairs with one of RESIDUE in the text of their key or value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Time and memory; None: not known here."""

    reading_s: float
    """Opening, reading and cleaning, without tokenising and looking for near-duplicates."""
    tokenising_s: float
    bytes_read: int | None
    """`dump`: bytes of XML after decompression."""
    bare_parse_s: float | None
    """`dump`, whole pass: the time to decompress and parse the same bytes and do nothing with them."""
    peak_memory: int | None
    """Most bytes that the process has held so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The first pairs of the first article with enough of them."""

    title: str
    pairs: tuple[tuple[str, str], ...]
    """(key, value)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Articles of the training corpus that were met in the evaluation corpus as well."""

    articles: int
    same_id: int
    """Those with the same id; the others are near-duplicates."""
    titles: tuple[str, ...]
    """The first NUM_TITLES."""
    compared: int
    """Articles of the evaluation corpus they were looked for among: the first MAX_COMPARED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What is known of a corpus after reading it."""

    source: str
    need: Need
    places: Places
    pairs: Pairs
    speed: Speed
    sample: Sample | None
    held_out: "Survey | None" = None
    """The same for `evaluation.corpus`, where that is another one."""
    overlap: Overlap | None = None


def survey(
    config: Config, num_places: int = 1000, *, num_sample: int = 3, announce: Announce = lambda line: None
) -> Survey:
    """Survey the training corpus and, if it is another one, the evaluation corpus.

    Args:
        config: what would be trained.
        num_places: places of each corpus to read; 0: a whole pass.
        num_sample: pairs to show.
        announce: called now and then with a line about the progress.

    Raises:
        ConfigError: a whole pass of an endless corpus is asked for, or the tokenizer cannot be used.
        CorpusError, RemoteError: a corpus cannot be read.
    """
    held_out = config.evaluation.corpus if config.evaluation.articles else None
    held_out = None if held_out == config.corpus else held_out
    for corpus in filter(None, (config.corpus, held_out)):
        if num_places == 0 and corpus.kind in ENDLESS:
            raise ConfigError(f"--articles 0 asks for a whole pass, but corpus.kind: {corpus.kind} never ends")
    network, tokenizer = Network(config.network), load_tokenizer(config.model, offline=config.network.offline)
    training = TimedCorpus(config.corpus, network)
    read = functools.partial(
        survey_corpus,
        config=config,
        tokenizer=tokenizer,
        num_pairs=_num_pairs(training, config, tokenizer),
        num_places=num_places,
        announce=announce,
    )
    needed = config.training.updates * config.rollout.articles
    if held_out is None:
        return read(training, needed=needed, num_sample=num_sample)
    compared = _Compared(min(num_places or MAX_COMPARED, MAX_COMPARED))
    other = read(TimedCorpus(held_out, network), needed=config.evaluation.articles, each=compared.keep)
    own = read(training, needed=needed, num_sample=num_sample, each=compared.look_for)
    return replace(own, held_out=other, overlap=compared.overlap())


def survey_corpus(
    corpus: "TimedCorpus",
    config: Config,
    tokenizer: Any,
    num_pairs: int,
    num_places: int,
    *,
    needed: int,
    num_sample: int = 0,
    each: Callable[[Article], None] = lambda article: None,
    announce: Announce = lambda line: None,
) -> Survey:
    """Survey the first places of one corpus; call `each` with every article left to read."""
    encode, decode = _CountingEncoder(tokenizer), functools.partial(decode_ids, tokenizer)
    tally, sample, source = _Tally(), None, describe(corpus.config)
    for place in itertools.islice(CleanCorpus(corpus, corpus.config).places(0, 0), num_places or None):
        tally.count_place(place)
        if tally.counts["places"] % ANNOUNCE_EVERY == 0:
            announce(f"{source}: {tally.counts['places']:,} places")
        if place.readable is None:
            continue
        tokens_before = encode.tokens
        cut = cut_article(place.readable, encode, config.pairs)
        tally.count_article(cut, encode.tokens - tokens_before, decode)
        if sample is None and num_sample and len(cut.pairs) >= num_pairs:
            sample = _sample(cut, num_sample, decode)
        each(place.readable)
    whole_pass = num_places == 0 or tally.counts["places"] < num_places
    return Survey(
        source=source,
        need=_need(config, num_pairs, needed),
        places=tally.places(whole_pass, getattr(corpus.opened, "num_near_duplicates", 0)),
        pairs=tally.pairs(num_pairs, num_pairs + config.evaluation.num_probes),
        speed=_speed(corpus, encode.seconds, whole_pass),
        sample=sample,
    )


def require_usable(found: Survey, config: Config) -> None:
    """Raise CorpusError if no article has enough pairs to train on, or to evaluate on if that is to follow."""
    evaluated = found.held_out or found
    if not found.pairs.enough_to_train:
        unusable, num_pairs = found, found.need.num_pairs
    elif config.evaluation.articles and not evaluated.pairs.enough_to_evaluate:
        unusable, num_pairs = evaluated, found.need.num_pairs + found.need.num_probes
    else:
        return
    raise CorpusError(
        f"{unusable.source}: none of the {unusable.places.articles:,} articles read has the {num_pairs} pairs needed, "
        f"of {found.need.key_tokens} + {found.need.value_tokens} tokens; lower pairs.num_pairs or the lengths"
    )


def describe(corpus: CorpusConfig) -> str:
    """Name a corpus in a few words."""
    what: dict[str, list[object]] = {
        "encyclopedia": [corpus.variant, f"seed {corpus.seed}"],
        "hub": [corpus.name, corpus.subset],
        "wikipedia": [
            corpus.site or corpus.language,
            corpus.category and f"category {corpus.category}",
            f"{len(corpus.titles)} titles" if corpus.titles else None,
            f"{corpus.random} random articles" if corpus.random else None,
            corpus.path,
        ],
    }
    words = [*what.get(corpus.kind, [corpus.path]), corpus.title and repr(corpus.title)]
    words.append(None if corpus.split == "all" else f"split {corpus.split}")
    return " ".join([corpus.kind, ", ".join(str(word) for word in words if word)]).strip()


# -- reading -----------------------------------------------------------------------------------------------------------


class TimedCorpus:
    """A corpus as configured, opened, that counts the seconds spent inside it."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        self.config, self.seconds = config, 0.0
        began = time.perf_counter()
        make: Callable[[CorpusConfig, Network], Corpus] = resolve(CORPORA, config.kind, "corpus.kind")
        self.opened = make(config, network)
        self.seconds += time.perf_counter() - began

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield what the corpus does."""
        places = iter(self.opened.articles(epoch, start))
        while True:
            began = time.perf_counter()
            try:
                article = next(places)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - began
            yield article


class _CountingEncoder:
    """Encodes article text; counts tokens and seconds."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, text: str) -> list[int]:
        began = time.perf_counter()
        ids = encode_text(self._tokenizer, text)
        self.seconds += time.perf_counter() - began
        self.tokens += len(ids)
        return ids


class _Tally:
    """The counts so far, and two numbers an article."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._tokens, self._pairs = array("q"), array("q")

    def count_place(self, place: Place) -> None:
        self.counts["places"] += 1
        if place.article is None:
            self.counts["empty"] += 1
        elif place.repeats:
            self.counts["near_duplicates"] += 1
        else:
            self.counts[split_of(place.article.title)] += 1

    def count_article(self, cut: CutArticle, num_tokens: int, decode: Decode) -> None:
        self._tokens.append(num_tokens)
        self._pairs.append(len(cut.pairs))
        self.counts["key_tokens"] += sum(len(pair.key_ids) for pair in cut.pairs)
        self.counts["value_tokens"] += sum(len(pair.value_ids) for pair in cut.pairs)
        values = {tuple(pair.value_ids) for pair in cut.pairs}
        both = {(tuple(pair.key_ids), tuple(pair.value_ids)) for pair in cut.pairs}
        self.counts["repeated_values"] += len(cut.pairs) - len(values)
        self.counts["repeated_pairs"] += len(cut.pairs) - len(both)
        self.counts["with_residue"] += num_with_residue(cut, decode)

    def places(self, whole_pass: bool, near_duplicates_on_opening: int) -> Places:
        return Places(
            read=self.counts["places"],
            whole_pass=whole_pass,
            empty=self.counts["empty"],
            near_duplicates=self.counts["near_duplicates"],
            near_duplicates_on_opening=near_duplicates_on_opening,
            by_split={split: self.counts[split] for split in ("train", "dev", "test")},
            articles=len(self._pairs),
        )

    def pairs(self, to_train: int, to_evaluate: int) -> Pairs:
        num_pairs = sum(self._pairs)
        return Pairs(
            enough_to_train=sum(count >= to_train for count in self._pairs),
            enough_to_evaluate=sum(count >= to_evaluate for count in self._pairs),
            tokens_per_article=_spread(self._tokens),
            pairs_per_article=_spread(self._pairs),
            key_len=self.counts["key_tokens"] / num_pairs if num_pairs else None,
            value_len=self.counts["value_tokens"] / num_pairs if num_pairs else None,
            repeated_values=self.counts["repeated_values"],
            repeated_pairs=self.counts["repeated_pairs"],
            with_residue=self.counts["with_residue"],
        )


class _Compared:
    """The articles of the evaluation corpus, by id and signature, and what was met of them in the training corpus."""

    def __init__(self, capacity: int) -> None:
        self._ids: set[str] = set()
        self._texts = NearDuplicates(capacity)
        self._capacity, self._kept = capacity, 0
        self._met = self._same_id = 0
        self._titles: list[str] = []

    def keep(self, article: Article) -> None:
        if self._kept < self._capacity:
            self._kept += 1
            self._ids.add(article.id)
            self._texts.add(signature(article.text))

    def look_for(self, article: Article) -> None:
        same_id = article.id in self._ids
        if same_id or self._texts.holds(signature(article.text)):
            self._met += 1
            self._same_id += same_id
            self._titles += [article.title] if len(self._titles) < NUM_TITLES else []

    def overlap(self) -> Overlap:
        return Overlap(
            articles=self._met, same_id=self._same_id, titles=tuple(self._titles), compared=self._kept
        )


def num_with_residue(cut: CutArticle, decode: Decode) -> int:
    """Count the pairs of an article in whose text wikitext is left."""
    if not any(mark in cut.article.text for mark in RESIDUE):
        return 0  # decoding is the slow part, and nearly every article is clean
    texts = ((decode(list(pair.key_ids)), decode(list(pair.value_ids))) for pair in cut.pairs)
    return sum(any(mark in key or mark in value for mark in RESIDUE) for key, value in texts)


def _spread(values: "array[int]") -> Spread | None:
    if not values:
        return None
    numbers = np.array(values)
    return Spread(
        min=int(numbers.min()),
        median=float(np.median(numbers)),
        mean=float(numbers.mean()),
        max=int(numbers.max()),
        total=int(numbers.sum()),
    )


def _sample(cut: CutArticle, num_pairs: int, decode: Decode) -> Sample:
    texts = [(decode(list(pair.key_ids)), decode(list(pair.value_ids))) for pair in cut.pairs[:num_pairs]]
    return Sample(title=cut.article.title, pairs=tuple(texts))


def _need(config: Config, num_pairs: int, articles: int) -> Need:
    return Need(
        num_pairs=num_pairs,
        num_probes=config.evaluation.num_probes if config.evaluation.articles else 0,
        cut=config.pairs.cut,
        key_tokens=config.pairs.key_tokens,
        value_tokens=config.pairs.value_tokens,
        articles=articles,
    )


def _num_pairs(corpus: TimedCorpus, config: Config, tokenizer: Any) -> int:
    """Return N; `auto`: all pairs of the first article that the context holds, and at least the 2 that it takes."""
    if config.pairs.num_pairs != "auto":
        return config.pairs.num_pairs
    offline = config.network.offline
    context = config.rollout.context_tokens or max_positions(config.model, offline=offline)
    template = build_template(tokenizer, config.template)
    fits = template.steps_that_fit(context, config.rollout.query_tokens, config.pairs.value_tokens)
    article = next(filter(None, CleanCorpus(corpus, corpus.config).articles(0, 0)), None)
    has = 0 if article is None else len(cut_article(article, _CountingEncoder(tokenizer), config.pairs).pairs)
    return max(2, min(fits, has))


def _speed(corpus: TimedCorpus, tokenising_s: float, whole_pass: bool) -> Speed:
    bytes_read = getattr(corpus.opened, "bytes_read", None)
    bare_parse_s = None
    if bytes_read is not None and whole_pass and corpus.config.path is not None:  # otherwise it would take hours
        _, bare_parse_s = dump.bare_parse(corpus.config.path)
    return Speed(
        reading_s=corpus.seconds,
        tokenising_s=tokenising_s,
        bytes_read=bytes_read,
        bare_parse_s=bare_parse_s,
        peak_memory=_peak_memory(),
    )


def _peak_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere


# -- for a person ------------------------------------------------------------------------------------------------------
