"""OpenAI embedder: text-embedding-ada-002, its successors, and any server with the same interface.

In: texts. Out: unit vectors, each checked and put in its place by the index in the reply. The key comes from
OPENAI_API_KEY only; the address from `embedder.base_url`, then OPENAI_BASE_URL, then OpenAI's.
"""

import math
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import numpy as np
from jaxtyping import Float32

from attention_guided_rl.config import EmbedderConfig
from attention_guided_rl.embedders.cache import NANO, Ledger, VectorStore
from attention_guided_rl.embedders.text import (
    STORE,
    CutTexts,
    TextEmbedder,
    check_canaries,
    known_dimensions,
    model_changed,
)
from attention_guided_rl.errors import AgrlError, ConfigError, CredentialsError, RemoteError, SpendError, UnsafeError
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network, Transient, is_loopback, retry_after, web_address
from attention_guided_rl.secrets import redact

DEFAULT_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "text-embedding-ada-002"
MODELS = {  # at OpenAI: dimensions, dollars per million tokens
    "text-embedding-ada-002": (1536, 0.10),
    "text-embedding-3-small": (1536, 0.02),
    "text-embedding-3-large": (3072, 0.13),
}
_PLAIN_HEADERS = {"host", "content-type", "content-length", "accept", "accept-encoding", "connection", "user-agent"}
MAX_TEXTS = 2048  # of a request
MAX_TEXT_TOKENS = 8192
MARKS = 2  # tokens that some services put around each text, such as [CLS] and [SEP]
MAX_REQUEST_TOKENS = 300_000
MAX_MALFORMED = 5  # unusable replies to one request; a service that gives more is broken, not busy


class OpenAIEmbedder(TextEmbedder):
    """Embedder over an OpenAI-compatible service."""

    def __init__(self, config: EmbedderConfig, network: Network, model: LanguageModel) -> None:
        encoder = OpenAIEncoder(config, network)
        self._ledger = encoder.ledger
        super().__init__(encoder, network, model.decode)

    @property
    def spent_usd(self) -> float:
        """Dollars that this run has spent or reserved so far."""
        return self._ledger.spent_usd

    @staticmethod
    def preflight(config: EmbedderConfig, network: Network) -> None:
        """Find out before anything large is loaded whether the service may be used and answers as it did."""
        host = service_address(config).host
        if network.private_text and not is_loopback(host) and not config.send_local_text:
            raise UnsafeError(
                f"the corpus is on this machine, and its keys would be sent to {host}; to allow that, set "
                "embedder.send_local_text: true (agrl train --dry-run shows how much it is)"
            )
        encoder = OpenAIEncoder(config, network)
        if not network.config.offline:
            check_canaries(encoder, encoder.store)

    @staticmethod
    def price(config: EmbedderConfig) -> tuple[str, float]:
        """Return the host and the price in dollars per million tokens."""
        url = service_address(config)
        return url.host, _price(config, url)


