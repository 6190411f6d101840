"""Wikipedia, or another MediaWiki, as a corpus: articles by title, by list, by category or at random.

In: titles, through the Action API of the wiki, one request at a time. Out: one Article of clean prose a title. What
was fetched once is kept on disk, pinned by its revision: a second run reads the same text and asks for nothing.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import httpx2
from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.hygiene import without_near_duplicates
from attention_guided_rl.data.wikitext import MAX_WIKITEXT, NO_PROSE_NAMESPACES, clean_wikitext
from attention_guided_rl.errors import (
    ConfigError,
    CorpusError,
    CredentialsError,
    RemoteError,
    StorageError,
    UnsafeError,
)
from attention_guided_rl.network import Network, Transient, retry_after, web_address
from attention_guided_rl.randomness import Purpose, generator
from attention_guided_rl.records import Article
from attention_guided_rl.storage import write_text

MAX_TITLES = 50  # of a request; the API refuses more
MAX_TITLES_LEN = 4000  # characters of a request's titles, as they are sent; servers refuse long addresses
MAX_LISTED = 500  # titles of a list in one reply
MAX_REPLIES = 200  # to one question; a server that goes on longer goes on for ever
MAX_TITLE_FILE = 2**24  # bytes
NUM_HINTS = 5

BASE_QUERY = {"action": "query", "format": "json", "formatversion": "2", "maxlag": "5"}
SITE_QUERY = {"meta": "siteinfo", "siprop": "general|namespaces|rightsinfo"}
PAGE_QUERY = {
    "prop": "revisions|info|pageprops",
    "rvprop": "ids|timestamp|content",
    "rvslots": "main",
    "ppprop": "disambiguation",
    "inprop": "url",
    "redirects": "1",
}
PASSING_ERRORS = re.compile(r"maxlag|ratelimited|readonly|internal_api_error_.*", re.DOTALL)

MISSING = "no such page"
INVALID = "not a valid title"
ELSEWHERE = "not in the main namespace"
CIRCLE = "a redirect in a circle"
SEVERAL = "a disambiguation page"
NOT_WIKITEXT = "no wikitext"
TOO_LARGE = "too large"
EMPTY = "no text"
REPEATED = "named twice"

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://")
_HOST = re.compile(r"([a-z]{2,}(?:-[a-z]+)*)(?:\.m)?\.wikipedia\.org")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_TITLE = re.compile(r"[\x00-\x1f\x7f<>\[\]{}|\ufffd]")
_LINK = re.compile(r"\[\[([^\[\]|#:\n]{1,100})")

_log = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound="_Kept")


class WikipediaCorpus:
    """The articles of one wiki that the configuration names, held in memory, in the order of the list or shuffled."""

    def __init__(self, config: CorpusConfig, network: Network) -> None:
        """Read all articles from the cache, and fetch those that are not in it.

        Raises:
            CorpusError: the one article is not there or is no article, or nothing is left of the list.
            RemoteError, CredentialsError: the wiki cannot be used, or must not be asked.
            UnsafeError: an address that is not of Wikipedia, or that leads to a private one.
        """
        place, titles = _place_and_titles(config)
        self._shuffle, self._seed = config.shuffle, config.seed
        with contextlib.closing(_Wiki(place, config.requests_per_second, network)) as wiki:
            library = _Library(wiki, _Store(network.cache("wikipedia"), place.site), network)
            if config.title:
                self._articles = [library.article(titles[0])]
                return
            if config.category:
                titles = library.category(config.category, config.limit)
            elif config.random:
                titles = library.random(config.random, config.seed)
            articles = library.articles(titles)
        self._articles = without_near_duplicates(articles) if config.drop_near_duplicates else articles
        if len(self._articles) < len(articles):
            _log.warning("%s: %d near-duplicates left out", place.host, len(articles) - len(self._articles))

    def articles(self, epoch: int, start: int) -> Iterator[Article]:
        """Yield one pass from place `start` on; with `corpus.shuffle` each epoch has an order of its own."""
        order = list(range(len(self._articles)))
        if self._shuffle:
            order = generator(self._seed, Purpose.SHUFFLE, epoch).permutation(len(order)).tolist()
        for place in order[start:]:
            yield self._articles[place]


@dataclass(frozen=True, slots=True)
class _Place:
    """A wiki: the address of its api.php, its host, and its name in the articles' ids."""

    site: str
    host: str
    label: str
    trusted: bool
    """Whether the user named the address, so that it may be private."""


