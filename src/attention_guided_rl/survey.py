"""Survey: what a corpus holds, before anyone trains. It needs the model's tokenizer, not its weights.

In: Config. Out: a Survey, to be printed or written as JSON. Of an article read, only a few numbers are kept.
"""

import contextlib
import functools
import itertools
import json
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_guided_rl.config import Config, CorpusConfig, PairsConfig
from attention_guided_rl.data import CORPORA
from attention_guided_rl.data.dump import bare_parse
from attention_guided_rl.data.hygiene import CleanCorpus, NearDuplicates, Place, signature, split_of
from attention_guided_rl.data.pairs import CutArticle, cut_article
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.loading import load_tokenizer
from attention_guided_rl.model import decode_ids, encode_text
from attention_guided_rl.network import Network
from attention_guided_rl.records import Article
from attention_guided_rl.sizes import context_tokens, resolve_sizes
from attention_guided_rl.tables import resolve
from attention_guided_rl.template import build_template
from attention_guided_rl.tracking import make_console, visible

RESIDUE = ("{{", "}}", "[[", "]]", "<ref", "|-", "&nbsp;", "thumb|")
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
    """What is asked of the corpora."""

    tokenizer: str
    cut: str
    key_tokens: int
    value_tokens: int
    num_pairs: int
    """N: pairs of an article to train on it; `auto` as it is resolved."""
    num_probes: int
    """P: further pairs of an article to evaluate on it."""
    training_articles: int
    """Updates × articles an update."""
    evaluation_articles: int


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
    peak_memory: int | None
    """Most bytes that the process has held so far."""
    bare_bytes_per_s: float | None = None
    """`dump` after a whole pass: bytes of XML a second if the file is decompressed and parsed and nothing else."""


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
    """What is known of a corpus after reading it; strict JSON by `dataclasses.asdict`."""

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
    read = functools.partial(
        survey_corpus,
        network=network,
        tokenizer=tokenizer,
        pairs=config.pairs,
        need=_need(config, tokenizer, network),
        num_places=num_places,
        announce=announce,
    )
    if held_out is None:
        return _with_bare_speed(read(config.corpus, num_sample=num_sample), config.corpus)
    compared = _Compared(min(num_places or MAX_COMPARED, MAX_COMPARED))
    other = read(held_out, each=compared.keep)
    own = _with_bare_speed(read(config.corpus, num_sample=num_sample, each=compared.look_for), config.corpus)
    return replace(own, held_out=other, overlap=compared.overlap())


def survey_corpus(
    config: CorpusConfig,
    network: Network,
    tokenizer: Any,
    pairs: PairsConfig,
    need: Need,
    num_places: int,
    *,
    num_sample: int = 0,
    each: Callable[[Article], None] = lambda article: None,
    announce: Announce = lambda line: None,
) -> Survey:
    """Survey the first places of one corpus (0: a whole pass); call `each` with every article left to read."""
    source = describe(config)
    announce(source)
    corpus = _TimedCorpus(config, network)
    encode, decode = _CountingEncoder(tokenizer), functools.partial(decode_ids, tokenizer)
    tally, sample = _Tally(), None
    for place in itertools.islice(CleanCorpus(corpus, config).places(0, 0), num_places or None):
        tally.count_place(place)
        if tally.counts["places"] % ANNOUNCE_EVERY == 0:
            announce(f"{source}: {tally.counts['places']:,} places")
        if place.readable is None:
            continue
        tokens_before = encode.tokens
        cut = cut_article(place.readable, encode, pairs)
        tally.count_article(cut, encode.tokens - tokens_before, decode)
        if sample is None and num_sample and len(cut.pairs) >= need.num_pairs:
            sample = _sample(cut, num_sample, decode)
        each(place.readable)
    whole_pass = num_places == 0 or tally.counts["places"] < num_places
    return Survey(
        source=source,
        need=need,
        places=tally.places(whole_pass, getattr(corpus.opened, "num_near_duplicates", 0)),
        pairs=tally.pairs(need.num_pairs, need.num_pairs + need.num_probes),
        speed=Speed(
            reading_s=corpus.seconds,
            tokenising_s=encode.seconds,
            bytes_read=getattr(corpus.opened, "bytes_read", None),
            peak_memory=_peak_memory(),
        ),
        sample=sample,
    )


def require_usable(found: Survey) -> None:
    """Raise CorpusError if no article has enough pairs to train on, or to evaluate on if that is to follow."""
    need, evaluated = found.need, found.held_out or found
    if not found.pairs.enough_to_train:
        unusable, num_pairs = found, need.num_pairs
    elif need.evaluation_articles and not evaluated.pairs.enough_to_evaluate:
        unusable, num_pairs = evaluated, need.num_pairs + need.num_probes
    else:
        return
    raise CorpusError(
        f"{unusable.source}: of {unusable.places.articles:,} articles none has the {num_pairs:,} pairs needed, of "
        f"{need.key_tokens} + {need.value_tokens} tokens; lower pairs.num_pairs or the lengths"
    )


