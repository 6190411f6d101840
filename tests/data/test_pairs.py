"""Pairs: how text is cut, what becomes probe and pool, and where a stream goes on."""

import hashlib
import itertools
from collections.abc import Iterator

import pytest

from attention_guided_rl.config import PairsConfig
from attention_guided_rl.data.pairs import PoolStream, Position, cut_article, split_sentences
from attention_guided_rl.errors import CheckpointError, CorpusError
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Article, PairPool, PairText


def encode(text: str) -> list[int]:
    """One token per character."""
    return [ord(c) for c in text]


def article(text: str = "", *, name: str = "a", pairs: tuple[PairText, ...] | None = None) -> Article:
    return Article(id=name, title=name, text=text, source="here", revision="1", url="", licence="", pairs=pairs)


def text(ids) -> str:
    return "".join(map(chr, ids))


def cut(subject: Article, **settings) -> list[tuple[str, str]]:
    return [(text(p.key_ids), text(p.value_ids)) for p in cut_article(subject, encode, PairsConfig(**settings)).pairs]


# -- cutting -----------------------------------------------------------------------------------------------------------


def test_tokens_are_cut_into_keys_and_values_without_gap_or_overlap():
    # " abcdefghijklm" is 14 tokens: two pairs of 2 + 3, and 4 left over
    assert cut(article("abcdefghijklm"), key_tokens=2, value_tokens=3) == [(" a", "bcd"), ("ef", "ghi")]


def test_a_pair_that_just_fits_counts():
    assert cut(article("abcd"), key_tokens=2, value_tokens=3) == [(" a", "bcd")]
    assert cut(article("abc"), key_tokens=2, value_tokens=3) == []


def test_positions_and_ids_name_the_place_in_the_article():
    pieces = cut_article(article("abcdefghi"), encode, PairsConfig(key_tokens=2, value_tokens=3))
    assert [p.position for p in pieces.pairs] == [0, 1]
    assert [pieces.pair_id(p) for p in pieces.pairs] == [f"{pieces.digest}-0", f"{pieces.digest}-1"]
    assert [p.subject for p in pieces.pairs] == [-1, -1]


def test_the_digest_names_the_cut_text_and_nothing_else():
    config = PairsConfig(key_tokens=2, value_tokens=3)
    digest = cut_article(article("abcdefghi"), encode, config).digest
    assert cut_article(article("abcdefghi", name="b"), encode, config).digest == digest
    assert cut_article(article("abcdefghj"), encode, config).digest != digest
    assert cut_article(article("abcdefghi"), encode, PairsConfig(key_tokens=3, value_tokens=2)).digest != digest


SENTENCES = "Dr. Ada wrote it. She lived in St. Ives! Was it 3.5 km away? Yes. Nobody knew."


def test_sentences_alternate_between_key_and_value():
    # five sentences: two pairs, the fifth has no value
    assert cut(article(SENTENCES), cut="sentences", key_tokens=64, value_tokens=64) == [
        (" Dr. Ada wrote it.", " She lived in St. Ives!"),
        (" Was it 3.5 km away?", " Yes."),
    ]


def test_sentences_longer_than_their_slot_are_cut():
    assert cut(article(SENTENCES), cut="sentences", key_tokens=5, value_tokens=3) == [
        (" Dr. ", " Sh"),
        (" Was ", " Ye"),
    ]


def test_sentences_stay_as_they_are_written_and_end_with_their_line():
    assert split_sentences("A  (double)  space, don't “quote”.  Next.\nA heading\n\nText goes on.") == [
        "A  (double)  space, don't “quote”.", "Next.", "A heading", "Text goes on.",
    ]  # fmt: skip


def test_ready_pairs_are_taken_as_they_are_and_cut_to_their_slots():
    pairs = (PairText("who", "she", 3), PairText(" where ", "there"), PairText("what", "an owl", 0))
    pieces = cut_article(article(pairs=pairs), encode, PairsConfig(key_tokens=5, value_tokens=4))
    assert [(text(p.key_ids), text(p.value_ids), p.subject) for p in pieces.pairs] == [
        (" who", " she", 3), (" wher", " the", -1), (" what", " an ", 0),
    ]  # fmt: skip


def test_a_pair_without_tokens_is_left_out_and_leaves_its_place():
    def without_spaces(text: str) -> list[int]:
        return encode(text.replace(" ", ""))

    pairs = (PairText("a", "b"), PairText("c", "  "), PairText("e", "f"))
    pieces = cut_article(article(pairs=pairs), without_spaces, PairsConfig(key_tokens=2, value_tokens=2))
    assert [(text(p.key_ids), p.position) for p in pieces.pairs] == [("a", 0), ("e", 2)]


# -- the stream --------------------------------------------------------------------------------------------------------


