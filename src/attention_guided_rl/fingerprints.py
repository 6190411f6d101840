"""Fingerprints: what a checkpoint was made with, so that a base model that changed behind its name is noticed."""

import hashlib
import json

import torch

from attention_guided_rl.model import LanguageModel

_SAMPLED = 64  # elements of each tensor: enough for another model, not for a single changed weight


@torch.no_grad()
def fingerprints(model: LanguageModel) -> dict[str, str]:
    """Return SHA-256 digests of the base model (a sample of every frozen tensor's bits) and of the tokenizer."""
    weights, tokenizer = hashlib.sha256(), model.tokenizer
    for parameter in model.named_frozen().values():
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(_SAMPLED, flat.numel()), device=flat.device).long()
        weights.update(str(tuple(parameter.shape)).encode())
        weights.update(flat[places].cpu().view(torch.uint8).numpy().tobytes())
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, sorted(tokenizer.all_special_ids)]
    return {
        "the base model": weights.hexdigest(),
        "the tokenizer": hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest(),
    }
