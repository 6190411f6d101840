"""Embedders: what turns queries and keys into vectors. `EMBEDDERS` is the table; `package.module:name` works too."""

from collections.abc import Callable

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.attention import AttentionEmbedder
from attention_guided_rl.embedders.hashing import HashingEmbedder
from attention_guided_rl.embedders.openai import OpenAIEmbedder
from attention_guided_rl.embedders.sentence_transformers import SentenceTransformersEmbedder
from attention_guided_rl.environment import Embedder
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network

EMBEDDERS: dict[str, Callable[[EmbedderConfig, Network, LanguageModel], Embedder]] = {
    "attention": lambda config, network, model: AttentionEmbedder(config, model),
    "hashing": lambda config, network, model: HashingEmbedder(config, model),
    "openai": OpenAIEmbedder,
    "sentence_transformers": SentenceTransformersEmbedder,
}
