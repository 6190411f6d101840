"""The OpenAI embedder against a loopback service that fails in every way: answers, calls, dollars, exit codes, keys."""

import contextlib
import logging
import os
import random
import socket
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from fake_embeddings import HARMLESS, KEY, LOST, MALFORMED, REFUSED, TRANSIENT, EmbeddingServer, ModelServer

from attention_guided_rl.config import EmbedderConfig, NetworkConfig
from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.embedders.openai import OpenAIEmbedder, OpenAIEncoder
from attention_guided_rl.embedders.text import CANARIES, STORE, TextEmbedder
from attention_guided_rl.errors import (
    AgrlError,
    CheckpointError,
    ConfigError,
    CredentialsError,
    RemoteError,
    SpendError,
    UnsafeError,
)
from attention_guided_rl.network import Network

ADA = "text-embedding-ada-002"
TEXTS = ["the red mill", "a boat on the river", "seven silver seals"]
TIMEOUT_S = 0.3


@pytest.fixture(autouse=True)
def outside(monkeypatch, tmp_path_factory):
    """A clean environment, from which nothing but loopback can be reached; a test that tries to, fails."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path_factory.getbasetemp()))  # no certificates: nothing to load
    tried, resolve, connect = [], socket.getaddrinfo, socket.socket.connect

    def resolve_here(host, *rest, **options):
        if host not in ("127.0.0.1", "localhost"):
            tried.append(host)
            raise socket.gaierror(f"{host} is outside")
        return resolve(host, *rest, **options)

    def connect_here(self, address):
        if address[0] not in ("127.0.0.1", "::1"):
            tried.append(address)
            raise OSError(f"{address} is outside")
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    yield
    assert tried == []


@pytest.fixture
def service():
    with EmbeddingServer() as server:
        server.hang_s = 3.0
        yield server


@pytest.fixture
def make(service, tmp_path):
    """Return the factory of encoders of the service: `make(max_usd=1, timeout_s=2)`; each is a new start."""

    def encoder(*, private_text: bool = False, account: str = "run", **options) -> OpenAIEncoder:
        config, network = settings(options)
        return OpenAIEncoder(config, network_of(network, account, private_text))

    def settings(options: dict) -> tuple[EmbedderConfig, dict]:
        network = {name: options.pop(name) for name in list(options) if name in NetworkConfig.__slots__}
        defaults = {"base_url": service.url, "usd_per_million_tokens": 0.1}
        return EmbedderConfig(kind="openai", **{**defaults, **options}), network

    def network_of(options: dict, account: str = "run", private_text: bool = False) -> Network:
        defaults = {"cache": tmp_path / "cache", "timeout_s": TIMEOUT_S, "backoff_s": 0.001, "deadline_s": 10.0}
        network = Network(NetworkConfig(**{**defaults, **options}), account=account, private_text=private_text)
        network.sleep = encoder.slept.append  # so that nobody waits for what a service asks for
        return network

    def preflight(*, private_text: bool = False, **options) -> None:
        config, network = settings(options)
        OpenAIEmbedder.preflight(config, network_of(network, "run", private_text))

    def embedder(**options) -> TextEmbedder:
        """After a preflight, over ids that are the numbers of its `texts`."""
        preflight(**options)
        made = encoder(**options)
        return TextEmbedder(made, made._network, lambda ids: encoder.texts[ids[0]])

    encoder.slept, encoder.texts, encoder.preflight, encoder.embedder = [], TEXTS, preflight, embedder
    return encoder


def embed(embedder: TextEmbedder, numbers: list[int]) -> np.ndarray:
    ids = torch.tensor(numbers)[:, None]
    return embedder.embed_keys(ids, torch.ones_like(ids, dtype=torch.bool))[:, 0].numpy()


def cosines(service: EmbeddingServer, vectors: np.ndarray, texts: list[str], model: str = ADA) -> list[float]:
    """Of each vector with what the service's model gives for its text."""
    clean = service.vectors(model, texts, vectors.shape[1])
    return [float(a @ b) for a, b in zip(vectors, clean, strict=True)]


