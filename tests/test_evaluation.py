"""Evaluation: who picks what, on equal terms, and what the summary makes of it."""

import json
import shutil
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from attention_guided_rl import runs
from attention_guided_rl.arms import run_arms
from attention_guided_rl.branching import branch_logprobs
from attention_guided_rl.config import Config
from attention_guided_rl.config_files import config_to_yaml, load_config
from attention_guided_rl.distributed import Processes
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.evaluation import _warn_of_other_articles, evaluation_records, scoring_identity
from attention_guided_rl.headroom import (
    Headroom,
    different_articles,
    measure_headroom,
    no_floor_of,
    permute_values,
    random_order_rewards,
)
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.oracle import oracle_rows
from attention_guided_rl.order_files import OrderLine, picks_of_orders
from attention_guided_rl.pickers import PICKERS, replay
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import (
    PADDING,
    QUERY,
    TEMPLATE,
    VALUE,
    Continuations,
    PairPool,
    TrajectoryBatch,
    has_padding,
)
from attention_guided_rl.selection import sample
from attention_guided_rl.session import Session
from attention_guided_rl.summary import PICKERS as OUR_PICKERS
from attention_guided_rl.summary import area_under, summarise, with_holm
from attention_guided_rl.texts import first_of_subject, with_key_text

# -- the summary, on records typed by hand -----------------------------------------------------------------------------


def record(arm: str, article: str, reward: float, *, index: int = 0, seed: int = 0, subjects: int | None = None):
    return {"arm": arm, "article": article, "index": index, "seed": seed, "reward": reward, "subjects": subjects}


