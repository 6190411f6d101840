"""Replies of services that are not what they should be: a wiki's Action API, an embeddings service."""

import itertools
import os
from pathlib import Path

import fake_mediawiki as fake
import numpy as np
import pytest
from fake_mediawiki import FakeMediaWiki
from fuzzing import as_json, damaged, documented, fuzz, mutated
from hypothesis import strategies as st

from attention_guided_rl.config import CorpusConfig, EmbedderConfig, NetworkConfig
from attention_guided_rl.data.wikipedia import WikipediaCorpus
from attention_guided_rl.embedders.openai import OpenAIEncoder
from attention_guided_rl.errors import AgrlError
from attention_guided_rl.network import Network

pytestmark = pytest.mark.timeout(600)
HEADERS = [
    *(
        {"Content-Type": f"application/json; charset={name}"}
        for name in ("utf-8", "x", "rot13", "base64", "bz2", "idna")
    ),
    *(
        {"Content-Type": value}
        for value in (
            "",
            "application/json; charset=uu",
            ";",
            "text/html; charset",
            "application/json; charset=utf-16",
            "\xff",
        )
    ),
    *(
        {"Retry-After": value}
        for value in ("x", "-1", "1e400", "nan", "Thu, 99 Foo 9999 99:99:99", "1 2 3", "0" * 3000)
    ),
    *({"Content-Encoding": value} for value in ("gzip", "br", "x", "gzip, gzip", "deflate")),
    *({"Location": value} for value in ("", "http://[", "//", "\x7f", "x" * 9000, "file:///etc/passwd", "?a#b")),
    *({}, {}, {}, {}, {"Set-Cookie": "a=b" * 500}, {"X": "\xe9"}),
]
JUNK = [
    b"",
    b"null",
    b"[]",
    b"<html>",
    b"\xff",
    b"[" * 10**5,
    b"{" * 10**5,
    b"\0" * 100,
    b"9" * 5000,
    b'"' + b"x" * 10**6,
]
STATUS = (*[200] * 12, 204, 206, 301, 302, 304, 400, 401, 403, 404, 408, 413, 429, 500, 503, 599, 999)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that answers whatever it is asked with what `always` is."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # no certificates: nothing to load
    with FakeMediaWiki({}) as wiki:
        yield wiki


def network_in(folder: Path) -> Network:
    """A network that does not wait, and soon gives up."""
    made = Network(NetworkConfig(cache=folder, timeout_s=2.0, backoff_s=1000.0, deadline_s=15.0))
    made.sleep = lambda seconds: None
    return made


@st.composite
def answers(draw: st.DrawFn, valid: list[bytes | dict]) -> tuple[int, dict[str, str], bytes]:
    """Draw status, headers and body of a reply."""
    how = draw(st.sampled_from(("data", "data", "data", "bytes", "junk")))
    if how == "data":
        body = as_json(draw(mutated(valid)))
    else:
        body = draw(damaged([as_json(v) for v in valid])) if how == "bytes" else draw(st.sampled_from(JUNK))
    headers = draw(st.sampled_from(HEADERS)) if draw(st.booleans()) else {}
    return draw(st.sampled_from(STATUS)), headers, body


# -- a wiki ------------------------------------------------------------------------------------------------------------

PAGE = {
    "pageid": 7, "ns": 0, "title": "Mill", "fullurl": "https://wiki.example/wiki/Mill", "pageprops": {},
    "revisions": [
        {"revid": 41, "timestamp": "2026-01-02T03:04:05Z",
         "slots": {"main": {"contentmodel": "wikitext", "content": "A '''mill''' turns in the [[wind]]."}}}
    ],
}  # fmt: skip
WIKI = {  # answers every question at once
    "batchcomplete": True,
    "query": {
        "normalized": [{"fromencoded": False, "from": "mill", "to": "Mill"}],
        "redirects": [{"from": "Windmill", "to": "Mill"}],
        "pages": [PAGE, {"ns": 0, "title": "Boat", "missing": True}],
        "categorymembers": [{"pageid": 7, "ns": 0, "title": "Mill"}],
        "search": [{"ns": 0, "title": "Mill", "pageid": 7}],
        "namespaces": {"6": {"id": 6, "name": "Bestand", "canonical": "File"}, "14": {"id": 14, "name": "Categorie"}},
        "rightsinfo": {"url": "https://creativecommons.org/licenses/by-sa/4.0/", "text": "CC BY-SA"},
    },
}
REFUSED = {"error": {"code": "maxlag", "info": "Waiting for a server."}, "servedby": "fake"}
GOES_ON = {**WIKI, "continue": {"rvcontinue": "7|41", "continue": "||info"}}
WANTED = [{"title": "mill"}, {"titles": ("Mill", "Boat", "Windmill")}, {"category": "Mills"}, {"random": 3}]
REPLIES = [
    *((200, headers, as_json(WIKI)) for headers in HEADERS),
    *((200, {}, body) for body in JUNK),
    *((302, headers, b"") for headers in HEADERS if "Location" in headers),
    (200, {}, as_json({**WIKI, "continue": {"rvcontinue": "x" * 100_000}})),
    (200, {}, as_json({**WIKI, "continue": {"a": "\x00\r\nX: y", "titles": "|" * 3000}})),
    (200, {}, as_json({"query": {"pages": [PAGE] * 20_000}})),
]


