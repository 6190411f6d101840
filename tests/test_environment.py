"""The environment: what is unread, what was read, and who decides."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor

from attention_guided_rl.config import SelectionConfig
from attention_guided_rl.environment import ReadingEnvironment, embed_pool_keys
from attention_guided_rl.records import Article, PairPool

NUM_PAIRS = 4


class OneHot:
    """Token i is the i-th unit vector; token 9 is whitespace."""

    identity = "one-hot"
    depends_on_policy = False

    def embed_queries(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.eye(10)[ids[:, 0]][:, None] * (ids[:, 0] != 9)[:, None, None]

    def embed_keys(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.eye(10)[ids[:, 0]][:, None]


def pool(num_articles: int = 1) -> PairPool:
    """Pairs whose key is the token n and whose value is n + 10 (n + 110 in the second article) and padding."""
    numbers = torch.arange(NUM_PAIRS).expand(num_articles, -1)
    values = numbers + 10 + 100 * torch.arange(num_articles)[:, None]
    article = Article(id="a", title="", text="", source="", revision="", url="", licence="")
    return PairPool(
        articles=(article,) * num_articles,
        pair_ids=(tuple("abcd"),) * num_articles,
        probe_pair_ids=((),) * num_articles,
        key_ids=numbers[..., None],
        key_mask=torch.ones(num_articles, NUM_PAIRS, 1, dtype=torch.bool),
        value_ids=torch.stack([values, torch.zeros_like(values)], -1),
        value_mask=tensor([True, False]).expand(num_articles, NUM_PAIRS, 2),
        probe_key_ids=torch.zeros(num_articles, 0, 1, dtype=torch.long),
        probe_key_mask=torch.zeros(num_articles, 0, 1, dtype=torch.bool),
        probe_value_ids=torch.zeros(num_articles, 0, 2, dtype=torch.long),
        probe_value_mask=torch.zeros(num_articles, 0, 2, dtype=torch.bool),
        position=numbers,
        probe_position=torch.zeros(num_articles, 0, dtype=torch.long),
        subject=torch.full((num_articles, NUM_PAIRS), -1),
        probe_subject=torch.zeros(num_articles, 0, dtype=torch.long),
    )


def opened(num_articles: int = 1, trajectories: int = 1, temperature: float = 0.01) -> ReadingEnvironment:
    env, pairs = ReadingEnvironment(OneHot(), SelectionConfig(), temperature), pool(num_articles)
    env.reset(pairs, embed_pool_keys(OneHot(), pairs), trajectories)
    return env


def ask(env: ReadingEnvironment, *tokens: int, uniform: float = 0.5, **options):
    ids = tensor(tokens)[:, None]
    return env.step(ids, torch.ones_like(ids, dtype=torch.bool), torch.full((len(tokens),), uniform), **options)


def fixed(*picks: int):
    """A picker that reads these positions."""
    return lambda env, logprobs, uniform: tensor(picks)


def test_each_row_reads_what_its_own_query_asks_for():
    reading = ask(opened(num_articles=2, trajectories=2), 3, 0, 2, 2)
    assert reading.picks.tolist() == [3, 0, 2, 2]
    assert reading.value_ids[:, 0].tolist() == [13, 10, 112, 112]  # rows 2 and 3 read the second article
    assert reading.value_mask.tolist() == [[True, False]] * 4


def test_a_row_is_not_affected_by_its_neighbours():
    alone, together = opened(trajectories=1, temperature=1.0), opened(trajectories=3, temperature=1.0)
    for asked, uniform in ((1, 0.7), (1, 0.1), (0, 0.9), (2, 0.3)):
        one = ask(alone, asked, uniform=uniform)
        three = ask(together, 3, asked, 0, uniform=uniform)
        assert three.picks[1] == one.picks[0]
        assert torch.equal(three.selection_logprobs[1], one.selection_logprobs[0])


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_read_twice_and_everything_is_read_once(seed):
    env = opened(num_articles=2, trajectories=3, temperature=1.0)
    numbers = torch.rand(NUM_PAIRS, 6, generator=torch.Generator().manual_seed(seed))
    ids = tensor([0, 1, 2, 3, 0, 0])[:, None]
    picks = torch.stack([env.step(ids, torch.ones_like(ids, dtype=torch.bool), u).picks for u in numbers], 1)
    assert picks.sort(1).values.tolist() == [[0, 1, 2, 3]] * 6
    assert not env.unread.any()


def test_what_was_read_has_probability_zero_from_then_on():
    env = opened(temperature=1.0)
    ask(env, 0, picker=fixed(2))
    reading = ask(env, 2)
    assert reading.selection_logprobs[0, 2] == -torch.inf
    assert reading.selection_logprobs.exp()[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])


def test_picking_a_read_pair_is_an_error_that_changes_nothing():
    env = opened(trajectories=2)
    ask(env, 0, 1, picker=fixed(0, 1))
    with pytest.raises(ValueError, match="picked twice"):
        ask(env, 0, 1, picker=fixed(3, 1))
    assert env.unread.tolist() == [[False, True, True, True], [True, False, True, True]]


def test_a_picker_overrules_the_query():
    env = opened(trajectories=2)
    reading = ask(env, 0, 0, picker=fixed(3, 1))
    assert reading.picks.tolist() == [3, 1]
    assert reading.value_ids[:, 0].tolist() == [13, 11]
    assert env.last_pick is not None
    assert env.last_pick.tolist() == [3, 1]


def test_a_picker_sees_the_selection_and_the_uniform_numbers():
    seen = {}

    def look(env, logprobs, uniform):
        seen.update(unread=env.unread.tolist(), chances=logprobs.exp().tolist(), uniform=uniform.tolist())
        return tensor([0])

    ask(opened(temperature=1.0), 1, uniform=0.25, picker=look)
    # e/(e + 3) for the key asked for, 1/(e + 3) for the others
    assert seen["chances"][0] == pytest.approx([0.174878, 0.475367, 0.174878, 0.174878], abs=1e-6)
    assert seen["uniform"] == [0.25]
    assert seen["unread"] == [[True] * 4]


def test_a_reset_makes_everything_unread_again():
    env = opened()
    ask(env, 1)
    env.reset(pool(), embed_pool_keys(OneHot(), pool()), 2)
    assert env.unread.tolist() == [[True] * NUM_PAIRS] * 2
    assert env.last_pick is None


def test_a_whitespace_query_gives_a_uniform_choice_among_the_unread():
    env = opened()
    ask(env, 0, picker=fixed(1))
    assert ask(env, 9).selection_logprobs.exp()[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_value_scores_let_the_last_value_ask():
    pairs = replace(pool(), value_ids=pool().value_ids - 9)  # now pair n's value is the key of pair n + 1
    env = ReadingEnvironment(OneHot(), SelectionConfig(), 1.0)
    env.reset(pairs, embed_pool_keys(OneHot(), pairs), 1)
    ask(env, 0, picker=fixed(2))
    assert int(env.value_scores().argmax()) == 3