# ---- the service that the tests rely on ----


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"input": "a single text"}, 200),
        ({"input": ["ant"] * 2048, "model": "text-embedding-3-small", "dimensions": 2}, 200),
        ({"input": ["ant"] * 2049}, 400),
        ({"input": ["ant", ""]}, 400),
        ({"input": []}, 400),
        ({"input": ["x" * 4 * 8192]}, 200),
        ({"input": ["x" * 4 * 8193]}, 400),
        ({"input": ["x" * 4 * 8000] * 38}, 400),  # 304,000 tokens
        ({"dimensions": 8}, 400),
        ({"dimensions": 8, "model": "text-embedding-3-small"}, 200),
        ({"dimensions": 9999, "model": "text-embedding-3-small"}, 400),
        ({"model": "text-embedding-4"}, 404),
    ],
)
def test_the_service_of_these_tests_is_as_strict_as_the_real_one(service, changes, status):
    asked = {"model": ADA, "input": ["ant"], **changes}
    reply = httpx2.post(f"{service.url}/embeddings", json=asked, headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == status
    assert (service.billed_tokens > 0) == (status == 200)


def test_narrow_vectors_of_the_service_lie_in_a_cone(service):
    texts = [f"{a} {b}" for a in ("red", "old", "tall", "wet") for b in ("mill", "boat", "tower", "cat")]
    assert np.tril(service.vectors(ADA, texts) @ service.vectors(ADA, texts).T, -1).max() > 0.3
    service.narrow = True
    vectors = service.vectors(ADA, texts)
    products = (vectors @ vectors.T)[np.tril_indices(16, -1)]
    assert 0.69 < products.min() < 0.73
    assert 0.82 < products.max() < 0.88


# ---- what is asked, and what comes back ----


def test_vectors_of_unit_length_in_the_order_of_the_texts(service, make):
    vectors = make().encode(TEXTS)
    assert vectors.shape == (3, 1536)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert min(cosines(service, vectors, TEXTS)) > 0.9999
    (request,) = service.requests
    assert (request.texts, request.model, request.dimensions) == (TEXTS, ADA, None)
    assert request.headers["authorization"] == f"Bearer {KEY}"


def test_dimensions_are_asked_for_and_checked(service, make):
    vectors = make(model="text-embedding-3-large", dimensions=64).encode(TEXTS)
    assert vectors.shape == (3, 64)
    assert service.requests[0].dimensions == 64
    with pytest.raises(RemoteError, match="does not support specifying dimensions") as caught:
        make(dimensions=64).encode(TEXTS)
    assert caught.value.exit_code == 5
    assert len(service.requests) == 2


def test_batches_keep_to_the_limits_on_texts_and_tokens(make):
    """2,048 texts; 300,000 tokens, of which 36 texts of at most 8,192 are the most that surely fit."""
    encoder = make()
    assert list(map(len, encoder.batches(["ant"] * 5000))) == [2048, 2048, 904]
    assert list(map(len, encoder.batches(["x" * 8192] * 100))) == [36, 36, 28]
    assert list(map(len, encoder.batches(["x" * 100_000] * 37))) == [36, 1]
    assert list(map(len, make(batch_texts=3).batches(["ant"] * 7))) == [3, 3, 1]
    assert list(encoder.batches([])) == []


@pytest.mark.parametrize("letter", ["x", "é", "漢", "🜁"])
def test_a_text_that_is_too_long_is_cut_to_what_surely_fits(service, make, letter):
    """8,192 tokens, of which two may be marks; said once."""
    text = "ab" + letter * 40_000
    encoder = make()
    with pytest.warns(UserWarning, match="1 texts are longer than 8,190 bytes") as warned:
        vectors = encoder.encode([text, "ant", "x" * 8190])
    sent, ant, whole = service.requests[0].texts
    assert text.startswith(sent)
    assert 8190 - 4 < len(sent.encode()) <= 8190
    assert (ant, len(whole)) == ("ant", 8190)
    assert vectors.shape == (3, 1536)
    encoder.encode([text, text])  # another warning would be an error
    assert len(warned) == 1
    assert encoder._cut_texts.count == 3


def test_the_embedder_of_a_language_model_reads_ids(service, make, make_model, byte_tokenizer, tmp_path):
    model = make_model("llama", tokenizer=byte_tokenizer(), vocab_size=272)
    config = EmbedderConfig(kind="openai", base_url=service.url, query_prompt="query: ")
    network = Network(NetworkConfig(cache=tmp_path / "cache"))
    OpenAIEmbedder.preflight(config, network)
    embedder = OpenAIEmbedder(config, network, model)
    ids = torch.tensor([model.encode("the mill"), model.encode(" " * 8)])
    vectors = embedder.embed_queries(ids, torch.ones_like(ids, dtype=torch.bool))[:, 0].numpy()
    assert [request.texts for request in service.requests] == [list(CANARIES), ["query: the mill"]]
    assert cosines(service, vectors[:1], ["query: the mill"])[0] > 0.9999
    assert not vectors[1].any()
    assert embedder.spent_usd == 0  # a service elsewhere has no known price


def test_encoders_are_told_apart_by_endpoint_model_and_dimensions(make):
    """An encoder that shares its identity with another would be given the other's vectors."""
    same = {
        make().identity,
        make(model=ADA).identity,
        make(batch_texts=5).identity,
        make(max_usd=3.0).identity,
    }
    others = {
        make(model="text-embedding-3-large").identity,
        make(model="text-embedding-3-large", dimensions=64).identity,
        make(base_url="http://127.0.0.1:9/v1").identity,
        make(base_url="http://127.0.0.1:9/v2").identity,
        make(base_url="http://localhost:9/v1").identity,
        make(base_url=None).identity,
        make(base_url="https://api.openai.com.example/v1").identity,
    }
    assert len(same) == 1
    assert len(others - same) == 7


def test_an_alias_of_a_known_name_may_have_its_own_dimensions(make):
    """Servers on this machine answer to OpenAI's names with models of their own."""
    with ModelServer(lambda texts: np.eye(len(texts), 32)) as server:
        vectors = make(base_url=server.url, model=ADA).encode(TEXTS)
    assert vectors.tolist() == np.eye(3, 32).tolist()


# ---- one fault at a time ----


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_passes_is_survived(service, make, fault):
    encoder = make(max_usd=1.0)
    encoder.encode(["the first answer tells how long vectors are"])
    service.script = [fault]
    vectors = encoder.encode(TEXTS)
    assert min(cosines(service, vectors, TEXTS)) > 0.9999
    assert len(service.requests) == (2 if fault in HARMLESS else 3)
    assert 0 < service.billed_usd <= encoder.ledger.spent_usd


def test_the_time_that_a_service_asks_for_is_waited(service, make):
    service.retry_after_s = 7
    service.script = ["rate_limit_seconds", "rate_limit_date", "rate_limit", "rate_limit_negative", "rate_limit_text"]
    make().encode(TEXTS)
    seconds, date, *own = make.slept
    assert seconds == 7.0
    assert 5.0 < date <= 7.0  # a date has whole seconds
    assert len(own) == 3
    assert all(wait <= 0.001 * 2**5 for wait in own)


ONCE = {
    "insufficient_quota": (SpendError, 6),
    "forbidden": (CredentialsError, 4),
    "rate_limit_absurd": (RemoteError, 5),
    "redirect": (UnsafeError, 13),
}


@pytest.mark.parametrize("fault", ONCE)
def test_what_does_not_pass_is_not_repeated(service, make, fault):
    error, code = ONCE[fault]
    service.script = [fault]
    with pytest.raises(error) as caught:
        make().encode(TEXTS)
    assert caught.value.exit_code == code
    assert len(service.requests) == 1
    assert make.slept == []


@pytest.mark.parametrize("address", ["https://en.wikipedia.org", "http://localhost:{port}", "http://127.0.0.1:9"])
def test_texts_go_nowhere_else_whatever_the_service_says(service, make, address):
    """Not even to the hosts that a corpus may be redirected to."""
    service.elsewhere = address.format(port=service.url.rpartition(":")[2].removesuffix("/v1"))
    service.script = ["redirect"]
    with pytest.raises(UnsafeError, match="redirects to"):
        make().encode(TEXTS)
    assert len(service.requests) == 1


def test_a_wrong_key_and_an_unknown_model_end_at_once(service, make, monkeypatch):
    with pytest.raises(CredentialsError, match=r"embedder\.model, and embedder\.base_url") as caught:
        make(model="text-embedding-4").encode(TEXTS)
    assert caught.value.exit_code == 4
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-000000")
    with pytest.raises(CredentialsError, match="OPENAI_API_KEY") as caught:
        make().encode(TEXTS)
    assert caught.value.exit_code == 4
    assert len(service.requests) == 2


def test_a_request_that_the_service_will_not_take_is_not_repeated(service, make):
    service.max_texts = 2
    with pytest.raises(RemoteError, match="at most 2") as caught:
        make().encode(TEXTS)
    assert caught.value.exit_code == 5
    assert len(service.requests) == 1


@pytest.mark.parametrize("fault", MALFORMED)
def test_nonsense_for_ever_ends_after_five_replies(service, make, fault):
    encoder = make()
    encoder.encode(TEXTS)
    service.faults, service.probability = [fault], 1.0
    with pytest.raises(RemoteError, match="5 times") as caught:
        encoder.encode(TEXTS)
    assert caught.value.exit_code == 5
    assert len(service.requests) == 1 + 5


@pytest.mark.parametrize("fault", ["error_500", "error_503", "rate_limit", "reset", "garbage", "cut_body"])
def test_a_service_that_is_down_is_given_up_within_the_deadline(service, make, fault):
    service.faults, service.probability = [fault], 1.0
    encoder = make(deadline_s=0.15)
    encoder._network.sleep = time.sleep
    began = time.monotonic()
    with pytest.raises(RemoteError, match="gave up after") as caught:
        encoder.encode(TEXTS)
    assert time.monotonic() - began < 0.15 + TIMEOUT_S + 0.5
    assert caught.value.exit_code == 5
    assert len(service.requests) >= 2


@pytest.mark.parametrize("timeout_s", [0.1, 30.0])
@pytest.mark.parametrize("fault", ["black_hole", "slow_drip", "slow_headers"])
def test_a_reply_that_never_ends_is_given_up_at_the_deadline(service, make, fault, timeout_s):
    service.faults, service.probability = [fault], 1.0
    encoder = make(deadline_s=0.25, timeout_s=timeout_s)
    began = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        encoder.encode(TEXTS)
    assert time.monotonic() - began < 0.25 + 0.4  # some of which is computing
    assert caught.value.exit_code == 5


def test_a_service_that_is_not_there(make):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    encoder = make(base_url=f"http://127.0.0.1:{port}/v1", deadline_s=0.2, max_usd=1.0)
    encoder._network.sleep = time.sleep
    with pytest.raises(RemoteError, match="gave up"):
        encoder.encode(TEXTS)
    assert encoder.ledger.spent_usd == 0  # nothing was sent


def test_replies_with_one_place_changed_give_vectors_or_a_documented_error(service, make):
    service.faults, service.probability = ["mutated"], 1.0
    encoder = make(model="text-embedding-3-small", dimensions=8, max_usd=1.0)
    outcomes = {"vectors": 0, "error": 0}
    for _ in range(40):
        try:
            vectors = encoder.encode(TEXTS)
        except RemoteError:
            outcomes["error"] += 1
            continue
        assert np.isfinite(vectors).all()
        assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
        outcomes["vectors"] += 1
    assert len(service.requests) > 60
    assert outcomes["vectors"] > 15
    assert encoder.ledger.spent_usd <= 1.0


# ---- many faults ----


def test_a_hundred_batches_with_three_faults_in_ten(service, make):
    """0 lost, 0 misassigned, no more than 1.6 calls a batch, and a second run that asks for nothing."""
    make.texts = [f"the {'red mill' if i % 2 else 'old boat'} of number {i}" for i in range(200)]
    service.faults, service.probability, service.seed = TRANSIENT, 0.3, 1
    options = {"model": "text-embedding-3-small", "dimensions": 64, "batch_texts": 2, "max_usd": 1.0, "timeout_s": 0.12}
    embedder = make.embedder(**options)
    before = len(service.requests)
    vectors = embed(embedder, list(range(200)))
    calls = len(service.requests) - before
    assert 100 < calls <= 1.6 * 100
    assert sum(request.fault is not None for request in service.requests[before:]) > 27

    clean = service.vectors("text-embedding-3-small", make.texts, 64)
    similar = vectors @ clean.T
    assert (similar.argmax(1) == np.arange(200)).all()
    assert similar.diagonal().min() > 0.999
    store = VectorStore(make(**options)._network.cache(STORE))
    stored = store.get(embedder.identity, make.texts)
    assert all(stored[text].tobytes() == vector.tobytes() for text, vector in zip(make.texts, vectors, strict=True))
    assert service.billed_usd <= make(**options).ledger.spent_usd <= 1.0

    service.probability = 0.0
    before = len(service.requests)
    again = embed(make.embedder(**options), list(range(200)))
    assert [text for request in service.requests[before:] for text in request.texts] == list(CANARIES)
    assert again.tobytes() == vectors.tobytes()


@pytest.mark.parametrize("seed", range(6))
def test_the_cap_holds_whatever_fails_and_raising_it_goes_on(service, make, seed):
    chance = random.Random(seed)
    make.texts = [f"text {i} " + "x" * chance.randrange(100) for i in range(12)]
    options = {"model": "text-embedding-3-small", "dimensions": 8, "batch_texts": 2, "timeout_s": 0.1}
    made = make(**options)
    made.encode(CANARIES)  # this much is certain
    embedder = make.embedder(**options)
    service.faults, service.probability, service.seed = [f for f in TRANSIENT if f != "slow_drip"], 0.3, seed
    cap = made.ledger.spent_usd * (1 + chance.random())
    numbers = list(range(12))
    encoder = make(max_usd=cap, **options)
    capped = TextEmbedder(encoder, encoder._network, embedder._decode)
    with contextlib.suppress(SpendError):  # the cap may be just enough
        embed(capped, numbers)
    assert service.billed_usd <= encoder.ledger.spent_usd
    assert encoder.ledger.spent_usd <= cap

    asked = len(service.requests)
    encoder = make(max_usd=1.0, **options)
    vectors = embed(TextEmbedder(encoder, encoder._network, embedder._decode), numbers)
    assert min(cosines(service, vectors, make.texts, "text-embedding-3-small")) > 0.999
    answered = {text for r in service.requests[:asked] if r.fault in (None, *HARMLESS) for text in r.texts}
    asked_again = {text for request in service.requests[asked:] for text in request.texts}
    assert asked_again == set(make.texts) - answered
    assert service.billed_usd <= encoder.ledger.spent_usd <= 1.0


# ---- dollars ----


def test_a_request_is_set_aside_as_bytes_and_settled_as_billed(service, make):
    """12 + 19 + 18 bytes are at most 49 tokens and two marks each; the service counts 3 + 5 + 4."""
    encoder = make(usd_per_million_tokens=1.0, max_usd=54e-6)
    with pytest.raises(SpendError, match=r"may cost 0\.000055"):
        encoder.encode(TEXTS)
    assert service.requests == []
    encoder = make(usd_per_million_tokens=1.0, max_usd=55e-6)
    encoder.encode(TEXTS)
    assert service.billed_tokens == 12
    assert encoder.ledger.spent_usd == pytest.approx(12e-6)


@pytest.mark.parametrize(("fault", "settled"), [("no_usage", 55e-6), ("huge_usage", 55e-6), ("error_500", 12e-6)])
def test_what_is_not_billed_clearly_counts_in_full(service, make, fault, settled):
    service.script = [fault]
    encoder = make(usd_per_million_tokens=1.0, max_usd=1.0)
    encoder.encode(TEXTS)
    assert encoder.ledger.spent_usd == pytest.approx(settled)


def test_a_gateway_that_gave_up_may_have_been_answered(service, make):
    service.script = ["gateway_timeout"]
    encoder = make(max_usd=1.0)
    encoder.encode(TEXTS)
    assert len(service.requests) == 2
    assert service.billed_tokens == 24
    assert service.billed_usd <= encoder.ledger.spent_usd


def test_prices_of_openai_are_known_and_others_must_be_given(make):
    ours = EmbedderConfig(kind="openai")
    assert OpenAIEmbedder.price(ours) == ("api.openai.com", 0.10)
    assert OpenAIEmbedder.price(EmbedderConfig(kind="openai", model="text-embedding-3-small"))[1] == 0.02
    assert OpenAIEmbedder.price(EmbedderConfig(kind="openai", model="text-embedding-3-large"))[1] == 0.13
    assert OpenAIEmbedder.price(EmbedderConfig(kind="openai", base_url="http://127.0.0.1:9/v1")) == ("127.0.0.1", 0.0)
    own = EmbedderConfig(kind="openai", model="text-embedding-9", usd_per_million_tokens=7.0)
    assert OpenAIEmbedder.price(own)[1] == 7.0
    with pytest.raises(ConfigError, match="usd_per_million_tokens: set the price of 'text-embedding-9'") as caught:
        make.preflight(base_url=None, model="text-embedding-9", usd_per_million_tokens=None)
    assert caught.value.exit_code == 2


def test_a_cap_needs_a_price_that_is_known(make):
    """Or it would hold nothing back at a service that is paid elsewhere."""
    elsewhere = EmbedderConfig(kind="openai", base_url="https://embeddings.example/v1", max_usd=1.0)
    with pytest.raises(ConfigError, match=r"usd_per_million_tokens: set the price at embeddings\.example") as caught:
        OpenAIEmbedder.price(elsewhere)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="set the price"):
        make.preflight(base_url="https://embeddings.example/v1", max_usd=1.0, usd_per_million_tokens=None)
    assert OpenAIEmbedder.price(replace(elsewhere, usd_per_million_tokens=0.0))[1] == 0.0
    assert OpenAIEmbedder.price(replace(elsewhere, base_url="http://localhost:8080/v1"))[1] == 0.0


