"""Embedders: what turns queries and keys into vectors. `EMBEDDERS` is the table; `package.module:name` works too."""

from collections.abc import Callable

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.attention import AttentionEmbedder
from attention_guided_rl.embedders.hashing import HashingEmbedder
from attention_guided_rl.environment import Embedder
from attention_guided_rl.model import LanguageModel

EMBEDDERS: dict[str, Callable[[EmbedderConfig, LanguageModel], Embedder]] = {
    "attention": AttentionEmbedder,
    "hashing": HashingEmbedder,
}
