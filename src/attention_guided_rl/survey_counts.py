"""What a survey counts: the records it hands on, and the tallies that fill them. Of an article, a few numbers stay."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attention_guided_rl.data.hygiene import NearDuplicates, Place, signature, split_of
from attention_guided_rl.data.pairs import CutArticle
from attention_guided_rl.records import Article

RESIDUE = ("{{", "}}", "[[", "]]", "<ref", "|-", "&nbsp;", "thumb|")
"""What is left of wikitext where its conversion failed."""
MAX_COMPARED = 20_000  # articles of the evaluation corpus whose id and signature (256 bytes) are remembered
NUM_TITLES = 3  # named of articles that are in both

Decode = Callable[[list[int]], str]


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
    """`files`, `wikipedia`: the same, dropped before anything has a place."""
    skipped_on_opening: int
    """`wikipedia`: titles that are missing, lead to a list of meanings, or to an article named before."""
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


class Tally:
    """The counts so far, and two numbers an article."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._tokens, self._pairs = array("q"), array("q")

    def count_place(self, place: Place) -> None:
        """Count what stands at a place."""
        self.counts["places"] += 1
        if place.article is None:
            self.counts["empty"] += 1
        elif place.repeats:
            self.counts["near_duplicates"] += 1
        else:
            self.counts[split_of(place.article.title)] += 1

    def count_article(self, cut: CutArticle, num_tokens: int, decode: Decode) -> None:
        """Count the pairs of an article left to read."""
        self._tokens.append(num_tokens)
        self._pairs.append(len(cut.pairs))
        self.counts["key_tokens"] += sum(len(pair.key_ids) for pair in cut.pairs)
        self.counts["value_tokens"] += sum(len(pair.value_ids) for pair in cut.pairs)
        values = {tuple(pair.value_ids) for pair in cut.pairs}
        both = {(tuple(pair.key_ids), tuple(pair.value_ids)) for pair in cut.pairs}
        self.counts["repeated_values"] += len(cut.pairs) - len(values)
        self.counts["repeated_pairs"] += len(cut.pairs) - len(both)
        self.counts["with_residue"] += num_with_residue(cut, decode)

    def places(self, whole_pass: bool, *, near_duplicates_on_opening: int, skipped_on_opening: int) -> Places:
        """Return what was counted of places."""
        return Places(
            read=self.counts["places"],
            whole_pass=whole_pass,
            empty=self.counts["empty"],
            near_duplicates=self.counts["near_duplicates"],
            near_duplicates_on_opening=near_duplicates_on_opening,
            skipped_on_opening=skipped_on_opening,
            by_split={split: self.counts[split] for split in ("train", "dev", "test")},
            articles=len(self._pairs),
        )

    def pairs(self, to_train: int, to_evaluate: int) -> Pairs:
        """Return what was counted of pairs; so many are needed of an article."""
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


class Compared:
    """The articles of the evaluation corpus, by id and signature, and what was met of them in the training corpus."""

    def __init__(self, capacity: int) -> None:
        self._ids: set[str] = set()
        self._texts = NearDuplicates(capacity)
        self._capacity, self._kept = capacity, 0
        self._met = self._same_id = 0
        self._titles: list[str] = []

    def keep(self, article: Article) -> None:
        """Remember an article of the evaluation corpus."""
        if self._kept < self._capacity:
            self._kept += 1
            self._ids.add(article.id)
            self._texts.add(signature(article.text))

    def look_for(self, article: Article) -> None:
        """Note whether an article of the training corpus is among those."""
        same_id = article.id in self._ids
        if same_id or self._texts.holds(signature(article.text)):
            self._met += 1
            self._same_id += same_id
            self._titles += [article.title] if len(self._titles) < NUM_TITLES else []

    def overlap(self) -> Overlap:
        """Return what was met."""
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
