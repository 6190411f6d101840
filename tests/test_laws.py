"""The laws of the method, each broken by some earlier attempt at it. Expected values: loops, enumeration, hand.

Nothing here is mocked. Where a law needs a number, it is computed a second time, slowly: one forward of the wrapped
transformers model per prefix, every trajectory of a toy, sums written out. Law 11 (learning) is in test_learning.py,
apart from its last clause.
"""

import ast
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from torch import tensor

import attention_guided_rl
from attention_guided_rl import config as config_module
from attention_guided_rl import runs
from attention_guided_rl.arms import run_arms
from attention_guided_rl.config import (
    Config,
    EmbedderConfig,
    FilterConfig,
    KLConfig,
    ModelConfig,
    NetworkConfig,
    ObjectiveConfig,
    PairsConfig,
    SelectionConfig,
    TemplateConfig,
)
from attention_guided_rl.config_files import config_to_yaml, load_config
from attention_guided_rl.data import CORPORA
from attention_guided_rl.data.pairs import cut_article
from attention_guided_rl.embedders.attention import AttentionEmbedder
from attention_guided_rl.environment import ReadingEnvironment, embed_pool_keys, picked_logprobs
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.evaluation import evaluation_records
from attention_guided_rl.loading import load_model, prepare
from attention_guided_rl.network import Network
from attention_guided_rl.objective import policy_gradient
from attention_guided_rl.randomness import Purpose, uniforms
from attention_guided_rl.records import (
    PADDING,
    QUERY,
    VALUE,
    Advantages,
    Article,
    BranchRequest,
    Continuations,
    PairPool,
    PairText,
    UpdateBatch,
)
from attention_guided_rl.reward import (
    REWARDS,
    RewardInputs,
    expected_rewards,
    reward_inputs,
    unread_candidates,
    with_candidates,
)
from attention_guided_rl.rl_agent import (
    AgentState,
    RunningMoments,
    compute_advantages,
    compute_returns,
    full_kl,
    sampled_kl,
)
from attention_guided_rl.rollouts import rollout
from attention_guided_rl.scorer import SCORERS, reference_scorer
from attention_guided_rl.selection import head_scores, sample, selection_logprobs
from attention_guided_rl.template import Template, assemble, build_template
from attention_guided_rl.texts import with_key_text
from attention_guided_rl.update import apply_update, make_optimizer, reward_weights
from attention_guided_rl.verification import verify_run

SHAPES = ("llama", "qwen3", "gpt2")
each_shape = pytest.mark.parametrize("shape", SHAPES)


def read(session, *, update=0, articles=2, trajectories=3, probes=0):
    """Write trajectories with the active policy on the first pool of the corpus."""
    pool = session.stream(session.config.corpus, num_probes=probes, purpose=Purpose.POOL).next_pool(articles)
    numbers = session.uniforms(Purpose.TRAINING, update, range(articles), trajectories)
    return pool, session.rollout(pool, numbers)


def next_token_logprobs(model, prefix, *, reference=False):
    """log p(· | prefix) from the wrapped transformers model itself: no cache, no padding, no slots."""
    with torch.no_grad():
        if reference:
            with model.peft_model.disable_adapter():
                logits = model.peft_model(input_ids=tensor([prefix])).logits
        else:
            logits = model.peft_model(input_ids=tensor([prefix])).logits
    return logits[0, -1].double().log_softmax(-1)


def hand_loop(model, ids, role, wanted, *, reference=False):
    """Log-probability of every token whose role is wanted, given the real tokens before it, one forward each."""
    real = [(i, r, place) for place, (i, r) in enumerate(zip(ids.tolist(), role.tolist(), strict=True)) if r != PADDING]
    return {
        place: float(next_token_logprobs(model, [i for i, _, _ in real[:n]], reference=reference)[token])
        for n, (token, r, place) in enumerate(real)
        if r in wanted
    }


def update_batch(session, paid, advantages, rows=None):
    keep = torch.arange(paid.rows.num_rows) if rows is None else tensor(rows)
    chosen = paid.rows.select(keep)
    return UpdateBatch(
        rows=chosen,
        advantages=advantages[keep],
        reference_hidden=session.reference_hidden(paid)[keep],
        num_query_tokens=len(keep) * chosen.num_steps * chosen.layout.query_len,
    )


def gradients(model, loss):
    """Return the gradient of every trained tensor and leave none behind."""
    named = model.named_trainable()
    for parameter in named.values():
        parameter.grad = None
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = None
    return found


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_trainable().items()}


# -- 1: the shift --------------------------------------------------------------------------------------------------


@each_shape
def test_law_01_token_logprobs_equal_a_hand_loop(make_session, shaken, shape):
    session = make_session(shape=shape)
    model = shaken(session.model)
    _pool, rows = read(session)
    assert bool((rows.role == PADDING).any())
    positions = torch.cat([rows.layout.query_positions, rows.layout.value_positions])
    ours = model.token_logprobs(rows.ids, rows.role, positions)
    for b in (0, 4):
        expected = hand_loop(model, rows.ids[b], rows.role[b], {QUERY, VALUE})
        assert len(expected) > 12
        for place, logprob in zip(positions.tolist(), ours[b].tolist(), strict=True):
            assert logprob == pytest.approx(expected.get(place, 0.0), abs=5e-5)  # 0 at padding


@each_shape
def test_law_01_scores_are_of_the_value_from_its_first_token_to_its_last(make_session, shaken, shape):
    session = make_session(shape=shape)
    model = shaken(session.model)
    pool, rows = read(session)
    reference, policy = (SCORERS[name](model).score(rows).value_logprobs for name in ("reference", "policy"))
    prior = SCORERS["reference"](model).prior(pool, session.template)
    ids, real = rows.value_slots()
    for ours, is_reference in ((reference, True), (policy, False)):
        expected = hand_loop(model, rows.ids[2], rows.role[2], {VALUE}, reference=is_reference)
        assert list(expected.values()) == pytest.approx(ours[2][real[2]].tolist(), abs=5e-5)
        assert bool((ours[~real] == 0).all())
    assert [ids[2, t][real[2, t]].tolist() for t in range(3)] == [
        pool.value_ids[0, pick][pool.value_mask[0, pick]].tolist() for pick in rows.picks[2].tolist()
    ]
    bare = list(session.template.prompt + session.template.before_query + session.template.before_value)
    for n in range(5):
        value = pool.value_ids[1, n][pool.value_mask[1, n]].tolist()
        steps = [next_token_logprobs(model, bare + value[:i], reference=True)[v] for i, v in enumerate(value)]
        assert float(prior[1, n]) == pytest.approx(float(sum(steps)), abs=1e-4)


@each_shape
def test_law_01_cached_equals_uncached(make_session, shaken, shape):
    session = make_session(shape=shape)
    model = shaken(session.model)
    _pool, rows = read(session)
    cache, length = model.new_cache(), rows.layout.row_len
    cuts = [0, 5, 6, 17, 18, length]
    with torch.no_grad():
        states = torch.cat(
            [model.extend(cache, rows.ids[:, a:b], rows.role[:, :b]) for a, b in itertools.pairwise(cuts)], 1
        )
        for positions in (rows.layout.query_positions, rows.layout.value_positions):
            cached = model.logprobs_of(
                states[:, positions - 1], rows.ids[:, positions], rows.role[:, positions] != PADDING
            )
            uncached = model.token_logprobs(rows.ids, rows.role, positions)
            torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=0)


@each_shape
def test_law_01_branches_equal_whole_rows(make_session, shaken, shape):
    session = make_session(shape=shape)
    model = shaken(session.model)
    _pool, rows = read(session)
    layout, scorer = rows.layout, SCORERS["policy"](model)
    cut = layout.prompt_len + 2 * layout.step_len  # two steps are cached, some of their values padded
    last = slice(cut, None)
    # the row's own third step, and another row's
    continuations = torch.stack([rows.ids[:, last], rows.ids[:, last].flip(0)], 1)
    roles = torch.stack([rows.role[:, last], rows.role[:, last].flip(0)], 1)
    cache = model.new_cache()
    with torch.no_grad():
        model.extend(cache, rows.ids[:, :cut], rows.role[:, :cut])
        prefix = tensor([cut, layout.prompt_len + layout.step_len])
        for _ in range(2):  # the second call finds the cache as the first did
            ours = scorer.branch(
                cache,
                rows.role[:, :cut],
                Continuations(ids=continuations, mask=roles != PADDING, prefix_len=prefix, num_scored=4),
            )
        for b, c in itertools.product((0, 5), range(2)):
            kept = int(prefix[c])
            ids = torch.cat([rows.ids[b, :kept], continuations[b, c]])
            role = torch.cat([rows.role[b, :kept], roles[b, c]])
            expected = hand_loop(model, ids, role, {VALUE})
            whole = [expected.get(place, 0.0) for place in range(len(ids) - 4, len(ids))]
            assert ours[b, c].tolist() == pytest.approx(whole, abs=5e-5)


@pytest.mark.parametrize("prefix", ["template.query_prefix", "template.value_prefix"])
def test_law_01_a_slot_after_nothing_is_refused(make_session, prefix):
    """Its first token would be predicted from the padding at the end of the slot before."""
    for empty in ("", "  "):
        with pytest.raises(ConfigError, match=prefix):
            make_session({prefix: empty})


