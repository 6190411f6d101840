"""Text embedder: what every encoder of texts, remote or local, has in common.

In: token ids of queries and keys. Out: unit vectors. Ids are decoded, each distinct text is looked up in the vector
store, and only what is missing goes to the encoder, in as few batches as it allows. Whitespace is never sent.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.errors import CheckpointError, RemoteError
from attention_guided_rl.network import Network

STORE = "embeddings.sqlite"
CLAIM_WAIT = 0.02  # seconds between looks at what another process is computing
QUIET_WAIT = 5.0  # seconds of that before a word is said about it
MIN_CANARY_COSINE = 0.999
MAX_TAIL_COSINE = 0.9999  # services answer a little differently each time: about 1e-5 off
_LONG = "The keeper of the tower counts the boats, writes the number down, and closes the book for the night; " * 4
CANARIES = (
    "The mill stands by the river.",
    "Query: which guild keeps the silver seal?",
    "1 2 3 4 5 6 7 8 9 10",
    "Ein Garten hinter der Mauer.",
    "red, green, blue; north, south",
    "def read(order): return [values[i] for i in order]",
    _LONG + "It is the first of May.",
    _LONG + "It snows on the harbour.",
)
"""Texts embedded at every start: other vectors than last time mean another model under the same name. The last two
differ only at the end, so equal vectors mean that the server cuts its input short without saying so."""

logger = logging.getLogger(__name__)


@runtime_checkable
class TextEncoder(Protocol):
    """Texts to vectors. What it returns is stored, so it is asked once per text."""

    identity: str
    """Endpoint or library, model, dimensions, normalisation: vectors of another identity are never mixed in."""
    query_prompt: str
    """Text put before each query."""
    key_prompt: str
    """Text put before each key."""

    def batches(self, texts: Sequence[str]) -> Iterable[Sequence[str]]:
        """Divide texts into batches that `encode` takes at once."""
        ...

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "M D"]:
        """Return one finite unit vector for each text, in order."""
        ...


class TextEmbedder:
    """An Embedder over a TextEncoder and the vector store."""

    depends_on_policy = False

    def __init__(self, encoder: TextEncoder, network: Network, decode: Callable[[list[int]], str]) -> None:
        """Open the store.

        Raises:
            RemoteError: the encoder has never been asked for its canaries, so nothing is known of it.
        """
        self.identity = encoder.identity
        self._encoder, self._network, self._decode = encoder, network, decode
        self._store = VectorStore(network.cache(STORE))
        dimensions = known_dimensions(self._store, encoder.identity)
        if dimensions is None:
            raise RemoteError(f"embedder: {encoder.identity} has not answered yet; run once without --offline")
        self._dimensions = dimensions

    @property
    def num_cut_texts(self) -> int:
        """Texts of this start that were too long for the encoder, so that only their beginning is embedded."""
        return int(getattr(self._encoder, "num_cut_texts", 0))

    def embed_queries(self, ids: Int[Tensor, "B Q"], mask: Bool[Tensor, "B Q"]) -> Float[Tensor, "B 1 D"]:
        """Embed queries in one batched call; whitespace gives the zero vector."""
        return self._embed(ids, mask, self._encoder.query_prompt)

    def embed_keys(self, ids: Int[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> Float[Tensor, "M 1 D"]:
        """Embed keys."""
        return self._embed(ids, mask, self._encoder.key_prompt)

    def _embed(self, ids: Tensor, mask: Tensor, prompt: str) -> Tensor:
        rows = zip(ids.tolist(), mask.tolist(), strict=True)
        texts = [self._decode([token for token, real in zip(*row, strict=True) if real]) for row in rows]
        vectors = self._vectors(list(dict.fromkeys(prompt + text for text in texts if text.strip())))
        nothing = np.zeros(self._dimensions, np.float32)
        chosen = [vectors[prompt + text] if text.strip() else nothing for text in texts]
        return torch.from_numpy(np.stack(chosen))[:, None].to(ids.device)

    def _vectors(self, texts: list[str]) -> dict[str, Float32[np.ndarray, " _"]]:
        """Look texts up and have the missing ones encoded; what another process is at, is waited for."""
        found = self._store.get(self.identity, texts)
        silent_until = time.monotonic() + QUIET_WAIT
        try:
            while missing := [text for text in texts if text not in found]:
                for batch in self._encoder.batches(missing):
                    mine = self._store.claim(self.identity, batch, seconds=2 * self._network.config.deadline_s)
                    if mine:
                        found |= self._store.put(self.identity, _encoded(self._encoder, mine, self._dimensions))
                others = [text for text in missing if text not in found]
                found |= self._store.get(self.identity, others)
                if left := sum(text not in found for text in others):
                    if time.monotonic() > silent_until:
                        logger.warning("waiting for %d texts that another process is having embedded", left)
                        silent_until = float("inf")
                    time.sleep(CLAIM_WAIT)
        except BaseException:
            self._store.release()
            raise
        return found


class CutTexts:
    """What an encoder leaves out of texts that are too long for it: said once, counted always."""

    def __init__(self, limit: str) -> None:
        self._limit = limit
        self.count = 0

    def note(self, num_texts: int) -> None:
        """Count texts of which only the beginning is embedded."""
        if num_texts and not self.count:
            warnings.warn(
                f"embedder: {num_texts} texts are longer than {self._limit}, and only their beginning is embedded; "
                "more may follow, of which nothing is said",
                stacklevel=2,
            )
        self.count += num_texts
        if num_texts:
            logger.info("%d texts cut to %s so far", self.count, self._limit)


def _encoded(
    encoder: TextEncoder, batch: Sequence[str], dimensions: int | None = None
) -> dict[str, Float32[np.ndarray, " _"]]:
    """Encode a batch; raise RemoteError for vectors that must not be stored."""
    vectors = encoder.encode(batch)
    if not np.isfinite(vectors).all() or dimensions not in (None, vectors.shape[1]):
        raise RemoteError(f"embedder: {encoder.identity} gave vectors that are not finite, or of another length")
    return dict(zip(batch, vectors, strict=True))


def check_canaries(encoder: TextEncoder, store: VectorStore) -> None:
    """Embed the canaries afresh and compare them with those of earlier starts.

    Raises:
        CheckpointError: the model behind this name has changed, so stored vectors do not go with new ones.
        RemoteError: the service cuts its input short.
    """
    fresh = {text: vector for batch in encoder.batches(CANARIES) for text, vector in _encoded(encoder, batch).items()}
    if float(fresh[CANARIES[-1]] @ fresh[CANARIES[-2]]) > MAX_TAIL_COSINE:
        raise RemoteError(f"embedder: {encoder.identity} gives one vector for texts that differ at the end only")
    stored = store.put(_canaries_of(encoder.identity), fresh)
    same_size = all(len(stored[text]) == len(fresh[text]) for text in CANARIES)
    cosine = min(float(stored[text] @ fresh[text]) for text in CANARIES) if same_size else 0.0
    if cosine < MIN_CANARY_COSINE:
        raise model_changed(encoder.identity, f"cosine {cosine:.3f} to its earlier vectors for the same texts")


def known_dimensions(store: VectorStore, identity: str) -> int | None:
    """Return the length of an encoder's vectors, known since its first start; None: it has not had one."""
    canaries = store.get(_canaries_of(identity), CANARIES)
    return len(next(iter(canaries.values()))) if canaries else None


def model_changed(identity: str, how: str) -> CheckpointError:
    """Return the error of an encoder that is not the one whose vectors are stored."""
    return CheckpointError(
        f"embedder: the model behind {identity} has changed ({how}); earlier runs cannot go on with it, and a new run "
        "needs another network.cache"
    )


def _canaries_of(identity: str) -> str:
    return f"{identity}/canaries"
