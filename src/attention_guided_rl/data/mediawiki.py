"""MediaWiki: one wiki asked through its Action API. Everything that goes over the wire stands here.

In: titles, or the query of a list. Out: the pages behind redirects, each with its newest revision or why it is no
article. Requests go out one at a time, at a measured pace, with `maxlag`, and are repeated while that may help.
"""

import contextlib
import functools
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx2

from attention_guided_rl.data.article_cache import CACHE_FOLDER, CachedPage, CachedSite, digest
from attention_guided_rl.data.mediawiki_reply import (
    CIRCLE,
    INVALID,
    TOO_LARGE,
    PageReply,
    Query,
    Reply,
    Revision,
    read_reply,
)
from attention_guided_rl.data.plain_text import printable
from attention_guided_rl.data.wikitext import NO_PROSE_NAMESPACES
from attention_guided_rl.errors import CredentialsError, RemoteError, StorageError
from attention_guided_rl.network import Network, Transient, retry_after

MAX_TITLES = 50  # of a request; the API refuses more
MAX_TITLES_LEN = 4000  # characters of a request's titles, as they are sent; servers refuse long addresses
MAX_LISTED = 500  # titles of a list in one reply
MAX_REPLIES = 200  # to one question; a server that goes on longer goes on for ever
NUM_HINTS = 5

BASE_QUERY = {"action": "query", "format": "json", "formatversion": "2", "maxlag": "5"}
SITE_QUERY = {"meta": "siteinfo", "siprop": "general|namespaces|rightsinfo"}
CATEGORY_QUERY = {"list": "categorymembers", "cmprop": "ids|title", "cmnamespace": "0", "cmtype": "page"}
RANDOM_QUERY = {"generator": "random", "grnnamespace": "0", "prop": "pageprops", "ppprop": "disambiguation"}
PAGE_QUERY = {
    "prop": "revisions|info|pageprops",
    "rvprop": "ids|timestamp|content",
    "rvslots": "main",
    "ppprop": "disambiguation",
    "inprop": "url",
    "redirects": "1",
}
PASSING_ERRORS = re.compile(r"maxlag|ratelimited|readonly|internal_api_error_.*", re.DOTALL)
WIKIPEDIA_HOST = re.compile(r"([a-z]{2,}(?:-[a-z]+)*)(?:\.m)?\.wikipedia\.org")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_TITLE = re.compile(r"[\x00-\x1f\x7f<>\[\]{}|\ufffd]")


@dataclass(frozen=True, slots=True)
class WikiAddress:
    """A wiki: the address of its api.php, its host, and its name in the articles' ids."""

    site: str
    host: str
    label: str
    trusted: bool
    """Whether the user named the address, so that it may be private."""


def normal_title(title: str) -> str:
    """Return a title without section, underscores as spaces, composed as MediaWiki stores it."""
    title = " ".join(title.partition("#")[0].replace("_", " ").split())
    return re.sub(r"[\ud800-\udfff]", "\ufffd", unicodedata.normalize("NFC", title))  # what cannot be sent


def quoted(titles: Sequence[str]) -> str:
    """Return the first titles for a message."""
    return ", ".join(repr(title[:100]) for title in titles[:NUM_HINTS])


def batches(titles: Sequence[str]) -> Iterator[list[str]]:
    """Yield the titles in parts that fit into a request."""
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