class Shelf:
    """Articles of these lengths in pairs of 2 + 3 tokens; every pass the same, or for ever if `passes` is 0."""

    def __init__(self, *num_pairs: int, passes_end: bool = True, salt: str = "") -> None:
        self._lengths, self._passes_end, self._salt = num_pairs, passes_end, salt
        self.asked: list[tuple[int, int]] = []

    def _article(self, number: int) -> Article:
        num_pairs = self._lengths[number % len(self._lengths)]
        letters = itertools.cycle(f"{number}abcdefghijkl{self._salt}mnopq")
        return article("".join(itertools.islice(letters, max(0, 5 * num_pairs - 1))), name=f"number {number}")

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        self.asked.append((epoch, start))
        for number in itertools.count(start) if not self._passes_end else range(start, len(self._lengths)):
            yield self._article(number)


def stream(shelf: Shelf, *, num_pairs: int = 4, num_probes: int = 0, seed: int = 0, purpose=Purpose.POOL) -> PoolStream:
    config = PairsConfig(num_pairs=num_pairs, key_tokens=2, value_tokens=3)
    return PoolStream(
        shelf, encode, config, num_pairs=config.num_pairs, num_probes=num_probes, seed=seed, purpose=purpose
    )


def names(pool: PairPool) -> list[str]:
    return [a.id.removeprefix("number ") for a in pool.articles]


def test_a_pool_is_padded_slots_with_masks():
    pairs = (PairText("ab", "abc", 1), PairText("c", "d", 2))
    config = PairsConfig(num_pairs=2, key_tokens=4, value_tokens=6)

    class One:
        def articles(self, epoch: int, start: int) -> Iterator[Article]:
            yield from [article(pairs=pairs)][start:]

    pool = PoolStream(
        One(), encode, config, num_pairs=config.num_pairs, num_probes=0, seed=0, purpose=Purpose.POOL
    ).next_pool(1)
    a, b, c, d, space = (ord(x) for x in "abcd ")
    assert pool.key_ids.tolist() == [[[space, a, b, 0], [space, c, 0, 0]]]
    assert pool.key_mask.tolist() == [[[True, True, True, False], [True, True, False, False]]]
    assert pool.value_ids.tolist() == [[[space, a, b, c, 0, 0], [space, d, 0, 0, 0, 0]]]
    assert pool.value_mask.sum(-1).tolist() == [[4, 2]]
    assert pool.mean_value_len.tolist() == [3.0]
    assert pool.subject.tolist() == [[1, 2]]
    assert pool.probe_key_ids.shape == (1, 0, 4)


def test_the_stream_advances_and_begins_again():
    shelf = Shelf(4, 5, 6)
    pools = stream(shelf)
    assert [names(pools.next_pool(2)) for _ in range(3)] == [["0", "1"], ["2", "0"], ["1", "2"]]
    assert shelf.asked == [(0, 0), (1, 0)]


def test_short_articles_are_skipped_and_counted():
    pools = stream(Shelf(4, 3, 4, 0, 4))
    assert names(pools.next_pool(3)) == ["0", "2", "4"]
    assert pools.num_skipped == 2
    pools.next_pool(3)
    assert pools.num_skipped == 4


def test_probes_count_towards_what_an_article_needs():
    pools = stream(Shelf(4, 5, 6), num_probes=2)
    assert names(pools.next_pool(2)) == ["2", "2"]
    assert pools.num_skipped == 4


@pytest.mark.timeout(10)
@pytest.mark.parametrize("lengths", [(3, 2), ()], ids=["all too short", "no article"])
def test_a_corpus_without_a_usable_article_is_an_error_that_says_what_is_needed(lengths):
    with pytest.raises(CorpusError, match=r"4 pairs needed.*pairs\.num_pairs"):
        stream(Shelf(*lengths)).next_pool(1)


@pytest.mark.timeout(10)
def test_an_endless_corpus_of_short_articles_is_refused_too():
    with pytest.raises(CorpusError, match=r"pairs\.num_pairs"):
        stream(Shelf(3, passes_end=False)).next_pool(1)


def test_probes_and_pool_are_different_pairs_in_article_order():
    pools = stream(Shelf(12, 9), num_pairs=4, num_probes=3)
    for _ in range(10):
        pool = pools.next_pool(2)
        for a in range(2):
            pool_ids, probe_ids = pool.pair_ids[a], pool.probe_pair_ids[a]
            assert (len(set(pool_ids)), len(set(probe_ids))) == (4, 3)
            assert not set(pool_ids) & set(probe_ids)
            positions, probes = pool.position[a].tolist(), pool.probe_position[a].tolist()
            assert positions == sorted(positions)
            assert probes == sorted(probes)
            together = sorted(positions + probes)
            assert together == list(range(together[0], together[0] + 7))  # neighbours, no gap
            for place, key in zip(positions, pool.key_ids[a], strict=True):
                start = 5 * place
                assert text(key.tolist()) == f" {pool.articles[a].text}"[start : start + 2]


