"""What a scorer says on branches equals what it says of whole rows, written out token by token."""

import pytest
import torch
from torch import tensor

from attention_guided_rl.memory import RowLimit
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import PADDING, BranchRequest
from attention_guided_rl.reward import unread_candidates, with_candidates, with_probes
from attention_guided_rl.scorer import reference_scorer

STEPS, PROBES = 3, 2


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def session(request, make_session, shaken):
    session = make_session({"reward.scorer": "policy"}, shape=request.param)
    shaken(session.model)
    return session


def read(session):
    pool = session.stream(session.config.corpus, num_probes=PROBES, purpose=Purpose.POOL).next_pool(2)
    rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, 0, range(2), 3))
    assert bool((rows.role == PADDING).any())
    return pool, rows


def next_logprobs(session, prefix, scorer):
    """log p(· | prefix) over the whole vocabulary, by one forward of the transformers model."""
    model = session.model.peft_model
    with torch.no_grad():
        if scorer == "reference":
            with model.disable_adapter():
                return model(input_ids=tensor([prefix])).logits[0, -1].log_softmax(-1)
        return model(input_ids=tensor([prefix])).logits[0, -1].log_softmax(-1)


def score_by_hand(session, prefix, text, scorer):
    """Log-probabilities of the words of a text after a prefix."""
    return [float(next_logprobs(session, prefix + text[:i], scorer)[token]) for i, token in enumerate(text)]


def real_prefix(rows, b, end):
    return rows.ids[b, :end][rows.role[b, :end] != PADDING].tolist()


def scorer_of(session, name):
    return session.scorer if name == "policy" else session.reference_scorer


@pytest.mark.parametrize("scorer", ["reference", "policy"])
def test_probes_are_scored_after_every_step_and_an_empty_query(session, scorer):
    pool, rows = read(session)
    found = scorer_of(session, scorer).score(rows, with_probes(BranchRequest(), rows, pool)).probe_logprobs
    assert found.shape == (6, STEPS + 1, PROBES)
    empty = list(session.template.before_query + session.template.before_value)
    for b, t, p in ((0, 0, 0), (4, 1, 1), (5, 3, 0)):
        prefix = real_prefix(rows, b, rows.layout.prompt_len + t * rows.layout.step_len)
        probe = pool.probe_value_ids[b // 3, p][pool.probe_value_mask[b // 3, p]].tolist()
        expected = sum(score_by_hand(session, prefix + empty, probe, scorer))
        assert float(found[b, t, p]) == pytest.approx(expected, abs=1e-4)


def test_candidates_are_scored_in_the_place_of_what_was_read(session):
    pool, rows = read(session)
    candidates = unread_candidates(rows, pool)
    assert candidates.steps.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    scores = session.reference_scorer.score(rows, with_candidates(BranchRequest(), candidates, pool))
    starts = rows.layout.value_positions.view(STEPS, -1)[:, 0].tolist()
    for b in (1, 5):
        read_before = rows.picks[b].tolist()
        for t in range(STEPS):
            here = candidates.pairs[b][candidates.steps == t].tolist()
            assert here == [j for j in range(5) if j not in read_before[:t]]
        for c in (0, 6, 11):
            t, j = int(candidates.steps[c]), int(candidates.pairs[b, c])
            value = pool.value_ids[b // 3, j][pool.value_mask[b // 3, j]].tolist()
            expected = score_by_hand(session, real_prefix(rows, b, starts[t]), value, "reference")
            found = scores.candidate_logprobs[b, c].tolist()
            assert found == pytest.approx(expected + [0.0] * (4 - len(value)), abs=1e-4)


@pytest.mark.parametrize("scorer", ["reference", "policy"])
def test_counterfactual_queries_are_the_references_own_in_the_same_context(session, scorer):
    pool, rows = read(session)
    uniforms = session.uniforms(Purpose.COUNTERFACTUAL, 0, range(2), 3)[:, :, :-1]
    request = BranchRequest(counterfactual_uniforms=uniforms, query_temperature=0.8)
    scores = scorer_of(session, scorer).score(rows, request)
    allowed = session.model.query_vocabulary
    for b, t in ((0, 0), (3, 1), (5, 2)):
        start = rows.layout.prompt_len + t * rows.layout.step_len
        prefix = real_prefix(rows, b, start) + list(session.template.before_query)
        query = []
        for u in uniforms[b, t].tolist():  # inverse CDF over the words a query may have
            logprobs = next_logprobs(session, prefix + query, "reference") / 0.8
            probs = logprobs.masked_fill(~allowed, -torch.inf).softmax(-1)
            query.append(int((probs.cumsum(-1) > u).int().argmax()))
        assert scores.counterfactual_ids[b, t].tolist() == query
        pick = int(rows.picks[b, t])
        value = pool.value_ids[b // 3, pick][pool.value_mask[b // 3, pick]].tolist()
        after = prefix + query + list(session.template.before_value)
        expected = score_by_hand(session, after, value, scorer)
        found = scores.counterfactual_logprobs[b, t].tolist()
        assert found == pytest.approx(expected + [0.0] * (4 - len(value)), abs=1e-4)


def test_micro_batches_change_nothing(session, make_session, shaken):
    pool, rows = read(session)
    request = with_probes(BranchRequest(), rows, pool)
    request = with_candidates(request, unread_candidates(rows, pool), pool)
    whole = session.reference_scorer.score(rows, request)
    parts = reference_scorer(session.model, RowLimit(4, rows.layout.row_len))
    for name in ("value_logprobs", "query_hidden", "probe_logprobs", "candidate_logprobs"):
        torch.testing.assert_close(getattr(parts.score(rows, request), name), getattr(whole, name), atol=1e-4, rtol=0)


def test_branches_are_divided_when_they_are_many(session, monkeypatch):
    pool, rows = read(session)
    request = with_candidates(BranchRequest(), unread_candidates(rows, pool), pool)
    whole = session.reference_scorer.score(rows, request).candidate_logprobs
    monkeypatch.setattr("attention_guided_rl.branching._MASK_ELEMENTS", 1)  # one branch at a time
    torch.testing.assert_close(
        session.reference_scorer.score(rows, request).candidate_logprobs, whole, atol=1e-4, rtol=0
    )


def test_the_average_starts_at_the_policy_and_follows_it(make_session, shaken):
    session = make_session({"reward.scorer": "ema", "reward.ema_decay": 0.75})
    _, rows = read(session)
    model = session.model
    before = session.scorer.score(rows).value_logprobs
    torch.testing.assert_close(before, session.reference_scorer.score(rows).value_logprobs)
    start = {name: p.detach().clone() for name, p in model.named_trainable().items()}
    shaken(model)
    torch.testing.assert_close(session.scorer.score(rows).value_logprobs, before)  # until it is told
    session.ema.update()
    expected = {name: 0.75 * start[name] + 0.25 * p.detach() for name, p in model.named_trainable().items()}
    with session.ema.applied():
        for name, p in model.named_trainable().items():
            torch.testing.assert_close(p.detach(), expected[name])
    assert float((session.scorer.score(rows).value_logprobs - before).abs().max()) > 1e-3
    after = {name: p.detach() for name, p in model.named_trainable().items()}
    assert all(not torch.equal(after[name], expected[name]) for name in after)  # the policy itself is back
