"""Parts of a configuration with a fault in them, as `planted_faults:name`: what `agrl doctor` must notice."""

import contextlib
from dataclasses import replace

import torch

from attention_guided_rl.model import LanguageModel
from attention_guided_rl.objective import policy_gradient
from attention_guided_rl.records import LossOutput, Rewards
from attention_guided_rl.reward import plain


class ConstantEmbedder:
    """Every text has the same vector, so every choice is uniform."""

    identity, depends_on_policy = "constant", False

    def __init__(self, config, network, model):
        pass

    def embed_queries(self, ids, mask):
        return torch.ones(len(ids), 1, 3)

    embed_keys = embed_queries


def detached(model, batch, kl, temperature) -> LossOutput:
    """The policy's part of the loss has lost its graph."""
    whole = policy_gradient(model, batch, kl, temperature)
    penalty = policy_gradient(model, replace(batch, advantages=0 * batch.advantages), kl, temperature).loss
    return LossOutput(loss=(whole.loss - penalty).detach() + penalty, metrics=whole.metrics)


def without_kl(model, batch, kl, temperature) -> LossOutput:
    """β is not heeded."""
    return policy_gradient(model, batch, type(kl)(coefficient=0.0), temperature)


def without_a_graph(model, batch, kl, temperature) -> LossOutput:
    with torch.no_grad():
        return policy_gradient(model, batch, kl, temperature)


def of_wrong_sign(model, batch, kl, temperature) -> LossOutput:
    """What was good is made less likely."""
    return policy_gradient(model, replace(batch, advantages=-batch.advantages), kl, temperature)


def heedless(model, batch, kl, temperature) -> LossOutput:
    """Whatever was done is made more likely."""
    return policy_gradient(model, replace(batch, advantages=torch.ones_like(batch.advantages)), kl, temperature)


def colder(model, batch, kl, temperature) -> LossOutput:
    """Learns at another temperature than was sampled at."""
    return policy_gradient(model, batch, kl, temperature / 2)


def of_the_next_step(inputs) -> Rewards:
    """Reward t is that of step t + 1."""
    return Rewards(raw=plain(inputs).raw.roll(-1, 1), baseline=torch.zeros_like(inputs.raw))


def constant(inputs) -> Rewards:
    return Rewards(raw=torch.ones_like(inputs.raw), baseline=torch.zeros_like(inputs.raw))


def infinite(inputs) -> Rewards:
    return Rewards(raw=inputs.raw, baseline=torch.full_like(inputs.raw, torch.inf))


class FreshCopy(LanguageModel):
    """The reference is what the policy is now."""

    @contextlib.contextmanager
    def reference(self):
        yield


class DropoutStaysOn(LanguageModel):
    """An update forgets to switch the adapter's dropout off again."""

    @contextlib.contextmanager
    def adapter_dropout(self):
        for name, module in self.peft_model.named_modules():
            if "lora_dropout" in name:
                module.train()
        yield


class SeesPadding(LanguageModel):
    """Padding is attended to like text."""

    def hidden(self, ids, role, positions, cache=None):
        return super().hidden(ids, torch.zeros_like(role), positions, cache)