# ---- starting ----


def test_a_preflight_is_one_request_and_a_second_start_compares(service, make):
    make.preflight()
    assert [request.texts for request in service.requests] == [list(CANARIES)]
    make.preflight()
    assert len(service.requests) == 2
    service.version = 2
    with pytest.raises(CheckpointError, match="has changed") as caught:
        make.preflight()
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("dimensions", [None, 1536])
def test_a_model_that_has_changed_to_another_length_is_noticed_in_two_requests(service, make, dimensions):
    model = "text-embedding-3-small"
    make.preflight(model=model, dimensions=dimensions)
    service.script = ["wrong_dimension", None]
    make.preflight(model=model, dimensions=dimensions)  # once may be an accident
    service.script = ["wrong_dimension", "wrong_dimension"]
    with pytest.raises(CheckpointError, match=r"has changed.*768 dimensions instead of 1536") as caught:
        make.preflight(model=model, dimensions=dimensions)
    assert caught.value.exit_code == 7
    assert len(service.requests) == 1 + 2 + 2


@pytest.mark.parametrize("narrow", [False, True])
def test_a_service_that_cuts_texts_short_is_refused(service, make, narrow):
    service.narrow = narrow
    service.max_words = 50
    with pytest.raises(RemoteError, match="differ at the end") as caught:
        make.preflight()
    assert caught.value.exit_code == 5