def records(table: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rewards of articles a, b, c … by arm."""
    return [
        record(arm, "abcdefgh"[i], reward, index=i)
        for arm, rewards in table.items()
        for i, reward in enumerate(rewards)
    ]


TABLE = {
    "trained": [3.0, 5.0],
    "trained/key": [4.0, 6.5],
    "untrained": [1.0, 1.0],
    "untrained/key": [3.5, 4.0],
    "oracle": [5.0, 9.0],
}


def test_arms_contrasts_choice_gain_and_gap_of_two_articles():
    summary = summarise(records(TABLE), held_out=True)

    assert summary["unit"] == "nats per value token"
    assert (summary["articles"], summary["seeds"], summary["held_out"]) == (2, [0], True)
    assert list(summary["arms"]) == list(TABLE)
    # of two values the interval is from one to the other
    assert summary["arms"]["trained"] == {"mean": 4.0, "low": 3.0, "high": 5.0}
    contrast = summary["contrasts"]["trained-untrained"]  # 2, 4
    assert {k: contrast[k] for k in ("mean", "low", "high", "p")} == {"mean": 3.0, "low": 2.0, "high": 4.0, "p": 0.5}
    # trained/key − untrained/key: 0.5, 2.5; of four sign patterns two are as extreme
    assert summary["choice_gain"] == {"mean": 1.5, "low": 0.5, "high": 2.5, "p": 0.5, "p_holm": 1.0}  # of two contrasts
    # (trained − untrained)/(oracle − untrained): 3/6
    assert summary["oracle_gap_closed"] == pytest.approx(0.5)


def test_contrasts_are_only_those_whose_arms_were_run():
    assert set(summarise(records(TABLE), held_out=True)["contrasts"]) == {
        "trained-untrained", "trained/key-untrained/key",
    }  # fmt: skip
    summary = summarise(records({"random": [0.0, 1.0]}), held_out=True)
    assert (summary["contrasts"], summary["choice_gain"], summary["oracle_gap_closed"]) == ({}, None, None)


@pytest.mark.parametrize(
    ("oracle", "closed"),
    [([0.0, 3.0], None), ([1.0, 9.0], None), ([1.5, 9.0], 3 / 4.25)],  # gaps −1 … 2, 0 … 8, 0.5 … 8
)
def test_the_gap_closed_is_given_only_where_the_gaps_interval_is_positive(oracle, closed):
    value = summarise(records({**TABLE, "oracle": oracle}), held_out=True)["oracle_gap_closed"]
    assert value == (None if closed is None else pytest.approx(closed))


def test_of_a_single_article_no_share_of_a_gap_is_given():
    table = {arm: rewards[:1] for arm, rewards in TABLE.items()} | {"planted/possible": [9.0]}
    summary = summarise(records(table), held_out=True)
    assert (summary["oracle_gap_closed"], summary["possible_gap_closed"]) == (None, None)


def test_orders_of_a_file_are_compared_with_the_policy_and_with_random_picks_in_one_family():
    table = {
        "trained/key": [4.0, 6.0], "my-order/key": [3.0, 4.0], "my-order": [0.0, 0.0], "random/key": [1.0, 0.0],
        "trained@live": [0.0, 1.0], "untrained/key": [0.0, 0.0],
    }  # fmt: skip
    contrasts = summarise(records(table), held_out=True)["contrasts"]
    assert {name: c["mean"] for name, c in contrasts.items()} == {
        "trained/key-untrained/key": 5.0, "trained/key-random/key": 4.5,
        "trained/key-my-order/key": 1.5, "my-order/key-random/key": 3.0,
    }  # fmt: skip
    assert {c["p_holm"] for c in contrasts.values()} == {1.0}  # 4 × 0.5
    assert {*PICKERS, "oracle"} == OUR_PICKERS


def test_choices_are_compared_with_each_simple_reader_with_the_text_held_equal():
    readers = ("random", "article_order", "easy_to_hard", "nearest_key")
    table = {"trained/key": [4.0, 6.0], **{f"{name}/key": [float(i), i + 2.0] for i, name in enumerate(readers)}}
    contrasts = summarise(records(table), held_out=True)["contrasts"]
    assert {name: c["mean"] for name, c in contrasts.items()} == {
        f"trained/key-{name}/key": 4.0 - i for i, name in enumerate(readers)
    }


def test_holm_adjusts_over_all_contrasts_that_are_given():
    summary = summarise(
        records(
            {
                "trained": [1.0] * 5,
                "untrained": [0.0] * 5,  # p = 2/32
                "random": [0.0, 0.0, 0.0, 0.0, 2.0],  # differences 1, 1, 1, 1, −1: p = 12/32
            }
        ),
        held_out=True,
    )
    assert {name: c["p_holm"] for name, c in summary["contrasts"].items()} == {
        "trained-untrained": pytest.approx(4 / 32), "trained-random": pytest.approx(12 / 32),
    }  # fmt: skip


def test_seeds_are_averaged_within_their_article():
    rows = [record("trained", "a", 0.0), record("trained", "a", 2.0, seed=1), record("trained", "b", 5.0, index=1)]
    summary = summarise(rows, held_out=True)
    assert summary["arms"]["trained"] == {"mean": 3.0, "low": 1.0, "high": 5.0}  # of 1 and 5, not of 0, 2 and 5
    assert summary["seeds"] == [0, 1]
    assert summary["articles"] == 2


def test_the_main_differences_are_given_for_each_seed_where_there_are_several():
    table = {0: {"trained": [3.0, 5.0], "untrained": [1.0, 1.0]}, 1: {"trained": [1.0, 1.0], "untrained": [2.0, 1.0]}}
    rows = [r | {"seed": seed} for seed, arms in table.items() for r in records(arms)]
    assert summarise(rows, held_out=True)["by_seed"] == {"trained-untrained": [3.0, -0.5]}  # 2, 4 and −1, 0
    assert "by_seed" not in summarise(rows[:4], held_out=True)


def test_differences_are_paired_by_article_whatever_the_order():
    rows = [record("trained", "a", 1.0), record("trained", "b", 10.0), record("trained", "c", 99.0),
            record("untrained", "b", 9.0), record("untrained", "a", 0.0)]  # fmt: skip
    contrast = summarise(rows, held_out=True)["contrasts"]["trained-untrained"]
    assert (contrast["mean"], contrast["low"], contrast["high"]) == (1.0, 1.0, 1.0)  # 1 − 0 and 10 − 9


def test_of_a_single_article_the_trajectories_are_resampled_and_the_summary_says_so():
    rows = [record("trained", "a", float(i), index=i) for i in range(2)]
    summary = summarise(rows, held_out=False)
    assert (summary["resampled"], summary["articles"], summary["trajectories"]) == ("trajectory", 1, 2)
    assert summary["arms"]["trained"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert summary["held_out"] is False


def test_subjects_read_are_averaged_where_the_corpus_has_them():
    rows = [
        record("trained", "a", 1.0, subjects=2),
        record("trained", "b", 1.0, subjects=5),
        record("random", "a", 1.0),
    ]
    arms = summarise(rows, held_out=True)["arms"]
    assert arms["trained"]["subjects"] == 3.5
    assert "subjects" not in arms["random"]


@pytest.mark.parametrize("table", [TABLE, {arm: rewards[:1] for arm, rewards in TABLE.items()}], ids=["two", "one"])
def test_the_summary_is_strict_json(table):
    summary = summarise(records(table), held_out=True)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


# -- the arms ----------------------------------------------------------------------------------------------------------

EVALUATION = {"evaluation.articles": 3, "evaluation.batch_articles": 2}


@pytest.fixture
def session(make_session) -> Session:
    return make_session(EVALUATION)


def arms(session: Session, *pickers: str) -> dict[str, list]:
    """Results of each arm by batch, with the pool and the priors they belong to."""
    found: dict[str, list] = {}
    for batch in run_arms(session, pickers):
        for result in batch.results:
            found.setdefault(result.arm, []).append((result.paid, batch.pool, batch.prior))
    return found


def picks(results: list) -> list[list[int]]:
    return [row for paid, _, _ in results for row in paid.rows.picks.tolist()]


def mean_rewards(results: list) -> Tensor:
    return torch.cat([paid.rewards.rewards.mean(1) for paid, _, _ in results])


def test_each_picker_is_run_with_its_own_text_and_with_the_key(session):
    found = arms(session, "trained", "random")
    assert list(found) == ["trained", "trained/key", "random", "random/key"]
    for arm in ("trained", "random"):
        assert picks(found[arm]) == picks(found[f"{arm}/key"])
        assert len(picks(found[arm])) == 3  # articles, one trajectory each


def test_before_training_trained_and_untrained_are_the_same_to_the_bit(session):
    found = arms(session, "trained", "untrained")
    for text in ("", "/key"):
        for (a, _, _), (b, _, _) in zip(found[f"trained{text}"], found[f"untrained{text}"], strict=True):
            assert torch.equal(a.rows.ids, b.rows.ids)
            assert torch.equal(a.rewards.rewards, b.rewards.rewards)


def test_training_changes_the_trained_arm_alone(make_session, shaken):
    before, after = make_session(EVALUATION), make_session(EVALUATION)
    shaken(after.model, 0.5)
    a, b = (arms(s, "trained", "untrained", "random", "nearest_key", "oracle") for s in (before, after))
    for arm in ("untrained", "random", "nearest_key", "nearest_key/key", "oracle"):
        assert picks(a[arm]) == picks(b[arm])
        assert torch.equal(mean_rewards(a[arm]), mean_rewards(b[arm])), arm
    assert not torch.equal(a["trained"][0][0].rows.ids, b["trained"][0][0].rows.ids)


def test_arms_share_pools_and_do_not_depend_on_which_others_are_run(session):
    together, alone = arms(session, "trained", "random", "article_order"), arms(session, "random")
    assert picks(together["random"]) == picks(alone["random"])
    assert torch.equal(mean_rewards(together["random"]), mean_rewards(alone["random"]))
    for batch in zip(*together.values(), strict=True):
        assert len({pool.pair_ids for _, pool, _ in batch}) == 1


def test_results_do_not_depend_on_how_many_articles_are_evaluated_at_once(make_session):
    one, three = (make_session(EVALUATION | {"evaluation.batch_articles": size}) for size in (1, 3))
    pickers = ("trained", "random", "easy_to_hard", "nearest_key", "oracle")
    a, b = arms(one, *pickers), arms(three, *pickers)
    for arm in a:
        assert picks(a[arm]) == picks(b[arm]), arm
        torch.testing.assert_close(mean_rewards(a[arm]), mean_rewards(b[arm]), atol=1e-5, rtol=0)


def test_random_picks_follow_the_uniform_numbers_that_all_arms_share(session):
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(3), 1)
    expected = []
    for row in numbers[:, :, -1].tolist():
        unread = list(range(5))
        expected.append([unread.pop(int(u * len(unread))) for u in row])  # inverse CDF of a uniform choice
    assert picks(arms(session, "random")["random"]) == expected


def test_article_order_reads_from_the_beginning(session):
    assert picks(arms(session, "article_order")["article_order"]) == [[0, 1, 2]] * 3


def test_easy_to_hard_reads_by_the_values_prior(session):
    """u_j = Σ log p / L̄ with the pool's one L̄, so the order is that of the sums, also when lengths differ."""
    for paid, pool, prior in arms(session, "easy_to_hard")["easy_to_hard"]:
        assert len(set(pool.value_mask.sum(-1).flatten().tolist())) > 1
        for row, sums in zip(paid.rows.picks.tolist(), prior.tolist(), strict=True):
            assert row == sorted(range(5), key=lambda j: -sums[j])[:3]


def test_nearest_key_starts_in_article_order_and_follows_the_last_value(session):
    for paid, pool, _ in arms(session, "nearest_key")["nearest_key"]:
        for a, row in enumerate(paid.rows.picks.tolist()):
            assert row[0] == 0
            keys = session.embedder.embed_keys(pool.key_ids[a], pool.key_mask[a])  # (N, 2 key heads, D)
            for t in range(1, 3):
                last = row[t - 1]
                query = session.embedder.embed_queries(pool.value_ids[a, last][None], pool.value_mask[a, last][None])[0]
                scores = {
                    j: sum(float(query[h] @ keys[j, h // 2]) for h in range(4)) for j in range(5) if j not in row[:t]
                }
                assert row[t] == max(scores, key=lambda j: scores[j])


def test_planted_is_left_out_where_the_corpus_has_no_subjects(session):
    assert arms(session, "planted") == {}


def demo(variant: str) -> Config:
    return load_config("demo", overrides={
        "corpus.variant": variant, "evaluation.corpus.variant": variant, "evaluation.articles": 3,
        "pairs.num_pairs": 12, "rollout.steps": 6, "rollout.query_tokens": 3, "selection.temperature": 0.1,
        "training.device": "cpu",
    })  # fmt: skip


def test_planted_stays_on_a_subject_of_threads_while_it_has_unread_pairs():
    ((paid, pool, _),) = arms(Session(demo("threads"), Processes("cpu")), "planted")["planted"]
    for row, subjects in zip(paid.rows.picks.tolist(), pool.subject.tolist(), strict=True):
        for t in range(1, 6):
            left = [j for j in range(12) if j not in row[:t] and subjects[j] == subjects[row[t - 1]]]
            assert not left or row[t] in left


def test_planted_reads_a_chain_from_its_earliest_link():
    ((paid, pool, _),) = arms(Session(demo("chain"), Processes("cpu")), "planted")["planted"]
    for row, subjects in zip(paid.rows.picks.tolist(), pool.subject.tolist(), strict=True):
        assert [subjects[j] for j in row] == sorted(subjects)[:6]


# -- own-key text ------------------------------------------------------------------------------------------------------


def written(session: Session) -> tuple[TrajectoryBatch, PairPool]:
    pool = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL).next_pool(2)
    return session.rollout(pool, session.uniforms(Purpose.EVALUATION, 0, range(2), 1)), pool


@pytest.mark.parametrize(
    ("query_tokens", "key_tokens", "taken"),
    [(2, 3, slice(1, 3)), (5, 3, slice(0, 3)), (2, 6, slice(1, 3)), (3, 2, slice(0, 2)), (1, 2, slice(1, 2))],
    ids=["last two of three", "all three", "last two of three in a slot of six", "key cut to two", "one of two"],
)
def test_own_key_text_is_the_end_of_the_picked_key(make_session, query_tokens, key_tokens, taken):
    session = make_session({"rollout.query_tokens": query_tokens, "pairs.key_tokens": key_tokens})
    rows, pool = written(session)
    replaced = with_key_text(session, rows, pool)
    ids, mask = replaced.query_slots()

    for b in range(2):
        for t, pick in enumerate(rows.picks[b].tolist()):
            key = pool.key_ids[b, pick][:3].tolist()[taken]  # keys of this corpus are three words
            assert ids[b, t][mask[b, t]].tolist() == key
            assert mask[b, t].tolist() == [i < len(key) for i in range(query_tokens)]  # the rest of the slot is padding
    assert has_padding(replaced.role) == (has_padding(rows.role) or query_tokens > len(key))


def test_own_key_text_leaves_picks_values_and_selection_as_they_were(make_session):
    rows, pool = written(session := make_session())
    replaced = with_key_text(session, rows, pool)
    assert torch.equal(replaced.picks, rows.picks)
    assert torch.equal(replaced.selection_logprobs, rows.selection_logprobs)
    assert torch.equal(replaced.step, rows.step)
    outside = torch.ones(rows.ids.shape[1], dtype=torch.bool)
    outside[rows.layout.query_positions] = False
    assert torch.equal(replaced.ids[:, outside], rows.ids[:, outside])
    assert torch.equal(replaced.role[:, outside], rows.role[:, outside])


# -- the oracle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
def test_branches_off_a_cache_score_as_full_forwards_do(make_model, shape):
    """Every branch is a row of its own: prefix up to its length, then the continuation, padding left out."""
    model: LanguageModel = make_model(shape)
    numbers = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 52, (2, 9), generator=numbers)
    role = torch.full((2, 9), TEMPLATE)
    role[0, 5] = role[1, 2:4] = PADDING
    branches = torch.randint(4, 52, (2, 3, 6), generator=numbers)
    mask = torch.ones(2, 3, 6, dtype=torch.bool)
    mask[0, 1, 1] = mask[1, 0, 0:2] = False  # a query shorter than its slot; template text always follows it
    mask[0, 2, 5] = False  # a value shorter than its slot
    prefix_len = tensor([9, 4, 9])

    cache = model.new_cache()
    with torch.no_grad():
        model.extend(cache, ids, role)
        got = branch_logprobs(
            model,
            cache,
            role,
            Continuations(ids=branches, mask=mask, prefix_len=torch.as_tensor(prefix_len), num_scored=3),
        )
        for b in range(2):
            for c in range(3):
                real = role[b, : prefix_len[c]] != PADDING
                row = torch.cat([ids[b, : prefix_len[c]][real], branches[b, c][mask[b, c]]])[None]
                scored = [i for i in (3, 4, 5) if mask[b, c, i]]
                places = torch.arange(row.shape[1] - len(scored), row.shape[1])
                expected = model.token_logprobs(row, torch.full_like(row, TEMPLATE), places)[0]
                torch.testing.assert_close(got[b, c, [i - 3 for i in scored]], expected, atol=2e-5, rtol=0)
                assert all(got[b, c, i - 3] == 0 for i in (3, 4, 5) if not mask[b, c, i])


def test_branching_leaves_the_cache_as_it_was(make_model):
    model: LanguageModel = make_model("llama")
    ids, more = tensor([[1, 5, 9, 20]]), tensor([[7, 8]])
    role, longer = torch.full((1, 4), TEMPLATE), torch.full((1, 6), TEMPLATE)
    with torch.no_grad():
        touched, untouched = model.new_cache(), model.new_cache()
        for cache in (touched, untouched):
            model.extend(cache, ids, role)
        branches = tensor([[[4, 5, 6], [6, 5, 4]]])
        continuations = Continuations(
            ids=branches, mask=torch.ones_like(branches, dtype=torch.bool), prefix_len=tensor([4, 4]), num_scored=2
        )
        branch_logprobs(model, touched, role, continuations)
        assert torch.equal(model.extend(touched, more, longer), model.extend(untouched, more, longer))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"reward.kind": "plain"}, {"reward.kind": "plain", "reward.query_in_context": False}],
    ids=["value_prior", "plain", "queries deleted"],  # deleted queries make every first value_prior reward 0: a tie
)
def test_the_oracle_takes_the_best_unread_pair_at_every_step(make_session, overrides):
    session = make_session(EVALUATION | overrides)
    for paid, pool, prior in arms(session, "oracle")["oracle"]:
        num_articles = pool.num_articles
        prefix: list[list[int]] = [[] for _ in range(num_articles)]
        for t in range(3):
            unread = [[j for j in range(5) if j not in row] for row in prefix]
            rewards = [
                forced_rewards(session, pool, prior, [[*p, u[n]] for p, u in zip(prefix, unread, strict=True)])[:, t]
                for n in range(5 - t)
            ]
            best = torch.stack(rewards).argmax(0).tolist()
            prefix = [[*p, u[n]] for p, u, n in zip(prefix, unread, best, strict=True)]
            highest = torch.stack(rewards).max(0).values
            torch.testing.assert_close(paid.rewards.rewards[:, t], highest, atol=2e-5, rtol=0)
        assert paid.rows.picks.tolist() == prefix


