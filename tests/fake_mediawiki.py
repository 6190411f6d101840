"""A MediaWiki on this machine: the part of the Action API that a reader of articles needs, and its faults.

    with FakeMediaWiki({"Post mill": Page(invented_article("Post mill", 900))}) as wiki:
        ... CorpusConfig(kind="wikipedia", site=wiki.url, title="Post mill") ...
    assert len(wiki.requests) == 2

`wiki.faults` is a list of what to do instead of answering the next requests, one each; None answers as usual. All
texts are invented.
"""

import difflib
import gzip
import json
import random
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

PATH = "/w/api.php"
MAX_TITLES = 50
MAX_LISTED = 500
GERMAN = {"-2": ("Medium", "Media"), "0": ("", ""), "6": ("Datei", "File"), "14": ("Kategorie", "Category")}
ENGLISH = {"-2": ("Media", "Media"), "0": ("", ""), "6": ("File", "File"), "14": ("Category", "Category")}

Answer = Callable[["_Handler"], None]


@dataclass(frozen=True)
class Page:
    text: str = ""
    revision: int = 1
    namespace: int = 0
    redirect: str | None = None
    disambiguation: bool = False
    model: str = "wikitext"
    hidden: bool = False
    """Whether the text of the revision was withdrawn from the public."""
    categories: tuple[str, ...] = ()
    earlier: tuple[tuple[int, str], ...] = ()
    """Older revisions that are still shown: (number, text)."""


@dataclass(frozen=True)
class Request:
    method: str
    query: dict[str, str]
    headers: dict[str, str]
    server_name: str | None = None
    """The name in the TLS handshake."""
    target: str = ""
    """What stood in the first line, for a proxy the whole address."""