def describe(corpus: CorpusConfig) -> str:
    """Name a corpus in a few words."""
    seed = f", seed {corpus.seed}" if corpus.kind == "encyclopedia" else ""
    split = "" if corpus.split == "all" else f", split {corpus.split}"
    return f"{corpus.label.strip()}{seed}{split}"


# -- reading -----------------------------------------------------------------------------------------------------------


class _TimedCorpus:
    """A corpus as configured, opened, that counts the seconds spent inside it."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        self.config, self.seconds = config, 0.0
        began = time.perf_counter()
        self.opened = resolve(CORPORA, config.kind, "corpus.kind")(config, network)
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
        return Overlap(articles=self._met, same_id=self._same_id, titles=tuple(self._titles), compared=self._kept)


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


def _need(config: Config, tokenizer: Any, network: Network) -> Need:
    evaluated, num_pairs = config.evaluation.articles > 0, config.pairs.num_pairs
    if num_pairs == "auto":
        template, encode = build_template(tokenizer, config.template), functools.partial(encode_text, tokenizer)
        num_pairs, _ = resolve_sizes(config, template, encode, network, context_tokens(config))
    return Need(
        tokenizer=config.model.name,
        cut=config.pairs.cut,
        key_tokens=config.pairs.key_tokens,
        value_tokens=config.pairs.value_tokens,
        num_pairs=num_pairs,
        num_probes=config.evaluation.num_probes if evaluated else 0,
        training_articles=config.training.updates * config.rollout.articles,
        evaluation_articles=config.evaluation.articles,
    )


def _with_bare_speed(found: Survey, corpus: CorpusConfig) -> Survey:
    """Add how fast a dump could be read at best; after a part of it, that would take as long as all the rest."""
    if corpus.kind != "dump" or corpus.path is None or corpus.title is not None or not found.places.whole_pass:
        return found
    num_bytes, seconds = bare_parse(corpus.path)
    return replace(found, speed=replace(found.speed, bare_bytes_per_s=num_bytes / seconds))


def _peak_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere


# -- for a person ------------------------------------------------------------------------------------------------------


def show(config: Config, *, num_places: int, num_sample: int, as_json: bool = False) -> None:
    """Survey and print; raise CorpusError, once all is printed, if training would find nothing to read."""
    console = make_console()
    if as_json:
        found = survey(config, num_places, num_sample=num_sample)
        print(json.dumps(asdict(found), indent=1, allow_nan=False))
    else:
        with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
            found = survey(
                config,
                num_places,
                num_sample=num_sample,
                announce=lambda line: status.update(Text(visible(line))) if status else None,
            )
        print_survey(console, found)
    require_usable(found)


def print_survey(console: Console, found: Survey) -> None:
    """Print a survey, what it means for the run, and the sample."""
    console.print(Text(visible(found.source), style="bold"))
    _print_grid(console, facts(found))
    if found.places.articles:
        console.print(_sizes(found.pairs))
    _print_grid(console, prospects(found))
    if found.overlap is not None and found.overlap.articles:
        titles = ", ".join(repr(visible(title)) for title in found.overlap.titles)
        more = ", …" if found.overlap.articles > len(found.overlap.titles) else ""
        console.print(Text(f"warning: evaluation.corpus has articles that are trained on: {titles}{more}", style="red"))
    if found.sample is not None:
        console.print(Text(f"\n{visible(found.sample.title)}", style="bold"))
        _print_grid(console, [(visible(key), f"→ {visible(value)}") for key, value in found.sample.pairs])


def facts(found: Survey) -> list[tuple[str, str]]:
    """Return what was counted, as (name, words)."""
    places, pairs, need, memory = found.places, found.pairs, found.need, found.speed.peak_memory
    total = 0 if pairs.pairs_per_article is None else pairs.pairs_per_article.total
    of_other_splits = sum(places.by_split.values()) - places.articles
    near_duplicates = places.near_duplicates + places.near_duplicates_on_opening
    left_out = f"{places.empty:,} empty, {near_duplicates:,} near-duplicates"
    with_key = f", {pairs.repeated_pairs:,} with its key" if pairs.repeated_values else ""
    rows = [
        ("places", f"{places.read:,} read, a whole pass" if places.whole_pass else f"the first {places.read:,} read"),
        ("left out", left_out + (f", {of_other_splits:,} of other splits" if of_other_splits else "")),
        ("by title", ", ".join(f"{count:,} {split}" for split, count in places.by_split.items())),
        ("articles", _enough(found)),
    ]
    if pairs.enough_to_train != pairs.enough_to_evaluate:
        rows.append(("", f"{pairs.enough_to_train:,} give at least {need.num_pairs:,}, enough to train on"))
    if pairs.key_len is not None and (pairs.key_len, pairs.value_len) != (need.key_tokens, need.value_tokens):
        rows.append(("lengths", f"keys of {pairs.key_len:.1f}, values of {pairs.value_len:.1f} tokens in the mean"))
    rows += [
        ("repeats", f"{_share(pairs.repeated_values, total)} repeat a value of the article{with_key}"),
        ("wikitext", f"{_share(pairs.with_residue, total)} have some left"),
        ("reading", _reading_words(found.speed)),
        ("tokenising", f"{found.speed.tokenising_s:.1f} s with the tokenizer of {visible(need.tokenizer)}"),
    ]
    return rows if memory is None else [*rows, ("memory", f"{memory / 1e6:,.0f} MB at the peak")]


def prospects(found: Survey) -> list[tuple[str, str]]:
    """Return what the counts mean for training and evaluation, as (name, words)."""
    need, evaluated = found.need, found.held_out
    rows = [("training", _supply(need.training_articles, found.pairs.enough_to_train, found.places))]
    if not need.evaluation_articles:
        return rows
    if evaluated is None:
        supply = _supply(need.evaluation_articles, found.pairs.enough_to_evaluate, found.places)
        return [*rows, ("evaluation", f"on the same articles, for evaluation.corpus names no other: {supply}")]
    supply = _supply(need.evaluation_articles, evaluated.pairs.enough_to_evaluate, evaluated.places)
    rows += [("evaluation", f"{visible(evaluated.source)}: {supply}"), ("", _enough(evaluated))]
    if found.overlap is not None:
        among = "" if found.overlap.compared < MAX_COMPARED else f", looked for among its first {MAX_COMPARED:,}"
        rows.append(("overlap", f"{found.overlap.articles:,} articles, by id or as near-duplicates{among}"))
    return rows


def _enough(found: Survey) -> str:
    """Say how many articles have N + P pairs."""
    need = found.need
    wanted = f"{need.num_pairs:,}" + (f" + {need.num_probes}" if need.num_probes else "")
    lengths = f"{'at most ' if need.cut == 'sentences' else ''}{need.key_tokens} + {need.value_tokens} tokens"
    return f"{found.pairs.enough_to_evaluate:,} of {found.places.articles:,} give at least {wanted} pairs of {lengths}"


def _supply(needed: int, has: int, places: Places) -> str:
    """Say whether so many articles come up before one comes up again."""
    if not has:
        return f"{needed:,} articles are needed"
    if has >= needed:
        return f"{needed:,} articles are needed, {has:,} have enough: none is read twice"
    if places.whole_pass:
        return f"{needed:,} articles are needed, {has:,} have enough: {needed / has:.1f} passes over them"
    likely = -(-needed * places.read // has)
    return f"{needed:,} articles are needed, {has:,} have enough so far: at this rate, the first {likely:,} places do"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} pairs ({100 * count / total:.2f} %)" if total else "none of no pairs"


def _reading_words(speed: Speed) -> str:
    if speed.bytes_read is None:
        return f"{speed.reading_s:.1f} s"
    megabytes, bare = speed.bytes_read / 1e6, speed.bare_bytes_per_s
    words = f"{megabytes:,.1f} MB of XML in {speed.reading_s:.1f} s: {megabytes / speed.reading_s:.1f} MB/s"
    return words if bare is None else f"{words}; bare parse {bare / 1e6:.1f} MB/s"


def _sizes(pairs: Pairs) -> Table:
    table = Table(title="Sizes", title_justify="left")
    for column in ("", "min", "median", "mean", "max", "total"):
        table.add_column(column, justify="right" if column else "left")
    named = {"pairs of an article": pairs.pairs_per_article, "tokens of an article": pairs.tokens_per_article}
    for name, spread in named.items():
        if spread is not None:
            numbers = (f"{spread.median:,.10g}", f"{spread.mean:,.1f}", f"{spread.max:,}", f"{spread.total:,}")
            table.add_row(name, f"{spread.min:,}", *numbers)
    return table


def _print_grid(console: Console, rows: list[tuple[str, str]]) -> None:
    """Print two columns whose text is wrapped in its column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=10)  # the longest name
    for name, words in rows:
        grid.add_row(Text(name), Text(words))
    console.print(grid, soft_wrap=False)
