"""Hygiene: which split a title falls into, what counts as a near-duplicate, and that nothing depends on the start."""

import logging
import math
import random
from collections import Counter

import numpy as np
import pytest

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data import hygiene
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.data.hygiene import (
    NUM_HASHES,
    CleanCorpus,
    NearDuplicates,
    signature,
    split_of,
    without_near_duplicates,
)
from attention_guided_rl.errors import CorpusError
from attention_guided_rl.records import Article, PairText


def article(text: str, title: str = "a", pairs: tuple[PairText, ...] | None = None) -> Article:
    return Article(id=title, title=title, text=text, source="", revision="", url="", licence="", pairs=pairs)


class Listed:
    """A corpus of what is at each place."""

    def __init__(self, places: list[Article | None]) -> None:
        self._places = places

    def articles(self, epoch, start):
        yield from self._places[start:]


def config(*, split: str = "all", drop: bool = True) -> CorpusConfig:
    return CorpusConfig(split=split, drop_near_duplicates=drop)


VOCABULARY = [f"w{i}" for i in range(5000)]


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=count))


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "split"),
    [  # by the first byte of: printf 'albert einstein' | sha256sum; 90 % is e6.66, 95 % is f3.33
        ("Albert Einstein", "train"),  # b3
        ("Anarchism", "train"),  # 51
        ("Achilles", "train"),  # d6
        ("São Paulo", "train"),  # 57
        ("Animation", "dev"),  # ec
        ("Ada", "test"),  # fd
    ],
)
def test_split_of_titles_by_hand(title, split):
    assert split_of(title) == split


def test_splits_of_many_titles_are_90_5_and_5_percent():
    shares = Counter(split_of(f"Article number {i}") for i in range(20_000))
    assert shares.keys() == {"train", "dev", "test"}
    assert abs(shares["train"] - 18_000) < 170  # 4 standard errors of 42
    assert abs(shares["dev"] - 1_000) < 124  # 4 of 31
    assert abs(shares["test"] - 1_000) < 124


@pytest.mark.parametrize(
    "other",
    [
        "The_Köln cathedral",
        "the köln  cathedral",
        " THE KÖLN\tCathedral_",
        "The Ko\u0308ln Cathedral",
        "THE_KO\u0308LN_cathedral",
    ],
)
def test_spelling_of_a_title_does_not_change_its_split(other):
    for suffix in range(60):  # splits of one title would agree by chance
        assert split_of(f"{other} {suffix}") == split_of(f"The Köln Cathedral {suffix}")


def test_a_title_that_is_no_text_has_a_split():
    assert split_of("\ud800") in ("train", "dev", "test")
    assert split_of("") in ("train", "dev", "test")


def test_every_article_is_in_one_split_at_its_own_place():
    places = [article(words(20, i), f"title {i}") if i % 3 else None for i in range(300)]
    read = {
        s: list(CleanCorpus(Listed(places), config(split=s)).articles(0, 0)) for s in ("train", "dev", "test", "all")
    }
    assert read["all"] == places
    for i, whole in enumerate(places):
        found = [s for s in ("train", "dev", "test") if read[s][i] is not None]
        assert len(found) == (whole is not None)
        assert all(read[s][i] is whole for s in found)
    assert all(any(read[s]) for s in read)


# -- signatures --------------------------------------------------------------------------------------------------------


def test_identical_texts_have_one_signature_and_unrelated_ones_share_next_to_nothing():
    one, other = signature(words(500, 1)), signature(words(500, 2))
    assert (signature(words(500, 1)) == one).all()
    assert (one == other).sum() <= 1


def test_case_and_punctuation_do_not_count():
    assert (signature("The sea, rises: twice a day!") == signature("the SEA rises... twice a day")).all()


def test_fewer_than_five_words_have_no_signature():
    assert signature("") is None
    assert signature(" ... \n") is None
    assert signature("the sea rises twice") is None
    assert signature("the sea rises twice daily") is not None


def test_the_order_of_words_counts():
    text = words(300, 3).split()
    assert (signature(" ".join(text)) == signature(" ".join(reversed(text)))).sum() <= 1


@pytest.mark.parametrize("place", range(5))
def test_every_word_of_a_sequence_counts(place):
    one = ["the", "sea", "rises", "twice", "daily"]
    other = [*one[:place], "changed", *one[place + 1 :]]
    assert (signature(" ".join(one)) == signature(" ".join(other))).sum() <= 1