def forced_rewards(session: Session, pool: PairPool, prior: Tensor, orders: list[list[int]]) -> Tensor:
    """Rewards (A, S) of reading in these orders with own-key text, each row completed by whatever is unread."""
    complete = tensor([order + [j for j in range(5) if j not in order] for order in orders])
    step = iter(range(3))
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(len(orders)), 1)
    with session.model.reference():
        rows = session.rollout(pool, numbers, lambda env, logprobs, uniform: complete[:, next(step)])
    return session.pay_for_evaluation(with_key_text(session, rows, pool), pool, prior=prior).rewards.rewards


@pytest.mark.parametrize("overrides", [{}, {"reward.kind": "counterfactual"}], ids=["value_prior", "counterfactual"])
def test_a_beam_as_wide_as_all_beginnings_finds_the_best_order(make_session, overrides):
    """All 5·4 orders of two pairs fit a beam of 20, so it is an exhaustive search."""
    session = make_session(EVALUATION | {"rollout.steps": 2} | overrides)
    pool = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL).next_pool(2)
    q0 = session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 0, range(2), 1)
    prior = session.reference_scorer.prior(pool, session.template)

    def paid(rows: TrajectoryBatch) -> Tensor:
        return session.pay_for_evaluation(rows, pool, q0, prior=prior).rewards.rewards.mean(1)

    every = [paid(forced_rows(session, pool, [[i, j]] * 2)) for i in range(5) for j in range(5) if i != j]
    best = torch.stack(every).max(0).values
    torch.testing.assert_close(paid(oracle_rows(session, pool, prior, q0, width=20)), best, atol=2e-5, rtol=0)
    assert bool((paid(oracle_rows(session, pool, prior, q0)) <= best + 2e-5).all())


