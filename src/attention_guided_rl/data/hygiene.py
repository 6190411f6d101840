"""Hygiene: which articles of a corpus may be read, so that what is held out stays unseen.

In: a Corpus. Out: the same places without articles of another split and without near-duplicates. Both are decided by
the articles alone, in the corpus's own order, so every split, process and resumed run decides alike.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt64

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.corpus import Corpus
from attention_guided_rl.records import Article

WINDOW = 1000  # articles; near-duplicates further apart than this stay
MIN_SIMILARITY = 0.8  # of the sets of five-word sequences (Jaccard)
NUM_HASHES = 64  # the estimated similarity has a standard error of 0.05 at 0.8
SHINGLE_LEN = 5  # words

_WORD = re.compile(r"\w+")
_CHUNK = 4096  # sequences hashed at once, so that memory stays flat
_MULTIPLIERS, _SHIFTS = (
    np.random.Generator(np.random.Philox(n)).integers(0, 2**63, NUM_HASHES, np.uint64) for n in (1, 2)
)


class CleanCorpus:
    """A corpus with empty places where an article is of another split or nearly repeats one before it.

    Articles with ready-made pairs are taken as they are: in those, repetition is somebody's intention.
    """

    def __init__(self, corpus: Corpus, config: CorpusConfig) -> None:
        self._corpus, self._split, self._drop = corpus, config.split, config.drop_near_duplicates
        self.num_near_duplicates = 0
        """Articles passed over so far because they nearly repeat another."""

    def articles(self, epoch: int, start: int) -> Iterator[Article | None]:
        """Yield what is left at each place; reading begins WINDOW places early, to know what `start` may repeat."""
        first = max(0, start - WINDOW) if self._drop else start
        memory = NearDuplicates(WINDOW)
        for place, article in enumerate(self._corpus.articles(epoch, first), first):
            if article is not None and self._drop and article.pairs is None and memory.repeats(article.text):
                self.num_near_duplicates += place >= start
                article = None
            if article is not None and self._split not in ("all", split_of(article.title)):
                article = None
            if place >= start:
                yield article


class NearDuplicates:
    """The texts of a sliding window, by signature."""

    def __init__(self, window: int) -> None:
        self._signatures = np.zeros((window, NUM_HASHES), np.uint64)
        self._count = 0

    def repeats(self, text: str) -> bool:
        """Return whether the text nearly equals one of the last `window` texts, and remember it."""
        own = signature(text)
        if own is None:
            return False
        window = len(self._signatures)
        shared = (self._signatures[: min(self._count, window)] == own).mean(1)
        self._signatures[self._count % window] = own
        self._count += 1
        return bool((shared >= MIN_SIMILARITY).any())


def without_near_duplicates(articles: Sequence[Article]) -> list[Article]:
    """Return the articles of a whole collection without those that nearly repeat an earlier one."""
    memory = NearDuplicates(max(len(articles), 1))
    return [article for article in articles if article.pairs is not None or not memory.repeats(article.text)]


def split_of(title: str) -> str:
    """Return `train` (90 %), `dev` (5 %) or `test` (5 %), whatever the corpus, by the SHA-256 of the title."""
    name = " ".join(title.replace("_", " ").split()).casefold()
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") * 100 >> 64
    return "train" if percentile < 90 else "dev" if percentile < 95 else "test"


def signature(text: str) -> UInt64[np.ndarray, " H"] | None:
    """Return the smallest of each of H hashes over the five-word sequences of a text (MinHash); None: too short.

    Two texts agree in as large a share of the numbers as their sets of sequences overlap (Broder 1997).
    """
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], np.uint64)
    num_shingles = len(words) - SHINGLE_LEN + 1
    if num_shingles < 1:
        return None
    shingles = np.zeros(num_shingles, np.uint64)
    for i in range(SHINGLE_LEN):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[i : i + num_shingles]
    shingles ^= shingles >> np.uint64(29)
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint64).max)
    for start in range(0, num_shingles, _CHUNK):
        hashes = (shingles[start : start + _CHUNK, None] ^ _SHIFTS) * (_MULTIPLIERS | np.uint64(1))
        smallest = np.minimum(smallest, (hashes ^ hashes >> np.uint64(32)).min(0))
    return smallest
