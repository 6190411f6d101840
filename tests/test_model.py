"""The model's edges: text of ids, and weights that are exchanged for a while."""

import pytest
import torch

from attention_guided_rl import model as model_module
from attention_guided_rl.adapter import InPlaceLinear
from attention_guided_rl.config import ModelConfig
from attention_guided_rl.loading import prepare
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import UpdateBatch


def test_token_texts_join_to_the_text_and_a_split_character_goes_to_the_token_that_completes_it(
    make_model, byte_tokenizer
):
    tokenizer = byte_tokenizer()
    model = make_model("llama", tokenizer=tokenizer, vocab_size=len(tokenizer))
    ids = tokenizer.encode("né 日.", add_special_tokens=False)
    assert len(ids) == 8  # UTF-8: 1 + 2 + 1 + 3 + 1 bytes
    assert model.decode_tokens(ids) == ["n", "", "é", " ", "", "", "日", "."]
    assert model.decode_tokens([]) == []


def test_token_texts_of_words_hold_the_space_before_them(make_model, word_tokenizer):
    tokenizer = word_tokenizer()
    model = make_model("llama", tokenizer=tokenizer)
    assert model.decode_tokens(tokenizer.encode("ba be bi", add_special_tokens=False)) == ["ba", " be", " bi"]


def states_of(model):
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        return model.hidden(ids, torch.zeros_like(ids), torch.arange(1, 10))


@pytest.mark.parametrize(
    ("shape", "dtype", "rounding"),
    [
        ("llama", torch.float32, 1e-4),
        ("gpt2", torch.float32, 1e-4),
        ("llama", torch.bfloat16, 0.0),
        ("gpt2", torch.bfloat16, 0.0),  # its layers are PEFT's own, which compute the adapter in float32
    ],
)
def test_folding_the_adapter_changes_rounding_alone_and_nothing_afterwards(
    causal_lm, word_tokenizer, shaken, shape, dtype, rounding
):
    model = shaken(prepare(causal_lm(shape).to(dtype), word_tokenizer(), ModelConfig(name=shape)))
    trained = {name: p.clone() for name, p in model.named_trainable().items()}
    weights = {name: p.clone() for name, p in model.named_frozen().items()}
    apart = states_of(model)
    with model.reference():
        reference = states_of(model)
    with model.folded():
        if dtype == torch.bfloat16 and shape == "llama":
            held = [m.held for m in model.peft_model.modules() if isinstance(m, InPlaceLinear)]
            assert {part.dtype for pair in held if pair is not None for part in pair} == {dtype}
        torch.testing.assert_close(states_of(model), apart, atol=rounding, rtol=0)
        with model.reference(), model.folded():  # as an embedder in the middle of a rollout
            assert torch.equal(states_of(model), reference)
        torch.testing.assert_close(states_of(model), apart, atol=rounding, rtol=0)
    assert torch.equal(states_of(model), apart)
    assert (apart - reference).abs().max() > 1e-2
    assert all(torch.equal(p, weights[name]) for name, p in model.named_frozen().items())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_trainable().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.named_trainable().values())


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
def test_the_adapter_in_place_is_pefts_own_up_to_rounding(
    causal_lm, word_tokenizer, shaken, monkeypatch, shape, dtype, rounding
):
    model = shaken(prepare(causal_lm(shape).to(dtype), word_tokenizer(), ModelConfig(name=shape)))
    assert sum(isinstance(layer, InPlaceLinear) for layer in model.peft_model.modules()) == 2 * 7

    def states_and_gradient():
        ids = torch.arange(4, 24).view(2, 10)
        states = model.hidden(ids, torch.zeros_like(ids), torch.arange(1, 10)).float()
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        gradient = torch.autograd.grad((weights * states).sum(), list(model.named_trainable().values()))
        assert all(part.dtype == torch.float32 for part in gradient)
        return states.detach(), torch.cat([part.flatten() for part in gradient])

    states, gradient = states_and_gradient()
    monkeypatch.delattr(InPlaceLinear, "forward")
    expected, expected_gradient = states_and_gradient()
    assert (states - expected).norm() <= rounding * expected.norm()
    assert (gradient - expected_gradient).norm() <= 2 * rounding * expected_gradient.norm()


def test_the_adapter_in_place_drops_what_pefts_own_drops(make_model, shaken, monkeypatch):
    model = shaken(make_model("llama", lora_dropout=0.5))

    def dropped():
        torch.manual_seed(3)
        with model.adapter_dropout():
            return states_of(model)

    states = dropped()
    assert (states - states_of(model)).abs().max() > 1e-2
    monkeypatch.delattr(InPlaceLinear, "forward")
    torch.testing.assert_close(states, dropped(), atol=1e-4, rtol=0)


def test_an_adapter_that_says_nothing_changes_no_bit(make_model):
    model = make_model("llama")
    policy = states_of(model)
    with model.reference():
        assert torch.equal(policy, states_of(model))


@pytest.mark.parametrize("options", [{}, {"model.adapter": "full", "objective.kl.estimator": "k3"}])
def test_the_head_in_chunks_gives_the_same_loss_and_gradient(make_session, shaken, monkeypatch, options):
    def loss_and_gradient(size):
        monkeypatch.setattr(model_module, "HEAD_CHUNK", size)
        session = make_session(options)
        shaken(session.model, 0.02)
        pool = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL).next_pool(2)
        rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, 0, range(2), 3))
        hidden = session.reference_hidden(session.pay(rows, pool))
        advantages = torch.arange(18.0).view(6, 3) / 10 - 0.8
        batch = UpdateBatch(rows=rows, advantages=advantages, reference_hidden=hidden, num_query_tokens=36)
        loss = session.objective(session.model, batch, session.config.objective.kl, 1.0).loss
        return loss, torch.autograd.grad(loss, list(session.model.named_trainable().values()))

    whole, gradient = loss_and_gradient(2**24)
    in_chunks, same = loss_and_gradient(64 * 5)  # 36 tokens in chunks of 5, the last of 1
    torch.testing.assert_close(in_chunks, whole)
    torch.testing.assert_close(same, gradient, atol=1e-6, rtol=1e-4)
