"""Frozen layers by oneDNN give what PyTorch's own give, and only where that was measured."""

import pytest
import torch
from torch import nn

from attention_guided_rl import onednn
from attention_guided_rl.config import ModelConfig
from attention_guided_rl.loading import prepare
from attention_guided_rl.onednn import OneDnnLinear, pack, use_onednn
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.rl_agent import AgentState, compute_advantages
from attention_guided_rl.update import apply_update, make_optimizer

pytestmark = pytest.mark.skipif(not onednn.available(), reason="oneDNN is for x86")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)


def layers(bias=True):
    """A layer by oneDNN and PyTorch's own with the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias)).requires_grad_(False)
    plain = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    plain.load_state_dict(model[0].state_dict())
    use_onednn(model)
    assert type(model[0]) is OneDnnLinear
    return model[0], plain


INPUTS = {
    "one row": lambda: torch.randn(1, 48),
    "rows": lambda: torch.randn(9, 48),
    "no row": lambda: torch.randn(0, 48),
    "rows of tokens": lambda: torch.randn(3, 700, 48),
    "one number after another in a column": lambda: torch.randn(48, 9).t(),
    "a row repeated": lambda: torch.randn(1, 48).expand(9, 48),
    "a part of each row": lambda: torch.randn(9, 60)[:, 5:53],
    "a vector": lambda: torch.randn(48),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_output_and_gradient_are_those_of_pytorchs_layer(kind, bias):
    layer, plain = layers(bias)
    x = INPUTS[kind]().requires_grad_()
    y = x.detach().clone().requires_grad_()
    output, expected = layer(x), plain(y)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    weights = torch.randn(output.shape)
    (gradient,) = torch.autograd.grad((weights * output).sum(), x)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), y)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)  # a gradient that is one number repeated
    torch.testing.assert_close(gradient, torch.ones(output.shape) @ plain.weight, atol=1e-5, rtol=0)


def test_the_output_is_no_view_which_would_be_dear_to_add_to():
    layer, _ = layers()
    assert layer(torch.randn(9, 48, requires_grad=True))._base is None


@pytest.mark.parametrize("kind", INPUTS)
def test_packed_weights_are_used_in_place_of_its_own(kind):
    layer, plain = layers()
    other = torch.randn(80, 48)
    x = INPUTS[kind]()
    with torch.no_grad():
        layer.packed = pack(other)
        torch.testing.assert_close(layer(x), x @ other.t() + plain.bias, atol=1e-5, rtol=0)
        layer.packed = None
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=0)


def test_frozen_layers_of_32_bits_alone_are_changed(causal_lm, word_tokenizer, monkeypatch):
    def count(**options):
        dtype = options.pop("dtype", torch.float32)
        model = prepare(causal_lm("llama").to(dtype), word_tokenizer(), ModelConfig(name="llama", **options))
        everything = [*model._policy.modules(), *(model._frozen_copy or nn.Identity()).modules()]
        found = [module for module in everything if isinstance(module, OneDnnLinear)]
        assert not any(module.weight.requires_grad for module in found)
        return len(found)

    assert count() == 2 * 7 + 1  # of each layer q, k, v, o, gate, up and down; and the head
    assert count(dtype=torch.bfloat16) == 0
    assert count(adapter="full") == 0
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 40 * 32)
    assert count() == 2 * 3 + 1  # gate, up and down, and the head
    monkeypatch.setattr(onednn, "available", lambda: False)
    assert count() == 0


def test_sampling_packs_every_weight_and_leaves_nothing_behind(make_model, shaken):
    model = shaken(make_model("llama"))
    found = [module for module in model.peft_model.modules() if isinstance(module, OneDnnLinear)]
    with model.folded():
        assert all(module.packed is not None for module in found)
        with model.reference():
            assert all(module.packed is None for module in found)
    assert all(module.packed is None for module in found)


def test_an_update_is_that_of_pytorchs_layers(make_session, shaken, monkeypatch):
    def update(num_layers):
        session = make_session()
        assert sum(isinstance(m, OneDnnLinear) for m in session.model.peft_model.modules()) == num_layers
        shaken(session.model)
        pool = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL).next_pool(2)
        rows = session.rollout(pool, session.uniforms(Purpose.TRAINING, 0, range(2), 3))
        paid = session.pay(rows, pool)
        advantages, _ = compute_advantages(paid.rewards.rewards, session.config.objective, AgentState(), 3)
        optimizer = make_optimizer(session, session.config.optimizer)
        found = []
        parameters = session.model.named_trainable().values()
        optimizer.register_step_pre_hook(lambda *_: found.append(torch.cat([p.grad.flatten() for p in parameters])))
        assert apply_update(session, optimizer, paid, pool, advantages, 0).stepped
        return rows, paid.rewards.rewards, found[0]

    rows, rewards, gradient = update(2 * 7 + 1)
    monkeypatch.setattr(onednn, "available", lambda: False)
    other_rows, other_rewards, other_gradient = update(0)
    assert torch.equal(rows.ids, other_rows.ids)
    torch.testing.assert_close(rows.sampled_logprobs, other_rows.sampled_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rewards, other_rewards, atol=1e-5, rtol=0)
    assert (gradient - other_gradient).norm() <= 1e-4 * gradient.norm()