def forced_rows(session: Session, pool: PairPool, orders: list[list[int]]) -> TrajectoryBatch:
    """Rows of these orders with own-key text."""
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(len(orders)), 1)
    with session.model.reference():
        return with_key_text(session, session.rollout(pool, numbers, replay(tensor(orders))), pool)


# -- the battery -------------------------------------------------------------------------------------------------------


def perturbed(session: Session) -> Session:
    """Move the policy away from the reference."""
    numbers = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in session.model.named_trainable().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=numbers)
    return session


def battery(session: Session, *names: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for batch in run_arms(session, ["trained", "untrained", "planted"], battery=names):
        for result in batch.results:
            found.setdefault(result.arm, []).append((result.paid, batch.pool, batch.prior))
    return found


def queries(results: list) -> list[list[list[int]]]:
    return [row for paid, _, _ in results for row in paid.rows.query_slots()[0].tolist()]


def test_the_two_by_two_replays_picks_and_rewrites_the_text(make_session):
    session = perturbed(make_session(EVALUATION))
    arms = battery(session, "trained/untrained", "untrained/trained")
    assert picks(arms["trained"]) != picks(arms["untrained"])
    assert picks(arms["trained/untrained"]) == picks(arms["trained"])
    assert picks(arms["untrained/trained"]) == picks(arms["untrained"])
    for own, rewritten in (("untrained", "trained/untrained"), ("trained", "untrained/trained")):
        first = [row[0] for row in queries(arms[own])]  # the same writer, numbers and context: only the prompt
        assert [row[0] for row in queries(arms[rewritten])] == first
    assert queries(arms["trained/untrained"]) != queries(arms["trained"])


def test_before_training_the_two_by_two_is_one_arm_four_times(make_session):
    arms = battery(make_session(EVALUATION), "trained/untrained", "untrained/trained")
    for name in ("trained", "trained/untrained", "untrained/trained"):
        assert torch.equal(mean_rewards(arms[name]), mean_rewards(arms["untrained"]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_text_others_text_and_one_text_whatever_the_batch(make_session, size):
    session = perturbed(make_session(EVALUATION | {"evaluation.batch_articles": size}))
    arms = battery(session, "trained/none", "trained/shuffled", "trained/fixed")
    own = queries(arms["trained"])
    assert queries(arms["trained/shuffled"]) == [
        own[1],
        own[0],
        own[1],
    ]  # of the article before; the first: the second's
    assert queries(arms["trained/fixed"]) == [[queries(arms["untrained"])[0][0]] * 3] * 3
    for paid, _, _ in arms["trained/none"]:
        assert not (paid.rows.role == QUERY).any()
    for name in ("trained/none", "trained/shuffled", "trained/fixed"):
        assert picks(arms[name]) == picks(arms["trained"])


def test_the_first_pair_of_a_subject_is_the_one_no_step_before_was_about():
    assert first_of_subject([[2, 2, 0, 2, 1], [4, 3, 4, 3, 3]]).tolist() == [
        [True, False, True, False, True], [True, True, False, False, False],
    ]  # fmt: skip


def test_possible_text_is_the_key_but_where_nobody_can_name_it():
    """There the untrained model writes, step by step in that very context: checked against writing one row by hand."""
    session = Session(demo("threads"), Processes("cpu"))
    arms = battery(session, "planted/possible")
    ((paid, pool, _),) = arms["planted/possible"]
    ((planted, _, _),) = arms["planted/key"]
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(3), 1).float()
    ids, mask = paid.rows.query_slots()
    key_ids, key_mask = planted.rows.query_slots()
    layout, temperature = paid.rows.layout, session.config.rollout.temperature
    for b in range(3):
        seen: set[int] = set()
        for t, pick in enumerate(paid.rows.picks[b].tolist()):
            subject = int(pool.subject[b, pick])
            if subject in seen:
                assert ids[b, t][mask[b, t]].tolist() == key_ids[b, t][key_mask[b, t]].tolist()
                continue
            seen.add(subject)
            start = layout.prompt_len + t * layout.step_len + layout.before_query_len
            row = paid.rows.ids[b, :start][paid.rows.role[b, :start] != PADDING]
            for i in range(3):
                states = session.model.hidden(row[None], torch.full_like(row, TEMPLATE)[None], tensor([len(row)]))
                with torch.no_grad():
                    token = sample(session.model.policy_logprobs(states[:, -1], temperature), numbers[b : b + 1, t, i])
                assert int(ids[b, t, i]) == int(token)
                row = torch.cat([row, token])


def test_a_live_scorer_scores_both_writers_beside_the_reference(make_session):
    session = perturbed(make_session(EVALUATION | {"reward.scorer": "policy"}))
    rows = [
        r
        for batch in run_arms(session, ["trained", "untrained"], battery=["trained/untrained"])
        for r in evaluation_records(session, batch, 1)
    ]
    scorers = {r["arm"]: r["scorer"] for r in rows}
    assert {arm for arm, scorer in scorers.items() if scorer == "policy"} == {"trained@live", "untrained@live"}
    by_arm = {arm: [r["reward"] for r in rows if r["arm"] == arm] for arm in scorers}
    assert by_arm["untrained@live"] != by_arm["untrained"]
    contrasts = summarise(rows, held_out=True)["contrasts"]
    gain = sum(a - b for a, b in zip(by_arm["trained@live"], by_arm["untrained@live"], strict=True)) / 3
    assert contrasts["policy"]["mean"] == pytest.approx(gain)
    drift = sum(a - b for a, b in zip(by_arm["untrained@live"], by_arm["untrained"], strict=True)) / 3
    assert contrasts["drift"]["mean"] == pytest.approx(drift)


def test_agreement_is_the_interaction_of_picks_and_text():
    table = {
        "trained": [5.0, 9.0], "untrained": [1.0, 2.0],
        "trained/untrained": [2.0, 3.0], "untrained/trained": [3.0, 3.0],
    }  # fmt: skip
    agreement = summarise(records(table), held_out=True)["contrasts"]["agreement"]  # 5 − 2 − 3 + 1, 9 − 3 − 3 + 2
    assert {k: agreement[k] for k in ("mean", "low", "high", "p")} == {"mean": 3.0, "low": 1.0, "high": 5.0, "p": 0.5}


def test_the_area_under_the_probe_curve_is_what_was_learned_on_average_over_steps():
    rows = [
        record("trained", "a", 1.0) | {"probe_curve": [-4.0, -3.0, -1.0]},  # + 1, + 3
        record("trained", "b", 1.0, index=1) | {"probe_curve": [-2.0, -2.0, -1.0]},  # 0, + 1
        record("random", "a", 1.0) | {"probe_curve": None},
    ]
    arms = summarise(rows, held_out=True)["arms"]
    assert arms["trained"]["probe_curve"] == [-3.0, -2.5, -1.0]
    assert arms["trained"]["probe_area"] == pytest.approx((0.5 + 2.0) / 2)
    assert "probe_area" not in arms["random"]


def test_probe_curves_have_a_point_before_the_first_pair_and_one_after_each(make_session):
    session = make_session(EVALUATION | {"reward.kind": "held_out"})
    for batch in run_arms(session, ["random"]):
        for r in evaluation_records(session, batch, 0):
            start, *rest = r["probe_curve"]
            assert len(rest) == 3
            # held_out pays the curve's rise, so its mean is the area under it
            assert r["reward"] == pytest.approx(area_under(r["probe_curve"]), abs=1e-5)
            assert r["reward"] == pytest.approx(sum(rest) / 3 - start, abs=1e-5)


# -- orders from a file ------------------------------------------------------------------------------------------------


def orders_of(pool: PairPool, orders: list[list[int]]) -> list[OrderLine]:
    return [
        OrderLine(
            article=pool.articles[a].id, hash=pool.pair_ids[a][0].rpartition("-")[0],
            pairs=tuple(pool.pair_ids[a][j] for j in order),
        )
        for a, order in enumerate(orders)
    ]  # fmt: skip


def test_orders_are_matched_by_article_and_pair_whatever_their_place_in_the_file(make_session):
    session = make_session(EVALUATION)
    pool = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL).next_pool(3)
    orders = [[4, 0, 2], [1, 3, 0], [2, 1, 4]]
    lines = [*orders_of(pool, orders), OrderLine(article="another", hash="", pairs=())]
    lines[0] = lines[0].model_copy(update={"picks": (4, 0, 2)})
    found = picks_of_orders(lines[::-1], pool, 3, "orders.jsonl")
    assert [row.tolist() for row in found] == orders
    batches = run_arms(session, [], orders={"mine": found})
    results = [r for batch in batches for r in batch.results]
    assert [r.arm for r in results] == ["mine", "mine/key"] * 2
    assert [row for r in results if r.arm == "mine/key" for row in r.paid.rows.picks.tolist()] == orders


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"article": "another"}, "no order for article"),
        ({"hash": "0" * 16}, "another text"),
        ({"pairs": ("x-1", "x-2", "x-3")}, "'x-1' is not in this evaluation's pool"),
        ({"picks": (2, 0, 1)}, r"picks \[2, 0, 1\] are not its pairs, which lie at \[2, 1, 0\]"),
        ({"pairs": ()}, "0 pairs, 0 of them different; the evaluation reads 3"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(make_session, change, complaint):
    session = make_session(EVALUATION)
    pool = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL).next_pool(2)
    lines = orders_of(pool, [[0, 1, 2], [2, 1, 0]])
    lines[1] = lines[1].model_copy(update=change)
    with pytest.raises(CorpusError, match=complaint):
        picks_of_orders(lines, pool, 3, "orders.jsonl")