class OpenAIEncoder:
    """One model at one service."""

    def __init__(self, config: EmbedderConfig, network: Network) -> None:
        url = service_address(config)
        self.host = url.host
        self._model = config.model or DEFAULT_MODEL
        self._asked_dimensions = config.dimensions
        self._max_texts = min(config.batch_texts or MAX_TEXTS, MAX_TEXTS)
        place = f"{url.host}{'' if url.port is None else f':{url.port}'}{url.path.rstrip('/')}"
        self.identity = f"openai/{place}/{self._model}/{config.dimensions or 'native'}/unit"
        self.query_prompt, self.key_prompt = config.query_prompt or "", config.key_prompt or ""
        self._nano_usd_per_token = math.ceil(_price(config, url) * NANO / 1_000_000)
        self._network = network
        self.store = VectorStore(network.cache(STORE))
        known = MODELS[self._model][0] if _is_openai(url) and self._model in MODELS else None
        self._stored_dimensions = known_dimensions(self.store, self.identity)
        self._dimensions = config.dimensions or known or self._stored_dimensions  # None until the first reply
        must_be_known = network.goes_on and self._nano_usd_per_token > 0
        self.ledger = Ledger(self.store, network.account, config.max_usd, opened_before=must_be_known)
        http_client = network.client(str(url), trusted=True, redirects_to=())
        if _is_in_the_clear(url):
            http_client.event_hooks = {"request": [_without_secrets]}
        weakref.finalize(self, http_client.close)
        self._cut_texts = CutTexts(f"{MAX_TEXT_TOKENS - MARKS:,} bytes")
        from openai import OpenAI  # half a second, which only this embedder has to wait

        self._client = OpenAI(
            api_key="none" if network.config.offline else _key(url),
            base_url=str(url),
            max_retries=0,  # repetition is ours: with a deadline, a ledger and checks of what came back
            timeout=httpx2.Timeout(network.config.timeout_s, connect=5.0),
            http_client=http_client,
        )

    @property
    def num_cut_texts(self) -> int:
        """Texts of which only the beginning was embedded."""
        return self._cut_texts.count

    def batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Divide texts by the service's limits on texts and tokens of a request."""
        batch: list[str] = []
        tokens = 0
        for text in texts:
            more = max_tokens(text)
            if batch and (len(batch) == self._max_texts or tokens + more > MAX_REQUEST_TOKENS):
                yield batch
                batch, tokens = [], 0
            batch.append(text)
            tokens += more
        if batch:
            yield batch

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "M D"]:
        """Ask for the vectors of one batch, as often as it takes.

        Raises:
            RemoteError, CredentialsError, SpendError: the service cannot be used; what came before is stored.
            CheckpointError: twice in a row its vectors have the same length, which is not that of the stored ones.
        """
        self._network.require_online(f"a text for {self.identity}")
        self._cut_texts.note(sum(_cut(text) != text for text in texts))
        num_malformed = 0
        last_length: int | None = None

        def attempt() -> Float32[np.ndarray, "M D"]:
            nonlocal num_malformed, last_length
            try:
                return self._ask(texts)
            except _MalformedError as error:
                num_malformed += 1
                before, last_length = last_length, error.length
                if self._stored_dimensions and error.length and error.length == before:  # no accident
                    raise model_changed(
                        self.identity, f"vectors of {error.length} dimensions instead of {self._stored_dimensions}"
                    ) from error
                if num_malformed == MAX_MALFORMED:
                    raise RemoteError(f"{self._model} at {self.host}: {error}, {MAX_MALFORMED} times") from error
                raise Transient(str(error)) from error

        return self._network.retry(f"embeddings of {self._model} at {self.host}", attempt)

    def _ask(self, texts: Sequence[str]) -> Float32[np.ndarray, "M D"]:
        """Send one request, with the most that it can cost set aside before."""
        import openai

        bound = sum(map(max_tokens, texts)) * self._nano_usd_per_token
        entry = self.ledger.reserve(bound)
        options: dict[str, Any] = {} if self._asked_dimensions is None else {"dimensions": self._asked_dimensions}
        try:
            reply = self._client.embeddings.create(input=[_cut(text) for text in texts], model=self._model, **options)
        except openai.APIStatusError as error:
            if error.status_code not in (502, 504):  # a refusal is not billed; a gateway knows not what it lost
                self.ledger.settle(entry, 0)
            raise self._refusal(error) from None  # whose text may hold the key, and tracebacks show it
        except openai.APIConnectionError as error:  # a timeout may have been billed: what was reserved stays
            if isinstance(error.__cause__, AgrlError):
                raise error.__cause__ from None
            hint = ""
            if isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout):
                self.ledger.settle(entry, 0)
                hint = "; check the connection and embedder.base_url"
            raise Transient(f"no answer ({redact(str(error.__cause__ or error))}){hint}") from error
        except (
            openai.OpenAIError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise _MalformedError(f"not a list of embeddings ({type(error).__name__})") from error
        vectors = _checked(reply, len(texts), self._dimensions)
        self._dimensions = vectors.shape[1]
        used = getattr(getattr(reply, "usage", None), "total_tokens", None)
        if isinstance(used, int) and 0 < used * self._nano_usd_per_token <= bound:
            self.ledger.settle(entry, used * self._nano_usd_per_token)
        return vectors

    def _refusal(self, error: Any) -> Exception:
        """Return what an HTTP status other than success means."""
        status, service = error.status_code, f"{self._model} at {self.host}"
        said = redact(" ".join(str(error.message).split()))[:200]
        if error.code == "insufficient_quota" or error.type == "insufficient_quota":
            return SpendError(f"{service}: the quota of this account is used up ({said}); add credit, then resume")
        if status in (401, 403):
            return CredentialsError(f"{service}: refused the key ({status}: {said}); set OPENAI_API_KEY to a valid one")
        if status == 404:
            return CredentialsError(
                f"{service}: not there, or not open to this key ({said}); check embedder.model, and embedder.base_url, "
                "which mostly ends in /v1"
            )
        if status in (408, 409, 429) or status >= 500:
            return Transient(f"status {status} ({said})", retry_after(error.response.headers))
        return RemoteError(f"{service}: refused the request ({status}: {said})")


class _MalformedError(Exception):
    """A reply that does not hold the vectors asked for. `length`: theirs, where all have the same and it is wrong."""

    def __init__(self, cause: str, length: int | None = None) -> None:
        super().__init__(cause)
        self.length = length


def service_address(config: EmbedderConfig) -> httpx2.URL:
    """Return the address of the service."""
    return web_address(config.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL)


def max_tokens(text: str) -> int:
    """Return what no tokenizer over bytes exceeds: the number of bytes of a text as it is sent, and two marks."""
    return len(_cut(text).encode()) + MARKS


def _cut(text: str) -> str:
    """Return the text, or of a longer one as much as surely fits."""
    most, data = MAX_TEXT_TOKENS - MARKS, text.encode()
    return text if len(data) <= most else data[:most].decode(errors="ignore")


def _price(config: EmbedderConfig, url: httpx2.URL) -> float:
    if config.usd_per_million_tokens is not None:
        return config.usd_per_million_tokens
    if not _is_openai(url):
        if config.max_usd is not None and not is_loopback(url.host):
            raise ConfigError(
                f"embedder.usd_per_million_tokens: set the price at {url.host}, which is not known here, so that "
                "embedder.max_usd can hold (0: it is free)"
            )
        return 0.0
    model = config.model or DEFAULT_MODEL
    if model not in MODELS:
        raise ConfigError(f"embedder.usd_per_million_tokens: set the price of {model!r}, which is not known here")
    return MODELS[model][1]


def _key(url: httpx2.URL) -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise CredentialsError("OPENAI_API_KEY holds characters that no key has; copy it again")
    if _is_in_the_clear(url):
        if key:
            warnings.warn(f"OPENAI_API_KEY is not sent to {url.host}, whose address is not https", stacklevel=2)
        return "none"
    if not key and _is_openai(url):
        raise CredentialsError("embedder.kind: openai needs a key: set the environment variable OPENAI_API_KEY")
    return key or "none"


def _is_in_the_clear(url: httpx2.URL) -> bool:
    return url.scheme != "https" and not is_loopback(url.host)


def _without_secrets(request: httpx2.Request) -> None:
    """Drop what the client library may have found in the environment: organisation, project, headers of one's own."""
    for name in set(request.headers) - _PLAIN_HEADERS:
        del request.headers[name]


def _is_openai(url: httpx2.URL) -> bool:
    return url.host == web_address(DEFAULT_URL).host


def _checked(reply: Any, num_texts: int, dimensions: int | None) -> Float32[np.ndarray, "M D"]:
    """Return the vectors in the order of the texts, of unit length."""
    try:
        items = {item.index: np.asarray(item.embedding, np.float64) for item in reply.data}
        count = len(reply.data)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise _MalformedError(f"not a list of embeddings ({type(error).__name__})") from error
    if count != num_texts or set(items) != set(range(num_texts)):
        raise _MalformedError(f"{num_texts} texts sent, {len(items)} distinct of {count} embeddings came back")
    shapes = {vector.shape for vector in items.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or shapes == {(0,)}:
        raise _MalformedError("embeddings of unequal length")
    vectors = np.stack([items[i] for i in range(num_texts)])
    if dimensions is not None and vectors.shape[1] != dimensions:
        cause = f"embeddings of {vectors.shape[1]} dimensions instead of {dimensions}"
        raise _MalformedError(cause, vectors.shape[1])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms < 1e-6).any():
        raise _MalformedError("an embedding that is not finite, or zero")
    return (vectors / norms).astype(np.float32)