def test_a_long_text_is_hashed_in_pieces_to_the_same_signature():
    text = words(9000, 4)  # of several chunks
    halves = [" ".join(text.split()[:4504]), " ".join(text.split()[4500:])]  # share the four words at the seam
    assert (signature(text) == np.minimum(signature(halves[0]), signature(halves[1]))).all()


@pytest.mark.parametrize(("length", "shared"), [(100, 0.8), (300, 0.2), (300, 0.5), (300, 0.8), (300, 0.95)])
def test_agreement_estimates_the_overlap_without_bias(length, shared):
    """Two texts of n sequences with c in common: the sets overlap by c / (2n − c)."""
    common = round(2 * length * shared / (1 + shared))
    overlap = common / (2 * length - common)
    estimates = []
    for trial in range(150):
        start, first, second = (
            words(n, 10 * trial + i) for i, n in enumerate((common + 4, length - common, length - common))
        )
        estimates.append((signature(f"{start} {first}") == signature(f"{start} {second}")).mean())
    one = math.sqrt(overlap * (1 - overlap) / NUM_HASHES)  # of independent hashes
    assert abs(np.mean(estimates) - overlap) < 4 * one / math.sqrt(150)
    assert 0.8 * one < np.std(estimates) < 1.2 * one


def test_every_hash_is_fair():
    """Each hash agrees on a set of texts as often as any: half, within 4.5 standard errors, and none copies another."""
    agreeing = []
    for trial in range(300):  # 2/3 of the sequences in common: an overlap of 1/2
        start, first, second = (words(n, 10 * trial + i) for i, n in enumerate((204, 100, 100)))
        agreeing.append(signature(f"{start} {first}") == signature(f"{start} {second}"))
    assert (abs(np.mean(agreeing, 0) - 0.5) < 4.5 * 0.5 / math.sqrt(300)).all()
    correlation = np.corrcoef(np.array(agreeing, float).T) - np.eye(NUM_HASHES)
    assert abs(correlation).max() < 5 / math.sqrt(300)


# -- near-duplicates ---------------------------------------------------------------------------------------------------

LONG = words(600, 7)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        (LONG, True),
        (f"  {LONG.upper()}.", True),
        (LONG.replace(LONG.split()[300], "changed"), True),
        (f"{LONG} One more sentence at the very end of it.", True),
        (f"Quite another beginning of the text. {' '.join(LONG.split()[12:])}", True),
        (f"{' '.join(LONG.split()[:400])} {words(200, 8)}", False),  # overlap of one half
        (words(600, 8), False),
        ("", False),
        ("the sea rises", False),
    ],
)
def test_what_counts_as_a_near_duplicate(text, repeats):
    memory = NearDuplicates(10)
    assert not memory.repeats(LONG)
    assert memory.repeats(text) is repeats


def test_short_texts_never_repeat():
    memory = NearDuplicates(10)
    assert [memory.repeats("the sea rises") for _ in range(3)] == [False] * 3
    assert [memory.repeats("") for _ in range(3)] == [False] * 3


def test_a_repeated_repetition_is_found_too():
    memory = NearDuplicates(2)  # the second is remembered, though it was a repetition
    assert [memory.repeats(text) for text in (LONG, LONG, words(50, 1), LONG, LONG)] == [False, True, False, True, True]


def test_the_window_is_a_thousand_places():
    def read(distance: int) -> list[Article | None]:
        gap: list[Article | None] = [None] * (distance - 1)
        return list(CleanCorpus(Listed([article(LONG), *gap, article(LONG)]), config()).articles(0, 0))

    assert read(1)[-1] is None
    assert read(1000)[-1] is None
    assert read(1001)[-1] is not None


def test_reading_from_a_place_on_knows_the_thousand_before_it():
    gap: list[Article | None] = [None] * 999
    corpus = CleanCorpus(Listed([None, article(LONG), *gap, article(LONG), article(LONG)]), config())
    assert list(corpus.articles(0, 1001)) == [None, None]


def test_the_window_is_a_thousand_places_of_articles_too():
    gap = [article(words(8, i)) for i in range(1000)]
    assert list(CleanCorpus(Listed([article(LONG), *gap[1:], article(LONG)]), config()).articles(0, 0))[-1] is None
    assert list(CleanCorpus(Listed([article(LONG), *gap, article(LONG)]), config()).articles(0, 0))[-1] is not None