# -- headroom ----------------------------------------------------------------------------------------------------------


def test_permuted_values_come_from_other_articles_and_leave_keys_in_place(make_session):
    session = make_session(EVALUATION)
    pool = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL).next_pool(3)
    permuted = permute_values(pool)
    assert torch.equal(permuted.key_ids, pool.key_ids)
    for a in range(3):
        for n in range(5):
            assert torch.equal(permuted.value_ids[a, n], pool.value_ids[(a + 1 + n % 2) % 3, n])
    assert sorted(permuted.value_ids.flatten().tolist()) == sorted(pool.value_ids.flatten().tolist())


def test_headroom_puts_the_searches_beside_their_floor_and_random_orders_beside_their_spread(make_session, capsys):
    session = make_session(EVALUATION | {"evaluation.oracle": True, "evaluation.articles": 4})
    result = measure_headroom(session)
    assert {"oracle", "beam", "permuted/oracle", "permuted/beam", "article_order/key"} <= set(result.contrasts)
    assert {arm for arm, c in result.contrasts.items() if "p_holm" not in c} == {
        "oracle", "beam", "permuted/oracle", "permuted/beam",
    }  # fmt: skip
    lead = result.contrasts["oracle"]["mean"] - result.contrasts["permuted/oracle"]["mean"]
    assert result.above_floor["oracle"]["mean"] == pytest.approx(lead)
    pool = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL).next_pool(4)
    variances = [statistics.variance(row) for row in random_order_rewards(session, pool).tolist()]
    assert result.random_order_sd == pytest.approx((sum(variances) / 4) ** 0.5, rel=1e-4)
    assert result.verdict in " ".join(capsys.readouterr().out.split())


