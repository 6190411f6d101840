"""Vectors as text-embedding-ada-002 gives them: of unit length, and no two with an inner product below 0.75."""

import torch
from torch import Tensor

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.hashing import HashingEmbedder
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network

SHARED = 0.75  # of the squared length lies along one direction that all texts have in common


class NarrowEmbedder:
    """The hashing embedder, its vectors pressed into a cone: score = 0.75 + 0.25 × the cosine of word counts."""

    identity = "narrow"
    depends_on_policy = False

    def __init__(self, config: EmbedderConfig, network: Network, model: LanguageModel) -> None:
        self._words = HashingEmbedder(config, model)

    def embed_queries(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _pressed(self._words.embed_queries(ids, mask))

    def embed_keys(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _pressed(self._words.embed_keys(ids, mask))


def _pressed(vectors: Tensor) -> Tensor:
    common = torch.full_like(vectors[..., :1], SHARED**0.5)
    return torch.cat([common, (1 - SHARED) ** 0.5 * vectors], -1)
