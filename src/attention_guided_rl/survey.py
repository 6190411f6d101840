"""Survey: what a corpus holds, before anyone trains. It needs the model's tokenizer, not its weights.

In: Config. Out: a Survey, to be printed or written as JSON. Of an article read, only a few numbers are kept.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from attention_guided_rl.config import Config, CorpusConfig, PairsConfig
from attention_guided_rl.data import CORPORA, open_corpus
from attention_guided_rl.data.dump_xml import bare_parse
from attention_guided_rl.data.hygiene import CleanCorpus
from attention_guided_rl.data.pairs import CutArticle, cut_article
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.loading import load_tokenizer
from attention_guided_rl.model import decode_ids, encode_text
from attention_guided_rl.network import Network
from attention_guided_rl.records import Article
from attention_guided_rl.sizes import context_tokens, resolve_sizes
from attention_guided_rl.survey_counts import MAX_COMPARED, Compared, Decode, Need, Sample, Speed, Survey, Tally
from attention_guided_rl.tables import resolve
from attention_guided_rl.template import build_template

ENDLESS = ("encyclopedia",)
"""Kinds of corpora whose first pass never ends."""
ANNOUNCE_EVERY = 50  # places

Announce = Callable[[str], None]


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
    for field, corpus in (("corpus", config.corpus), ("evaluation.corpus", held_out)):
        if num_places == 0 and corpus is not None and corpus.kind in ENDLESS:
            raise ConfigError(f"--articles 0 asks for a whole pass, but {field}.kind: {corpus.kind} never ends")
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
    compared = Compared(min(num_places or MAX_COMPARED, MAX_COMPARED))
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
    tally, sample = Tally(), None
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
        places=tally.places(
            whole_pass,
            near_duplicates_on_opening=getattr(corpus.opened, "num_near_duplicates", 0),
            skipped_on_opening=getattr(corpus.opened, "num_skipped", 0),
        ),
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


def _sample(cut: CutArticle, num_pairs: int, decode: Decode) -> Sample:
    texts = [(decode(list(pair.key_ids)), decode(list(pair.value_ids))) for pair in cut.pairs[:num_pairs]]
    return Sample(title=cut.article.title, pairs=tuple(texts))


def _need(config: Config, tokenizer: Any, network: Network) -> Need:
    evaluated, num_pairs = config.evaluation.articles > 0, config.pairs.num_pairs
    if num_pairs == "auto":
        template, encode = build_template(tokenizer, config.template), functools.partial(encode_text, tokenizer)
        num_pairs, _ = resolve_sizes(
            config, template, encode, functools.partial(open_corpus, network=network), context_tokens(config)
        )
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