@dataclass
class FakeMediaWiki:
    pages: dict[str, Page]
    namespaces: dict[str, tuple[str, str]] = field(default_factory=lambda: dict(ENGLISH))
    """Local and canonical name by number."""
    rights: tuple[str, str] = ("Invented Licence 1.0", "https://licence.example/1.0/")
    max_text: int = 10**9
    """Characters of wikitext in one reply; the pages that do not fit come in the next."""
    max_listed: int = MAX_LISTED
    """Titles of a list in one reply."""
    tls: tuple[str, str] | None = None
    """Files with the certificate and its key."""
    faults: list[Answer | None] = field(default_factory=list)
    always: Answer | None = None
    """What to do instead of answering any request."""
    requests: list[Request] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(1))

    def __enter__(self) -> "FakeMediaWiki":
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"wiki": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None  # clients that go away are part of the tests
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            context.sni_callback = lambda connection, name, _: setattr(connection, "named", name)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PATH}"

    def asked(self, key: str) -> list[str]:
        """The values of one parameter in the requests that had it."""
        return [request.query[key] for request in self.requests if key in request.query]

    def reply(self, query: dict[str, str]) -> dict[str, Any]:
        """What the API answers."""
        if query.get("action") != "query" or query.get("format") != "json" or query.get("formatversion") != "2":
            return error("badvalue", "Only action=query&format=json&formatversion=2 is known here.")
        if "revids" in query:
            return self._reply_revision(query)
        if "titles" in query:
            return self._reply_pages(query)
        if query.get("meta") == "siteinfo":
            names = {key: {"id": int(key), "name": n, "canonical": c} for key, (n, c) in self.namespaces.items()}
            rights = {"url": self.rights[1], "text": self.rights[0]}
            return {"batchcomplete": True, "query": {"namespaces": names, "rightsinfo": rights}}
        if query.get("generator") == "random":
            return self._reply_random(query)
        lists = {"categorymembers": self._reply_category, "search": self._reply_search}
        if query.get("list") in lists:
            return lists[query["list"]](query)
        return {"batchcomplete": True}

    def _reply_pages(self, query: dict[str, str]) -> dict[str, Any]:
        asked = query["titles"].split("|")
        if len(asked) > MAX_TITLES:
            return error("toomanyvalues", f"Too many values supplied for parameter titles: the limit is {MAX_TITLES}.")
        valid = {title: normal(title) for title in asked if is_valid(title)}
        normalized = [{"fromencoded": False, "from": a, "to": b} for a, b in valid.items() if a != b]
        redirects, final = self._follow(list(dict.fromkeys(valid.values()))) if "redirects" in query else ([], valid)
        invalid = [
            {"title": title, "invalidreason": "The requested page title contains invalid characters.", "invalid": True}
            for title in asked
            if title not in valid
        ]
        known = sorted((title for title in final if title in self.pages), key=self.number)
        missing = [{"ns": 0, "title": title, "missing": True} for title in final if title not in self.pages]
        replies = [self._about(title, query) for title in known]
        further = self._add_texts(replies, known, query) if "revisions" in query["prop"] else {}
        found = {"normalized": normalized, "redirects": redirects, "pages": [*invalid, *missing, *replies]}
        body = {"query": {key: value for key, value in found.items() if value}}
        return {**({"continue": further} if further else {"batchcomplete": True}), **body}

    def _reply_revision(self, query: dict[str, str]) -> dict[str, Any]:
        number = int(query["revids"])
        for title, page in self.pages.items():
            texts = {page.revision: page.text, **dict(page.earlier)}
            if number in texts:
                shown = FakeMediaWiki({**self.pages, title: replace(page, text=texts[number], revision=number)})
                return shown._reply_pages({"titles": title, "prop": query["prop"]})
        return {"batchcomplete": True, "query": {"badrevids": {str(number): {"revid": number, "missing": True}}}}

    def _follow(self, titles: list[str]) -> tuple[list[dict[str, str]], list[str]]:
        """The steps of all redirects, and where they end; those in a circle end nowhere."""
        steps: dict[str, str] = {}
        final = []
        for title in titles:
            path = [title]
            while (page := self.pages.get(path[-1])) and page.redirect and path[-1] not in path[:-1]:
                steps[path[-1]] = page.redirect
                path.append(page.redirect)
            if path[-1] not in path[:-1] and path[-1] not in final:
                final.append(path[-1])
        return [{"from": a, "to": b} for a, b in steps.items()], final

    def number(self, title: str) -> int:
        return 1 + list(self.pages).index(title)

    def _about(self, title: str, query: dict[str, str]) -> dict[str, Any]:
        page = self.pages[title]
        reply: dict[str, Any] = {"pageid": self.number(title), "ns": page.namespace, "title": title}
        if "rvcontinue" not in query:  # the other modules are done with the first part
            reply |= {"contentmodel": page.model, "pagelanguage": "en", "lastrevid": page.revision}
            reply["fullurl"] = f"https://wiki.example/wiki/{quote(title.replace(' ', '_'), safe='/:')}"
            if page.disambiguation:
                reply["pageprops"] = {"disambiguation": ""}
        return reply

    def _add_texts(self, replies: list[dict[str, Any]], titles: list[str], query: dict[str, str]) -> dict[str, str]:
        """Add revisions until the reply is full; return where to continue."""
        first = int(query.get("rvcontinue", "0|0").split("|")[0])
        size = 0
        for reply, title in zip(replies, titles, strict=True):
            if reply["pageid"] < first:
                continue
            page = self.pages[title]
            if size and size + len(page.text) > self.max_text:
                return {"rvcontinue": f"{reply['pageid']}|{page.revision}", "continue": "||info|pageprops"}
            size += len(page.text)
            content = {"texthidden": True} if page.hidden else {"content": page.text}
            slot = {"contentmodel": page.model, "contentformat": "text/x-wiki", **content}
            revision = {"revid": page.revision, "parentid": 0, "timestamp": "2026-01-02T03:04:05Z"}
            reply["revisions"] = [{**revision, "slots": {"main": slot}}]
        return {}

    def _reply_category(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, _, name = query["cmtitle"].partition(":")
        if prefix not in self.namespaces["14"]:
            return error("invalidcategory", "The category name you entered is not valid.")
        namespaces = query.get("cmnamespace", "").split("|")
        members = [
            title
            for title, page in sorted(self.pages.items())
            if normal(name) in page.categories and str(page.namespace) in namespaces
        ]
        start = int(query.get("cmcontinue", "page|0").split("|")[1])
        stop = start + min(int(query["cmlimit"]), self.max_listed, MAX_LISTED)
        body = {"query": {"categorymembers": [self._listed(title) for title in members[start:stop]]}}
        more = {"continue": {"cmcontinue": f"page|{stop}", "continue": "-||"}} if stop < len(members) else {}
        return {"batchcomplete": True, **more, **body}

    def _reply_random(self, query: dict[str, str]) -> dict[str, Any]:
        titles = [t for t, page in self.pages.items() if page.namespace == 0 and page.redirect is None]
        count = min(int(query["grnlimit"]), self.max_listed, len(titles))
        drawn = sorted(self.draw.sample(titles, count), key=self.number)
        marked = {"pageprops": {"disambiguation": ""}}
        return {
            "batchcomplete": True,
            "continue": {"grncontinue": f"0.5|0.5|{self.draw.randrange(10**6)}|0", "continue": "grncontinue||"},
            "query": {"pages": [self._listed(t) | (marked if self.pages[t].disambiguation else {}) for t in drawn]},
        }

    def _reply_search(self, query: dict[str, str]) -> dict[str, Any]:
        names = [t for t, page in self.pages.items() if str(page.namespace) == query["srnamespace"]]
        near = difflib.get_close_matches(query["srsearch"], names, int(query["srlimit"]), 0.6)
        search = [{**self._listed(title), "snippet": "", "wordcount": 1} for title in near]
        return {"batchcomplete": True, "query": {"searchinfo": {"totalhits": len(near)}, "search": search}}

    def _listed(self, title: str) -> dict[str, Any]:
        return {"pageid": self.number(title), "ns": self.pages[title].namespace, "title": title}


class _Handler(BaseHTTPRequestHandler):
    wiki: FakeMediaWiki
    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True  # head and body are two packets; it would hold back the second for 40 ms

    def do_GET(self) -> None:
        self._handle(urlsplit(self.path).query)

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def _handle(self, query: str) -> None:
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        named = getattr(self.connection, "named", None)
        self.wiki.requests.append(Request(self.command, parameters, headers, named, self.path))
        fault = self.wiki.faults.pop(0) if self.wiki.faults else self.wiki.always
        if fault is not None:
            fault(self)
        elif not re.match(r"[\w-]+/\d[\w.]* \(.+\)", self.headers.get("User-Agent", "")):
            self.send(403, b"Please set a user-agent and respect our robot policy.")
        elif urlsplit(self.path).path != PATH:
            self.send(404, b"<html>Not found</html>", {"Content-Type": "text/html"})
        else:
            self.send_json(self.wiki.reply(parameters))

    def send_json(self, reply: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(reply, ensure_ascii=False).encode()
        encoding = {}
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body, encoding = gzip.compress(body, 1), {"Content-Encoding": "gzip"}
        self.send(200, body, {"Content-Type": "application/json; charset=utf-8", **encoding, **(headers or {})})

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


# Faults


def status(code: int, retry_after: str | None = None) -> Answer:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return lambda handler: handler.send(code, b"<html>a page of the proxy</html>", headers)


def api_error(code: str, info: str = "", retry_after: str | None = None) -> Answer:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return lambda handler: handler.send_json(error(code, info), headers)


def body(data: bytes, headers: dict[str, str] | None = None) -> Answer:
    """Any body with status 200."""
    return lambda handler: handler.send(200, data, headers)


def redirect(address: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    return lambda handler: handler.send(302, body, {"Location": address, **(headers or {})})


def cut(handler: _Handler) -> None:
    """Half a body."""
    handler.send(200, b'{"query": {', length=1000)
    handler.close_connection = True


def reset(handler: _Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def silence(handler: _Handler) -> None:
    """A black hole, until the server is closed."""
    handler.wiki.closing.wait(20)
    handler.close_connection = True


def drip(pause: float) -> Answer:
    """One byte after another, for ever."""

    def answer(handler: _Handler) -> None:
        handler.send(200, b"", length=10**6)
        while not handler.wiki.closing.wait(pause):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    return answer


# What the wiki is made of


def error(code: str, info: str) -> dict[str, Any]:
    return {"error": {"code": code, "info": info, "docref": "See the documentation."}, "servedby": "fake"}


def is_valid(title: str) -> bool:
    return bool(title.strip()) and len(title.encode()) < 256 and not re.search(r"[#<>\[\]{}|\ufffd\x00-\x1f]", title)


def normal(title: str) -> str:
    title = " ".join(title.replace("_", " ").split())
    return title[:1].upper() + title[1:]


def invented_article(title: str, num_words: int, seed: int = 1) -> str:
    """Wikitext of an article about nothing that exists, of about so many words: sections, links, references."""
    sentences = _sentences(title, random.Random(f"{seed} {title}"))
    parts = [f"{{{{Infobox thing|name={title}}}}}\n'''{title}''' is a thing that was made up.<ref>Nobody.</ref>"]
    count = 0
    while count < num_words:
        paragraph = " ".join(islice(sentences, 4))
        count += len(paragraph.split())
        parts.append(f"== Part {len(parts)} ==\n{paragraph}")
    return "\n\n".join([*parts, "== See also ==\n* [[Another thing]]", "[[Category:Things]]"])


def _sentences(title: str, draw: random.Random) -> Iterator[str]:
    who = ["The keeper", "A visitor", "The old guild", "Every {}", "The council", "A child", "The second {}"]
    does = ["painted", "measured", "[[Sale|sold]]", "forgot", "carried", "''counted''", "mended", "described"]
    what = ["a brass [[lantern]]", "the north gate", "{{convert|40|km}} of rope", "two grey stones", "the long ledger"]
    when = ["in the winter", "before noon", "during the flood<ref>Page 3.</ref>", "after the fair", "year after year"]
    while True:
        subject, verb, thing, time = (draw.choice(words) for words in (who, does, what, when))
        yield f"{subject.format(title.lower())} {verb} {thing} {time} {draw.randrange(1000)}."