@pytest.mark.parametrize("wanted", [0, 2])
def test_a_wiki_is_read_or_refused_in_one_line(server, tmp_path, wanted):
    numbers = itertools.count()

    def check(answer: tuple[int, dict[str, str], bytes]) -> None:
        status, headers, body = answer
        server.always = lambda handler: handler.send(status, body, headers)
        number = next(numbers)
        config = CorpusConfig(kind="wikipedia", site=server.url, requests_per_second=100, **WANTED[wanted + number % 2])
        try:
            articles = list(WikipediaCorpus(config, network_in(tmp_path / f"cache{number}")).articles(0, 0))
            for article in articles:
                "".join((article.id, article.title, article.text, article.url, article.licence)).encode()
        except AgrlError as error:
            documented(error)
        assert {path.name.rstrip("0123456789") for path in tmp_path.iterdir()} <= {"cache"}

    target, found = ("pages", REPLIES[::2]) if wanted == 0 else ("lists", REPLIES[1::2])
    fuzz(target, answers([WIKI, WIKI, GOES_ON, REFUSED]), check, tmp_path, found)


# -- an embeddings service ---------------------------------------------------------------------------------------------

TEXTS = ["the red mill", "a boat", "seven silver seals"]
VECTORS = {
    "object": "list",
    "data": [{"object": "embedding", "index": i, "embedding": [0.6, 0.8 if i else -0.8, 0.0]} for i in range(3)],
    "model": "m",
    "usage": {"prompt_tokens": 9, "total_tokens": 9},
}
PACKED = {**VECTORS, "data": [{"index": i, "embedding": "AACAPwAAAAAAAAAA"} for i in (2, 0, 1)]}  # 1, 0, 0 in base64
NO = {"error": {"message": "no", "type": "x", "code": "y", "param": None}}
BAD_VECTORS = [
    *((200, headers, as_json(VECTORS)) for headers in HEADERS),
    *((200, {}, body) for body in JUNK),
    *((400, {}, as_json({"error": error})) for error in (None, [], "x", {"code": []}, {"message": {}, "type": 1})),
    *(
        (200, {}, as_json({"data": [{"index": i, "embedding": [value, 1.0]} for i in range(3)]}))
        for value in (10**400, 1e308, float("nan"), "1", None, True, [1], {"x": 1}, -1e-320)
    ),
    (200, {}, as_json({"data": [{"index": i, "embedding": "A" * i} for i in range(3)]})),
    (200, {}, as_json({"data": [{"index": [i], "embedding": [1.0]} for i in range(3)]})),
]


def test_vectors_are_taken_or_refused_in_one_line(server, tmp_path):
    encoder = OpenAIEncoder(
        EmbedderConfig(kind="openai", base_url=f"http://127.0.0.1:{server.port}/v1"), network_in(tmp_path / "cache")
    )

    server.always = fake.body(as_json(VECTORS))
    encoder.encode(TEXTS)  # the first time, the client library asks what machine this is

    def check(answer: tuple[int, dict[str, str], bytes]) -> None:
        status, headers, body = answer
        server.always = lambda handler: handler.send(status, body, headers)
        try:
            vectors = encoder.encode(TEXTS)
        except AgrlError as error:
            documented(error)
            return
        assert np.isfinite(vectors).all()
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert len(vectors) == 3

    fuzz("vectors", answers([VECTORS, VECTORS, PACKED, NO]), check, tmp_path, BAD_VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_answers_that_are_mutated_are_good_ones(server, tmp_path):
    server.always = lambda handler: handler.send(200, as_json(WIKI))
    config = CorpusConfig(kind="wikipedia", site=server.url, title="Windmill")
    assert [a.title for a in WikipediaCorpus(config, network_in(tmp_path)).articles(0, 0)] == ["Mill"]
    server.always = fake.body(as_json(PACKED))
    base_url = f"http://127.0.0.1:{server.port}/v1"
    encoder = OpenAIEncoder(EmbedderConfig(kind="openai", base_url=base_url), network_in(tmp_path))
    assert encoder.encode(TEXTS).tolist() == [[1, 0, 0]] * 3
