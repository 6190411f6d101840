"""Hashing embedder: the words of a text, hashed into a vector. Lexical, deterministic, no model."""

import functools
import hashlib
import re

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.model import LanguageModel

_WORD = re.compile(r"\w+")


class HashingEmbedder:
    """Unit-length bag of lower-cased words: the score is the cosine of word counts, up to hash collisions."""

    depends_on_policy = False

    def __init__(self, config: EmbedderConfig, model: LanguageModel) -> None:
        self._dimensions, self._decode_rows = config.dimensions or 4096, model.decode_rows
        self.identity = f"hashing/words/{self._dimensions}/unit"

    def embed_queries(self, ids: Int[Tensor, "B Q"], mask: Bool[Tensor, "B Q"]) -> Float[Tensor, "B 1 D"]:
        """Embed queries."""
        return self._embed(ids, mask)

    def embed_keys(self, ids: Int[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> Float[Tensor, "M 1 D"]:
        """Embed keys, the same way as queries."""
        return self._embed(ids, mask)

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        rows, columns, signs = [], [], []
        for row, text in enumerate(self._decode_rows(ids, mask)):
            for word in _WORD.findall(text.lower()):
                number, sign = _place(word)
                rows.append(row)
                columns.append(number % self._dimensions)
                signs.append(sign)
        vectors = torch.zeros(len(ids), self._dimensions)
        vectors.index_put_((torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)),
                           torch.tensor(signs), accumulate=True)  # fmt: skip
        norms = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return (vectors / norms)[:, None].to(ids.device)


@functools.lru_cache(maxsize=65_536)
def _place(word: str) -> tuple[int, float]:
    """Return a number and a sign for the word, from a hash that is the same in every process."""
    digest = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
    return digest >> 1, 1.0 if digest & 1 else -1.0