@pytest.mark.parametrize("queries", ["sampled", "key", "deleted"])
def test_law_01_padding_can_be_deleted(make_session, queries):
    """Slots that are not full change nothing: neither short values, nor short keys as queries, nor no query at all."""
    session = make_session({"rollout.query_tokens": 4})
    pool, rows = read(session)
    if queries == "key":  # keys have 3 tokens, the slot 4
        rows = with_key_text(session, rows, pool)
    if queries == "deleted":
        rows = rows.without_queries()
    ours = session.reference_scorer.score(rows).value_logprobs
    _, real = rows.value_slots()
    assert not bool(real.all())
    for b in (0, 3):
        expected = hand_loop(session.model, rows.ids[b], rows.role[b], {VALUE}, reference=True)
        assert ours[b][real[b]].tolist() == pytest.approx(list(expected.values()), abs=5e-5)
    if queries == "sampled":
        expected = hand_loop(session.model, rows.ids[5], rows.role[5], {QUERY}, reference=True)
        allowed = session.model.query_vocabulary
        states = session.model.hidden(rows.ids, rows.role, rows.layout.query_positions)
        normaliser = session.model.policy_logprobs(states, 1.0)[5, :, allowed].exp().sum(-1)
        torch.testing.assert_close(normaliser, torch.ones(12))
        query_ids, _ = rows.query_slots()
        distribution = session.model.policy_logprobs(states, 1.0)[5]
        chosen = distribution.gather(-1, query_ids[5].flatten()[:, None])[:, 0]
        torch.testing.assert_close(rows.sampled_logprobs[5].flatten(), chosen.detach(), atol=5e-5, rtol=0)
        full = session.model.token_logprobs(rows.ids, rows.role, rows.layout.query_positions)[5]
        assert full.tolist() == pytest.approx(list(expected.values()), abs=5e-5)


# -- 2: a query acts on its own reward and on later ones -------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["reference", "policy", "ema"])
@pytest.mark.parametrize("kind", REWARDS)
def test_law_02_a_query_changes_its_own_reward_and_none_before(make_session, shaken, kind, scorer):
    options = {"reward.kind": kind, "reward.scorer": scorer}
    session = make_session(options)
    # with a counterfactual there must be queries in the context; then the session stands in for itself
    order_only = session if kind == "counterfactual" else make_session(options | {"reward.query_in_context": False})
    for one in {id(s): s for s in (session, order_only)}.values():
        shaken(one.model)
    pool, rows = read(session, probes=2)
    q0 = session.counterfactual_uniforms(Purpose.COUNTERFACTUAL, 0, range(2), 3)
    before, without = (one.pay(rows, pool, q0).rewards.rewards for one in (session, order_only))
    for t, i in itertools.product(range(3), range(2)):
        ids = rows.ids.clone()
        place = int(rows.layout.query_positions.view(3, 2)[t, i])
        ids[1, place] = 4 + (int(ids[1, place]) - 4 + 5) % 48  # another word
        changed = replace(rows, ids=ids)
        after = session.pay(changed, pool, q0).rewards.rewards
        assert abs(float(after[1, t] - before[1, t])) > 1e-4
        torch.testing.assert_close(after[1, :t], before[1, :t], atol=1e-6, rtol=0)
        others = [0, 2, 3, 4, 5]
        torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
        if order_only is not session:
            assert torch.equal(order_only.pay(changed, pool, q0).rewards.rewards, without)
    if order_only is not session:
        assert float((before - without).abs().median()) > 1e-2


def test_law_02_rewards_are_per_mean_value_token_less_the_prior_of_what_was_read(make_session):
    session = make_session()
    pool, rows = read(session)
    scores = session.reference_scorer.score(rows)
    prior = session.reference_scorer.prior(pool, session.template)
    paid = {kind: make_session({"reward.kind": kind}).pay(rows, pool).rewards for kind in ("plain", "value_prior")}
    for b in range(6):
        article = b // 3
        mean_len = sum(int(pool.value_mask[article, n].sum()) for n in range(5)) / 5
        for t in range(3):
            raw = float(scores.value_logprobs[b, t].sum()) / mean_len
            u = float(prior[article, rows.picks[b, t]]) / mean_len
            assert float(paid["plain"].rewards[b, t]) == pytest.approx(raw, abs=1e-5)
            assert float(paid["value_prior"].rewards[b, t]) == pytest.approx(raw - u, abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "value_prior"])
def test_law_02_an_exchangeable_scorer_gives_every_order_the_same_total(kind):
    """Pólya's urn over words: by the chain rule the order cannot matter, though the values differ in length."""
    values = [[0], [1, 0], [0, 2, 2], [2, 1, 1, 0]]
    ids = tensor([[v + [0] * (4 - len(v)) for v in values]])
    mask = tensor([[[i < len(v) for i in range(4)] for v in values]])
    pool = hand_pool(ids, mask)

    def logprobs(words, seen):
        found = []
        for word in words:
            found.append(math.log((1 + seen.count(word)) / (3 + len(seen))))
            seen.append(word)
        return found + [0.0] * (4 - len(words))

    orders = list(itertools.permutations(range(4)))
    rows = []
    for order in orders:
        seen: list[int] = []
        rows.append([logprobs(values[j], seen) for j in order])
    prior = tensor([[sum(logprobs(v, [])) for v in values]])
    inputs = RewardInputs(picks=tensor(orders), value_logprobs=tensor(rows), pool=pool, prior=prior)
    rewards = REWARDS[kind](inputs).rewards
    totals = rewards.sum(1)
    assert float(rewards.std(0).max()) > 0.1  # the steps do differ
    torch.testing.assert_close(totals, totals[:1].expand(24), atol=1e-5, rtol=0)
    expected = sum(map(sum, rows[0])) / 2.5  # lengths 1, 2, 3, 4
    if kind == "value_prior":
        expected -= float(prior.sum()) / 2.5
    assert float(totals[0]) == pytest.approx(expected, abs=1e-5)


def hand_pool(value_ids, value_mask=None, key_ids=None):
    """A pool of one article from ids alone."""
    num_articles, num_pairs, _ = value_ids.shape
    value_mask = torch.ones_like(value_ids, dtype=torch.bool) if value_mask is None else value_mask
    key_ids = value_ids[:, :, :1] if key_ids is None else key_ids
    nothing = torch.zeros(num_articles, 0, 1, dtype=torch.long)
    article = Article(id="a", title="a", text="", source="", revision="", url="", licence="")
    return PairPool(
        articles=(article,) * num_articles,
        pair_ids=(tuple(map(str, range(num_pairs))),) * num_articles,
        probe_pair_ids=((),) * num_articles,
        key_ids=key_ids,
        key_mask=torch.ones_like(key_ids, dtype=torch.bool),
        value_ids=value_ids,
        value_mask=value_mask,
        probe_key_ids=nothing.expand(-1, -1, key_ids.shape[2]),
        probe_key_mask=nothing.bool().expand(-1, -1, key_ids.shape[2]),
        probe_value_ids=nothing.expand(-1, -1, value_ids.shape[2]),
        probe_value_mask=nothing.bool().expand(-1, -1, value_ids.shape[2]),
        position=torch.arange(num_pairs).expand(num_articles, -1),
        probe_position=nothing[:, :, 0],
        subject=torch.full((num_articles, num_pairs), -1),
        probe_subject=nothing[:, :, 0],
    )


# -- 3: the gradient -------------------------------------------------------------------------------------------------


@each_shape
def test_law_03_the_first_gradient_reaches_every_b_and_no_a(make_session, shape):
    session = make_session(shape=shape)
    model = session.model
    pool, rows = read(session)
    paid = session.pay(rows, pool)
    advantages, _ = compute_advantages(paid.rewards.rewards, ObjectiveConfig(), AgentState(), 3)
    batch = update_batch(session, paid, advantages.advantages)
    only_policy = KLConfig(coefficient=0.0)

    optimizer = make_optimizer(session, session.config.optimizer)
    policy_gradient(model, batch, only_policy, 1.0).loss.backward()
    parameters = dict(model.peft_model.named_parameters())
    assert sum("lora_B" in name for name in parameters) == sum("lora_A" in name for name in parameters) >= 8
    for name, parameter in parameters.items():
        if "lora_B" in name:
            assert not parameter.detach().any(), f"{name} starts at 0"
            assert float(parameter.grad.abs().max()) > 1e-6, name
        elif "lora_A" in name:
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name

    optimizer.step()
    optimizer.zero_grad()
    after = gradients(model, policy_gradient(model, batch, only_policy, 1.0).loss)
    assert all(float(g.abs().max()) > 1e-7 for g in after.values())
    assert all(p.grad is None for name, p in parameters.items() if "lora_" not in name)


class TableEmbedder:
    """Each word's vector is a row of a table; a text is the sum of its words. Two query heads, one key head."""

    identity, depends_on_policy = "table", False

    def __init__(self, vocabulary: int) -> None:
        self.table = torch.randn(vocabulary, 3, generator=torch.Generator().manual_seed(11))

    def embed_queries(self, ids, mask):
        vector = (self.table[ids] * mask[..., None]).sum(1)
        return torch.stack([vector, 0.5 * vector.flip(-1)], 1)

    def embed_keys(self, ids, mask):
        return (self.table[ids] * mask[..., None]).sum(1)[:, None]


