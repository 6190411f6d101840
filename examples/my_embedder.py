"""Two embedders of your own: character trigrams, computed on the spot, or kept in the vector store."""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.embedders.text import STORE, TextEmbedder, check_canaries
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network


def trigrams(texts: Sequence[str], dimensions: int) -> np.ndarray:
    """Count the trigrams of each text in places given by a hash; unit length, but white space gives zeros."""
    counts = np.zeros((len(texts), dimensions), np.float32)
    for row, text in enumerate(texts):
        padded = f" {text.strip().lower()} "
        for start in range(len(padded) - 2):
            counts[row, zlib.crc32(padded[start : start + 3].encode()) % dimensions] += 1
    return counts / np.linalg.norm(counts, axis=1, keepdims=True).clip(1)


class TrigramEmbedder:
    """The whole interface: two attributes and two methods."""

    depends_on_policy = False

    def __init__(self, config: EmbedderConfig, network: Network, model: LanguageModel) -> None:
        self._dimensions, self._decode = config.dimensions or 4096, model.decode
        self.identity = f"trigrams/{self._dimensions}/unit"

    def embed_queries(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Turn token ids (B, Q) and their mask into vectors (B, 1, D): one head."""
        texts = [self._decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
        return torch.from_numpy(trigrams(texts, self._dimensions))[:, None].to(ids.device)

    embed_keys = embed_queries


class TrigramEncoder:
    """The same as a TextEncoder: texts in, unit vectors out. Blank texts do not reach it, others once."""

    query_prompt = key_prompt = ""

    def __init__(self, config: EmbedderConfig) -> None:
        self._dimensions, self._batch = config.dimensions or 4096, config.batch_texts or 256
        self.identity = f"stored-trigrams/{self._dimensions}/unit"

    def batches(self, texts: Sequence[str]) -> Iterable[Sequence[str]]:
        """Divide texts into what `encode` takes at once."""
        return (texts[start : start + self._batch] for start in range(0, len(texts), self._batch))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return a finite unit vector for each text, in order."""
        return trigrams(texts, self._dimensions)


def stored_trigrams(config: EmbedderConfig, network: Network, model: LanguageModel) -> TextEmbedder:
    """Make the embedder over the encoder; the canaries notice when vectors in the store are of another encoder."""
    encoder = TrigramEncoder(config)
    check_canaries(encoder, VectorStore(network.cache(STORE)))
    return TextEmbedder(encoder, network, model.decode)