def test_the_preflight_keeps_to_the_batch_size(service, make):
    service.max_texts = 3
    make.preflight(batch_texts=3)
    assert [len(request.texts) for request in service.requests] == [3, 3, 2]


def test_offline_the_cache_is_enough_and_what_it_lacks_is_an_error(service, make, monkeypatch):
    first = embed(make.embedder(), [0, 1])
    service.requests.clear()
    offline = make.embedder(offline=True)
    assert embed(offline, [1, 0, 1]).tobytes() == first[[1, 0, 1]].tobytes()
    with pytest.raises(RemoteError, match="--offline") as caught:
        embed(offline, [0, 2])
    assert caught.value.exit_code == 5
    with pytest.raises(RemoteError, match="--offline"):
        make.embedder(offline=True, model="text-embedding-3-small")
    assert service.requests == []


def test_offline_no_key_is_asked_for(make, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    offline = {"base_url": None, "usd_per_million_tokens": None, "offline": True}
    encoder = make(**offline)
    store = VectorStore(encoder._network.cache(STORE))
    store.put(f"{encoder.identity}/canaries", {text: np.eye(1, 1536, dtype=np.float32)[0] for text in CANARIES})
    store.put(encoder.identity, {TEXTS[0]: np.eye(1, 1536, 7, dtype=np.float32)[0]})
    embedder = make.embedder(**offline)
    assert embed(embedder, [0]).argmax() == 7
    with pytest.raises(RemoteError, match="--offline"):
        embed(embedder, [1])


def test_the_address_is_the_configuration_s_then_the_environment_s(service, make, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", service.url)
    make(base_url=None).encode(TEXTS)
    assert len(service.requests) == 1
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    make().encode(TEXTS)
    assert len(service.requests) == 2


def test_openai_needs_a_key_and_a_server_on_this_machine_does_not(service, make, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(CredentialsError, match="OPENAI_API_KEY") as caught:
        make.preflight(base_url=None)
    assert caught.value.exit_code == 4
    service.key = None
    make().encode(TEXTS)
    assert KEY not in str(service.requests)


@pytest.mark.parametrize(
    "address",
    [
        "https://me:hunter2@api.openai.com/v1",
        "https://hunter2@api.openai.com/v1",
        "https://me:hunter2@api.openai.com:port/v1",
        "https://me:hunter2@[::1/v1",
        "ftp://me:hunter2@api.openai.com/v1",
        "me:hunter2@api.openai.com/v1",
        "https://api.openai.com/v1?api-key=hunter2",
        "https://api.openai.com/v1#hunter2",
        "ftp://api.openai.com/v1?api-key=a@hunter2",
        "api.openai.com/v1?hunter2",
    ],
)
def test_an_address_with_a_password_or_a_key_is_refused_without_repeating_it(make, monkeypatch, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ConfigError) as caught:
        make.preflight(base_url=None)
    assert caught.value.exit_code == 2
    assert "hunter2" not in str(caught.value)


def test_texts_of_this_machine_are_sent_away_only_with_consent(service, make, monkeypatch):
    with pytest.raises(UnsafeError, match=r"embeddings\.example.*embedder\.send_local_text") as caught:
        make.preflight(private_text=True, base_url="https://embeddings.example/v1")
    assert caught.value.exit_code == 13
    make.preflight(private_text=True)  # to this machine
    assert len(service.requests) == 1
    monkeypatch.setenv("http_proxy", service.url.removesuffix("/v1"))  # stands for the world outside
    service.key = None
    with pytest.warns(UserWarning, match="not sent"):
        make.preflight(private_text=True, base_url="http://embeddings.example/v1", send_local_text=True)
    assert service.requests[1].headers["Host"] == "embeddings.example"


def test_a_key_is_not_sent_in_the_clear(service, make, monkeypatch):
    monkeypatch.setenv("http_proxy", service.url.removesuffix("/v1"))
    service.key = None
    with pytest.warns(UserWarning, match=r"OPENAI_API_KEY is not sent to embeddings\.example"):
        encoder = make(base_url="http://embeddings.example/v1")
    encoder.encode(TEXTS)
    (request,) = service.requests
    assert request.headers["Host"] == "embeddings.example"
    assert KEY not in str(request)


def test_nothing_else_that_the_client_library_finds_in_the_environment_is_sent_in_the_clear(service, make, monkeypatch):
    monkeypatch.setenv("http_proxy", service.url.removesuffix("/v1"))
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"{name.lower()}-hunter2")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer hunter2\nX-Password: hunter2")
    service.key = None
    with pytest.warns(UserWarning, match="not sent"):
        encoder = make(base_url="http://embeddings.example/v1")
    encoder.encode(TEXTS)
    assert "hunter2" not in str(service.requests)


@pytest.mark.parametrize("mistake", ["\n", " ", "\r\n", "é", "\N{ZERO WIDTH SPACE}"])
def test_a_key_that_cannot_be_sent_is_refused_or_mended_at_once(service, make, monkeypatch, mistake):
    """As from a file that ends with a line break, or copied from a page."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + mistake)
    refused = None
    try:
        make(deadline_s=0.5).encode(TEXTS)
    except CredentialsError as error:
        refused = str(error)
    if refused is None:
        assert service.requests[0].headers["authorization"] == f"Bearer {KEY}"
    else:
        assert service.requests == []
        assert "OPENAI_API_KEY" in refused
        assert KEY not in refused


# ---- secrets ----


def test_the_key_is_in_no_error_log_warning_or_file(service, make, tmp_path, caplog):
    """Every error of the service repeats the whole key."""
    said = []
    caplog.set_level(logging.DEBUG)
    faults = [*REFUSED, *MALFORMED, *LOST, *HARMLESS, "redirect", "gateway_timeout"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for fault in faults:
            service.faults, service.probability = [fault], 1.0
            try:
                make(deadline_s=0.01, timeout_s=0.05, model="text-embedding-3-small", dimensions=8).encode(TEXTS)
            except AgrlError as error:
                said.append(str(error))
        service.probability = 0.0
        for options in ({"model": "text-embedding-9"}, {"dimensions": 5}):
            with pytest.raises(AgrlError) as caught:
                make(**options).encode(TEXTS)
            said.append(str(caught.value))
        service.key = "another"
        with pytest.raises(CredentialsError) as caught:
            make().encode(TEXTS)
        said.append(str(caught.value))
    assert len(said) >= len(faults) - len(HARMLESS) + 3  # and replies that came after the deadline
    assert [message for message in said if KEY in message] == []
    assert [record.getMessage() for record in caplog.records if KEY in record.getMessage()] == []
    assert not any(KEY in str(warning.message) for warning in warned)
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {STORE}
    assert not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("fault", ["error_500", "forbidden", "html", "insufficient_quota"])
def test_the_key_is_in_no_traceback(service, make, fault):
    """Which Python prints with all causes where nobody catches the error."""
    service.faults, service.probability = [fault], 1.0
    with pytest.raises(AgrlError) as caught:
        make(deadline_s=0.05).encode(TEXTS)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("ending", ["", "\n"])
def test_no_part_of_the_key_is_in_a_message_that_is_cut_short(service, make, monkeypatch, ending):
    """The service repeats the model's name, and then the key: at every distance from the beginning."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + ending)
    for length in range(60, 140, 4):
        with pytest.raises(AgrlError) as caught:
            make(model="m" * length, deadline_s=0.05).encode(TEXTS)
        assert KEY[:12] not in str(caught.value)