class Toy:
    """Three words to write with, two-word queries, two steps, three pairs: all of the 9 · 3 · 9 · 2 trajectories."""

    steps, query_len, tau, temperature = 2, 2, 0.8, 0.7

    def __init__(self, causal_lm, word_tokenizer, shaken) -> None:
        tokenizer = word_tokenizer(["x", "y", "z"])  # ids 4, 5, 6; values use ids the tokenizer does not have
        lm = causal_lm("gpt2", 12).double()  # finite differences need the digits (Llama's norms are float32)
        self.model = shaken(prepare(lm, tokenizer, ModelConfig(lora_rank=2, lora_alpha=4.0)), 0.2)
        self.words = [4, 5, 6]
        values = tensor([[[7, 8], [9, 10], [11, 7]]])
        self.pool = hand_pool(values, key_ids=tensor([[[4], [5], [6]]]))
        self.template = Template(prompt=(1, 3), before_query=(2,), before_value=(3, 0), prompt_text="")
        self.embedder = TableEmbedder(12)
        self.rows = self._enumerate()
        with torch.no_grad():
            assert float(self.probabilities().sum()) == pytest.approx(1.0, abs=1e-6)

    def environment(self, rows):
        env = ReadingEnvironment(self.embedder, SelectionConfig(), self.tau)
        env.reset(self.pool, embed_pool_keys(self.embedder, self.pool), rows)
        return env

    def sigma(self, query, unread):
        """σ over the unread pairs, in plain Python."""
        vector = sum(self.embedder.table[word] for word in query)
        scores = {}
        for j in unread:
            key = self.embedder.table[self.words[j]]
            scores[j] = (float(vector @ key) + float(0.5 * vector.flip(0) @ key)) / 2 / self.tau
        total = sum(math.exp(s) for s in scores.values())
        return {j: math.exp(s) / total for j, s in scores.items()}

    def _enumerate(self):
        queries, picks, self.sigma_of_row = [], [], []
        texts = list(itertools.product(self.words, repeat=self.query_len))
        for text in itertools.product(texts, repeat=self.steps):
            for order in itertools.permutations(range(3), self.steps):
                unread, probability = [0, 1, 2], 1.0
                for query, pick in zip(text, order, strict=True):
                    probability *= self.sigma(query, unread)[pick]
                    unread.remove(pick)
                queries.append(text)
                picks.append(order)
                self.sigma_of_row.append(probability)
        query_ids, pick = tensor(queries), tensor(picks)
        values = self.pool.value_ids[0][pick]
        full = torch.ones_like(query_ids, dtype=torch.bool)
        nothing = torch.zeros(len(picks), self.steps, 3)
        return assemble(
            self.template, query_ids, full, values, torch.ones_like(values, dtype=torch.bool), pick,
            torch.zeros(query_ids.shape), nothing,
        )  # fmt: skip

    def all_sigma(self):
        """σ of every row, step and pair, 0 where read."""
        query_ids, _ = self.rows.query_slots()
        found = torch.zeros(len(query_ids), self.steps, 3)
        for b, (texts, picks) in enumerate(zip(query_ids.tolist(), self.rows.picks.tolist(), strict=True)):
            for t, text in enumerate(texts):
                for j, probability in self.sigma(text, [j for j in range(3) if j not in picks[:t]]).items():
                    found[b, t, j] = probability
        return found

    def query_logprobs(self):
        """log π of every query token of every row, from the transformers model in float64."""
        logits = self.model.peft_model(input_ids=self.rows.ids).logits / self.temperature
        logprobs = logits[:, :, self.words].log_softmax(-1)
        found = []
        for place in (self.rows.role[0] == QUERY).nonzero()[:, 0].tolist():
            word = self.rows.ids[:, place] - self.words[0]
            found.append(logprobs[:, place - 1].gather(1, word[:, None])[:, 0])
        return torch.stack(found, 1)

    def probabilities(self):
        return self.query_logprobs().sum(1).exp() * tensor(self.sigma_of_row, dtype=torch.float64)

    def rewards(self):
        scores = reference_scorer(self.model).score(self.rows)
        prior = reference_scorer(self.model).prior(self.pool, self.template)
        inputs = RewardInputs(picks=self.rows.picks, value_logprobs=scores.value_logprobs, pool=self.pool, prior=prior)
        return REWARDS["value_prior"](inputs).rewards


@pytest.fixture(scope="module")
def toy(causal_lm, word_tokenizer, shaken):
    return Toy(causal_lm, word_tokenizer, shaken)


@pytest.fixture(scope="module")
def exact(toy):
    """Rewards, and the gradient of the expected mean reward over all trajectories, checked by finite differences."""
    rewards = toy.rewards()
    mean_reward = rewards.double().mean(1)
    gradient = gradients(toy.model, (toy.probabilities() * mean_reward).sum())
    named, step = toy.model.named_trainable(), 1e-5
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in named.items()}
        values = []
        with torch.no_grad():
            for move in (step, -2 * step):
                for name, parameter in named.items():
                    parameter += move * direction[name]
                values.append(float((toy.probabilities() * mean_reward).sum()))
            for name, parameter in named.items():
                parameter += step * direction[name]
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(sum((gradient[n] * direction[n]).sum() for n in named)), rel=1e-4)
    return rewards, gradient


@pytest.mark.parametrize("baseline", ["none", "running_mean", "leave_one_out"])
@pytest.mark.parametrize("returns", ["to_go", "trajectory"])
def test_law_03_every_estimator_has_the_exact_gradient_as_its_mean(toy, exact, returns, baseline):
    rewards, gradient = exact
    config = ObjectiveConfig(returns=returns, advantage_baseline=baseline)
    earlier = (RunningMoments(3, 0.4, 1.0), RunningMoments(3, -0.2, 1.0))
    state, rows = AgentState(scale=1.0, returns=earlier), len(rewards)
    probability = toy.probabilities().detach().float()
    if baseline == "leave_one_out":  # groups of two: every row with every other, in the mean over the other
        pairs = torch.stack([rewards[:, None].expand(-1, rows, -1), rewards[None].expand(rows, -1, -1)], 2)
        found, _ = compute_advantages(pairs.flatten(0, 2), config, state, 2)
        first = found.advantages.view(rows, rows, 2, -1)[:, :, 0]
        advantages = (first * probability[None, :, None]).sum(1)
    else:
        found, _ = compute_advantages(rewards, config, state, 2)
        advantages = found.advantages
    assert_is_the_gradient(toy, estimate(toy, probability[:, None] * advantages), gradient)


def estimate(toy, advantages, config=KLConfig(coefficient=0.0), **options):  # noqa: B008
    """The objective's gradient over all trajectories, each weighted by its probability."""
    batch = UpdateBatch(
        rows=toy.rows,
        advantages=advantages,
        reference_hidden=reference_scorer(toy.model).score(toy.rows).query_hidden,
        num_query_tokens=toy.steps * toy.query_len,
        **options,
    )
    return gradients(toy.model, policy_gradient(toy.model, batch, config, toy.temperature).loss)