def first_pool(session: Session, names: str) -> PairPool:
    """The pools of the corpus's first articles, each named by a letter."""
    stream = session.stream(session.config.corpus, num_probes=1, purpose=Purpose.EVALUATION_POOL)
    pool = stream.next_pool(len(names))
    return replace(pool, articles=tuple(replace(a, id=n) for a, n in zip(pool.articles, names, strict=True)))


@pytest.mark.parametrize(
    ("names", "why"), [("aaaaa", "one article is read"), ("ababc", "3 different articles are read"), ("abcdb", None)]
)
def test_a_noise_floor_needs_four_different_articles(make_session, names, why):
    found = no_floor_of(first_pool(make_session(EVALUATION), names))
    assert found is None if why is None else found.startswith(why)


def test_values_are_not_exchanged_between_two_pools_of_one_article(make_session):
    pool = first_pool(make_session(EVALUATION), "abac")
    kept = different_articles(pool)
    assert [article.id for article in kept.articles] == ["a", "b", "c"]
    assert kept.pair_ids == (pool.pair_ids[0], pool.pair_ids[1], pool.pair_ids[3])


def found(orders: dict[str, tuple[float, float]], search: tuple[float, float] | None, *, steerability: float = 1.0):
    """Headroom of (low, p) by order, and of one search beyond its floor."""

    def c(low: float, p: float) -> dict[str, float]:
        return {"mean": low + 1, "low": low, "high": low + 2, "p": p}

    control = {"oracle": c(9.0, 0.0), "planted_shuffled/key": c(9.0, 0.0)}
    return Headroom(
        contrasts=control | with_holm({arm: c(*values) for arm, values in orders.items()}),
        random_order_sd=0.1,
        above_floor={} if search is None else with_holm({"oracle": c(*search)}),
        no_floor="too few" if search is None else None,
        steerability=steerability,
    )


