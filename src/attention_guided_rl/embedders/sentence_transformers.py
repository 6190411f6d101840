"""Sentence-transformers embedder: a local encoder by name or folder (extra `sentence-transformers`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.embedders.text import CANARIES, STORE, CutTexts, TextEmbedder, check_canaries
from attention_guided_rl.errors import ConfigError, UnsafeError
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network
from attention_guided_rl.plain_data import parse_json

DEFAULT_BATCH = 64


class SentenceTransformersEmbedder(TextEmbedder):
    """Embedder over a sentence-transformers model; the canaries notice another model under the same name."""

    def __init__(self, config: EmbedderConfig, network: Network, model: LanguageModel) -> None:
        encoder = SentenceTransformersEncoder(config, offline=network.config.offline)
        check_canaries(encoder, VectorStore(network.cache(STORE)))
        super().__init__(encoder, network, model.decode)

    @staticmethod
    def preflight(config: EmbedderConfig, network: Network) -> None:
        """Load the encoder and let it go: it is small beside the language model, which loads after it."""
        encoder = SentenceTransformersEncoder(config, offline=network.config.offline)
        check_canaries(encoder, VectorStore(network.cache(STORE)))


class SentenceTransformersEncoder:
    """A model in this process. Query and document prompts are the model's own unless configured."""

    def __init__(self, config: EmbedderConfig, *, offline: bool) -> None:
        assert config.model is not None  # the configuration refuses that
        self._model: Any = _load(config, offline=offline)
        if hasattr(self._model.tokenizer, "split_special_tokens"):
            self._model.tokenizer.split_special_tokens = True  # "[SEP]" in a text is text
        self._dimensions = config.dimensions
        self._batch = config.batch_texts or DEFAULT_BATCH
        folder = Path(config.model)
        name = folder.resolve().name if folder.is_dir() else f"{config.model}@{config.revision or 'newest'}"
        self.identity = f"sentence-transformers/{name}/{config.dimensions or 'native'}/unit"
        prompts = self._model.prompts
        own = {role: prompts.get(role) or "" for role in ("query", "document")}
        self.query_prompt = own["query"] if config.query_prompt is None else config.query_prompt
        self.key_prompt = own["document"] if config.key_prompt is None else config.key_prompt
        self._longest: int | None = self._model.max_seq_length
        self._cut_texts = CutTexts(f"{self._longest} tokens")
        self.encode(CANARIES[:1])  # which checks the dimensions

    @property
    def num_cut_texts(self) -> int:
        """Texts of which only the beginning was embedded."""
        return self._cut_texts.count

    def batches(self, texts: Sequence[str]) -> Iterator[Sequence[str]]:
        """Divide texts into batches of `embedder.batch_texts`."""
        for start in range(0, len(texts), self._batch):
            yield texts[start : start + self._batch]

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "M D"]:
        """Encode one batch."""
        self._cut_texts.note(sum(map(self._is_cut, texts)))
        vectors = self._model.encode(
            list(texts), prompt="", batch_size=self._batch, normalize_embeddings=True, show_progress_bar=False
        )
        if self._dimensions not in (None, vectors.shape[1]):
            raise ConfigError(f"embedder.dimensions: {self._dimensions}, but the model has {vectors.shape[1]}")
        return np.asarray(vectors, np.float32)

    def _is_cut(self, text: str) -> bool:
        longest = self._longest
        if longest is None or len(text.encode()) + 2 <= longest:  # no tokenizer makes more of it
            return False
        tokenizer = self._model.tokenizer
        return len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) > longest


def _load(config: EmbedderConfig, *, offline: bool) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(
            "embedder.kind: sentence_transformers needs a package: "
            "pip install 'attention-guided-rl[sentence-transformers]'"
        ) from None
    name = str(config.model)
    _refuse_code(Path(name))
    device = None if config.device == "auto" else config.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("embedder.device: cuda asked for, but PyTorch sees no GPU")
    try:
        return SentenceTransformer(
            name,
            revision=config.revision,
            device=device,
            truncate_dim=config.dimensions,
            local_files_only=offline,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            raise UnsafeError(f"embedder.model: {name!r} wants to run code of its own; refused") from error
        raise ConfigError(f"embedder.model: cannot load {name!r} as a sentence-transformers model: {reason}") from error


def _refuse_code(folder: Path) -> None:
    """Refuse a folder whose modules are not the library's own: naming a class is a way to run it."""
    try:
        modules = parse_json((folder / "modules.json").read_bytes())
        kinds = [str(module["type"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return  # no such file, or one that the loading proper will complain about
    foreign = [kind for kind in kinds if not kind.startswith("sentence_transformers.")]
    if foreign:
        raise UnsafeError(f"embedder.model: {folder.name!r} wants to run {foreign[0]!r}; refused")
