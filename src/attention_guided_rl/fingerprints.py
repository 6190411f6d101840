"""Fingerprints: what a checkpoint was made with, so that a base model that changed behind its name is noticed."""

import hashlib
import json

import torch
from jaxtyping import Int
from torch import Tensor

from attention_guided_rl.model import LanguageModel

_SAMPLED = 64  # elements of each tensor: enough for another model, not for a single changed weight


@torch.no_grad()
def fingerprints(model: LanguageModel) -> dict[str, str]:
    """Return SHA-256 digests of the base model (a sample of every frozen tensor's bits) and of the tokenizer."""
    weights, tokenizer = hashlib.sha256(), model.tokenizer
    for parameter in model.named_frozen().values():
        flat = parameter.detach().flatten()
        weights.update(str(tuple(parameter.shape)).encode())
        weights.update(flat[sampled_places(flat.numel()).to(flat.device)].cpu().view(torch.uint8).numpy().tobytes())
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, sorted(tokenizer.all_special_ids)]
    return {
        "the base model": weights.hexdigest(),
        "the tokenizer": hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest(),
    }


def sampled_places(count: int) -> Int[Tensor, " M"]:
    """Return places from the first to the last of so many elements; in whole numbers, for float32 counts to 2²⁴."""
    sampled = min(_SAMPLED, count)
    return torch.arange(sampled) * (count - 1) // max(1, sampled - 1)