def read_address(address: str) -> tuple[str, str]:
    """Return the language and the title that the address of a Wikipedia article holds.

    Raises:
        UnsafeError: it is not https, or not of Wikipedia.
        ConfigError: it names no article.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UnsafeError("corpus.title: refused an address that is not https://….wikipedia.org/wiki/…") from None
    wikipedia = _HOST.fullmatch(host)
    if parts.scheme != "https" or wikipedia is None or port not in (None, 443) or "@" in parts.netloc:
        raise UnsafeError(
            f"corpus.title: refused an address at {one_line(f'{parts.scheme}://{host}')}: only "
            "https://….wikipedia.org/wiki/… is taken; for another wiki give the title, and corpus.site"
        )
    named = parse_qs(parts.query).get("title")
    title = named[0] if named else unquote(parts.path.partition("/wiki/")[2])
    if not title:
        raise ConfigError("corpus.title: this address names no article; it ends in /wiki/ and the title")
    return wikipedia[1], normal_title(title)


def normal_title(title: str) -> str:
    """Return a title without section, underscores as spaces, composed as MediaWiki stores it."""
    title = " ".join(title.partition("#")[0].replace("_", " ").split())
    return re.sub(r"[\ud800-\udfff]", "\ufffd", unicodedata.normalize("NFC", title))  # what cannot be sent


def one_line(text: str, limit: int = 200) -> str:
    """Return text of a server so that a terminal can show it: one line, nothing that is not printable."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text[: 4 * limit].split()))[:limit]


def _place_and_titles(config: CorpusConfig) -> tuple[_Place, tuple[str, ...]]:
    """Return the wiki and the configured titles; addresses among these name the wiki, which must be one."""
    given = (config.title,) if config.title else config.titles
    if config.path is not None:
        given = _read_titles(config.path)
    named = [read_address(title) if _ADDRESS.match(title) else (None, normal_title(title)) for title in given]
    languages = {language or config.language for language, _ in named} or {config.language}
    if len(languages) > 1 or (config.site is not None and any(language for language, _ in named)):
        wikis = f"Wikipedia in {', '.join(sorted(languages))}"
        raise ConfigError(f"corpus.title: a corpus has one wiki, got {wikis}; give titles, and corpus.language or site")
    titles = tuple(dict.fromkeys(title for _, title in named))
    if config.site is not None:
        site = web_address(config.site)
        wikipedia = _HOST.fullmatch(site.host)
        return _Place(str(site), site.host, wikipedia[1] if wikipedia else site.host, trusted=True), titles
    (language,) = languages
    host = f"{language}.wikipedia.org"
    return _Place(f"https://{host}/w/api.php", host, language, trusted=False), titles


def _read_titles(path: Path) -> tuple[str, ...]:
    """Return the lines of a file that are neither empty nor a comment."""
    try:
        if path.stat().st_size > MAX_TITLE_FILE:
            raise CorpusError(f"{path}: too large for a list of titles; set corpus.path to a text file, one a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: byte {error.start} is not valid UTF-8; convert the file to UTF-8") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); set corpus.path to a file of titles") from error
    titles = tuple(line for line in lines if line and not line.startswith("#"))
    if not titles:
        raise CorpusError(f"{path}: no title in it; write one in each line")
    return titles


# What is kept on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What a wiki replied, and to which question."""

    site: str
    requested: str
    retrieved: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Time in UTC."""

    def is_sound(self) -> bool:
        """Return whether it is as it was written."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site(_Kept):
    """What its reply about itself says of a wiki."""

    no_prose: tuple[str, ...]
    """Prefixes of the links that show no text."""
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _List(_Kept):
    """The titles of a category, or those drawn at random."""

    titles: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page(_Kept):
    """One revision of the page that a title led to; or, with `problem`, why there is no article."""

    title: str
    page_id: int
    revision: int
    timestamp: str
    url: str
    licence: str
    wikitext: str
    sha256: str
    """Of the wikitext."""
    problem: str

    def is_sound(self) -> bool:
        """Return whether the text is as it was written."""
        return self.sha256 == _digest(self.wikitext)


_ADAPTERS: dict[type[_Kept], TypeAdapter[Any]] = {shape: TypeAdapter(shape) for shape in (_Site, _List, _Page)}