@pytest.mark.parametrize(
    ("orders", "search", "said"),
    [
        ({"article_order/key": (0.02, 0.04)}, None, "there is something to learn"),
        # of two the smaller p counts double; of four articles none is below 2 / 2⁴
        ({"article_order/key": (0.02, 0.04), "nearest_key/key": (-1.0, 0.9)}, None, "Nothing to learn"),
        ({"article_order/key": (0.3, 0.125)}, None, "say nothing"),
        ({"article_order/key": (0.009, 0.001)}, None, "Nothing to learn"),
        ({"article_order/key": (-0.1, 0.5)}, (0.02, 0.04), "may be something to learn"),
        ({"article_order/key": (-0.1, 0.5)}, (0.02, 0.06), "than its noise floor"),
        ({"article_order/key": (-1.0, 0.5)}, (-1.0, 0.5), "Nothing to learn"),
    ],
)
def test_headroom_claims_only_what_is_shown(orders, search, said):
    assert said in found(orders, search).verdict


def test_headroom_says_plainly_that_a_selection_cannot_be_steered():
    said = found({"article_order/key": (0.5, 0.001)}, (0.5, 0.001), steerability=0.09).verdict
    assert said.startswith("The selection cannot be steered (0.090 nats, below 0.1)")
    assert "nothing can be learned about order" in said


