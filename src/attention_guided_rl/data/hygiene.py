"""Hygiene: which articles of a corpus may be read, so that what is held out stays unseen.

In: a Corpus. Out: the same places without articles of another split and without near-duplicates. Both are decided by
the articles alone, in the corpus's own order, so every split, process and resumed run decides alike.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt32, UInt64

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.records import Article

WINDOW = 1000  # places; near-duplicates further apart than this stay
MIN_SIMILARITY = 0.8  # of the sets of five-word sequences (Jaccard)
NUM_HASHES = 64  # the estimated similarity has a standard error of 0.05 at 0.8
SHINGLE_LEN = 5  # words

_WORD = re.compile(r"\w+")
_CHUNK = 4096  # sequences hashed at once, so that memory stays flat
_XORED, _MULTIPLIED = np.random.Generator(np.random.Philox(1)).integers(0, 2**32, (2, NUM_HASHES, 1), np.uint32)
_MULTIPLIED |= np.uint32(1)  # odd: each hash is a permutation of the 32-bit numbers


@dataclass(frozen=True, slots=True)
class Place:
    """What stands at a place of a corpus, and what is wrong with it."""

    article: Article | None
    """None: the corpus has nothing there."""
    repeats: bool
    """Whether the article nearly equals one of the WINDOW places before it."""
    wanted: bool
    """Whether the article is of the split that is read."""

    @property
    def readable(self) -> Article | None:
        """The article, if it may be read."""
        return self.article if self.wanted and not self.repeats else None


class CleanCorpus:
    """A corpus with empty places where an article is of another split or nearly repeats one before it.

    Articles with ready-made pairs are never taken for near-duplicates: in those, repetition is somebody's intention.
    """

    def __init__(self, corpus: Corpus, config: CorpusConfig) -> None:
        self._corpus, self._split, self._drop = corpus, config.split, config.drop_near_duplicates

    @property
    def pinned(self) -> str:
        """What the corpus inside pins its articles by."""
        return str(getattr(self._corpus, "pinned", ""))

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield what may be read at each place from `start` on."""
        return (place.readable for place in self.places(epoch, start))

    def places(self, epoch: int, start: int) -> Iterator[Place]:
        """Yield each place from `start` on; reading begins WINDOW places early, to know what `start` may repeat."""
        first = max(0, start - WINDOW) if self._drop else start
        memory = NearDuplicates(WINDOW)
        for number, article in enumerate(self._corpus.articles(epoch, first), first):
            repeats = self._drop and memory.repeats(_comparable(article))
            if number >= start:
                wanted = article is not None and self._split in ("all", split_of(article.title))
                yield Place(article, repeats, wanted)


class NearDuplicates:
    """A sliding window of texts, each kept as its signature."""

    def __init__(self, window: int) -> None:
        self._signatures = np.zeros((window, NUM_HASHES), np.uint32)
        self._count = 0

    def repeats(self, text: str | None) -> bool:
        """Return whether a text nearly equals one of the last `window` texts, and take it into the window.

        None takes a place in the window too, as does a text of fewer than SHINGLE_LEN words, which repeats nothing.
        """
        own = None if text is None else signature(text)
        found = self.holds(own)
        self.add(own)
        return found

    def holds(self, own: UInt32[np.ndarray, " H"] | None) -> bool:
        """Return whether one of the last `window` signatures is nearly this one."""
        if own is None:
            return False
        agreeing = (self._signatures[: self._count] == own).sum(1)
        return bool((agreeing >= MIN_SIMILARITY * NUM_HASHES).any())

    def add(self, own: UInt32[np.ndarray, " H"] | None) -> None:
        """Take a signature into the window in place of the oldest."""
        self._signatures[self._count % len(self._signatures)] = 0 if own is None else own  # no signature is near 0
        self._count += 1


def without_near_duplicates(articles: Sequence[Article]) -> list[Article]:
    """Return the articles of a whole collection without those that nearly repeat an earlier one."""
    memory = NearDuplicates(max(len(articles), 1))
    return [article for article in articles if not memory.repeats(_comparable(article))]


def split_of(title: str) -> str:
    """Return `train` (90 %), `dev` (5 %) or `test` (5 %), whatever the corpus, by the SHA-256 of the title.

    Underscores and runs of white space count as a space; case, and how an accent is encoded, make no difference.
    """
    words = unicodedata.normalize("NFC", title).replace("_", " ").split()
    name = " ".join(words).casefold().encode("utf-8", "surrogatepass")  # as a title from JSON may have lone surrogates
    percentile = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") * 100 >> 64
    return "train" if percentile < 90 else "dev" if percentile < 95 else "test"


def signature(text: str) -> UInt32[np.ndarray, " H"] | None:
    """Return the smallest of each of H hashes over the five-word sequences of a text (MinHash); None: too short.

    Two texts agree in as large a share of the numbers as their sets of sequences overlap (Broder 1997).
    """
    shingles = _shingles(text)
    if not len(shingles):
        return None
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingles), _CHUNK):
        hashes = (shingles[start : start + _CHUNK] ^ _XORED) * _MULTIPLIED
        smallest = np.minimum(smallest, hashes.min(1))
    return smallest


def _comparable(article: Article | None) -> str | None:
    """The text that near-duplicates are known by."""
    return article.text if article is not None and article.pairs is None else None


def _shingles(text: str) -> UInt32[np.ndarray, " n"]:
    """Return a 32-bit hash of every five-word sequence of a text, in order."""
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], np.uint64)
    count = max(len(words) - SHINGLE_LEN + 1, 0)
    codes = np.zeros(count, np.uint64)
    for i in range(SHINGLE_LEN):
        codes = codes * np.uint64(0x9E3779B97F4A7C15) + words[i : i + count]
    return (_mix(codes) >> np.uint64(32)).astype(np.uint32)


def _mix(codes: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Make every bit depend on every other (SplitMix64, Steele et al. 2014): the hashes above only xor and multiply."""
    codes = (codes ^ codes >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ codes >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return codes ^ codes >> np.uint64(31)