class MediaWiki:
    """The Action API of one wiki: one request at a time, at a measured pace, repeated while that may help."""

    def __init__(self, address: WikiAddress, requests_per_second: float, network: Network) -> None:
        self.address = address
        self._network = network
        self._interval = 1 / requests_per_second
        self._asked = network.cache(CACHE_FOLDER) / ".asked"
        self._client: httpx2.Client | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()

    def about(self, requested: str) -> CachedSite:
        """Ask the wiki for its namespaces and its licence."""
        query = next(self._ask(SITE_QUERY))
        special = [query.namespaces[key] for key in ("-2", "6", "14") if key in query.namespaces]
        names = {name.lower() for namespace in special for name in (namespace.name, namespace.canonical) if name}
        rights = [printable(part) for part in (query.rightsinfo.text, query.rightsinfo.url)]
        licence = f"{rights[0]} ({rights[1]})" if all(rights) else "".join(rights)
        if not licence and WIKIPEDIA_HOST.fullmatch(self.address.host):
            licence = "CC BY-SA 4.0"
        no_prose = tuple(sorted(NO_PROSE_NAMESPACES | names))
        return CachedSite(site=self.address.site, requested=requested, no_prose=no_prose, licence=licence)

    def category(self, category: str, limit: int) -> tuple[str, ...]:
        """Return the titles of the first articles of a category, in the order of the wiki."""
        titles: dict[str, None] = {}
        for reply in self._ask({**CATEGORY_QUERY, "cmtitle": category, "cmlimit": str(min(limit, MAX_LISTED))}):
            titles |= dict.fromkeys(normal_title(page.title) for page in reply.categorymembers if page.ns == 0)
            if len(titles) >= limit:
                break
        return tuple(titles)[:limit]

    def random(self, count: int) -> tuple[str, ...]:
        """Return titles drawn at random, fewer than `count` if the wiki has no more.

        No disambiguation pages, where the wiki marks them as such.
        """
        drawn: dict[str, PageReply] = {}
        titles: list[str] = []
        for reply in self._ask({**RANDOM_QUERY, "grnlimit": str(min(count, MAX_LISTED))}):
            before = len(drawn)
            drawn |= {page.title: page.after(drawn.get(page.title)) for page in reply.pages if page.ns == 0}
            titles = [normal_title(page.title) for page in drawn.values() if not page.is_disambiguation]
            if len(titles) >= count or len(drawn) == before:  # the wiki draws for ever
                break
        return tuple(sorted(titles, key=digest)[:count])  # they come by number: cut off at random, not the youngest

    def pages(self, titles: Sequence[str], licence: str) -> list[CachedPage]:
        """Return the page that each of at most MAX_TITLES titles leads to, behind redirects."""
        moves: dict[str, str] = {}
        found: dict[str, PageReply] = {}
        asked = [title for title in titles if _is_title(title)]
        for reply in self._ask({**PAGE_QUERY, "titles": "|".join(asked)}) if asked else ():
            moves |= {move.source: move.to for move in (*reply.normalized, *reply.redirects)}
            found |= {page.title: page.after(found.get(page.title)) for page in reply.pages}
        pages = []
        for title in titles:
            final = _final(title, moves)
            page = found.get(final) or PageReply(final, missing=True)
            problem = CIRCLE if final in moves else page.problem
            pages.append(self._page(title, page, problem if _is_title(title) else INVALID, licence))
        return pages

    def revision(self, requested: str, page_id: int, revision: int, licence: str) -> CachedPage | None:
        """Return a page that is an article in one revision, or None where the wiki does not show it any more."""
        query = {**{name: value for name, value in PAGE_QUERY.items() if name != "redirects"}, "revids": str(revision)}
        found: dict[str, PageReply] = {}
        for reply in self._ask(query):
            found |= {page.title: page.after(found.get(page.title)) for page in reply.pages}
        for page in found.values():
            if not page.problem and (page.pageid, page.revisions[0].revid) == (page_id, revision):
                return self._page(requested, page, "", licence)
        return None

    def _page(self, requested: str, reply: PageReply, problem: str, licence: str) -> CachedPage:
        wikitext = reply.slot.content.replace("\0", "") if problem != TOO_LARGE else ""
        revision = reply.revisions[0] if reply.revisions else Revision(0)
        return CachedPage(
            site=self.address.site,
            requested=requested,
            title=_CONTROL.sub("\ufffd", " ".join(reply.title.split())),
            page_id=reply.pageid,
            revision=revision.revid,
            timestamp=revision.timestamp,
            url=printable(reply.fullurl, 2000) if reply.fullurl.startswith(("http://", "https://")) else "",
            licence=licence,
            wikitext=wikitext,
            sha256=digest(wikitext),
            problem=problem,
        )

    def nearest(self, text: str, namespace: str = "0") -> str:
        """Return a hint of similar titles; empty where the wiki has none, or is not in the mood."""
        query = {"list": "search", "srsearch": text[:200], "srnamespace": namespace, "srlimit": str(NUM_HINTS)}
        try:
            found = self._attempt({**BASE_QUERY, **query}).query.search
        except (Transient, RemoteError):
            return ""
        return f"nearest: {quoted([page.title for page in found])}" if found else ""

    def _ask(self, parameters: Mapping[str, str]) -> Iterator[Query]:
        """Yield the parts of a reply until it is complete.

        Raises:
            RemoteError: it never is, or the wiki cannot be used.
        """
        further: dict[str, str | int] = {}
        for _ in range(MAX_REPLIES):
            attempt = functools.partial(self._attempt, {**BASE_QUERY, **parameters, **further})
            reply = self._network.retry(self.address.host, attempt)
            yield reply.query
            if not reply.further:
                return
            if reply.further == further:
                break
            further = reply.further
        raise RemoteError(f"{self.address.host}: its reply has no end; corpus.site may be no MediaWiki")

    def _attempt(self, parameters: Mapping[str, str | int]) -> Reply:
        """Send one request. Raises Transient where another may succeed, RemoteError or CredentialsError otherwise."""
        self._keep_pace()
        if self._client is None:
            self._client = self._network.client(self.address.site, trusted=self.address.trusted)
        try:
            response = self._client.get(self.address.site, params=parameters)
        except httpx2.TransportError as error:
            raise Transient(printable(str(error)) or type(error).__name__) from error
        except httpx2.InvalidURL as error:
            raise RemoteError(
                f"{self.address.host}: its reply asks to go on in a way that no address can hold"
            ) from error
        except httpx2.TooManyRedirects as error:
            raise RemoteError(f"{self.address.host}: redirects in a circle; correct corpus.site") from error
        wait = retry_after(response.headers)
        self._check_status(response.status_code, wait)
        reply = read_reply(response.text, self.address.host)
        if reply.error is None:
            return reply
        said = f"{printable(reply.error.code, 50)}: {printable(reply.error.info)}"
        if PASSING_ERRORS.fullmatch(reply.error.code):
            raise Transient(said, wait)
        raise RemoteError(f"{self.address.host}: refused the request: {said}")

    def _keep_pace(self) -> None:
        """Wait for the interval after the last request of any corpus and process, which the time of a file tells."""
        try:
            with contextlib.suppress(FileNotFoundError):
                pause = self._asked.stat().st_mtime + self._interval - time.time()
                if 0 < pause <= self._interval:  # not for ever if the clock was set back
                    self._network.sleep(pause)
            self._asked.touch()
            os.utime(self._asked, (now := time.time(), now))  # the file system's own time lags by milliseconds
        except OSError as error:
            raise StorageError(f"{self._asked}: cannot write: {error.strerror or error}") from error

    def _check_status(self, status: int, wait: float | None) -> None:
        host = self.address.host
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
            raise RemoteError(f"{host}: HTTP {status}; is {self.address.site} the address of its api.php?")


def _is_title(title: str) -> bool:
    return 0 < len(title.encode()) < 256 and not _NO_TITLE.search(title)


def _final(title: str, moves: Mapping[str, str]) -> str:
    """Follow redirects; the result is still among the moves where they run in a circle."""
    seen: set[str] = set()
    while title in moves and title not in seen:
        seen.add(title)
        title = moves[title]
    return title