def assert_is_the_gradient(toy, found, gradient):
    for name, ours in found.items():
        wanted = -gradient[name] / (toy.steps * toy.query_len)
        torch.testing.assert_close(ours, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def weighted_advantages(toy, rewards, config, **options):
    """A_t with s = 1 and a fixed baseline, times the row's probability."""
    earlier = (RunningMoments(3, 0.4, 1.0), RunningMoments(3, -0.2, 1.0))
    found, _ = compute_advantages(rewards, config, AgentState(scale=1.0, returns=earlier), 2, **options)
    return toy.probabilities().detach().float()[:, None] * found.advantages


@pytest.mark.parametrize("returns", ["to_go", "trajectory"])
def test_law_03_levels_have_the_exact_gradient_too(toy, exact, returns):
    """held_out: r_t says how much is known after step t; the mean over steps is still what is maximised."""
    rewards, gradient = exact
    config = ObjectiveConfig(returns=returns, advantage_baseline="running_mean")
    assert_is_the_gradient(toy, estimate(toy, weighted_advantages(toy, rewards, config, is_level=True)), gradient)


def test_law_03_the_expectation_over_the_pick_has_the_exact_gradient(toy, exact):
    rewards, gradient = exact
    rows = replace(toy.rows, selection_logprobs=toy.all_sigma().log())
    candidates = unread_candidates(rows, toy.pool)
    scorer = reference_scorer(toy.model)
    scores = scorer.score(rows, with_candidates(BranchRequest(), candidates, toy.pool))
    inputs = reward_inputs(rows, scores, toy.pool, scorer.prior(toy.pool, toy.template))
    expected = expected_rewards(REWARDS["value_prior"], inputs, scores, candidates, rows).rewards
    assert float((expected - rewards).abs().max()) > 0.05
    config = ObjectiveConfig(advantage_baseline="running_mean")
    assert_is_the_gradient(toy, estimate(toy, weighted_advantages(toy, expected, config)), gradient)


def test_law_03_a_penalty_in_the_reward_has_the_exact_gradient(toy, exact):
    rewards, _ = exact
    beta, shape = 0.3, (len(rewards), toy.steps, toy.query_len)
    with torch.no_grad(), toy.model.reference():
        reference = toy.query_logprobs()
    k1 = (toy.query_logprobs() - reference).view(shape).mean(-1)
    wanted = gradients(toy.model, (toy.probabilities() * (rewards - beta * k1).mean(1)).sum())
    config = ObjectiveConfig(
        advantage_baseline="running_mean", kl=KLConfig(coefficient=beta, place="reward", estimator="k1")
    )
    advantages = weighted_advantages(toy, rewards, config, kl=k1.detach().float())
    assert_is_the_gradient(toy, estimate(toy, advantages, config.kl), wanted)


def test_law_03_a_trained_selection_has_the_exact_gradient(toy, exact):
    """The embedder uses the policy's projections: log σ of the pick joins the loss."""
    rewards, _ = exact
    embedder = AttentionEmbedder(EmbedderConfig(kind="attention", trained=True), toy.model)
    words = tensor(list(itertools.product(toy.words, repeat=toy.query_len)))
    place = {tuple(text): n for n, text in enumerate(words.tolist())}
    queries = embedder.embed_queries(words, torch.ones_like(words, dtype=torch.bool))
    keys = embedder.embed_keys(toy.pool.key_ids[0], toy.pool.key_mask[0])
    scores = torch.einsum("qhd,khd->qk", queries, keys) / queries.shape[1] / toy.tau
    query_ids, _ = toy.rows.query_slots()
    log_sigma, read = torch.zeros(len(rewards)), torch.full((len(rewards), 2, 3), -torch.inf)
    for b, (texts, picks) in enumerate(zip(query_ids.tolist(), toy.rows.picks.tolist(), strict=True)):
        for t, (text, pick) in enumerate(zip(texts, picks, strict=True)):
            unread = [j for j in range(3) if j not in picks[:t]]
            read[b, t, unread] = 0.0  # only which are unread counts
            row = scores[place[tuple(text)]]
            log_sigma = log_sigma + torch.zeros(len(rewards)).index_add(
                0, tensor([b]), (row[pick] - row[unread].logsumexp(0))[None].float()
            )
    probability = (toy.query_logprobs().sum(1) + log_sigma).exp()
    assert float(probability.detach().sum()) == pytest.approx(1.0, abs=1e-4)
    wanted = gradients(toy.model, (probability * rewards.double().mean(1)).sum())
    rows = replace(toy.rows, selection_logprobs=read)
    chosen = picked_logprobs(
        embedder, SelectionConfig(), toy.tau, rows, toy.pool, torch.zeros(len(rewards), dtype=torch.long)
    )
    earlier = (RunningMoments(3, 0.4, 1.0), RunningMoments(3, -0.2, 1.0))
    config = ObjectiveConfig(advantage_baseline="running_mean")
    found, _ = compute_advantages(rewards, config, AgentState(scale=1.0, returns=earlier), 2)
    advantages = probability.detach().float()[:, None] * found.advantages
    ours = estimate(toy, advantages, selection_logprobs=chosen)
    without = estimate(toy, advantages)
    assert_is_the_gradient(toy, ours, wanted)
    assert any(float((ours[n] - without[n]).abs().max()) > 1e-3 * float(wanted[n].abs().max()) for n in ours)


def test_law_03_the_gradient_through_the_reward_makes_it_whole(toy, make_session):
    """Live scorer, weight 1: the loss has the gradient of E[R_θ] by θ in the policy and in the reward alike."""
    layout = toy.rows.layout
    logits = toy.model.peft_model(input_ids=toy.rows.ids).logits
    places = layout.value_positions
    logprobs = logits[:, places - 1].log_softmax(-1).gather(-1, toy.rows.ids[:, places][..., None])[..., 0]
    rewards = logprobs.view(len(toy.rows.ids), toy.steps, -1).sum(-1) / 2  # all values have two tokens
    wanted = gradients(toy.model, (toy.probabilities() * rewards.mean(1)).sum())
    probability = toy.probabilities().detach().float()
    config = ObjectiveConfig(advantage_baseline="running_mean")
    advantages = weighted_advantages(toy, rewards.detach().float(), config)
    session = make_session({"reward.kind": "plain", "reward.scorer": "policy", "reward.gradient_weight": 1.0})
    weights = probability * reward_weights(session, toy.rows, toy.pool, torch.arange(len(toy.rows.ids)), 1.0)
    assert_is_the_gradient(toy, estimate(toy, advantages, reward_weights=weights), wanted)


def test_law_03_the_rollout_draws_from_the_enumerated_distribution(toy):
    """What the sampler says about a trajectory, queries and choices, is what enumeration says about it."""
    numbers = uniforms(3, Purpose.TRAINING, 0, range(1), 40, toy.steps, toy.query_len)
    drawn = rollout(toy.model, toy.template, toy.environment(40), numbers, toy.temperature)
    places = {
        (tuple(ids), tuple(picks)): n
        for n, (ids, picks) in enumerate(zip(toy.rows.ids.tolist(), toy.rows.picks.tolist(), strict=True))
    }
    with torch.no_grad():
        logprobs = toy.query_logprobs()
    found = [places[tuple(i), tuple(p)] for i, p in zip(drawn.ids.tolist(), drawn.picks.tolist(), strict=True)]
    assert len(set(found)) > 10
    torch.testing.assert_close(drawn.sampled_logprobs.flatten(1).double(), logprobs[found], atol=1e-5, rtol=0)
    chosen = drawn.selection_logprobs.gather(-1, drawn.picks[:, :, None]).sum((1, 2)).exp()
    torch.testing.assert_close(chosen, tensor([toy.sigma_of_row[n] for n in found]), atol=1e-5, rtol=0)


def test_law_03_returns_and_leave_one_out_by_hand():
    rewards = tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 0.0], [3.0, 0.0, 3.0]])
    assert compute_returns(rewards, "to_go").tolist() == nested([[3, 8 / 3, 2], [1, 1, 0], [2, 1, 1]])
    assert compute_returns(rewards, "trajectory").tolist() == nested([[3] * 3, [1] * 3, [2] * 3])
    twice = torch.cat([rewards, 10 * rewards])  # a second article: its group has nothing to do with the first
    found, _ = compute_advantages(twice, ObjectiveConfig(), AgentState(scale=1.0), 3)
    first = [[1.5, 5 / 3, 1.5], [-1.5, -5 / 6, -1.5], [0.0, -5 / 6, 0.0]]
    assert found.advantages.tolist() == nested([*first, *[[10 * x for x in row] for row in first]], abs=1e-5)


def nested(values, **tolerance):
    return [pytest.approx(row, **tolerance) for row in values]


# -- 4: the KL -------------------------------------------------------------------------------------------------------


def kl_only(session, paid, estimator="full", temperature=1.0):
    """The loss with every advantage 0 and β = 1: the KL alone."""
    batch = update_batch(session, paid, torch.zeros(paid.rows.picks.shape))
    return session.objective(session.model, batch, KLConfig(coefficient=1.0, estimator=estimator), temperature)


@each_shape
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_law_04_the_kl_is_zero_at_step_0_and_pulls_back_afterwards(make_session, shape, adapter):
    session = make_session({"model.adapter": adapter, "optimizer.learning_rate": 1e-3}, shape=shape)
    pool, rows = read(session)
    paid = session.pay(rows, pool)
    output = kl_only(session, paid)
    assert output.loss.item() == 0.0
    assert all(float(g.abs().max()) < 1e-6 for g in gradients(session.model, output.loss).values())

    advantages, _ = compute_advantages(paid.rewards.rewards, ObjectiveConfig(), AgentState(), 3)
    optimizer = make_optimizer(session, session.config.optimizer)
    outcome = apply_update(session, optimizer, paid, pool, advantages, 0)
    assert outcome.stepped
    paid = session.pay(rows, pool)  # as the next update would: the reference must not have moved
    moved = kl_only(session, paid)
    assert moved.loss.item() > 1e-5
    pull = gradients(session.model, moved.loss)
    norm = math.sqrt(sum(float(g.square().sum()) for g in pull.values()))
    assert norm > 1e-4
    with torch.no_grad():
        for name, parameter in session.model.named_trainable().items():
            parameter -= 0.1 * moved.loss.item() / norm**2 * pull[name]
    after = kl_only(session, paid).loss.item()
    assert after < 0.95 * moved.loss.item()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_law_04_the_kl_is_that_of_the_sampled_distribution_and_finite_under_the_mask(make_session, shaken, temperature):
    session = make_session({"rollout.temperature": temperature})
    model = shaken(session.model)
    pool, rows = read(session)
    output = kl_only(session, session.pay(rows, pool), temperature=temperature)
    allowed = model.query_vocabulary.nonzero()[:, 0].tolist()
    assert len(allowed) == 48
    total = 0.0
    for b in range(6):
        real = rows.role[b] != PADDING
        for place in rows.layout.query_positions.tolist():
            prefix = rows.ids[b, :place][real[:place]].tolist()
            ours, base = (
                (next_token_logprobs(model, prefix, reference=r)[allowed] / temperature).log_softmax(-1)
                for r in (False, True)
            )
            total += float((ours.exp() * (ours - base)).sum())
    assert output.loss.item() == pytest.approx(total / 36, rel=1e-4)
    found = gradients(model, output.loss)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in found.values())


