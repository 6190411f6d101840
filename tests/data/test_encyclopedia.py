"""The generated encyclopedia: what is planted is there, and nothing else is."""

import itertools
import re
from collections import Counter
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.encyclopedia import (
    ATTRIBUTES,
    DETAILS,
    VARIANTS,
    EncyclopediaCorpus,
    generate_article,
    planted_pick,
)
from attention_guided_rl.loading import BUNDLED_MODEL
from attention_guided_rl.records import Article

CHANCE = 1 / 12  # that two independent draws of an attribute agree


class Pair(NamedTuple):
    """A pair read back from its text."""

    asked: str
    """The name in the key."""
    role: str
    named: str
    """The name in the value."""
    words: list[str]
    """The seven words after it."""
    subject: int


def parse(article: Article) -> list[Pair]:
    found = []
    for pair in article.pairs or ():
        key = re.fullmatch(r"What the (\w+) of (\w+ \w+) (shows|keeps|teaches):", pair.key)
        value = re.fullmatch(r"(\w+ \w+) ((?:\w+ ){6}\w+)\.", pair.value)
        assert key, pair.key
        assert value, pair.value
        assert pair.subject is not None
        found.append(Pair(key[2], key[1], value[1], value[2].split(), pair.subject))
    return found


def articles(variant: str, count: int, seed: int = 5) -> list[list[Pair]]:
    return [parse(generate_article(seed, index, variant=variant)) for index in range(count)]


def agreement(pairs: list[tuple[Pair, Pair]]) -> float:
    """Share of the six attributes that two pairs have in common, on average."""
    return sum(a == b for p, q in pairs for a, b in zip(p.words[:6], q.words[:6], strict=True)) / (6 * len(pairs))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


# -- surface -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_are_8_and_values_10_tokens_of_the_bundled_tokenizer(tokenizer, variant):
    for index in range(30):
        pairs = generate_article(3, index, variant=variant).pairs
        assert pairs is not None
        keys = tokenizer([f" {p.key}" for p in pairs], add_special_tokens=False)["input_ids"]
        values = tokenizer([f" {p.value}" for p in pairs], add_special_tokens=False)["input_ids"]
        assert {len(ids) for ids in keys} == {8}
        assert {len(ids) for ids in values} == {10}


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_tell_the_pairs_of_an_article_apart(variant):
    for pairs in articles(variant, 20):
        assert len({(p.asked, p.role) for p in pairs}) == len(pairs) == 28


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_are_interleaved_at_random(variant):
    """The first pair of the article is not more often of one label than of another."""
    first = Counter(pairs[0].subject for pairs in articles(variant, 150))
    share_of_label = Counter(p.subject for p in articles(variant, 1)[0])
    for label, count in share_of_label.items():
        expected = 150 * count / 28
        assert abs(first[label] - expected) < 5 * max(1.0, expected**0.5)


@pytest.mark.parametrize(("variant", "subjects", "pairs_per_subject"), [
    ("threads", 3, 2), ("null", 5, 8), ("needle", 9, 1), ("chain", 2, 8), ("threads", 65, 1), ("needle", 17, 4),
    ("chain", 16, 4),
])  # fmt: skip
def test_an_article_has_as_many_pairs_as_its_sizes_say_or_they_are_refused(variant, subjects, pairs_per_subject):
    """There are 64 first names and 64 last names, and no two bearers in an article share one."""
    try:
        pairs = generate_article(0, 0, variant=variant, subjects=subjects, pairs_per_subject=pairs_per_subject).pairs
    except ValueError:
        assert subjects * pairs_per_subject > 60
        return
    assert pairs is not None
    assert len(pairs) == subjects * pairs_per_subject


# -- what is planted ---------------------------------------------------------------------------------------------------