class _Store:
    """The files of one wiki in the cache. Their names are hashes: a title is never a name of a file."""

    def __init__(self, folder: Path, site: str) -> None:
        self._folder, self._site = folder, site

    def read(self, shape: type[Kept], requested: str) -> Kept | None:
        """Return what is kept, or None; what is damaged counts as not there."""
        try:
            kept: Kept = _ADAPTERS[shape].validate_json(self._path(shape, requested).read_bytes())
        except (OSError, ValidationError):
            return None
        return kept if (kept.site, kept.requested) == (self._site, requested) and kept.is_sound() else None

    def write(self, kept: _Kept) -> None:
        """Keep what was not there; raise StorageError where the disk refuses."""
        path = self._path(type(kept), kept.requested)
        if path.exists():
            _log.warning("%s: what the cache had of %r was damaged or no article; fetched again", path, kept.requested)
        write_text(path, json.dumps(asdict(kept), ensure_ascii=False, indent=1) + "\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time look up again and fetch, so that those started together do not all ask."""
        try:
            self._folder.mkdir(exist_ok=True)
            acquired = FileLock(self._folder / ".lock").acquire()
        except OSError as error:
            raise StorageError(f"{self._folder}: cannot write: {error.strerror or error}") from error
        with acquired:
            yield

    def _path(self, shape: type[_Kept], requested: str) -> Path:
        kind = [] if shape is _Page else [shape.__name__]
        name = "\n".join([self._site, *kind, requested])
        return self._folder / f"{_digest(name)}.json"


def _quoted(titles: Sequence[str]) -> str:
    return ", ".join(repr(title[:100]) for title in titles[:NUM_HINTS])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Library:
    """The pages of one wiki, from the cache or else from the wiki, and then kept."""

    def __init__(self, wiki: "_Wiki", store: _Store, network: Network) -> None:
        self._wiki, self._store, self._network = wiki, store, network
        self._place = wiki.place

    def article(self, title: str) -> Article:
        """Return the article with a title; raise CorpusError with a hint if there is none."""
        (page,) = self._pages((title,), keep_problems=False)
        article = self._article(page)
        if isinstance(article, Article):
            return article
        hint = "change corpus.title"
        if article == SEVERAL:
            meanings = list(dict.fromkeys(link.strip() for link in _LINK.findall(page.wikitext)))
            hint = f"set corpus.title to one of its meanings: {_quoted(meanings)}"
        elif article in (MISSING, INVALID):
            hint = self._wiki.nearest(title) or hint
        raise CorpusError(f"{self._place.host}: {title[:200]!r}: {article}; {hint}")

    def articles(self, titles: Sequence[str]) -> list[Article]:
        """Return the articles with these titles; what is none is counted and left out.

        Raises:
            CorpusError: nothing is left.
        """
        articles: dict[str, Article] = {}
        skipped: Counter[str] = Counter()
        for page in self._pages(titles, keep_problems=True):
            article = self._article(page)
            if isinstance(article, str) or article.id in articles:
                skipped[article if isinstance(article, str) else REPEATED] += 1
            else:
                articles[article.id] = article
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            report = f"{self._place.host}: skipped {skipped.total()} of {len(titles)} titles: {reasons}"
            if not articles:
                raise CorpusError(f"{report}; set other titles")
            _log.warning(report)
        return list(articles.values())

    def category(self, name: str, limit: int) -> tuple[str, ...]:
        """Return the titles of the first articles of a category, in the order of the wiki."""
        name = normal_title(name)
        named = name.partition(":")[0].lower() in self._site.no_prose
        query = {"list": "categorymembers", "cmtitle": name if named else f"Category:{name}", "cmprop": "ids|title"}
        query |= {"cmnamespace": "0", "cmtype": "page", "cmlimit": str(min(limit, MAX_LISTED))}
        return self._list(f"category {name!r}, {limit}", query, limit, similar=name)

    def random(self, count: int, seed: int) -> tuple[str, ...]:
        """Return random titles, the same ever after."""
        query = {"list": "random", "rnnamespace": "0", "rnlimit": str(min(count, MAX_LISTED))}
        return self._list(f"random {count}, seed {seed}", query, count)

    @functools.cached_property
    def _site(self) -> _Site:
        return self._kept(_Site, "the wiki itself", self._wiki.about)

    def _list(self, requested: str, query: Mapping[str, str], limit: int, similar: str = "") -> tuple[str, ...]:
        def fetch(requested: str) -> _List:
            titles = self._wiki.titles(query, limit)
            if not titles:
                hint = self._wiki.nearest(similar, "14") if similar else ""
                raise CorpusError(f"{self._place.host}: {requested}: no articles; {hint or 'name another'}")
            return _List(site=self._place.site, requested=requested, titles=titles)

        return self._kept(_List, requested, fetch).titles

    def _kept(self, shape: type[Kept], requested: str, fetch: Callable[[str], Kept]) -> Kept:
        kept = self._store.read(shape, requested)
        if kept is None:
            self._network.require_online(f"{self._place.host}: {requested}")
            with self._store.lock():
                kept = self._store.read(shape, requested)
                if kept is None:
                    kept = fetch(requested)
                    self._store.write(kept)
        return kept

    def _pages(self, titles: Sequence[str], *, keep_problems: bool) -> list[_Page]:
        """Return the page of each title. `keep_problems`: what is no article is not asked for again either."""
        found = self._look_up(titles, keep_problems)
        missing = [title for title in titles if title not in found]
        if missing:
            self._network.require_online(f"{self._place.host}: {missing[0][:200]!r}")
            licence = self._site.licence
        for batch in _batches(missing):
            with self._store.lock():
                found |= self._look_up(batch, keep_problems)
                for page in self._wiki.pages([title for title in batch if title not in found], licence):
                    found[page.requested] = page
                    if keep_problems or not page.problem:
                        self._store.write(page)
            _log.info("%s: %d of %d pages", self._place.host, len(found), len(titles))
        return [found[title] for title in titles]

    def _look_up(self, titles: Sequence[str], with_problems: bool) -> dict[str, _Page]:
        pages = {title: self._store.read(_Page, title) for title in titles}
        return {title: page for title, page in pages.items() if page and (with_problems or not page.problem)}

    def _article(self, page: _Page) -> Article | str:
        """Return the article, or why the page is none."""
        if page.problem:
            return page.problem
        text = clean_wikitext(page.wikitext, frozenset(self._site.no_prose))
        if not text:
            return EMPTY
        return Article(
            id=f"wikipedia:{self._place.label}:{page.page_id}",
            title=page.title,
            text=text,
            source=f"wikipedia:{self._place.label}",
            revision=str(page.revision),
            url=page.url,
            licence=page.licence,
        )


def _batches(titles: Sequence[str]) -> Iterator[list[str]]:
    """Divide titles by the limits of a request."""
    batch: list[str] = []
    size = 0
    for title in titles:
        more = 3 * len(title.encode()) + 3  # each byte may become %XX, the separator does
        if batch and (len(batch) == MAX_TITLES or size + more > MAX_TITLES_LEN):
            yield batch
            batch, size = [], 0
        batch.append(title)
        size += more
    if batch:
        yield batch


# What goes over the wire: of each reply, the part that is read


@dataclass(frozen=True, slots=True)
class _Slot:
    content: str = ""
    contentmodel: str = "wikitext"


@dataclass(frozen=True, slots=True)
class _Revision:
    revid: int
    timestamp: str = ""
    slots: dict[str, _Slot] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _PageReply:
    title: str
    pageid: int = 0
    ns: int = 0
    missing: bool = False
    invalid: bool = False
    fullurl: str = ""
    pageprops: dict[str, Any] = field(default_factory=dict)
    revisions: tuple[_Revision, ...] = ()

    def after(self, earlier: "_PageReply | None") -> "_PageReply":
        """Return the page with what an earlier part of the reply said of it."""
        if earlier is None:
            return self
        return replace(
            self,
            fullurl=self.fullurl or earlier.fullurl,
            pageprops=earlier.pageprops | self.pageprops,
            revisions=self.revisions or earlier.revisions,
        )

    @property
    def slot(self) -> _Slot:
        """The main text of the newest revision; empty where it is hidden."""
        return self.revisions[0].slots.get("main", _Slot()) if self.revisions else _Slot()

    @property
    def problem(self) -> str:
        """Why the page is no article, or empty."""
        problems = {
            INVALID: self.invalid,
            MISSING: self.missing,
            ELSEWHERE: self.ns != 0,
            SEVERAL: "disambiguation" in self.pageprops,
            NOT_WIKITEXT: self.slot.contentmodel != "wikitext",
            TOO_LARGE: len(self.slot.content) > MAX_WIKITEXT,
            EMPTY: not self.slot.content.strip(),
        }
        return next((problem for problem, holds in problems.items() if holds), "")


@dataclass(frozen=True, slots=True)
class _Move:
    to: str
    source: Annotated[str, Field(validation_alias="from")]


@dataclass(frozen=True, slots=True)
class _Listed:
    title: str
    ns: int


@dataclass(frozen=True, slots=True)
class _Namespace:
    name: str
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class _Rights:
    text: str = ""
    url: str = ""


@dataclass(frozen=True, slots=True)
class _Query:
    normalized: tuple[_Move, ...] = ()
    redirects: tuple[_Move, ...] = ()
    pages: tuple[_PageReply, ...] = ()
    categorymembers: tuple[_Listed, ...] = ()
    random: tuple[_Listed, ...] = ()
    search: tuple[_Listed, ...] = ()
    namespaces: dict[str, _Namespace] = field(default_factory=dict)
    rightsinfo: _Rights = _Rights()


@dataclass(frozen=True, slots=True)
class _Error:
    code: str
    info: str = ""


@dataclass(frozen=True, slots=True)
class _Reply:
    query: _Query = _Query()
    error: _Error | None = None
    further: Annotated[dict[str, str | int], Field(validation_alias="continue")] = field(default_factory=dict)


_REPLY = TypeAdapter(_Reply)


class _Wiki:
    """The Action API of one wiki: one request at a time, at a measured pace, repeated while that may help."""

    def __init__(self, place: _Place, requests_per_second: float, network: Network) -> None:
        self.place = place
        self._network = network
        self._interval = 1 / requests_per_second
        self._next = 0.0
        self._client: httpx2.Client | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()

    def about(self, requested: str) -> _Site:
        """Ask the wiki for its namespaces and its licence."""
        query = next(self._ask(SITE_QUERY))
        special = [query.namespaces[key] for key in ("-2", "6", "14") if key in query.namespaces]
        names = {name.lower() for namespace in special for name in (namespace.name, namespace.canonical) if name}
        rights = [one_line(part) for part in (query.rightsinfo.text, query.rightsinfo.url)]
        licence = f"{rights[0]} ({rights[1]})" if all(rights) else "".join(rights)
        if not licence and _HOST.fullmatch(self.place.host):
            licence = "CC BY-SA 4.0"
        no_prose = tuple(sorted(NO_PROSE_NAMESPACES | names))
        return _Site(site=self.place.site, requested=requested, no_prose=no_prose, licence=licence)

    def titles(self, query: Mapping[str, str], limit: int) -> tuple[str, ...]:
        """Return the titles of a list, at most `limit`."""
        titles: dict[str, None] = {}
        for reply in self._ask(query):
            before = len(titles)
            listed = (*reply.categorymembers, *reply.random)
            titles |= dict.fromkeys(normal_title(page.title) for page in listed if page.ns == 0)
            if len(titles) >= limit or (reply.random and len(titles) == before):  # random pages go on for ever
                break
        return tuple(titles)[:limit]

    def pages(self, titles: Sequence[str], licence: str) -> list[_Page]:
        """Return the page that each of at most MAX_TITLES titles leads to, behind redirects."""
        moves: dict[str, str] = {}
        found: dict[str, _PageReply] = {}
        asked = [title for title in titles if _is_title(title)]
        for reply in self._ask({**PAGE_QUERY, "titles": "|".join(asked)}) if asked else ():
            moves |= {move.source: move.to for move in (*reply.normalized, *reply.redirects)}
            found |= {page.title: page.after(found.get(page.title)) for page in reply.pages}
        pages = []
        for title in titles:
            final = _final(title, moves)
            page = found.get(final) or _PageReply(final, missing=True)
            problem = CIRCLE if final in moves else page.problem
            pages.append(self._page(title, page, problem if _is_title(title) else INVALID, licence))
        return pages

    def _page(self, requested: str, reply: _PageReply, problem: str, licence: str) -> _Page:
        wikitext = reply.slot.content.replace("\0", "") if problem != TOO_LARGE else ""
        revision = reply.revisions[0] if reply.revisions else _Revision(0)
        return _Page(
            site=self.place.site,
            requested=requested,
            title=_CONTROL.sub("\ufffd", " ".join(reply.title.split())),
            page_id=reply.pageid,
            revision=revision.revid,
            timestamp=revision.timestamp,
            url=one_line(reply.fullurl, 2000) if reply.fullurl.startswith(("http://", "https://")) else "",
            licence=licence,
            wikitext=wikitext,
            sha256=_digest(wikitext),
            problem=problem,
        )

    def nearest(self, text: str, namespace: str = "0") -> str:
        """Return a hint of similar titles; empty where the wiki has none, or is not in the mood."""
        query = {"list": "search", "srsearch": text[:200], "srnamespace": namespace, "srlimit": str(NUM_HINTS)}
        try:
            found = self._attempt({**BASE_QUERY, **query}).query.search
        except (Transient, RemoteError):
            return ""
        return f"nearest: {_quoted([page.title for page in found])}" if found else ""

    def _ask(self, parameters: Mapping[str, str]) -> Iterator[_Query]:
        """Yield the parts of a reply until it is complete.

        Raises:
            RemoteError: it never is, or the wiki cannot be used.
        """
        further: dict[str, str | int] = {}
        for _ in range(MAX_REPLIES):
            attempt = functools.partial(self._attempt, {**BASE_QUERY, **parameters, **further})
            reply = self._network.retry(self.place.host, attempt)
            yield reply.query
            if not reply.further:
                return
            if reply.further == further:
                break
            further = reply.further
        raise RemoteError(f"{self.place.host}: its reply has no end; corpus.site may be no MediaWiki")

    def _attempt(self, parameters: Mapping[str, str | int]) -> _Reply:
        """Send one request. Raises Transient where another may succeed, RemoteError or CredentialsError otherwise."""
        pause = self._next - time.monotonic()
        if pause > 0:
            self._network.sleep(pause)
        self._next = time.monotonic() + self._interval
        if self._client is None:
            self._client = self._network.client(self.place.site, trusted=self.place.trusted)
        try:
            response = self._client.get(self.place.site, params=parameters)
        except httpx2.TransportError as error:
            raise Transient(one_line(str(error)) or type(error).__name__) from error
        except httpx2.TooManyRedirects as error:
            raise RemoteError(f"{self.place.host}: redirects in a circle; correct corpus.site") from error
        wait = retry_after(response.headers)
        self._check_status(response.status_code, wait)
        reply = _read_reply(response.text, self.place.host)
        if reply.error is None:
            return reply
        said = f"{one_line(reply.error.code, 50)}: {one_line(reply.error.info)}"
        if PASSING_ERRORS.fullmatch(reply.error.code):
            raise Transient(said, wait)
        raise RemoteError(f"{self.place.host}: refused the request: {said}")

    def _check_status(self, status: int, wait: float | None) -> None:
        host = self.place.host
        if status == 401:
            raise CredentialsError(f"{host}: wants a password (HTTP 401); wikis that want one are not supported")
        if status == 403:
            raise RemoteError(
                f"{host}: refused (HTTP 403); wikis ask who is calling, in the User-Agent: set network.contact to a "
                "mail address or page of yours"
            )
        if status in (408, 429) or status >= 500:
            raise Transient(f"HTTP {status}", wait)
        if status != 200:
            raise RemoteError(f"{host}: HTTP {status}; is {self.place.site} the address of its api.php?")


def _read_reply(text: str, host: str) -> _Reply:
    """Raise Transient if it is no JSON, as when a proxy answers; RemoteError if it is that of another service."""
    try:
        return _REPLY.validate_json(text)
    except ValidationError as error:
        if error.errors(include_url=False, include_context=False, include_input=False)[0]["type"] == "json_invalid":
            raise Transient(f"not an API reply: {one_line(text, 80)!r}") from None
        raise RemoteError(f"{host}: not a reply of MediaWiki: {one_line(text, 80)!r}; correct corpus.site") from None


def _is_title(title: str) -> bool:
    return 0 < len(title.encode()) < 256 and not _NO_TITLE.search(title)


def _final(title: str, moves: Mapping[str, str]) -> str:
    """Follow redirects; the result is still among the moves where they run in a circle."""
    seen: set[str] = set()
    while title in moves and title not in seen:
        seen.add(title)
        title = moves[title]
    return title