def test_law_04_padded_query_slots_have_no_kl_and_no_policy_loss(make_session, shaken):
    session = make_session()
    shaken(session.model)
    pool, rows = read(session)
    ids, mask = rows.query_slots()
    mask = mask.clone()
    mask[:, 1, 1] = False  # the second query has one token only
    values, value_mask = rows.value_slots()
    rows = assemble(
        session.template, ids, mask, values, value_mask, rows.picks, rows.sampled_logprobs, rows.selection_logprobs
    )
    other = replace(rows, ids=torch.where((rows.role == PADDING) & (rows.step == 1), 9, rows.ids))
    advantages = torch.arange(18.0).view(6, 3) - 8
    found = []
    for one in (rows, other):
        batch = update_batch(session, session.pay(one, pool), advantages)
        output = session.objective(session.model, batch, KLConfig(coefficient=0.5), 1.0)
        found.append(output)
    for name in ("loss/policy", "loss/kl"):
        torch.testing.assert_close(found[0].metrics[name], found[1].metrics[name], atol=1e-5, rtol=1e-5)
    by_hand = 0.0
    for b in range(6):
        real = rows.role[b] != PADDING
        for place in (rows.role[b] == QUERY).nonzero()[:, 0].tolist():
            prefix = rows.ids[b, :place][real[:place]].tolist()
            allowed = session.model.query_vocabulary
            ours, base = (
                next_token_logprobs(session.model, prefix, reference=r)[allowed].log_softmax(-1) for r in (False, True)
            )
            by_hand += float((ours.exp() * (ours - base)).sum())
    assert float(found[0].metrics["loss/kl"]) == pytest.approx(by_hand / 36, rel=1e-4)


def test_law_04_estimators_by_enumeration():
    """Over a vocabulary with a masked id: full = Σ π log(π/π₀); in the mean k3 is it, and k2 has its gradient."""
    logits = tensor([0.3, -1.2, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    allowed = tensor([True, True, True, False])
    ours = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    base = tensor([-0.5, 0.4, 0.1, 3.0], dtype=torch.float64).masked_fill(~allowed, -torch.inf).log_softmax(-1)
    probs = ours.exp().detach()
    wanted = sum(float(probs[v]) * (ours[v].item() - float(base[v])) for v in range(3))
    full = full_kl(ours, base)
    assert full.item() == pytest.approx(wanted, abs=1e-12)
    (gradient,) = torch.autograd.grad(full, logits, retain_graph=True)
    assert bool(torch.isfinite(gradient).all())
    k2, k3 = (sampled_kl(ours[:3], base[:3], kind) for kind in ("k2", "k3"))
    assert (probs[:3] * k3).sum().item() == pytest.approx(wanted, abs=1e-12)
    (mean_gradient,) = torch.autograd.grad((probs[:3] * k2).sum(), logits)
    torch.testing.assert_close(mean_gradient, gradient)


# -- 5: the learner sees what the sampler saw ------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_law_05_the_learner_recomputes_the_samplers_logprobs(make_session, shaken, shape, temperature):
    session = make_session({"rollout.temperature": temperature}, shape=shape)
    model = shaken(session.model)
    pool, rows = read(session)
    paid = session.pay(rows, pool)
    batch = update_batch(session, paid, torch.ones(6, 3))
    output = policy_gradient(model, batch, KLConfig(coefficient=0.0), temperature)
    assert float(output.metrics["policy/sampler_mismatch"]) < 1e-5
    assert output.loss.item() == pytest.approx(-float(rows.sampled_logprobs.mean()), abs=1e-5)  # every advantage is 1
    allowed = model.query_vocabulary.nonzero()[:, 0].tolist()
    for b in (0, 5):
        real, found = rows.role[b] != PADDING, []
        for place in rows.layout.query_positions.tolist():
            logprobs = next_token_logprobs(model, rows.ids[b, :place][real[:place]].tolist())[allowed] / temperature
            found.append(float(logprobs.log_softmax(-1)[allowed.index(int(rows.ids[b, place]))]))
        assert rows.sampled_logprobs[b].flatten().tolist() == pytest.approx(found, abs=5e-5)


@each_shape
def test_law_05_logprobs_of_actions_depend_on_the_context(make_session, shape):
    session = make_session(shape=shape)
    pool, rows = read(session)
    batch = update_batch(session, session.pay(rows, pool), torch.ones(6, 3))

    def of_third_query(rows):
        only_third = tensor([0.0, 0.0, 1.0]).expand(6, 3)
        changed = replace(batch, rows=rows, advantages=only_third)
        return policy_gradient(session.model, changed, KLConfig(coefficient=0.0), 1.0).loss.item()

    before = of_third_query(rows)
    layout = rows.layout
    for position in (layout.prompt_len - 1, int(layout.value_positions[0]), int(layout.query_positions[0])):
        ids = rows.ids.clone()
        ids[:, position] = 4 + (ids[:, position] - 4 + 7) % 48
        assert abs(of_third_query(replace(rows, ids=ids)) - before) > 1e-3
    ids = rows.ids.clone()
    ids[:, rows.layout.value_positions[-4:]] = 9  # what comes later does not matter
    assert of_third_query(replace(rows, ids=ids)) == pytest.approx(before, abs=1e-6)


# -- 6: one softmax --------------------------------------------------------------------------------------------------


def test_law_06_the_softmax_is_applied_once():
    keys = torch.eye(5)[None, :, None]  # one article, five orthogonal keys, one head
    scores = head_scores(keys[0, 2:3], keys)
    unread = torch.ones(1, 5, dtype=torch.bool)
    for tau in (4.0, 1.0, 0.25, 0.1):
        probs = selection_logprobs(scores, unread, tau).exp()[0]
        assert float(probs[2]) == pytest.approx(math.exp(1 / tau) / (math.exp(1 / tau) + 4), rel=1e-5)
    assert float(selection_logprobs(scores, unread, 0.01).exp()[0, 2]) > 1 - 1e-6
    assert float(selection_logprobs(scores, unread, 1.0).exp()[0, 2]) == pytest.approx(0.4046097, abs=1e-6)  # e/(e+4)


def test_law_06_the_environment_picks_with_that_probability():
    """Inverse CDF: of a fine grid of uniform numbers, the share that picks pair j is σ(j)."""
    pool = hand_pool(torch.zeros(1, 3, 2, dtype=torch.long), key_ids=tensor([[[0], [1], [2]]]))
    embedder = TableEmbedder(3)
    embedder.table = torch.eye(3)
    env = ReadingEnvironment(embedder, SelectionConfig(), 0.5)
    env.reset(pool, embed_pool_keys(embedder, pool), 4000)
    numbers = (torch.arange(4000) + 0.5) / 4000
    query = torch.full((4000, 1), 1)
    reading = env.step(query, torch.ones_like(query, dtype=torch.bool), numbers)
    # heads: e_1 and half of e_1 reversed (e_1 again): mean score 0.75 for pair 1, over τ = 0.5
    expected = [1 / (2 + math.exp(1.5)), math.exp(1.5) / (2 + math.exp(1.5)), 1 / (2 + math.exp(1.5))]
    share = [float((reading.picks == j).float().mean()) for j in range(3)]
    assert share == pytest.approx(expected, abs=1e-3)
    assert reading.selection_logprobs[0].exp().tolist() == pytest.approx(expected, abs=1e-6)


def test_law_06_mean_of_softmaxes_over_the_unread():
    scores = tensor([[[0.0, 1.0, 9.0], [2.0, 0.0, 9.0]]])
    unread = tensor([[True, True, False]])
    e = math.exp
    expected = [(1 / (1 + e(1)) + e(2) / (1 + e(2))) / 2, (e(1) / (1 + e(1)) + 1 / (1 + e(2))) / 2, 0.0]
    found = selection_logprobs(scores, unread, 1.0, "mean_softmax")
    assert found.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)
    expected = [e(1) / (e(1) + e(0.5)), e(0.5) / (e(1) + e(0.5)), 0.0]
    found = selection_logprobs(scores, unread, 1.0, "mean_score")
    assert found.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)


# -- 7: rows are independent -----------------------------------------------------------------------------------------


@each_shape
def test_law_07_a_batch_of_two_is_two_batches_of_one(make_session, shaken, shape):
    session = make_session(shape=shape)
    shaken(session.model)
    stream = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL)
    alone = [stream.next_pool(1), stream.next_pool(1)]
    stream = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL)
    together = session.rollout(stream.next_pool(2), session.uniforms(Purpose.TRAINING, 3, range(2), 1))
    assert together.ids[0].tolist() != together.ids[1].tolist()
    for index, pool in enumerate(alone):
        row = session.rollout(pool, session.uniforms(Purpose.TRAINING, 3, range(index, index + 1), 1))
        for name in ("ids", "role", "step", "picks"):
            assert torch.equal(getattr(row, name)[0], getattr(together, name)[index]), name
        for name in ("sampled_logprobs", "selection_logprobs"):
            torch.testing.assert_close(getattr(row, name)[0], getattr(together, name)[index], atol=1e-5, rtol=0)
    one = session.uniforms(Purpose.TRAINING, 3, range(2), 2)
    assert torch.equal(one[2:], session.uniforms(Purpose.TRAINING, 3, range(1, 2), 2))
    assert len({tuple(row) for row in one.flatten(1).tolist()}) == 4


@each_shape
def test_law_07_rows_pick_for_themselves_and_never_twice(make_session, shape):
    session = make_session({"rollout.steps": 5, "selection.temperature": 50.0}, shape=shape)
    _pool, rows = read(session, trajectories=6)
    assert len({tuple(picks) for picks in rows.picks[:6].tolist()}) > 3  # one article, six orders
    for b in range(12):
        assert sorted(rows.picks[b].tolist()) == [0, 1, 2, 3, 4]
        for t in range(5):
            probs, already = rows.selection_logprobs[b, t].exp(), rows.picks[b, :t].tolist()
            assert not probs[already].any()
            assert float(probs.sum()) == pytest.approx(1.0, abs=1e-5)
            assert bool((probs[[j for j in range(5) if j not in already]] > 0).all())