def test_threads_pairs_of_a_subject_share_name_and_attributes():
    for pairs in articles("threads", 40):
        by_subject = {label: [p for p in pairs if p.subject == label] for label in range(7)}
        for members in by_subject.values():
            assert len(members) == 4
            assert {p.asked for p in members} == {p.named for p in members} == {members[0].named}
            assert len({tuple(p.words[:6]) for p in members}) == 1
            assert len({p.role for p in members}) == 4
            assert all(p.words[6] in DETAILS for p in members)


def test_threads_subjects_share_no_name_and_no_more_attributes_than_chance():
    several = articles("threads", 60)
    for pairs in several:
        words = [word for name in {p.named for p in pairs} for word in name.split()]
        assert len(words) == len(set(words)) == 14
    across = [(p, q) for pairs in several for p, q in itertools.combinations(pairs, 2) if p.subject != q.subject]
    assert agreement(across) == pytest.approx(CHANCE, abs=0.02)


def test_threads_details_are_the_pairs_own():
    same = [
        p.words[6] == q.words[6]
        for pairs in articles("threads", 100)
        for p, q in itertools.combinations(pairs, 2)
        if p.subject == q.subject
    ]
    assert sum(same) / len(same) == pytest.approx(1 / 24, abs=0.02)


def test_attributes_are_drawn_evenly_from_six_lists_of_twelve_words():
    assert [len(words) for words in ATTRIBUTES] == [12] * 6
    assert len({word for words in ATTRIBUTES for word in words}) == 72
    subjects = {(i, p.named): p for i, pairs in enumerate(articles("threads", 200)) for p in pairs}
    assert len(subjects) == 1400
    for place, words in enumerate(ATTRIBUTES):
        counts = Counter(p.words[place] for p in subjects.values())
        assert set(counts) == set(words)
        for count in counts.values():
            assert abs(count - 1400 / 12) < 5 * (1400 * CHANCE * (1 - CHANCE)) ** 0.5


def test_null_values_share_nothing_with_their_own_key_or_subject_beyond_chance():
    several = articles("null", 150)
    everything = [p for pairs in several for p in pairs]
    own = sum(bool(set(p.asked.split()) & set(p.named.split())) for p in everything) / len(everything)
    assert own == pytest.approx(2 / 64, abs=0.015)  # a first and a last name, each one of 64

    def of(same: bool) -> float:
        return agreement(
            [
                (p, q)
                for pairs in several
                for p, q in itertools.combinations(pairs, 2)
                if (p.subject == q.subject) is same
            ]
        )

    assert of(same=True) == pytest.approx(CHANCE, abs=0.012)
    assert of(same=False) == pytest.approx(CHANCE, abs=0.012)


def test_null_has_the_keys_and_labels_of_threads():
    for pairs in articles("null", 20):
        for label in range(7):
            members = [p for p in pairs if p.subject == label]
            assert len(members) == 4
            assert len({p.asked for p in members}) == 1


def test_needle_lists_what_the_explained_pairs_repeat():
    for pairs in articles("needle", 40):
        ((*_, facts, _),) = [p for p in pairs if p.subject == 0]
        runs = {tuple(facts[i : i + 3]) for i in range(4)}
        explained = [p for p in pairs if p.subject == 1]
        assert len(explained) == 14
        for p in explained:
            assert tuple(p.words[:3]) in runs
            assert set(p.words[3:]) <= set(DETAILS)
            assert p.named == p.asked


def test_the_keys_of_needle_say_what_is_explained():
    """A guild is the needle, people are explained, places are filler."""
    for index in range(40):
        pairs = generate_article(3, index, variant="needle").pairs
        assert pairs is not None
        for p in pairs:
            assert p.key.rpartition(" ")[2] == ("teaches:", "keeps:", "shows:")[p.subject or 0]


def test_needle_filler_is_unrelated():
    several = articles("needle", 100)
    related = [
        (needle, p) for pairs in several for needle in pairs if needle.subject == 0 for p in pairs if p.subject == 2
    ]
    assert len(related) == 1300
    assert agreement(related) == pytest.approx(CHANCE, abs=0.02)
    for pairs in several:
        assert len({p.asked for p in pairs}) == 28