def test_near_duplicates_stay_if_they_are_wanted():
    places = [article(LONG), article(LONG)]
    assert list(CleanCorpus(Listed(places), config(drop=False)).articles(0, 0)) == places


def test_ready_pairs_are_never_near_duplicates():
    ready = article(LONG, pairs=(PairText("key", "value"),))
    places = [ready, ready, article(LONG), ready]
    assert list(CleanCorpus(Listed(places), config()).articles(0, 0)) == places
    assert without_near_duplicates(places) == places


def test_the_near_duplicate_of_an_article_of_another_split_goes_as_well():
    """Or text that is trained on would be read in the evaluation under another title."""
    places = [article(LONG, "Anarchism"), article(LONG, "Ada")]  # train, test
    assert list(CleanCorpus(Listed(places), config(split="test")).articles(0, 0)) == [None, None]


def test_places_say_why_they_are_empty():
    places = [article(LONG, "Anarchism"), None, article(LONG, "Achilles"), article(words(20, 1), "Ada")]
    found = list(CleanCorpus(Listed(places), config(split="train")).places(0, 0))
    assert [place.article for place in found] == places
    assert [place.repeats for place in found] == [False, False, True, False]
    assert [place.wanted for place in found] == [True, False, True, False]
    assert [place.readable is not None for place in found] == [True, False, False, False]


def test_what_is_at_a_place_does_not_depend_on_where_reading_began(monkeypatch):
    monkeypatch.setattr(hygiene, "WINDOW", 20)  # for speed; that it is a thousand is tested above
    rng = random.Random(0)
    places: list[Article | None] = []
    for place in range(100):  # repetitions at every distance, empty places of every length
        if rng.random() < 0.4:
            places.append(None)
        elif place and rng.random() < 0.5:
            earlier = places[max(0, place - rng.choice([1, 5, 12, 18, 19, 20, 21, 24]))]
            places.append(earlier)
        else:
            places.append(article(words(8, place), f"title {place}"))
    corpus = CleanCorpus(Listed(places), config(split="train"))
    whole = list(corpus.articles(0, 0))
    kept = sum(found is not None for found in whole)
    assert 20 < kept < sum(p is not None for p in places) - 10
    for start in range(1, 102):
        assert list(corpus.articles(0, start)) == whole[start:], start


# -- whole collections -------------------------------------------------------------------------------------------------


def test_a_whole_collection_has_no_window():
    between = [article(words(6, i)) for i in range(1500)]
    collection = [article(LONG, "first"), *between, article(LONG, "last")]
    assert without_near_duplicates(collection) == collection[:-1]
    assert without_near_duplicates([]) == []


def files(folder, **options) -> FilesCorpus:
    return FilesCorpus(CorpusConfig(kind="files", path=folder, shuffle=False, **options))


def test_files_leave_near_duplicates_out_once_and_say_so_once(tmp_path, caplog):
    for name, text in {"a": LONG, "b": words(30, 1), "c": LONG.upper(), "d": "too short"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        corpora = [files(tmp_path), files(tmp_path)]
    assert [a.title for a in corpora[0].articles(0, 0)] == ["a", "b", "d"]
    assert [a.title for a in corpora[0].articles(0, 1)] == ["b", "d"]
    assert corpora[0].num_near_duplicates == 1
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: 1 near-duplicates left out"]
    assert [a.title for a in files(tmp_path, drop_near_duplicates=False).articles(0, 0)] == ["a", "b", "c", "d"]


def test_an_article_asked_for_by_title_is_there_even_if_it_repeats_another(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(LONG, encoding="utf-8")
    assert [a.title for a in files(tmp_path, title="b").articles(0, 0)] == ["b"]
    with pytest.raises(CorpusError):
        files(tmp_path, title="c")


def test_a_shuffled_collection_drops_the_same_articles_in_every_pass(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_text(LONG if i in (2, 7, 9) else words(40, i), encoding="utf-8")
    corpus = CorpusConfig(kind="files", path=tmp_path, shuffle=True)
    clean = CleanCorpus(FilesCorpus(corpus), corpus)
    passes = [[a.title for a in clean.articles(epoch, 0) if a is not None] for epoch in range(6)]
    assert all(sorted(titles) == [f"{i:02d}" for i in range(12) if i not in (7, 9)] for titles in passes)
    assert len({tuple(titles) for titles in passes}) > 1