def test_where_in_an_article_and_which_probes_is_drawn_anew_every_time():
    pools = stream(Shelf(20), num_pairs=4, num_probes=2)
    drawn = [pools.next_pool(1) for _ in range(12)]
    assert len({tuple(p.position[0].tolist()) for p in drawn}) > 6
    starts = [min(*p.position[0].tolist(), *p.probe_position[0].tolist()) for p in drawn]
    assert len({tuple((p.probe_position[0] - start).tolist()) for p, start in zip(drawn, starts, strict=True)}) > 3


def test_pools_depend_on_seed_and_purpose_alone():
    def ids(**options) -> tuple:
        pools = stream(Shelf(20, 30), **options)
        return tuple(pools.next_pool(2).pair_ids for _ in range(3))

    assert ids() == ids()
    assert ids() != ids(seed=1)
    assert ids() != ids(purpose=Purpose.EVALUATION_POOL)


def test_a_process_gets_its_share_of_the_same_pool():
    whole, first, second = (stream(Shelf(8, 9, 10, 7)) for _ in range(3))
    for _ in range(3):
        pool = whole.next_pool(4)
        parts = first.next_pool(4, keep=slice(0, 2)), second.next_pool(4, keep=slice(2, 4))
        assert parts[0].pair_ids + parts[1].pair_ids == pool.pair_ids
    assert first.position == second.position == whole.position


@pytest.mark.parametrize("stop", range(8))
def test_a_resumed_stream_goes_on_as_if_never_interrupted(stop):
    lengths = (8, 3, 9, 2, 10, 1)  # every other article is skipped, also at the end of a pass
    whole = stream(Shelf(*lengths), num_probes=1)
    expected = [whole.next_pool(1).pair_ids for _ in range(11)]

    before = stream(Shelf(*lengths), num_probes=1)
    for _ in range(stop):
        before.next_pool(1)
    after = stream(Shelf(*lengths), num_probes=1)
    after.resume(before.position)
    assert [after.next_pool(1).pair_ids for _ in range(11 - stop)] == expected[stop:]
    assert after.position == whole.position


def test_the_history_names_all_that_was_drawn_in_order():
    def history(*lengths: int) -> str:
        drawing = stream(Shelf(*lengths))
        ids = [drawing.next_pool(1).pair_ids[0][0].partition("-")[0] for _ in range(2)]
        names = [article.id for article in Shelf(*lengths).articles(0, 0) if article]
        expected = ""
        for name, digest in zip(names, ids, strict=False):
            expected = hashlib.sha256(f"{expected}\n{name}\n{digest}".encode()).hexdigest()
        assert drawing.position.history == expected
        return expected

    assert history(8, 9, 10) == history(8, 9, 11) != history(9, 9, 10)


def test_a_resume_does_not_read_what_was_read():
    shelf = Shelf(8, 9, 10, passes_end=False)
    before = stream(shelf)
    before.next_pool(100)
    after = Shelf(8, 9, 10, passes_end=False)
    stream_after = stream(after)
    stream_after.resume(before.position)
    assert after.asked[-1] == (0, 99)
    assert names(stream_after.next_pool(1)) == ["100"]


@pytest.mark.parametrize(
    "changed", [Shelf(8, 9, 10, salt="x"), Shelf(9, 8, 10), Shelf(8)], ids=["other text", "other order", "fewer"]
)
def test_a_changed_corpus_is_noticed_on_resume(changed):
    before = stream(Shelf(8, 9, 10))
    before.next_pool(2)
    with pytest.raises(CheckpointError, match="corpus has changed"):
        stream(changed).resume(before.position)


def test_other_lengths_of_pairs_are_noticed_on_resume():
    before = stream(Shelf(8, 9))
    before.next_pool(1)
    other = PoolStream(
        Shelf(8, 9), encode, PairsConfig(num_pairs=4, key_tokens=3, value_tokens=2), num_pairs=4, num_probes=0,
        seed=0, purpose=Purpose.POOL,
    )  # fmt: skip
    with pytest.raises(CheckpointError):
        other.resume(before.position)


def test_a_stream_that_has_drawn_nothing_resumes_at_the_beginning():
    pools = stream(Shelf(8, 9))
    pools.resume(Position())
    assert names(pools.next_pool(1)) == ["0"]


def test_a_resumed_stream_of_short_articles_still_ends():
    before = stream(Shelf(8))
    before.next_pool(1)
    after = stream(Shelf(8))
    after.resume(before.position)
    assert names(after.next_pool(2)) == ["0", "0"]
