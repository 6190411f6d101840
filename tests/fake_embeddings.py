"""A loopback embeddings service with OpenAI's interface: as strict as the real one, and as unreliable as it is told.

    with EmbeddingServer() as server:  # base_url = server.url, OPENAI_API_KEY = server.key
        server.faults, server.probability, server.seed = TRANSIENT, 0.3, 7  # how often which fault, drawn by number
        server.script = ["reset", None]  # or: what happens to the next requests, in order
        server.requests, server.billed_tokens, server.billed_usd  # what was asked, and what it would cost

`ModelServer(encode)` answers with the vectors of a model. A request is billed once it is answered in full, whether or
not the client sees the answer. Every error repeats the whole key, and what a proxy was shown.
"""

import base64
import contextlib
import email.utils
import functools
import hashlib
import json
import os
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

KEY = "sk-loopback-0123456789"
MODELS = {"text-embedding-ada-002": 1536, "text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
USD_PER_MILLION = {"text-embedding-ada-002": 0.10, "text-embedding-3-small": 0.02, "text-embedding-3-large": 0.13}
MAX_TEXT_TOKENS, MAX_REQUEST_TOKENS = 8192, 300_000
DRIP_S = 0.05  # between the bytes of a slow reply

REFUSED = {  # status, type, code, Retry-After; nothing is computed, nothing billed
    "rate_limit": (429, "requests", "rate_limit_exceeded", None),
    "rate_limit_seconds": (429, "requests", "rate_limit_exceeded", "seconds"),
    "rate_limit_date": (429, "requests", "rate_limit_exceeded", "date"),
    "rate_limit_negative": (429, "requests", "rate_limit_exceeded", "-5"),
    "rate_limit_text": (429, "requests", "rate_limit_exceeded", "soon"),
    "rate_limit_absurd": (429, "requests", "rate_limit_exceeded", "86400"),
    "insufficient_quota": (429, "insufficient_quota", "insufficient_quota", None),
    "error_500": (500, "server_error", None, None),
    "error_503": (503, "server_error", None, None),
    "forbidden": (403, "invalid_request_error", "unsupported_country_region_territory", None),
}
MALFORMED = (
    *("html", "missing_item", "duplicate_index", "wrong_dimension", "nan_json", "nan_base64"),
    *("zero_vector", "null_embedding", "unequal_lengths"),
)
"""Replies with status 200 that hold no usable answer; billed."""
LOST = ("reset", "garbage", "cut_body", "black_hole", "slow_drip")
"""Replies that do not arrive; the last three are billed."""
HARMLESS = ("shuffled", "no_usage")
TRANSIENT = (
    *(name for name in REFUSED if name not in ("rate_limit_absurd", "insufficient_quota", "forbidden")),
    *(*MALFORMED, *LOST, *HARMLESS),
)
"""Everything that a client should survive. Others: the rest of REFUSED; `redirect` (to `server.elsewhere`);
`slow_headers`; `gateway_timeout`, a 504 in front of a service that has answered; `mutated`, one place of the reply
replaced by something else; `huge_usage`."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked, and the fault that it met."""

    texts: list[str]
    model: str
    dimensions: int | None
    headers: dict[str, str]
    fault: str | None


@dataclass(slots=True)
class _Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    body: bytes = b""


class EmbeddingServer:
    """The service, in threads of this process. All attributes may be set while it runs."""

    def __init__(self, *, key: str | None = KEY, narrow: bool = False) -> None:
        self.key = key
        """The only key it takes; None: any, and none."""
        self.narrow = narrow
        """Inner products of different texts lie around 0.70 to 0.85, as with text-embedding-ada-002."""
        self.faults: Sequence[str] = TRANSIENT
        self.probability = 0.0
        self.seed = 0
        self.script: list[str | None] = []
        self.hang_s = 5.0
        """How long a silent or slow connection is held."""
        self.retry_after_s = 1
        self.elsewhere = "http://198.51.100.7/v1/embeddings"
        self.version = 1
        """Another number is another model under the same name."""
        self.max_words: int | None = None
        """Texts are cut to so many words without a word."""
        self.max_texts = 2048
        self.requests: list[Request] = []
        self.billed_tokens = 0
        self.billed_usd = 0.0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._connections: set[socket.socket] = set()

    def __enter__(self) -> "EmbeddingServer":
        service = self

        class Handler(_Handler):
            server_: EmbeddingServer = service

        self._http = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def vectors(self, model: str, texts: Sequence[str], dimensions: int | None = None) -> np.ndarray:
        """Return what the model is: the vectors (M, D) before the noise of a request."""
        if self.max_words is not None:
            texts = [" ".join(text.split()[: self.max_words]) for text in texts]
        found = [_lexical(f"{model}/{self.version}", text, MODELS[model], self.narrow) for text in texts]
        return _unit(np.stack(found)[:, :dimensions])

    def noise(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return what makes the vectors of a request differ from those of the next, in the 4th decimal."""
        return np.random.default_rng([self.seed, number]).uniform(-2e-4, 2e-4, shape)

    def refusal(self, asked: dict[str, Any]) -> tuple[int, str, str | None] | None:
        """Return status, message and code if the request is not acceptable."""
        model, texts, dimensions = asked.get("model"), asked.get("input"), asked.get("dimensions")
        if model not in MODELS:
            return 404, f"The model `{model}` does not exist or you do not have access to it.", "model_not_found"
        if dimensions is not None and (model.endswith("ada-002") or not 0 < dimensions <= MODELS[model]):
            return 400, "This model does not support specifying dimensions.", None
        return _refused_texts(texts, self.max_texts)

    def _receive(self, asked: dict[str, Any], headers: dict[str, str]) -> tuple[int, str | None]:
        """Note a request; return its number and its fault."""
        with self._lock:
            number = len(self.requests)
            chance = random.Random(f"{self.seed}/{number}")
            fault = chance.choice(self.faults) if chance.random() < self.probability else None
            if self.script:
                fault = self.script.pop(0)
            texts = asked.get("input")
            texts = [texts] if isinstance(texts, str) else list(texts or [])
            self.requests.append(
                Request(texts, str(asked.get("model")), asked.get("dimensions"), headers, fault),
            )
        return number, fault

    def _bill(self, model: str, num_tokens: int) -> None:
        with self._lock:
            self.billed_tokens += num_tokens
            nano_usd = num_tokens * round(1000 * USD_PER_MILLION.get(model, 0.0))
            self.billed_usd = (round(1e9 * self.billed_usd) + nano_usd) / 1e9

    def _compute(self, number: int, asked: dict[str, Any], fault: str | None) -> dict[str, Any]:
        """Return the reply as JSON-like data, damaged as the fault says."""
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        clean = self.vectors(asked["model"], texts, asked.get("dimensions"))
        noisy = _unit(clean + self.noise(number, clean.shape))
        num_tokens = sum(map(count_tokens, texts))
        self._bill(asked["model"], num_tokens)
        as_text = asked.get("encoding_format") == "base64"
        if fault == "wrong_dimension":
            noisy = _unit(noisy[:, : noisy.shape[1] // 2])
        if fault == "zero_vector":
            noisy[-1] = 0.0
        if fault in ("nan_json", "nan_base64"):
            noisy[-1, 3] = np.nan
            as_text = fault == "nan_base64"
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, as_text=as_text)}
            for i, vector in enumerate(noisy)
        ]
        if fault == "null_embedding":
            data[0]["embedding"] = None
        if fault == "unequal_lengths":
            data[-1]["embedding"] = _encoded(noisy[-1, :-1], as_text=as_text)
            if len(data) == 1:  # nothing to be unequal to
                data[0]["embedding"] = []
        if fault == "missing_item":
            data.pop()
        if fault == "duplicate_index":
            data[-1]["index"] = 0 if len(data) > 1 else 1
        if fault == "shuffled":
            random.Random(number).shuffle(data)
        used = 10**30 if fault == "huge_usage" else num_tokens
        reply: dict[str, Any] = {"object": "list", "data": data, "model": asked["model"]}
        if fault != "no_usage":
            reply["usage"] = {"prompt_tokens": used, "total_tokens": used}
        return reply


class ModelServer(EmbeddingServer):
    """The same interface around a function from texts to vectors (M, D): exact, free of charge, of any name."""

    def __init__(self, encode: Callable[[list[str]], np.ndarray]) -> None:
        super().__init__(key=None)
        self._encode = encode
        self._one = threading.Lock()

    def vectors(self, model: str, texts: Sequence[str], dimensions: int | None = None) -> np.ndarray:
        with self._one:
            return np.asarray(self._encode(list(texts)), np.float64)

    def noise(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def refusal(self, asked: dict[str, Any]) -> tuple[int, str, str | None] | None:
        return _refused_texts(asked.get("input"), self.max_texts)


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the play


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server_: EmbeddingServer

    def setup(self) -> None:
        super().setup()
        self.server_._connections.add(self.connection)

    def finish(self) -> None:
        self.server_._connections.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):  # the other side has hung up
            super().finish()

    def do_GET(self) -> None:
        self._send(self._error(405, "Only POST requests are accepted.", "invalid_request_error", None))

    def do_POST(self) -> None:
        service = self.server_
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if urllib.parse.urlsplit(self.path).path != "/v1/embeddings":  # which has a host if this is asked as a proxy
            self._send(self._error(404, f"Unknown URL {self.path}", "invalid_request_error", "unknown_url"))
            return
        number, fault = service._receive(asked, dict(self.headers))
        if service.key is not None and self._given_key() != service.key:
            message = "Incorrect API key provided."
            self._send(self._error(401, message, "invalid_request_error", "invalid_api_key"))
        elif fault in REFUSED:
            status, kind, code, wait = REFUSED[fault]
            date = email.utils.formatdate(time.time() + service.retry_after_s, usegmt=True)
            wait = {"seconds": str(service.retry_after_s), "date": date}.get(wait or "", wait)
            self._send(self._error(status, f"Refused ({fault}).", kind, code, wait))
        elif fault == "reset":
            self._reset()
        elif fault == "garbage":
            self.wfile.write(b"220 mail ready\r\n" * 3)
            self.close_connection = True
        elif fault == "redirect":
            self._send(_Answer(307, {"Location": service.elsewhere}))
        elif refused := service.refusal(asked):
            status, message, refusal_code = refused
            self._send(self._error(status, message, "invalid_request_error", refusal_code))
        else:
            self._answer(service._compute(number, asked, fault), fault, number)

    def _answer(self, reply: dict[str, Any], fault: str | None, number: int) -> None:
        body = json.dumps(reply).encode()
        if fault == "mutated":
            body = _mutated(reply, random.Random(f"{self.server_.seed}/{number}/mutated"))
        if fault == "html":
            page = f"<html><body>Sign in to the hotel network, {self._given_key()}</body></html>".encode()
            self._send(_Answer(200, {"Content-Type": "text/html"}, page))
        elif fault == "gateway_timeout":
            self._send(self._error(504, "The service did not answer the gateway in time.", "server_error", None))
        elif fault == "black_hole":
            self.server_._closing.wait(self.server_.hang_s)
            self.close_connection = True
        elif fault in ("cut_body", "slow_drip", "slow_headers"):
            self._partly(body, fault)
            self.close_connection = True
        else:
            self._send(_Answer(body=body))

    def _partly(self, body: bytes, fault: str) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        if fault == "slow_headers":
            self._drip(head + b"X-Slow: " + b"x" * 100_000)
            return
        self.wfile.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
        if fault == "slow_drip":
            self._drip(body[len(body) // 2 :])

    def _drip(self, data: bytes) -> None:
        until = time.monotonic() + self.server_.hang_s
        for i in range(len(data)):
            if time.monotonic() > until or self.server_._closing.wait(DRIP_S):
                return
            self.wfile.write(data[i : i + 1])

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.close(self.connection.detach())  # and not shutdown, which would end it politely

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def _error(self, status: int, message: str, kind: str, code: str | None, wait: str | None = None) -> _Answer:
        shown = f"{self.headers.get('Authorization')}, proxy {self.headers.get('Proxy-Authorization')}"
        error = {"message": f"{message} Your key is {self._given_key()} ({shown}).", "type": kind, "param": None}
        error["code"] = code
        headers = {"Content-Type": "application/json", **({} if wait is None else {"Retry-After": wait})}
        return _Answer(status, headers, json.dumps({"error": error}).encode())

    def _given_key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def log_message(self, *_: object) -> None:
        pass


def count_tokens(text: str) -> int:
    """Return the number of tokens that a text is billed for."""
    return max(1, len(text.split()), len(text.encode()) // 4)


def _refused_texts(texts: Any, max_texts: int) -> tuple[int, str, str | None] | None:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        return 400, "'$.input' is invalid: an array of strings that are not empty is expected.", None
    if len(texts) > max_texts:
        return 400, f"'input' array too long: at most {max_texts} items.", None
    counts = list(map(count_tokens, texts))
    if max(counts) > MAX_TEXT_TOKENS:
        return 400, f"This model's maximum context length is {MAX_TEXT_TOKENS} tokens.", "context_length_exceeded"
    if sum(counts) > MAX_REQUEST_TOKENS:
        return 400, f"Requested {sum(counts)} tokens, max {MAX_REQUEST_TOKENS} tokens per request.", None
    return None


def _lexical(model: str, text: str, size: int, narrow: bool) -> np.ndarray:
    """Return a sum of word vectors: texts that share words are near, and no two texts are quite alike."""
    words = re.findall(r"\w+", text.lower())
    vector = 0.05 * _gauss(model, f"exactly {text}", size)
    for word in words:
        vector = vector + _gauss(model, word, size) / len(words) ** 0.5
    vector = _unit(vector)
    if narrow:
        vector[0] = 0.0
        vector = _unit(vector) * 0.28**0.5
        vector[0] = 0.72**0.5
    return vector


@functools.lru_cache(maxsize=16_384)
def _gauss(model: str, word: str, size: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(f"{model}\0{word}".encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(seed).standard_normal(size) / size**0.5


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _encoded(vector: np.ndarray, *, as_text: bool) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else [float(x) for x in vector]


def _mutated(reply: dict[str, Any], chance: random.Random) -> bytes:
    """Replace one place of the reply by something that does not belong there."""
    junk: list[Any] = [None, True, -1, 1.5, 10**30, 1e400, "", "x", "\0", "\udcff", [], {}, [[]], [None], {"index": 0}]
    junk += ["DEEP"]
    places: list[tuple[Any, Any]] = [({"reply": reply}, "reply")]
    for parent, key in places:
        child = parent[key]
        if isinstance(child, dict | list):
            places += [(child, k) for k in (child if isinstance(child, dict) else range(min(len(child), 4)))]
    parent, key = chance.choice(places)
    parent[key] = chance.choice(junk)
    top = places[0][0]["reply"]
    return json.dumps(top).replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode()