# -- records -----------------------------------------------------------------------------------------------------------


def test_records_say_who_picked_and_what_text_stood_in_the_slot(session):
    batches = list(run_arms(session, ["trained", "random", "oracle"]))
    rows = [r for batch in batches for r in evaluation_records(session, batch, update=7)]
    assert {(r["arm"], r["picker"], r["text"]) for r in rows} == {
        ("trained", "trained", "trained"), ("trained/key", "trained", "key"), ("random", "random", "untrained"),
        ("random/key", "random", "key"), ("oracle", "oracle", "key"),
    }  # fmt: skip
    assert sorted({r["index"] for r in rows}) == [0, 1, 2]
    assert len({r["article"] for r in rows}) == 3
    for r in rows:
        assert (r["update"], r["seed"], r["reward_kind"], r["scorer"]) == (7, 0, "value_prior", "reference")
        assert r["subjects"] is None
        assert len(set(r["picks"])) == 3

    (paid,) = [result.paid for result in batches[0].results if result.arm == "random"]
    (reward,) = [r["reward"] for r in rows if (r["arm"], r["index"]) == ("random", 1)]
    assert reward == pytest.approx(sum(paid.rewards.rewards[1].tolist()) / 3)


def test_records_count_the_subjects_read():
    session = Session(demo("threads"), Processes("cpu"))
    (batch,) = run_arms(session, ["random"])
    for r in evaluation_records(session, batch, update=0):
        labels = [int(batch.pool.subject[r["index"], j]) for j in r["picks"]]
        assert r["subjects"] == len(set(labels))


def test_scoring_is_one_name_for_all_that_a_reward_means(make_session, make_config):
    session = make_session()
    base = scoring_identity(session)
    assert scoring_identity(make_session({"template.prompt": "ba be"})) != base
    assert scoring_identity(make_session({"rollout.steps": 2})) != base
    for change in ({"pairs.value_tokens": 3}, {"rollout.query_tokens": 3}, {"reward.query_in_context": False},
                   {"evaluation.num_probes": 2}, {"model.revision": "main"}):  # fmt: skip
        session.config = make_config(change)
        assert scoring_identity(session) != base, change
    for change in ({"training.seed": 3}, {"evaluation.articles": 2}, {"rollout.temperature": 0.5}):
        session.config = make_config(change)
        assert scoring_identity(session) == base, change


def test_runs_that_are_no_seeds_of_one_setting_are_not_even_evaluated(make_config, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    runs.train(make_config({"training.updates": 0}), first)
    with pytest.raises(ConfigError, match=r"both have training\.seed 0"):
        runs.evaluate_seeds([first, first])
    shutil.copytree(first, second)
    config = make_config({"training.updates": 0, "training.seed": 1, "optimizer.learning_rate": 0.5})
    (second / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate is 0\.01 and 0\.5"):
        runs.evaluate_seeds([first, second])
    assert not (first / "evaluation.jsonl").exists()


def test_the_roles_of_a_replaced_row_cover_every_slot(make_session):
    rows, pool = written(session := make_session())
    role = with_key_text(session, rows, pool).role
    assert set(role[:, rows.layout.query_positions].flatten().tolist()) <= {QUERY, PADDING}
    assert set(role[:, rows.layout.value_positions].flatten().tolist()) <= {VALUE, PADDING}


def test_an_evaluation_that_reads_other_text_than_the_one_before_says_so(make_config, corpus_file, tmp_path, caplog):
    path = tmp_path / "articles.jsonl"
    path.write_bytes(corpus_file.read_bytes())
    runs.train(
        make_config({"corpus.path": str(path), "training.updates": 1, "evaluation.articles": 1}), tmp_path / "run"
    )
    path.write_text(path.read_text(encoding="utf-8").replace("ba", "be"), encoding="utf-8")
    runs.evaluate(tmp_path / "run", {"evaluation.arms": "standard"})
    assert "1 of 1 articles or their texts are not those of the evaluation before" in caplog.text
    assert "network.cache" in caplog.text


@pytest.mark.parametrize("left", ['{"index": 0, "reward": 1.0}\n', '{"index": 0, "pool"', "[]\n", "1\n"])
def test_an_evaluation_replaces_one_that_cannot_be_compared_with(tmp_path, caplog, left):
    (tmp_path / "evaluation.jsonl").write_text(left, encoding="utf-8")
    _warn_of_other_articles(tmp_path / "evaluation.jsonl", [{"index": 0, "pool": "a"}])
    assert caplog.text == ""