def test_law_07_impossible_choices_are_never_drawn():
    logprobs = tensor([[-math.inf, 0.5, 0.5, -math.inf]]).log_softmax(-1)
    edges = [0.0, 1e-12, 0.4999999, 0.5, 0.9999999, 1 - 2**-53]
    assert [int(sample(logprobs, tensor([u], dtype=torch.float64))) for u in edges] == [1, 1, 1, 2, 2, 2]


def test_law_07_a_second_reading_of_a_pair_is_refused(toy):
    env, query, full = toy.environment(1), tensor([[4, 5]]), torch.ones(1, 2, dtype=torch.bool)
    first = env.step(query, full, tensor([0.3]))
    with pytest.raises(ValueError, match="twice"):
        env.step(query, full, tensor([0.3]), lambda env, logprobs, uniform: first.picks)


# -- 8: which projection ---------------------------------------------------------------------------------------------


def test_law_08_query_heads_meet_the_key_head_of_their_group():
    """H = 4 on Hk = 2: heads 0 and 1 meet key head 0, heads 2 and 3 key head 1; written out for three pairs."""
    query = tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0]]])
    keys = tensor([[[[1.0, 4.0], [5.0, 7.0]], [[2.0, 0.0], [-1.0, 3.0]], [[0.0, -1.0], [2.0, 2.0]]]])
    expected = [
        [1.0, 2.0, 0.0],  # (1, 0) · first heads (1, 4), (2, 0), (0, −1)
        [8.0, 0.0, -2.0],  # (0, 2) · the same
        [15.0, -3.0, 6.0],  # (3, 0) · second heads (5, 7), (−1, 3), (2, 2)
        [12.0, 2.0, 4.0],  # (1, 1) · the same
    ]
    assert head_scores(query, keys)[0].tolist() == expected
    logprobs = selection_logprobs(head_scores(query, keys), torch.ones(1, 3, dtype=torch.bool), 2.0)
    exponentials = [math.exp(mean / 2) for mean in (9.0, 0.25, 2.0)]
    assert logprobs.exp()[0].tolist() == pytest.approx([x / sum(exponentials) for x in exponentials], rel=1e-5)

    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(6, 4, 2, generator=generator), torch.randn(2, 5, 2, 2, generator=generator)
    scores = head_scores(queries, keys)
    for b, h, n in itertools.product(range(6), range(4), range(5)):  # rows 0 to 2 read article 0
        wanted = sum(float(queries[b, h, d]) * float(keys[b // 3, n, h // 2, d]) for d in range(2))
        assert float(scores[b, h, n]) == pytest.approx(wanted, abs=1e-5)


def root_mean_square(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@each_shape
def test_law_08_queries_and_keys_go_through_their_own_projections(make_model, shaken, byte_tokenizer, shape):
    model = make_model(shape, tokenizer=byte_tokenizer(), vocab_size=262)
    embedder = AttentionEmbedder(EmbedderConfig(kind="attention"), model)
    ids = tensor([model.encode("abcd"), model.encode("xy  ")])
    mask = tensor([[True, True, True, True], [True, True, False, False]])
    before = embedder.embed_queries(ids, mask), embedder.embed_keys(ids, mask)
    shaken(model)  # the policy moves, the embedder stays

    lm = model.peft_model.base_model.model
    for row, real in ((0, 4), (1, 2)):
        text = tensor([[1, *ids[row, :real].tolist()]])
        with torch.no_grad(), model.peft_model.disable_adapter():
            states = lm(input_ids=text, output_hidden_states=True).hidden_states[-2][0]
        with torch.no_grad():
            if shape == "gpt2":
                last = lm.transformer.h[-1]
                normed = torch.nn.functional.layer_norm(states, (32,), last.ln_1.weight, last.ln_1.bias)
                fused = normed @ last.attn.c_attn.base_layer.weight + last.attn.c_attn.base_layer.bias
                queries, keys = fused[:, :32].view(-1, 4, 8), fused[:, 32:64].view(-1, 4, 8)
            else:
                last, head = lm.model.layers[-1], 12 if shape == "qwen3" else 8
                normed = root_mean_square(states, last.input_layernorm.weight, 1e-6)
                queries = (normed @ last.self_attn.q_proj.base_layer.weight.T).view(-1, 4, head)
                keys = (normed @ last.self_attn.k_proj.base_layer.weight.T).view(-1, 2, head)
                if shape == "qwen3":
                    queries = root_mean_square(queries, last.self_attn.q_norm.weight, 1e-6)
                    keys = root_mean_square(keys, last.self_attn.k_norm.weight, 1e-6)
        # the mean leaves BOS out, and padding does not count
        for wanted, found, moved in (
            (queries, before[0], embedder.embed_queries(ids, mask)), (keys, before[1], embedder.embed_keys(ids, mask))
        ):  # fmt: skip
            torch.testing.assert_close(found[row], wanted[1:].mean(0), atol=1e-5, rtol=1e-5)
            assert torch.equal(found, moved)


def test_law_08_a_blank_query_is_the_zero_vector(make_model, byte_tokenizer):
    model = make_model("llama", tokenizer=byte_tokenizer(), vocab_size=262)
    embedder = AttentionEmbedder(EmbedderConfig(kind="attention"), model)
    ids = tensor([model.encode(" \n "), model.encode(" a ")])
    queries = embedder.embed_queries(ids, torch.ones_like(ids, dtype=torch.bool))
    assert not queries[0].any()
    assert queries[1].any()


# -- 9: filter, accumulation, nothing to learn -----------------------------------------------------------------------


def test_law_09_the_filter_keeps_exactly_these_rows():
    config = ObjectiveConfig(
        advantage_baseline="none", filter=FilterConfig(kind="running_zscore", warmup=3, min_zscore=1.0)
    )
    state = AgentState()
    steps = [  # trajectory rewards (means of the two steps), then who is kept
        ([[0.0, 0.0], [3.0, 1.0]], [False, False]),  # 0 and 2: nothing seen before
        ([[100.0, 2.0], [4.0, 4.0]], [False, False]),  # two seen, three needed; 51 and 4 count nevertheless
        ([[-1.0, 3.0], [60.0, 30.0]], [False, False]),  # of 0, 2, 51, 4: mean 14.25, SD 24.56..; 45 > 38.8 is kept
    ]
    steps[2] = (steps[2][0], [False, True])
    for rewards, kept in steps:
        found, state = compute_advantages(tensor(rewards), config, state, 2)
        assert found.keep.tolist() == kept
    assert state.rewards.count == 6
    assert state.rewards.mean == pytest.approx((0 + 2 + 51 + 4 + 1 + 45) / 6)


def test_law_09_the_threshold_is_strict_and_of_earlier_updates_only():
    config = ObjectiveConfig(filter=FilterConfig(kind="running_zscore", warmup=3, min_zscore=1.0))
    _, state = compute_advantages(tensor([[0.0], [2.0], [4.0]]), config, AgentState(), 3)  # mean 2, SD 2 (n − 1)
    found, after = compute_advantages(tensor([[4.0], [4.5], [3.9]]), config, state, 3)
    assert found.keep.tolist() == [False, True, False]
    found, _ = compute_advantages(tensor([[4.5], [1000.0], [3.0]]), config, state, 3)  # 1000 does not raise its own bar
    assert found.keep.tolist() == [True, True, False]
    assert after.rewards.deviation == pytest.approx(1.7339742, abs=1e-6)  # of 0, 2, 4, 4, 4.5, 3.9
    default = FilterConfig(kind="running_zscore")
    for seen, kept in ((14, False), (15, True)):
        state = AgentState(rewards=RunningMoments(seen, 0.0, 1.0))
        found, _ = compute_advantages(tensor([[9.0], [9.0]]), ObjectiveConfig(filter=default), state, 2)
        assert found.keep.tolist() == [kept, kept]


def test_law_09_the_scale_is_of_earlier_updates_only():
    config = ObjectiveConfig(advantage_baseline="none", returns="trajectory")
    state = AgentState()
    expected = [  # one row, one step: Ĝ, then the scale that divides it
        (2.0, 2.0),  # the first uses its own
        (4.0, 2.0),
        (0.0, 0.95 * 2 + 0.05 * 4),
        (1.0, 0.95 * 2 + 0.05 * 4),  # 0 spread left it as it was
        (1.0, 0.95 * 2.1 + 0.05 * 1),
    ]
    for reward, scale in expected:
        found, state = compute_advantages(tensor([[reward]]), config, state, 1)
        assert float(found.advantages) == pytest.approx(reward / scale, rel=1e-6)
    found, _ = compute_advantages(tensor([[1e-5]]), config, AgentState(scale=1e-9), 1)
    assert float(found.advantages) == pytest.approx(1e-2)  # floor 1e-3 nats
    running = ObjectiveConfig(advantage_baseline="running_mean")
    first, state = compute_advantages(tensor([[1.0, 4.0], [3.0, 0.0]]), running, AgentState(scale=1.0), 2)
    assert first.advantages.tolist() == [[0.5, 1.0], [-0.5, -1.0]]  # Ĝ (2.5, 2), (1.5, 0) less their means (2, 1)
    second, _ = compute_advantages(tensor([[6.0, 4.0]]), running, replace(state, scale=1.0), 1)
    assert second.advantages.tolist() == [[3.0, 1.0]]  # (5, 2) less the means of earlier rows, (2, 1)


SIXTY_FOUR = {
    "rollout.articles": 4,
    "rollout.trajectories": 16,
    "rollout.steps": 2,
    "optimizer.max_grad_norm": 1e6,
    "objective.kl.coefficient": 0.5,
}


@pytest.mark.parametrize("kept", [range(64), [0, 1, 2, 3, 4, 20, 63]], ids=["all", "seven"])
def test_law_09_micro_batches_do_not_change_the_update(make_session, shaken, kept):
    """1 × 64 = 4 × 16; 7 kept rows in one, as 3 + 3 + 1, or one by one. Plain SGD: deltas are gradients."""
    moved, metrics = [], []
    for size in (None, 16, 3, 1) if len(kept) == 7 else (None, 16):
        session = make_session({**SIXTY_FOUR, "training.micro_batch_rows": size})
        shaken(session.model, 0.05)
        pool, rows = read(session, articles=4, trajectories=16)
        paid = session.pay(rows, pool)
        advantages, _ = compute_advantages(paid.rewards.rewards, ObjectiveConfig(), AgentState(), 16)
        keep = torch.zeros(64, dtype=torch.bool)
        keep[list(kept)] = True
        before = weights(session.model)
        optimizer = torch.optim.SGD(session.model.named_trainable().values(), lr=1.0)
        outcome = apply_update(session, optimizer, paid, pool, replace(advantages, keep=keep), 9)
        rate = outcome.metrics["optimizer/learning_rate"]
        moved.append({n: (p.detach() - before[n]) / rate for n, p in session.model.named_trainable().items()})
        metrics.append(outcome.metrics)
    for other, numbers in zip(moved[1:], metrics[1:], strict=True):
        for name, delta in moved[0].items():
            torch.testing.assert_close(other[name], delta, atol=2e-6, rtol=1e-5)
        assert numbers == pytest.approx(metrics[0], rel=1e-5, abs=1e-6)
    # and by hand: −(1/M) Σ A log π + (β/M) Σ KL with M = kept × S × Q
    batch = update_batch(session, paid, advantages.advantages, list(kept))
    before_update = make_session(SIXTY_FOUR)
    shaken(before_update.model, 0.05)
    output = policy_gradient(before_update.model, batch, KLConfig(coefficient=0.0), 1.0)
    sampled = batch.rows.sampled_logprobs
    by_hand = sum(
        -float(advantages.advantages[b, t]) * float(sampled[n, t].sum()) for n, b in enumerate(kept) for t in range(2)
    ) / (len(kept) * 2 * 2)
    assert output.loss.item() == pytest.approx(by_hand, abs=1e-5)
    assert metrics[0]["loss/policy"] == pytest.approx(by_hand, abs=1e-5)
    assert metrics[0]["loss/total"] == pytest.approx(by_hand + 0.5 * metrics[0]["loss/kl"], abs=1e-5)


@pytest.mark.parametrize("case", ["zero advantages", "zero among the kept", "none kept"])
def test_law_09_nothing_to_learn_leaves_everything_bit_equal(make_session, case):
    session = make_session({"objective.kl.coefficient": 0.5, "optimizer.weight_decay": 0.1})
    optimizer = make_optimizer(session, session.config.optimizer)
    pool, rows = read(session)
    paid = session.pay(rows, pool)
    first, _ = compute_advantages(paid.rewards.rewards, ObjectiveConfig(), AgentState(), 3)
    assert apply_update(session, optimizer, paid, pool, first, 0).stepped  # momentum is not 0 any more
    before = weights(session.model)
    moments = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    advantages, keep = torch.zeros(6, 3), torch.ones(6, dtype=torch.bool)
    if case != "zero advantages":
        advantages[1] = 1.0
        keep[1] = False
    if case == "none kept":
        keep[:] = False
    nothing = Advantages(returns=first.returns, advantages=advantages, keep=keep, scale=1.0)
    outcome = apply_update(session, optimizer, paid, pool, nothing, 1)
    assert (outcome.stepped, outcome.finite) == (False, True)
    for name, parameter in session.model.named_trainable().items():
        assert torch.equal(parameter, before[name])
    for old, new in zip(moments, optimizer.state.values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("reward", [0.1, -1.3, 2 / 3])
@pytest.mark.parametrize("group", [2, 3, 8])
@pytest.mark.parametrize("baseline", ["leave_one_out", "running_mean"])
def test_law_09_equal_rewards_give_exactly_zero_advantages(baseline, group, reward):
    """Rounding in a mean must not become an advantage: AdamW would make a full step of it."""
    config = ObjectiveConfig(advantage_baseline=baseline)
    rewards = torch.full((2 * group, 3), reward)
    found, state = compute_advantages(rewards, config, AgentState(), group)
    assert not found.advantages.any()
    assert state.scale is None


# -- 10: the stream, resuming, processes -----------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(records):
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def test_law_10_the_stream_advances(make_config, tmp_path):
    """Seven usable articles, two an update: 0 1, 3 4, 5 6, then 7 and, in the second pass, 0 again. 2 is too short."""
    runs.train(make_config({"training.updates": 4}), tmp_path / "run")
    found = lines(tmp_path / "run" / "trajectories.jsonl")
    names = {article.title: article.id for article in articles_of(make_config().corpus)}
    drawn = [found[row]["article"] for row in range(0, 24, 3)]
    assert drawn == [names[f"article {i}"] for i in (0, 1, 3, 4, 5, 6, 7, 0)]
    assert [(r["update"], r["index"], r["trajectory"]) for r in found] == list(
        itertools.product(range(1, 5), range(2), range(3))
    )
    assert found[0]["article"] == found[21]["article"]
    assert [r["queries"] for r in found[:3]] != [r["queries"] for r in found[21:]]  # other random numbers
    skipped = [m["data/skipped_articles"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert skipped == [0, 1, 1, 1]


def articles_of(corpus):
    return list(CORPORA[corpus.kind](corpus, Network(NetworkConfig())).articles(0, 0))


RESUMED = {
    "model.lora_dropout": 0.3,
    "optimizer.warmup_updates": 3,
    "objective.filter.kind": "running_zscore",
    "objective.filter.warmup": 2,
    "objective.filter.min_zscore": -0.5,
    "training.micro_batch_rows": 4,
}


def test_law_10_interrupted_and_resumed_equals_uninterrupted(make_config, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    runs.train(make_config({**RESUMED, "training.updates": 6}), whole)
    runs.train(make_config({**RESUMED, "training.updates": 3}), halves)
    runs.train(make_config({**RESUMED, "training.updates": 6}), halves, resume=True)
    last = Path("checkpoints") / "update-000006"
    for name in ("adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json"):
        assert (whole / last / name).read_bytes() == (halves / last / name).read_bytes(), name
    assert (whole / "trajectories.jsonl").read_bytes() == (halves / "trajectories.jsonl").read_bytes()
    metrics = [without_time(lines(run / "metrics.jsonl")) for run in (whole, halves)]
    assert metrics[0] == metrics[1]
    assert [m["update"] for m in metrics[0]] == [1, 2, 3, 4, 5, 6]
    assert 0 < sum(m["filter/kept_fraction"] for m in metrics[0]) / 6 < 1  # the filter was at work
    assert any(value.any() for value in load_file(whole / last / "optimizer.safetensors").values())

    dry = tmp_path / "dry"  # and so was the dropout
    runs.train(
        make_config({**RESUMED, "model.lora_dropout": 0.0, "training.updates": 3, "evaluation.articles": 0}), dry
    )
    names = [run / "checkpoints" / "update-000003" / "adapter" / "adapter_model.safetensors" for run in (halves, dry)]
    one, other = (load_file(path) for path in names)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_law_10_a_pair_is_written_once_whether_resumed_or_not(make_config, tmp_path):
    """Seven usable articles in 4 · 2 draws: the last recurs after the resume, and the evaluation reads two again."""
    for name, updates in (("whole", [4]), ("halves", [2, 4])):
        for number, total in enumerate(updates):
            config = make_config({"training.updates": total, "evaluation.articles": 2})
            runs.train(config, tmp_path / name, resume=number > 0)
            list(verify_run(tmp_path / name))
    for log in ("evaluation.jsonl", "evaluation.json", "trajectories.jsonl", "pairs.jsonl"):  # of one evaluation only
        assert (tmp_path / "whole" / log).read_bytes() == (tmp_path / "halves" / log).read_bytes(), log
    pairs = [r["pair"] for r in lines(tmp_path / "whole" / "pairs.jsonl")]
    assert len(pairs) == len(set(pairs))


TWO = {
    "training.updates": 3,
    "objective.filter.kind": "running_zscore",
    "objective.filter.warmup": 2,
    "objective.filter.min_zscore": 0.3,
    "optimizer.learning_rate": 1e-3,
}


@pytest.fixture(scope="module", autouse=True)
def two_processes(request, make_config, tmp_path_factory):
    """Two gloo processes on one run, started before the first test so that their imports cost nobody time."""
    if not any("two_processes" in item.name for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("two")
    file = folder / "config.yaml"
    file.write_text(config_to_yaml(make_config(TWO)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from attention_guided_rl.cli import entry_point; entry_point()", "train"]
    command += ["--config", str(file), "--runs-folder", str(folder), "--run", "two", "--training.device", "cpu"]
    started = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
        with (folder / f"output-{rank}.txt").open("w") as output:
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    yield folder, started
    for process in started:
        process.kill()
        process.wait()


def test_law_10_two_processes_equal_one(make_config, two_processes):
    folder, started = two_processes
    runs.train(make_config(TWO), folder / "one")
    for rank, process in enumerate(started):
        assert process.wait(timeout=60) == 0, (folder / f"output-{rank}.txt").read_text()
    one, two = (lines(folder / name / "trajectories.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 18
    for a, b in zip(one, two, strict=True):
        for name in ("update", "index", "article", "trajectory", "pairs", "ids", "picks", "queries", "kept"):
            assert a[name] == b[name], name
        assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)
        assert a["sampled_logprobs"] == nested(b["sampled_logprobs"], abs=1e-5)
    kept = [[sum(r["kept"] for r in one if (r["update"], r["index"]) == (u, i)) for i in range(2)] for u in (2, 3)]
    assert any(first != second and first + second < 6 for first, second in kept), kept  # else a mean of means would do
    metrics = [without_time(lines(folder / name / "metrics.jsonl")) for name in ("one", "two")]
    assert metrics[0] == nested(metrics[1], abs=1e-5)
    assert all(m["optimizer/gradient_norm"] > 1e-3 for m in metrics[0][1:])
    pairs = [[r["pair"] for r in lines(folder / name / "pairs.jsonl")] for name in ("one", "two")]
    assert pairs[0] == pairs[1]
    last = Path("checkpoints") / "update-000003" / "adapter" / "adapter_model.safetensors"
    first, second = (load_file(folder / name / last) for name in ("one", "two"))
    for name, tensor_ in first.items():
        torch.testing.assert_close(tensor_, second[name], atol=1e-5, rtol=0)


# -- 11: the rest is in test_learning.py -----------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_law_11_untrained_minus_untrained_is_exactly_zero(make_session, shape, adapter):
    options = {"model.adapter": adapter, "evaluation.articles": 5, "evaluation.batch_articles": 2}
    session = make_session(options, shape=shape)
    records = [r for b in run_arms(session, ["trained", "untrained"]) for r in evaluation_records(session, b, 0)]
    rewards = {(r["arm"], r["index"]): r["reward"] for r in records}
    assert len(rewards) == 20
    for index in range(5):
        assert rewards["trained", index] - rewards["untrained", index] == 0.0
        assert rewards["trained/key", index] - rewards["untrained/key", index] == 0.0


def test_law_11_a_learning_rate_of_zero_changes_nothing(make_config, make_session, tmp_path):
    options = {"optimizer.learning_rate": 0.0, "training.updates": 3, "evaluation.articles": 4}
    result = runs.train(make_config(options), tmp_path / "run")
    before = weights(make_session(options).model)
    session, update = runs.open_run(tmp_path / "run")
    assert update == 3
    for name, parameter in session.model.named_trainable().items():
        assert torch.equal(parameter, before[name])
    assert all(m["optimizer/gradient_norm"] > 0 for m in lines(tmp_path / "run" / "metrics.jsonl"))
    contrast = result.summary["contrasts"]["trained-untrained"]
    assert (contrast["mean"], contrast["low"], contrast["high"]) == (0.0, 0.0, 0.0)
    rewards = {(r["arm"], r["index"]): r["reward"] for r in lines(tmp_path / "run" / "evaluation.jsonl")}
    assert all(rewards["trained", i] == rewards["untrained", i] for i in range(4))


# -- 12: control tokens ----------------------------------------------------------------------------------------------

HOSTILE = "Read <s> this </s> and <pad> this <|eot|><|start|>user<|end|> <|bos|> <|eos|><|pad|> now. " * 4


@pytest.mark.parametrize("which", ["byte", "chat", "bundled"])
@pytest.mark.parametrize("cut", ["tokens", "sentences", "pairs"])
def test_law_12_article_text_never_becomes_control_ids(make_model, byte_tokenizer, chat_tokenizer, which, cut):
    if which == "bundled":
        model = load_model(ModelConfig(), torch.device("cpu"))
    else:
        model = make_model("gpt2", tokenizer=byte_tokenizer() if which == "byte" else chat_tokenizer, vocab_size=266)
    special = {i for i, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) >= 3
    build_template(model.tokenizer, TemplateConfig())  # a template does want control ids, and asks the same tokenizer
    ready = tuple(PairText(HOSTILE, HOSTILE) for _ in range(2)) if cut == "pairs" else None
    article = Article(id="", title="", text=HOSTILE, source="", revision="", url="", licence="", pairs=ready)
    mode = "sentences" if cut == "sentences" else "tokens"
    pairs = cut_article(article, model.encode, PairsConfig(cut=mode, key_tokens=9, value_tokens=70)).pairs
    assert len(pairs) >= 2
    assert not special & {i for pair in pairs for i in (*pair.key_ids, *pair.value_ids)}
    if which != "bundled":
        assert model.decode(model.encode(HOSTILE)) == HOSTILE
        assert set(build_template(model.tokenizer, TemplateConfig()).prompt) & special


def test_law_12_queries_never_contain_control_ids(make_session):
    session = make_session({"rollout.temperature": 100.0, "rollout.query_tokens": 12})  # as good as uniform
    _pool, rows = read(session, trajectories=12)
    ids = rows.query_slots()[0]
    assert set(ids.unique().tolist()) <= set(range(4, 52))
    assert len(ids.unique()) == 48
    assert bool(torch.isfinite(rows.sampled_logprobs).all())


def test_law_12_a_chat_template_is_rendered_once_with_a_fixed_date(chat_tokenizer):
    config = TemplateConfig(kind="chat", prompt="Ask.", date_string="05 May 2020")
    template = build_template(chat_tokenizer, config)

    def encode(text):
        return tuple(chat_tokenizer.encode(text, add_special_tokens=False))

    def turn(role):
        return f"<|start|>{role}<|end|>\n\n"

    start = f"<s>{turn('system')}Today: 05 May 2020<|eot|>{turn('user')}Ask."
    assert template.prompt == encode(start)
    assert template.before_query == encode(f"<|eot|>{turn('assistant')}")
    assert template.before_value == encode(f"<|eot|>{turn('user')}")
    with pytest.raises(ConfigError, match="chat"):
        build_template(type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer), config)


# -- 13: the configuration -------------------------------------------------------------------------------------------


def config_classes():
    found, waiting = {}, [Config]
    while waiting:
        cls = waiting.pop()
        hints = get_type_hints(cls)
        found[cls.__name__] = {}
        for f in fields(cls):
            nested = [t for t in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(t)]
            found[cls.__name__][f.name] = nested[0].__name__ if nested else None
            waiting += nested
    return found


class Reads(ast.NodeVisitor):
    """Which field of which configuration class a module reads, by following annotations and assignments."""

    def __init__(self, classes, attributes):
        self.classes, self.attributes, self.names, self.found = classes, attributes, {}, set()

    def type_of(self, node):
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if owner is not None:
                return self.classes[owner].get(node.attr)
            return self.attributes.get(node.attr)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, map(self.type_of, node.values)), None)
        return None

    def annotate(self, name, annotation):
        words = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation else set()
        found = words & self.classes.keys()
        if found:
            self.names[name] = found.pop()

    def visit_FunctionDef(self, node):
        outer = dict(self.names)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self.names.pop(argument.arg, None)
            self.annotate(argument.arg, argument.annotation)
        self.generic_visit(node)
        self.names = outer

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            both = (target, node.value)
            if all(isinstance(side, ast.Tuple) for side in both):
                couples = list(zip(target.elts, node.value.elts, strict=True))
            else:
                couples = [both]
            for name, value in couples:
                if isinstance(name, ast.Name):
                    self.names[name.id] = self.type_of(value)
                elif isinstance(name, ast.Attribute) and self.type_of(value):
                    self.attributes[name.attr] = self.type_of(value)

    def visit_Attribute(self, node):
        owner = self.type_of(node.value)
        if owner is not None and isinstance(node.ctx, ast.Load):
            self.found.add((owner, node.attr))
        self.generic_visit(node)


def test_law_13_every_field_is_read_somewhere():
    classes = config_classes()
    found = set()
    for path in sorted(Path(attention_guided_rl.__file__).parent.rglob("*.py")):
        if path.name == "config.py":
            continue  # checking a value is not using it
        reader = Reads(classes, {"config": "Config"})
        reader.visit(ast.parse(path.read_text(encoding="utf-8")))
        found |= reader.found
    declared = {(owner, name) for owner, names in classes.items() for name in names}
    assert len(declared) > 50
    assert sorted(declared - found) == []


def test_law_13_an_unknown_key_names_file_key_and_nearest(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, key, nearest in (
        ("training: {update: 3}", "training.update", "training.updates"),
        ("trainig: {updates: 3}", "trainig", "training"),
        ("objective: {kl: {coeficient: 0.1}}", "objective.kl.coeficient", "objective.kl.coefficient"),
        ("evaluation: {corpus: {sead: 3}}", "evaluation.corpus.sead", "evaluation.corpus.seed"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            load_config(files=[file])
        assert all(f"'{word}'" in str(error.value) for word in (key, nearest))
        assert str(file) in str(error.value)
    with pytest.raises(ConfigError, match=r"command line.*'rollout\.step'.*'rollout\.steps'"):
        load_config(overrides={"rollout.step": 3})


def test_law_13_a_resolved_configuration_reads_back_equal(make_config, tmp_path):
    for number, config in enumerate([make_config(), load_config(), load_config("demo")]):
        file = tmp_path / f"{number}.yaml"
        file.write_text(config_to_yaml(config), encoding="utf-8")
        assert load_config(files=[file]) == config
    assert set(config_classes()) <= set(vars(config_module))