def test_chain_links_name_the_next_and_change_at_most_one_attribute():
    changed = []
    for pairs in articles("chain", 40):
        links = sorted(pairs, key=lambda p: p.subject)
        assert [p.subject for p in links] == list(range(28))
        for link, after in itertools.pairwise(links):
            assert link.named == after.asked
            changed.append(sum(a != b for a, b in zip(link.words[:6], after.words[:6], strict=True)))
        assert links[-1].named not in {p.asked for p in links}
    assert set(changed) == {0, 1}
    assert sum(changed) / len(changed) == pytest.approx(11 / 12, abs=0.03)  # the fresh word may be the old one


def test_chain_links_far_apart_are_unrelated():
    ends = [
        (min(pairs, key=lambda p: p.subject), max(pairs, key=lambda p: p.subject)) for pairs in articles("chain", 150)
    ]
    assert agreement(ends) < 0.2  # an attribute survives 27 changes with probability (5/6)^27 = 0.007, else chance


# -- a pure function of its arguments ----------------------------------------------------------------------------------


def test_articles_are_the_same_every_time_from_any_start():
    corpus = EncyclopediaCorpus(CorpusConfig(seed=4, variant="needle"))
    from_start = list(itertools.islice(corpus.articles(0, 0), 6))
    assert list(itertools.islice(corpus.articles(0, 4), 2)) == from_start[4:]
    assert list(itertools.islice(corpus.articles(3, 0), 6)) == from_start
    assert from_start[5] == generate_article(4, 5, variant="needle")
    assert len({a.id for a in from_start}) == len({a.text for a in from_start}) == 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_articles_of_another_seed_are_others(variant):
    training, held_out = articles(variant, 40, seed=1), articles(variant, 40, seed=2)
    values = {(p.named, *p.words) for pairs in training for p in pairs}
    assert not values & {(p.named, *p.words) for pairs in held_out for p in pairs}
    assert generate_article(1, 0, variant=variant).id != generate_article(2, 0, variant=variant).id


def test_large_seeds_and_places_work():
    assert generate_article(2**63 - 1, 2**40).pairs != generate_article(2**63 - 2, 2**40).pairs


def test_the_corpus_uses_every_setting():
    config = CorpusConfig(seed=9, variant="chain", subjects=3, pairs_per_subject=5)
    assert next(EncyclopediaCorpus(config).articles(0, 7)) == generate_article(
        9, 7, variant="chain", subjects=3, pairs_per_subject=5
    )


# -- the planted rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["threads", "null"])
def test_the_rule_of_threads_is_to_stay_on_the_subject(variant):
    subjects = [0, 1, 0, 1, 2]
    assert planted_pick(variant, subjects, [0, 1, 2, 3, 4], None) == 0  # anywhere; the first
    assert planted_pick(variant, subjects, [1, 2, 3, 4], 0) == 2
    assert planted_pick(variant, subjects, [0, 1, 2, 4], 3) == 1
    assert planted_pick(variant, subjects, [1, 3, 4], 2) == 1  # nothing left on subject 0
    assert planted_pick(variant, subjects, [0, 2], 4) == 0


def test_the_rule_of_needle_is_the_needle_then_what_it_explains():
    subjects = [2, 1, 0, 1, 2]
    unread = [0, 1, 2, 3, 4]
    order = []
    last = None
    while unread:
        last = planted_pick("needle", subjects, unread, last)
        order.append(last)
        unread.remove(last)
    assert order == [2, 1, 3, 0, 4]


def test_the_rule_of_chain_is_link_order_whatever_was_read_last():
    assert planted_pick("chain", [3, 0, 2, 1], [0, 1, 2, 3], None) == 1
    assert planted_pick("chain", [3, 0, 2, 1], [0, 2, 3], 0) == 3
